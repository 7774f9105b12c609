"""The folders that step 1 leaves, made in an instant: for the tests of what reads them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tokenization.chunk_index import make_index
from tokenization.chunk_writer import chunk_header
from utils.chunks import Chunk
from utils.files import checksum
from utils.manifest import read_manifest, write_manifest


def make_folder(
    folder: Path,
    chunks: dict[str, list[int]],
    dtype: str = "uint16",
    seed: int = 0,
    chunk_tokens: int = 10,
    **manifest,
) -> None:
    """A folder as optimize_dataset.py leaves it: chunk name -> tokens of each document.

    Args:
        chunk_tokens: at which chunks are cut, as the index says; chunks of less than half of it are small.
    """
    folder.mkdir(parents=True)
    entries, files = [], []
    for name, lengths in chunks.items():
        tokens = np.random.default_rng([seed, len(files)]).integers(0, 1000, sum(lengths)).astype(dtype)
        (folder / name).write_bytes(chunk_header(np.array(lengths), dtype).tobytes() + tokens.tobytes())
        size = (folder / name).stat().st_size
        entries.append(Chunk(name, len(lengths), sum(lengths), size))
        counts = {"documents": len(lengths), "tokens": sum(lengths), "bytes": size}
        files.append({"name": name, **counts, "xxh3_128": checksum(folder / name)})
    (folder / "index.json").write_text(json.dumps(make_index(entries, dtype, chunk_tokens, "abcdefabcdef")))
    content = {
        "documents": sum(entry.documents for entry in entries),
        "tokens": sum(entry.tokens for entry in entries),
        "text_bytes": 4 * sum(entry.tokens for entry in entries),
        "chunks": len(entries),
        "dtype": dtype,
    }
    tokenizer = {"sha256": "t" * 64, "vocab_size": 1000, "bos_id": 0, "eos_id": 1}
    common = {
        "kind": "tokens",
        "settings": {},
        "inputs": [],
        "tokenizer": tokenizer,
        "fingerprint": "f",
        "split": "train",
    }
    write_manifest(folder, {**common, "content": content, "files": files, **manifest})


def make_split_manifest(source: Path) -> None:
    folders = sorted(path for path in source.iterdir() if path.is_dir())
    manifests = [read_manifest(folder) for folder in folders]
    keys = ("documents", "tokens", "text_bytes", "chunks")
    content = {key: sum(manifest["content"][key] for manifest in manifests) for key in keys}
    inputs = [{"path": "a.parquet", "bytes": 1, "rows": 2, "fingerprint": "x"}]
    write_manifest(
        source,
        {**manifests[0], "content": {**content, "dtype": "uint16"}, "files": [], "inputs": inputs}
        | {"folders": [folder.name for folder in folders]},
    )
