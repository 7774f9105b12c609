"""Checks what steps 1 and 2 publish, tokens and merged datasets, each by itself."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

from tokenization.chunk_reader import counted_in, verify
from tokenization.input_names import compression_of, is_jsonl
from tokenization.job import SPLITS, UnitRecord, fingerprint_of_identity
from tokenization.merge_plan import fingerprint_of
from tokenization.missing_chunks import MADE_FROM, MOVED_NAME, PLAN_NAME, chunk_of, moved_to, recorded_chunks
from tokenization.output import PROGRESS_NAME, QUARANTINE_NAME
from tools.provenance import AGREES, CHANGED, MISSING, UNKNOWN, Node, cached_checksum, in_threads
from utils import console
from utils.chunks import INDEX_NAME, Chunk, read_index
from utils.manifest import MANIFEST_NAME, read_manifest

COUNTS = ("documents", "tokens", "text_bytes", "chunks")


# --- chunks -----------------------------------------------------------------------------------------------------------


def _check_chunk(directory: Path, dtype: str, chunk: Chunk) -> tuple[str, str] | None:
    path = directory / chunk.name
    try:
        verify(path, chunk, dtype, "offsets")
        if chunk.xxh3_128 is not None and cached_checksum(path) != chunk.xxh3_128:
            return CHANGED, f"{chunk.name}: its content is not the one whose checksum the manifest has"
    except FileNotFoundError:
        return MISSING, f"{chunk.name}: {INDEX_NAME} lists it"
    except (OSError, ValueError) as error:
        return CHANGED, str(error).replace(f"{path}: ", f"{chunk.name}: ")
    return None


def check_chunks(node: Node, directory: Path, manifest: dict[str, Any], moved: dict[str, Any] | None = None) -> None:
    """Compare index, manifest and chunk files of one directory, every byte.

    Args:
        moved: checksums by name of chunks of the dataset, which may have been moved out of here into it.
    """
    index = node.collect(read_index, directory, directory.name)
    if index is None:
        return
    for key, value in counted_in(index, manifest).items():
        node.expect(f"{INDEX_NAME}: {key}", value, manifest["content"].get(key), MANIFEST_NAME)
    listed = {entry["name"]: entry for entry in manifest["files"]}
    indexed = {chunk.name: chunk for chunk in index.chunks}
    for name in sorted(listed.keys() ^ indexed.keys()):
        node.add(CHANGED, f"{name}: listed in {MANIFEST_NAME if name in listed else INDEX_NAME} alone")
    if listed.keys() == indexed.keys() and list(listed) != list(indexed):
        node.add(CHANGED, f"{INDEX_NAME}: another order of the chunks than in {MANIFEST_NAME}")
    chunks = []
    for name in listed.keys() & indexed.keys():
        counts = {key: listed[name].get(key) for key in ("documents", "tokens", "bytes")}
        recorded = Chunk(name, **counts, xxh3_128=listed[name].get("xxh3_128"))
        node.expect(f"{INDEX_NAME}: {name}", _counts(indexed[name]), counts, MANIFEST_NAME)
        chunks.append(recorded)
    gone = [chunk for chunk in chunks if moved and not (directory / chunk.name).exists()]
    gone = [chunk for chunk in gone if moved.get(chunk.name) == chunk.xxh3_128]
    if gone:
        node.add(AGREES, f"{console.counted(len(gone), 'chunk')}: moved into the dataset")
    gone_names = {chunk.name for chunk in gone}
    here = [chunk for chunk in sorted(chunks, key=lambda chunk: chunk.name) if chunk.name not in gone_names]
    wrong = [line for line in in_threads(functools.partial(_check_chunk, directory, index.dtype), here) if line]
    node.lines.extend(wrong)
    without = sum(chunk.xxh3_128 is None for chunk in here)
    if without:
        node.add(UNKNOWN, f"content of {console.counted(without, 'chunk')}: the manifest has no checksum of them")
    if here and not wrong:
        size = console.human_bytes(sum(chunk.bytes for chunk in here))
        node.add(AGREES, f"{console.counted(len(here), 'chunk')}, {size}: index, document offsets, checksums")


def _counts(chunk: Chunk) -> dict[str, int]:
    return {"documents": chunk.documents, "tokens": chunk.tokens, "bytes": chunk.bytes}


# --- tokens -----------------------------------------------------------------------------------------------------------


def check_tokens(node: Node, directory: Path, manifest: dict[str, Any], moved: dict[str, dict[str, Any]]) -> None:
    """OUT of optimize_dataset.py: its own parts against each other, down to every byte of the chunks.

    Args:
        moved: by split, the checksums by name of the chunks of datasets that were merged from here.
    """
    fingerprint = fingerprint_of_identity(manifest["settings"], manifest["tokenizer"], manifest["inputs"])
    if node.expect(
        "fingerprint of settings, tokenizer and inputs", fingerprint, manifest.get("fingerprint"), MANIFEST_NAME
    ):
        node.add(AGREES, "settings, tokenizer and inputs: their fingerprint")
    _check_plan(node, directory, manifest)
    for split in SPLITS:
        _check_split(node, directory, split, manifest, moved.get(split))
    _check_progress(node, directory, manifest)


def _check_plan(node: Node, directory: Path, manifest: dict[str, Any]) -> None:
    path = directory / PLAN_NAME
    if not path.is_file():
        node.add(UNKNOWN, f"{PLAN_NAME}: not here; it repeats the manifest")
        return
    try:
        plan = json.loads(path.read_bytes())
        plan.pop(MADE_FROM, None)  # where the command read, which shapes nothing
    except (ValueError, AttributeError) as error:
        node.add(CHANGED, f"{PLAN_NAME}: not readable ({error})")
        return
    if node.expect(PLAN_NAME, plan, {key: manifest[key] for key in ("settings", "tokenizer", "inputs")}, MANIFEST_NAME):
        node.add(AGREES, f"{PLAN_NAME}: it says what the manifest says")


def _check_split(node: Node, directory: Path, split: str, above: dict[str, Any], moved: dict | None) -> None:
    path = directory / split
    manifest = node.collect(read_manifest, path)
    if manifest is None:
        node.add(MISSING, f"{split}/{MANIFEST_NAME}")
        return
    if manifest["kind"] != "tokens":
        node.add(UNKNOWN, f"{split}/{MANIFEST_NAME}: replaced by the one of the dataset, which was merged in place")
        folders = sorted(folder.name for folder in path.iterdir() if (folder / MANIFEST_NAME).is_file())
    else:
        for key in ("settings", "tokenizer", "inputs", "fingerprint"):
            node.expect(f"{split}/{MANIFEST_NAME}: {key}", manifest.get(key), above.get(key), MANIFEST_NAME)
        folders = manifest.get("folders", [])
    moved = _moved(path, moved)
    content = above["content"].get(split, {})
    node.expect(f"{split}/{MANIFEST_NAME}: content", manifest["content"], content, MANIFEST_NAME)
    parts = []
    for folder in folders:
        part = node.collect(read_manifest, path / folder, "tokens")
        if part is None:
            node.add(MISSING, f"{split}/{folder}/{MANIFEST_NAME}")
            continue
        parts.append(part["content"])
        for key in ("settings", "tokenizer", "fingerprint"):
            node.expect(f"{split}/{folder}/{MANIFEST_NAME}: {key}", part.get(key), above.get(key), MANIFEST_NAME)
        below = Node(f"{split}/{folder}")
        check_chunks(below, path / folder, part, moved)
        node.lines += [(status, f"{split}/{folder}: {text}") for status, text in below.lines]
    sums = {key: sum(part[key] for part in parts) for key in COUNTS}
    if len(parts) == len(folders):
        expected = {key: content.get(key) for key in COUNTS}
        if node.expect(f"{split}: sum over its folders", sums, expected, MANIFEST_NAME):
            node.add(AGREES, f"{split}: {sums['documents']:,} documents, {sums['tokens']:,} tokens in all its folders")


def _moved(split_dir: Path, of_dataset: dict[str, Any] | None) -> dict[str, Any] | None:
    """Checksums by name of the chunks that merge_files.py --mode=move may have taken; None: it took none."""
    target = moved_to(split_dir)
    if target is not None and (manifest := read_manifest(target)) is not None:
        return {name: chunk.xxh3_128 for name, chunk in recorded_chunks(manifest).items()}
    # Earlier versions left no note of it, but they took all.
    is_noted, is_empty = (split_dir / MOVED_NAME).is_file(), not any(split_dir.glob("*/*.bin"))
    return of_dataset if is_noted or is_empty else None


def _check_progress(node: Node, directory: Path, manifest: dict[str, Any]) -> None:
    """The units' records against the manifest: what they count, and whether all rows are accounted for."""
    path = directory / PROGRESS_NAME
    if not path.is_file():
        node.add(UNKNOWN, f"{PROGRESS_NAME}: not here; rows are counted by the manifest alone")
        return
    records = {}
    for line in path.read_bytes().splitlines():
        try:
            record = UnitRecord.from_json(json.loads(line))
        except (ValueError, KeyError, TypeError):
            node.add(CHANGED, f"{PROGRESS_NAME}: a line is not the record of a unit")
            continue
        records[record.unit] = record
    content = manifest["content"]
    sound = True
    for split in SPLITS:
        parts = [getattr(record, split) for record in records.values()]
        sums = {key: sum(getattr(part, key) for part in parts) for key in ("documents", "tokens", "text_bytes")}
        sums["chunks"] = sum(len(part.chunks) for part in parts)
        expected = {key: content.get(split, {}).get(key) for key in COUNTS}
        sound &= node.expect(f"{PROGRESS_NAME}: {split}", sums, expected, MANIFEST_NAME)
    skipped = content["skipped_null"] + content["skipped_empty"]
    quarantined = sum(entry["rows"] or 1 for record in records.values() for entry in record.quarantined)
    found = sum(content[split]["documents"] for split in SPLITS) + skipped + quarantined
    limit = manifest["settings"].get("limit_documents")
    if any("rows" not in entry for entry in manifest["inputs"]):  # JSON lines: their bytes are counted instead
        if limit is None:
            plain = [e["bytes"] for e in manifest["inputs"] if is_jsonl(e["path"]) and not compression_of(e["path"])]
            line_bytes = sum(record.line_bytes for record in records.values())
            sound &= node.expect("bytes of JSON lines that were read", line_bytes, sum(plain), "its list of inputs")
    elif not quarantined or limit is None:  # others take the place of quarantined rows, as far as there are some
        planned = sum(entry["rows"] for entry in manifest["inputs"])
        planned = planned if limit is None else min(limit, planned)
        sound &= node.expect("rows that became documents or were skipped", found, planned, "its list of inputs")
    if sound:
        node.add(AGREES, f"{PROGRESS_NAME}: {len(records):,} units, {found:,} rows, all accounted for")
    if quarantined and not (directory / QUARANTINE_NAME).is_file():
        node.add(MISSING, f"{QUARANTINE_NAME}: the records name {quarantined:,} rows that were left out")


# --- datasets ---------------------------------------------------------------------------------------------------------


def check_dataset(node: Node, directory: Path, manifest: dict[str, Any] | None) -> None:
    """A merged dataset: its own parts against each other."""
    index = node.collect(read_index, directory, "dataset")
    if manifest is None:
        node.add(UNKNOWN, f"no {MANIFEST_NAME}: neither checksums nor where it came from")
        return
    check_chunks(node, directory, manifest)
    listed = [chunk_of(entry) for entry in manifest["files"]]
    for entry in manifest["files"]:
        parts = entry.get("gathered", [entry])
        for key in ("documents", "tokens"):
            found = sum(part[key] for part in parts)
            node.expect(f"{entry['name']}: {key} of the chunks gathered in it", found, entry[key], MANIFEST_NAME)
    if node.expect("fingerprint of its chunks", fingerprint_of(listed), manifest.get("fingerprint"), MANIFEST_NAME):
        node.add(AGREES, f"fingerprint of its chunks: {manifest['fingerprint'][:12]}...")
    if index is not None:
        stamp = json.loads((directory / INDEX_NAME).read_bytes()).get("updated_at")
        node.expect(f"{INDEX_NAME}: updated_at", stamp, str(int(manifest["fingerprint"][:12], 16)), MANIFEST_NAME)
    known = {entry["name"] for entry in manifest["files"]} | {INDEX_NAME, MANIFEST_NAME}
    if any(os.sep in name for name in known):  # merged in place: its files lie in the tokens' folders
        return
    for name in sorted(path.name for path in directory.iterdir() if path.name not in known):
        node.add(UNKNOWN, f"{name}: the manifest does not list it, so nothing says what it should be")
