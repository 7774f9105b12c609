"""Writes litdata's TokensLoader chunks; utils/chunks.py draws the format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash

from tokenization.chunk_reader import header_bytes
from utils.chunks import Chunk
from utils.files import atomic_write

MAX_CHUNK_BYTES = 2**32 - 1


def dtype_for_vocabulary(vocab_size: int) -> str:
    """The narrowest type that litdata and litgpt both read and that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= 2**16 else "int32"


def chunk_header(document_tokens: np.ndarray, dtype: str) -> np.ndarray:
    """The uint32 words before the tokens.

    Args:
        document_tokens: number of tokens of each document; shape (n,).
        dtype: of the tokens.

    Returns:
        uint32 array of shape (n + 2,).

    Raises:
        ValueError: the chunk would be 4 GiB or larger.
    """
    n = len(document_tokens)
    ends = np.cumsum(document_tokens, dtype=np.int64) * np.dtype(dtype).itemsize + header_bytes(n)
    if n and ends[-1] > MAX_CHUNK_BYTES:
        raise ValueError(f"a chunk of {ends[-1]} bytes does not fit the format's 32-bit offsets")
    return np.concatenate(([n, header_bytes(n)], ends)).astype("<u4")


class ChunkWriter:
    """Collects the documents of one unit and split, and writes a chunk file whenever one is full.

    A chunk ends with the document that takes it to `chunk_tokens`.
    """

    def __init__(self, directory: Path, name_of: Callable[[int], str], dtype: str, chunk_tokens: int):
        self._directory, self._name_of, self._dtype, self._chunk_tokens = directory, name_of, dtype, chunk_tokens
        self._pieces: list[np.ndarray] = []
        self._lengths: list[np.ndarray] = []
        self._tokens = 0
        self._documents = 0
        self.chunks: list[Chunk] = []

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents.

        Args:
            tokens: of all of them, back to back, shape (sum of lengths,); may be kept by reference until the chunk is
                written.
            lengths: tokens of each document, shape (n,).
        """
        ends = np.cumsum(lengths)
        first, begin = 0, 0
        while first < len(lengths):
            # the first document with which the chunk is full, or the last one there is
            last = int(np.searchsorted(ends, begin + self._chunk_tokens - self._tokens)) + 1
            last = min(last, len(lengths))
            end = int(ends[last - 1])
            piece = tokens[begin:end]
            # A view keeps its whole batch alive: a few validation documents from each would hold a unit in memory.
            batch = piece if piece.base is None else piece.base
            self._pieces.append(piece.copy() if 2 * piece.nbytes < batch.nbytes else piece)
            self._lengths.append(lengths[first:last])
            self._tokens += end - begin
            self._documents += last - first
            first, begin = last, end
            if self._tokens >= self._chunk_tokens:
                self.flush()

    def flush(self) -> None:
        """Write what was collected as a chunk file, whole or not at all."""
        if not self._documents:
            return
        path = self._directory / self._name_of(len(self.chunks))
        path.parent.mkdir(parents=True, exist_ok=True)
        header = chunk_header(np.concatenate(self._lengths), self._dtype)
        digest = xxhash.xxh3_128()
        with atomic_write(path) as file:
            for piece in (header, *self._pieces):
                view = memoryview(np.ascontiguousarray(piece)).cast("B")
                digest.update(view)
                file.write(view)
        size = header.nbytes + self._tokens * np.dtype(self._dtype).itemsize
        self.chunks.append(Chunk(path.name, self._documents, self._tokens, size, digest.hexdigest()))
        self._pieces, self._lengths, self._tokens, self._documents = [], [], 0, 0


def largest_chunk_tokens(dtype: str) -> int:
    """Tokens that fit into a chunk file however short the documents are: the header takes 4 bytes per document."""
    return (MAX_CHUNK_BYTES - header_bytes(0)) // (np.dtype(dtype).itemsize + 4)
