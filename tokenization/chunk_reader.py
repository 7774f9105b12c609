"""Reads chunk files and compares them with their entries in an index; utils/chunks.py draws the format."""

from __future__ import annotations

import dataclasses
import itertools
import os
from typing import Any, Literal

import numpy as np

from utils.chunks import Chunk, Index
from utils.files import checksum


def header_bytes(num_documents: int) -> int:
    return 4 * (num_documents + 2)


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


def counted_in(index: Index, manifest: dict[str, Any]) -> dict[str, Any]:
    """What the manifest beside an index must have as its `content`, as far as the index says it."""
    found = {"documents": index.documents, "tokens": index.tokens, "chunks": len(index.chunks), "dtype": index.dtype}
    if "packing" in manifest:  # the headers count pieces of documents
        found["pieces"] = found.pop("documents")
    return found
