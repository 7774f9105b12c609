"""Cuts the input into units of work, from the sorted list of files and what is known of each.

A unit is what one worker tokenizes at a time, and what a crash can lose. It consists of ranges of row groups, of record
batches, or of bytes of JSON lines: many small files make one unit, a large file makes several. The same input and
settings give the same units on any cluster.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Protocol

from tokenization.job import InputRange, Piece, Unit

MIB = 1 << 20
MIN_UNIT_BYTES = 4 * MIB
MAX_UNIT_BYTES = 1024 * MIB
# Enough that the slowest unit does not hold up a large cluster at the end; few enough to schedule and record.
TARGET_UNITS = 2048

# The chunk size in litgpt's and litdata's examples: 8,012 blocks of 2,048 tokens and their successor. 64 MB in int32.
BASE_CHUNK_TOKENS = 2049 * 8012
MAX_CHUNK_FACTOR = 4
BYTES_PER_CHUNK_FACTOR = 1 << 40


def default_unit_bytes(input_bytes: int) -> int:
    """Target size of a unit, in bytes of text, for an input of `input_bytes` bytes of files."""
    return max(MIN_UNIT_BYTES, min(MAX_UNIT_BYTES, math.ceil(input_bytes / TARGET_UNITS)))


def default_chunk_tokens(input_bytes: int) -> int:
    """64 MB in int32, and from 2 TiB of files on up to four times that, to keep the index short."""
    return BASE_CHUNK_TOKENS * max(1, min(MAX_CHUNK_FACTOR, input_bytes // BYTES_PER_CHUNK_FACTOR))


class InputSummary(Protocol):
    """What planning knows of a file: a parquet file's footer, a sample of a JSON lines file."""

    num_rows: int | None
    """None: not known before it is read."""
    fingerprint: str

    def pieces(self, unit_bytes: int, max_rows: int | None) -> Iterable[Piece]:
        """All of the file that units need, with the number of rows where `max_rows` is given."""


class UnitPacker:
    """Packs pieces of files, in the order in which the files are added, until a unit holds enough text.

    Args:
        unit_bytes: target size of a unit, in bytes of text; a row group is never cut.
        limit_rows: pack only the first so many rows.
    """

    def __init__(self, unit_bytes: int, limit_rows: int | None = None):
        self._unit_bytes, self._limit_rows = unit_bytes, limit_rows
        self._units: list[Unit] = []
        self._ranges: list[InputRange] = []
        self._rows: int | None = 0
        self._text_bytes = self._packed_rows = 0

    def add(self, file_index: int, summary: InputSummary) -> None:
        rows_left = None if self._limit_rows is None else self._limit_rows - self._packed_rows
        if rows_left is not None and rows_left <= 0:
            return
        for piece in summary.pieces(self._unit_bytes, rows_left):
            if self._limit_rows is not None and self._packed_rows >= self._limit_rows:
                return
            if piece.rows == 0:
                continue
            last = self._ranges[-1] if self._ranges else None
            if last and (last.file_index, last.last) == (file_index, piece.first):
                self._ranges[-1] = dataclasses.replace(last, last=piece.last)
            else:
                self._ranges.append(InputRange(file_index, piece.first, piece.last))
            self._rows = None if None in (self._rows, piece.rows) else self._rows + piece.rows
            self._text_bytes += piece.text_bytes
            self._packed_rows += piece.rows or 0
            if self._text_bytes >= self._unit_bytes:
                self._close_unit()

    def finish(self) -> list[Unit]:
        """All units, the last one however small it is."""
        if self._ranges:
            self._close_unit()
        return self._units

    def _close_unit(self) -> None:
        excess_rows = 0 if self._limit_rows is None else self._packed_rows - self._limit_rows
        max_rows = self._rows - excess_rows if excess_rows > 0 else None
        self._units.append(Unit(len(self._units), tuple(self._ranges), self._rows, self._text_bytes, max_rows))
        self._ranges, self._rows, self._text_bytes = [], 0, 0
