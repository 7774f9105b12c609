"""Which documents stand in a sequence that a run read, and which sequences a text stands in."""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Callable, Iterator

import numpy as np

from tokenization.chunk_reader import read_document_offsets, read_documents
from utils.chunks import Index


@dataclasses.dataclass(frozen=True)
class Part:
    """The tokens of one document that stand in one sequence."""

    dataset: int
    """Of the run's training datasets."""
    chunk: str
    document: int
    """In the chunk, from 0."""
    document_of_dataset: int
    first: int
    end: int
    """Tokens first .. end - 1 of the document."""
    document_tokens: int


class Blocks:
    """The blocks of a dataset, as TokensLoader cuts them: chunk by chunk, without each chunk's incomplete last one.

    Args:
        number: of the dataset.
        block_tokens: tokens of a block.
    """

    def __init__(self, number: int, index: Index, block_tokens: int):
        self._number, self.index, self._block_tokens = number, index, block_tokens
        self._begins = np.cumsum([0, *(chunk.tokens // block_tokens for chunk in index.chunks)])
        self._documents_before = np.cumsum([0, *(chunk.documents for chunk in index.chunks)])

    def place(self, block: int) -> tuple[int, int]:
        """Chunk number, and the block's first token in the chunk."""
        chunk = int(np.searchsorted(self._begins, block, side="right")) - 1
        return chunk, (block - int(self._begins[chunk])) * self._block_tokens

    def parts(self, block: int) -> list[Part]:
        """The documents of a block, in order."""
        chunk, begin = self.place(block)
        bounds = self._token_bounds(chunk)
        first = int(np.searchsorted(bounds, begin, side="right")) - 1
        last = int(np.searchsorted(bounds, begin + self._block_tokens, side="left"))
        found = []
        for document in range(first, last):
            start, end = int(bounds[document]), int(bounds[document + 1])
            inside = max(begin, start) - start, min(begin + self._block_tokens, end) - start
            if inside[0] < inside[1]:
                number = int(self._documents_before[chunk]) + document
                name = self.index.chunks[chunk].name
                found.append(Part(self._number, name, document, number, *inside, end - start))
        return found

    def whole_document(self, chunk: int, document: int, first: int, end: int) -> Part:
        bounds = self._token_bounds(chunk)
        number = int(self._documents_before[chunk]) + document
        length = int(bounds[document + 1] - bounds[document])
        return Part(self._number, self.index.chunks[chunk].name, document, number, first, end, length)

    def blocks_of(self, part: Part) -> list[int]:
        """The blocks that hold a part's tokens; none where they all stand in the chunk's incomplete last block."""
        chunk = int(np.searchsorted(self._documents_before, part.document_of_dataset, side="right")) - 1
        start = int(self._token_bounds(chunk)[part.document])
        first, last = (start + part.first) // self._block_tokens, (start + part.end - 1) // self._block_tokens
        count = int(self._begins[chunk + 1] - self._begins[chunk])
        return [int(self._begins[chunk]) + block for block in range(first, min(last + 1, count))]

    def tokens(self, part: Part) -> np.ndarray:
        """The whole document that a part belongs to."""
        return np.asarray(self._documents(part.chunk)[part.document])

    def documents(self) -> Iterator[tuple[int, list[np.ndarray]]]:
        """All documents, by chunk number."""
        for number, chunk in enumerate(self.index.chunks):
            yield number, read_documents(self.index.directory / chunk.name, self.index.dtype)

    @functools.lru_cache(maxsize=64)  # noqa: B019 - lives as long as the command
    def _documents(self, name: str) -> list[np.ndarray]:
        return read_documents(self.index.directory / name, self.index.dtype)

    @functools.lru_cache(maxsize=64)  # noqa: B019
    def _token_bounds(self, chunk: int) -> np.ndarray:
        offsets = read_document_offsets(self.index.directory / self.index.chunks[chunk].name)
        return (offsets - offsets[0]) // np.dtype(self.index.dtype).itemsize


def occurrences(decode: Callable[[list[int]], str], ids: list[int], text: str) -> list[tuple[int, int]]:
    """The shortest stretches of tokens, as (first, end), that decode to something with `text` in it."""
    found, begin = [], 0
    while begin < len(ids) and text in decode(ids[begin:]):
        ends = range(begin + 1, len(ids) + 1)
        end = ends[bisect.bisect_left(ends, True, key=lambda e: text in decode(ids[begin:e]))]
        starts = range(end - 1, begin - 1, -1)
        first = starts[bisect.bisect_left(starts, True, key=lambda s: text in decode(ids[s:end]))]
        found.append((first, end))
        begin = first + 1
    return found
