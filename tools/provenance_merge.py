"""Checks a merged dataset against the tokens of step 1: counts, each chunk, and what was gathered or packed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tokenization.gather import checksum_of_gathered
from tokenization.merge_chunks import LostSources
from tokenization.merge_packed import Counts, Packing, stream_packed
from tokenization.merge_plan import Part
from tokenization.missing_chunks import chunk_of, recorded_chunks
from tools.provenance import AGREES, CHANGED, UNKNOWN, Node
from utils.chunks import Chunk
from utils.manifest import MANIFEST_NAME, read_manifest

COUNTS = ("documents", "tokens", "text_bytes")


def check_merge(node: Node, manifest: dict[str, Any], tokens_dir: Path, tokens: dict[str, Any]) -> None:
    """A dataset against the tokens that it was merged from: settings, counts, and each chunk."""
    split = manifest.get("split")
    sound = True
    if not manifest["inputs"]:
        node.add(UNKNOWN, "inputs: a folder was merged by itself, and only the tokens' own manifest names input files")
    for key in ("settings", "tokenizer", *["inputs"] * bool(manifest["inputs"])):
        sound &= node.expect(key, manifest.get(key), tokens.get(key), f"{tokens_dir.name}/{MANIFEST_NAME}")
    sound &= node.expect("tokenized_by", manifest.get("tokenized_by"), tokens.get("made_by"), "the tokens' made_by")
    expected = {key: tokens["content"].get(split, {}).get(key) for key in COUNTS}
    found = {key: manifest["content"].get(key) for key in COUNTS}
    sound &= node.expect("content", found, expected, "the tokens' manifest")
    there: dict[str, Chunk] = {}
    paths: dict[str, Path] = {}
    for path in sorted((tokens_dir / str(split)).glob(f"*/{MANIFEST_NAME}")):
        folder = node.collect(read_manifest, path.parent, "tokens")
        for entry in folder["files"] if folder else ():
            there[entry["name"]] = chunk_of(entry)
            paths.setdefault(entry["name"], path.parent / entry["name"])
    here = {Path(name).name: dataclasses.replace(chunk, name=Path(name).name)
            for name, chunk in recorded_chunks(manifest).items()}  # fmt: skip
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            sound = False
            where = "the dataset alone" if name not in there else "the tokens alone" if name not in here else None
            node.add(CHANGED, f"{name}: " + (f"is in {where}" if where else "another chunk than the tokens have"))
    sound &= _check_gathered(node, manifest, paths)
    if "packing" in manifest:
        sound &= _check_packed(node, manifest, paths)
    if sound:
        node.add(AGREES, f"settings, counts and all {len(here):,} chunks are those of the tokens")


def _check_gathered(node: Node, manifest: dict[str, Any], paths: dict[str, Path]) -> bool:
    """Gather small chunks again, without writing, and compare checksums; those that were moved away are passed over."""
    sound = True
    for entry in manifest["files"]:
        sources = tuple((paths.get(part["name"]), chunk_of(part)) for part in entry.get("gathered", ()))
        if not sources or not all(path is not None and path.is_file() for path, _ in sources):
            continue
        try:
            same = (
                checksum_of_gathered(Part(chunk_of(entry), sources), manifest["content"]["dtype"]) == entry["xxh3_128"]
            )
        except (OSError, ValueError):  # a damaged source, which is named among the tokens
            continue
        if not same:
            node.add(CHANGED, f"{entry['name']}: not what the tokens' chunks give when they are gathered")
        sound &= same
    return sound


def _check_packed(node: Node, manifest: dict[str, Any], paths: dict[str, Path]) -> bool:
    """Pack the tokens' chunks again, without writing, and compare checksums."""
    sources = [(paths.get(entry["name"]), chunk_of(entry)) for entry in manifest["packed_from"]]
    if not all(path is not None and path.is_file() for path, _ in sources):
        node.add(UNKNOWN, "which documents its blocks hold: packing them again takes the tokens' chunks, which moved")
        return True
    parts = [Part(chunk, ((path, chunk),)) for path, chunk in sources]
    recorded = {entry["name"]: chunk_of(entry) for entry in manifest["files"]}
    packing, dtype = Packing.of_manifest(manifest), manifest["content"]["dtype"]
    try:
        made = {c.name: c for c in stream_packed(parts, dtype, packing, Counts(), lambda name, content, chunk: chunk)}
    except LostSources:  # a damaged source, which is named among the tokens
        return True
    wrong = sorted(name for name in made.keys() | recorded.keys() if made.get(name) != recorded.get(name))
    for name in wrong:
        node.add(CHANGED, f"{name}: not what the tokens' chunks give when they are packed")
    if not wrong:
        node.add(AGREES, f"packed again from the tokens: all {len(made):,} chunks, checksums")
    return not wrong
