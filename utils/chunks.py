"""litdata's TokensLoader chunk files and their index.json, written and read without litdata.

A chunk of three documents, little-endian (litdata/streaming/writer.py and item_loader.py):

    uint32       uint32[n + 1]               tokens, back to back
    +---+----------------------------------+-------------+------+---------------+
    | 3 | off[0] | off[1] | off[2] | off[3] | document 0  | doc1 | document 2    |
    +---+----------------------------------+-------------+------+---------------+
          |        '-------------------------------------^
          '-------- absolute byte positions; the last one is the file's size, so it is below 4 GiB

litdata's reader ignores the offsets: it cuts the tokens into blocks, and drops the last block if it is incomplete.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from utils.errors import UserError
from utils.manifest import safe_member

INDEX_NAME = "index.json"

# litdata/constants.py, _TORCH_DTYPES_MAPPING
CODE_OF_DTYPE = {"int32": 16, "int64": 18, "uint16": 20}
DTYPE_OF_CODE = {15: "int32", **{code: dtype for dtype, code in CODE_OF_DTYPE.items()}, 17: "int64"}


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk file: what index.json says about it, and its checksum, which manifests and progress.jsonl have too."""

    name: str
    """Path relative to the directory of the index, with '/'."""
    documents: int
    tokens: int
    bytes: int
    """Of the whole file, header included."""
    xxh3_128: str | None = None
    """Of the whole file; None while nobody has read it."""


@dataclasses.dataclass(frozen=True)
class Index:
    """index.json, checked."""

    directory: Path
    dtype: str
    chunks: tuple[Chunk, ...]
    chunk_tokens: int | None

    @property
    def tokens(self) -> int:
        return sum(chunk.tokens for chunk in self.chunks)

    @property
    def documents(self) -> int:
        return sum(chunk.documents for chunk in self.chunks)


def read_index(directory: str | os.PathLike, flag: str) -> Index:
    """Read and check `directory`/index.json, whoever wrote it.

    Raises:
        UserError: there is none, it is not litdata's, it does not hold tokens, or a name leads out of the directory.
    """
    directory = Path(directory)
    path = directory / INDEX_NAME

    def refused(why: str) -> UserError:
        return UserError(f"{flag}={directory}: {why}")

    if not directory.is_dir():
        raise refused("no such directory. Give the output of the step before.")
    if not path.is_file():
        folders = sorted(index.parent.name for index in directory.glob(f"*/{INDEX_NAME}"))
        if folders:
            raise refused(
                f"not merged yet: its chunks are in separate folders ({', '.join(folders[:5])}). "
                f"Merge them: python merge_files.py --source_dir={directory} --target_dir=DATA/{directory.name}"
            )
        raise refused(
            f"no {INDEX_NAME} in it. Give a directory of token chunks made by optimize_dataset.py, merge_files.py, or "
            "litdata.optimize with TokensLoader."
        )
    try:
        raw = json.loads(path.read_bytes())
        config, listed, data_format = raw["config"], raw["chunks"], raw["config"]["data_format"]
        if not isinstance(listed, list) or not isinstance(config, dict):
            raise TypeError("chunks is not a list or config is not an object")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise refused(f"{INDEX_NAME} is not litdata's ({error!r}). Make the directory again.") from error
    dtype = next((name for code, name in DTYPE_OF_CODE.items() if data_format == [f"no_header_tensor:{code}"]), None)
    if config.get("item_loader") != "TokensLoader" or dtype is None:
        raise refused(
            f"item_loader {config.get('item_loader')!r} with data_format {data_format!r} is not a dataset of tokens. "
            "Make it with optimize_dataset.py, or litdata.optimize(..., item_loader=TokensLoader())."
        )
    if config.get("compression") or config.get("encryption"):
        raise refused("compressed or encrypted chunks cannot be read in place. Make it without.")

    chunks = []
    for entry in listed:
        name = entry.get("filename") if isinstance(entry, dict) else None
        safe_member(directory, name)
        counts = [entry.get(key) for key in ("chunk_size", "dim", "chunk_bytes")]
        if any(not isinstance(count, int) or isinstance(count, bool) or count < 0 for count in counts):
            raise refused(f"{INDEX_NAME} has no valid counts for {name!r}. Make the directory again.")
        chunks.append(Chunk(name, *counts))
    if repeated := len(chunks) - len({chunk.name for chunk in chunks}):
        raise refused(f"{INDEX_NAME} names {repeated} chunks twice. Make the directory again.")
    chunk_tokens = config.get("chunk_size")
    return Index(directory, dtype, tuple(chunks), chunk_tokens if isinstance(chunk_tokens, int) else None)
