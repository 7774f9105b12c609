"""Checks what step 1 reads, files of text and a tokenizer, against what was recorded of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tokenization.input_names import describe_inputs, is_parquet
from tools.provenance import AGREES, CHANGED, MISSING, UNKNOWN, Node, check_files
from tools.source_rows import Source
from utils.manifest import MANIFEST_NAME, read_manifest
from utils.tokenizer import read_tokenizer_info


def check_inputs(node: Node, input_dir: str, manifest: dict[str, Any]) -> Source | None:
    """The input files against the inputs of a tokens' or dataset's manifest: size, rows, fingerprint; and by their own
    manifest, where they have one."""
    source = node.collect(Source, input_dir, manifest)
    if source is None:
        return None
    for path in source.missing:
        node.add(MISSING, f"{path}: it was tokenized")
    for line in source.changed:
        node.add(CHANGED, line)
    for path in source.unlisted:
        node.add(UNKNOWN, f"{path}: not among the files that were tokenized")
    if source.is_whole:
        inputs = manifest["inputs"]
        last = "footer" if all(is_parquet(entry["path"]) for entry in inputs) else "fingerprint"
        of_all = f"size, rows and {last}" if all("rows" in entry for entry in inputs) else f"size and {last}"
        node.add(AGREES, f"{describe_inputs(inputs)}: {of_all}")
    own = node.collect(read_manifest, input_dir) if "://" not in input_dir else None
    if own is not None:
        check_files(node, Path(input_dir), own["files"], source.unlisted)
        recorded = {entry["path"] for entry in manifest["inputs"]}
        if recorded != {entry["name"] for entry in own["files"]}:
            node.add(CHANGED, "the files of its own manifest are not those that were tokenized")
    else:
        node.add(UNKNOWN, "text of the files: no checksum was recorded of it; --deep reads some of it again")
    return source


def check_tokenizer(node: Node, directory: Path, recorded: dict[str, Any], source: Path | None) -> None:
    """A tokenizer's directory against what a manifest recorded of it.

    Args:
        source: the corpus that it may have been trained on.
    """
    info = node.collect(read_tokenizer_info, directory)
    if info is not None and node.expect("tokenizer", info.record(), recorded, "what was made with it"):
        node.add(AGREES, f"tokenizer.json: SHA-256 {info.sha256[:12]}..., {info.vocab_size:,} entries")
    manifest = node.collect(read_manifest, directory)
    if manifest is None or manifest["kind"] != "tokenizer":
        return
    check_files(node, directory, manifest["files"])
    corpus = node.collect(read_manifest, source) if source is not None else None
    if corpus is not None and "corpus" in manifest["settings"]:  # as make_demo_corpus.py has it
        found = hashlib.sha256(json.dumps(corpus["files"], sort_keys=True).encode()).hexdigest()
        if node.expect("corpus that it was trained on", found, manifest["settings"]["corpus"], MANIFEST_NAME):
            node.add(AGREES, "trained on the corpus that is here")
