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
import itertools
import json
import os
from pathlib import Path
from typing import Literal

import numpy as np

from utils.errors import UserError
from utils.files import checksum
from utils.manifest import safe_member

INDEX_NAME = "index.json"
MAX_CHUNK_BYTES = 2**32 - 1

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


def header_bytes(num_documents: int) -> int:
    return 4 * (num_documents + 2)


def dtype_for_vocabulary(vocab_size: int) -> str:
    """The narrowest type that litdata and litgpt both read and that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= 2**16 else "int32"


def read_document_offsets(path: str | os.PathLike) -> np.ndarray:
    """Byte positions of the documents of a chunk file; shape (n + 1,).

    Raises:
        ValueError: the header is not that of a TokensLoader chunk of this size.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        first = file.read(4)
        n = int.from_bytes(first, "little")
        if len(first) < 4 or header_bytes(n) > size:
            raise ValueError(f"{path}: {size} bytes cannot hold the header of {n} documents")
        offsets = np.frombuffer(file.read(4 * (n + 1)), dtype="<u4").astype(np.int64)
    if offsets[0] != header_bytes(n) or offsets[-1] != size or (np.diff(offsets) < 0).any():
        raise ValueError(f"{path}: document offsets do not fit the file of {size} bytes")
    return offsets


def read_documents(path: str | os.PathLike, dtype: str) -> list[np.ndarray]:
    """The documents of a chunk, each a view of shape (tokens,) of the memory-mapped file."""
    offsets = read_document_offsets(path)
    raw = np.memmap(path, mode="r")
    return [raw[start:end].view(np.dtype(dtype).newbyteorder("<")) for start, end in itertools.pairwise(offsets)]


def verify(
    path: str | os.PathLike, chunk: Chunk, dtype: str, depth: Literal["size", "offsets", "checksum"] = "offsets"
) -> Chunk:
    """Compare a chunk file with its entry.

    Args:
        dtype: of the tokens.
        depth: compare the size alone; also the counts of documents and tokens, from the header; or also every byte.

    Returns:
        The entry, with the file's checksum if that was computed.

    Raises:
        ValueError: the file is not what the entry says.
        OSError: the file cannot be read.
    """
    size = os.path.getsize(path)
    if size != chunk.bytes:
        raise ValueError(f"{path}: {size:,} bytes, the index says {chunk.bytes:,}")
    if depth == "size":
        return chunk
    offsets = read_document_offsets(path)
    documents, tokens = len(offsets) - 1, int(offsets[-1] - offsets[0]) // np.dtype(dtype).itemsize
    if (documents, tokens) != (chunk.documents, chunk.tokens):
        raise ValueError(
            f"{path}: holds {documents:,} documents and {tokens:,} tokens, the index says {chunk.documents:,} and "
            f"{chunk.tokens:,}"
        )
    if depth == "offsets":
        return chunk
    found = checksum(path)
    if chunk.xxh3_128 not in (None, found):
        raise ValueError(f"{path}: its content differs from its checksum")
    return dataclasses.replace(chunk, xxh3_128=found)


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
    if not directory.is_dir():
        raise UserError(f"{flag}={directory}: no such directory. Give the output of the step before.")
    if not path.is_file():
        folders = sorted(index.parent.name for index in directory.glob(f"*/{INDEX_NAME}"))
        if folders:
            raise UserError(
                f"{flag}={directory}: not merged yet: its chunks are in separate folders ({', '.join(folders[:5])}). "
                f"Merge them: python merge_files.py --source_dir={directory} --target_dir=DATA/{directory.name}"
            )
        raise UserError(
            f"{flag}={directory}: no {INDEX_NAME} in it. Give a directory of token chunks made by optimize_dataset.py, "
            "merge_files.py, or litdata.optimize with TokensLoader."
        )
    try:
        raw = json.loads(path.read_bytes())
        config = raw["config"]
        data_format = config["data_format"]
        listed = raw["chunks"]
        if not isinstance(listed, list) or not isinstance(config, dict):
            raise TypeError("chunks is not a list or config is not an object")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{flag}={directory}: {INDEX_NAME} is not litdata's ({type(error).__name__}: {error}). Make the directory "
            "again."
        ) from error

    kind, _, code = str(data_format[0] if isinstance(data_format, list) and len(data_format) == 1 else "").partition(
        ":"
    )
    dtype = DTYPE_OF_CODE.get(int(code)) if code.isdecimal() else None
    if config.get("item_loader") != "TokensLoader" or kind != "no_header_tensor" or dtype is None:
        raise UserError(
            f"{flag}={directory}: item_loader {config.get('item_loader')!r} with data_format {data_format!r} is not a "
            "dataset of tokens. Make it with optimize_dataset.py, or litdata.optimize(..., item_loader=TokensLoader())."
        )
    if config.get("compression") or config.get("encryption"):
        raise UserError(f"{flag}={directory}: compressed or encrypted chunks cannot be read in place. Make it without.")

    chunks = []
    for entry in listed:
        name = entry.get("filename") if isinstance(entry, dict) else None
        safe_member(directory, name)
        counts = [entry.get(key) for key in ("chunk_size", "dim", "chunk_bytes")]
        if any(not isinstance(count, int) or isinstance(count, bool) or count < 0 for count in counts):
            raise UserError(
                f"{flag}={directory}: {INDEX_NAME} has no valid counts for {name!r}. Make the directory again."
            )
        chunks.append(Chunk(name, *counts))
    repeated = len(chunks) - len({chunk.name for chunk in chunks})
    if repeated:
        raise UserError(f"{flag}={directory}: {INDEX_NAME} names {repeated} chunks twice. Make the directory again.")
    chunk_tokens = config.get("chunk_size")
    return Index(directory, dtype, tuple(chunks), chunk_tokens if isinstance(chunk_tokens, int) else None)
