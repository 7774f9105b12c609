"""Gathers small chunks: each unit leaves one per split, and litdata drops the last, incomplete block of every chunk.

Small chunks that follow one another become one chunk of their documents, in their order. So the tokens of the dataset
stay the same, one after another, and only the places where it is cut are fewer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import xxhash

from tokenization.chunk_reader import header_bytes, read_document_offsets
from tokenization.chunk_writer import MAX_CHUNK_BYTES, chunk_header
from tokenization.merge_plan import Part
from utils.chunks import Chunk
from utils.files import atomic_write

COPY_BLOCK_BYTES = 8 << 20
# A chunk of so many tokens loses 0.2% of them at a context of 8,192, on average; larger ones are not worth a copy.
SMALL_TOKENS = 1 << 21


def gather_small(parts: list[Part], chunk_tokens: int) -> list[Part]:
    """The parts of the merged dataset, with its small chunks gathered.

    A function of the chunks alone, so the same whichever nodes made them. A chunk is small if it is less than half full
    and has less than 2 M tokens. Others are never copied for this, nor are those without a checksum.

    Args:
        parts: of one file each.
        chunk_tokens: at which chunks are cut; a gathered one has at most as many.
    """
    gathered: list[Part] = []
    run: list[Part] = []
    tokens = size = 0
    for part in parts:
        chunk = part.chunk
        small = chunk.tokens < min(SMALL_TOKENS, chunk_tokens / 2) and chunk.xxh3_128 is not None
        if run and not (small and tokens + chunk.tokens <= chunk_tokens and size + chunk.bytes <= MAX_CHUNK_BYTES):
            gathered.append(_joined(run))
            run, tokens, size = [], 0, 0
        if small:
            run.append(part)
            tokens, size = tokens + chunk.tokens, size + chunk.bytes
        else:
            gathered.append(part)
    return gathered + ([_joined(run)] if run else [])


def _joined(run: list[Part]) -> Part:
    if len(run) == 1:
        return run[0]
    chunks = [part.chunk for part in run]
    documents, tokens = sum(chunk.documents for chunk in chunks), sum(chunk.tokens for chunk in chunks)
    token_bytes = sum(chunk.bytes - header_bytes(chunk.documents) for chunk in chunks)
    first, last = (chunk.name.removesuffix(".bin") for chunk in (chunks[0], chunks[-1]))
    # A name that no single chunk has: a merge that an earlier version began is known by the names in its target.
    name = f"{first.split('-to-')[0]}-to-{last.removeprefix('chunk-').split('-to-')[-1]}.bin"
    return Part(
        Chunk(name, documents, tokens, header_bytes(documents) + token_bytes),
        tuple(source for part in run for source in part.sources),
    )


def write_gathered(part: Part, path: Path, dtype: str) -> Chunk:
    """Write the gathered chunk, whole or not at all; returns its entry with the checksum.

    Raises:
        ValueError: what was read from a source differs from its checksum.
    """
    with atomic_write(path) as file:
        return _stream(part, dtype, file.write)


def checksum_of_gathered(part: Part, dtype: str) -> str:
    """What `write_gathered` would give, without writing."""
    return _stream(part, dtype, lambda block: None).xxh3_128


def _stream(part: Part, dtype: str, write: Callable) -> Chunk:
    digest = xxhash.xxh3_128()
    for block in _blocks(part, dtype):
        digest.update(block)
        write(block)
    return dataclasses.replace(part.chunk, xxh3_128=digest.hexdigest())


def _blocks(part: Part, dtype: str) -> Iterator[memoryview]:
    """The bytes of the gathered chunk: one header for all documents, then the tokens of each source."""
    itemsize = np.dtype(dtype).itemsize
    lengths = [np.diff(read_document_offsets(path)) // itemsize for path, _ in part.sources]
    yield memoryview(chunk_header(np.concatenate(lengths), dtype)).cast("B")
    for path, chunk in part.sources:
        digest, header_left = xxhash.xxh3_128(), header_bytes(chunk.documents)
        with open(path, "rb", buffering=0) as file:
            while block := file.read(COPY_BLOCK_BYTES):
                digest.update(block)
                yield memoryview(block)[header_left:]
                header_left = max(0, header_left - len(block))
        if digest.hexdigest() != chunk.xxh3_128:
            raise ValueError(f"{path}: its content differs from its checksum")
