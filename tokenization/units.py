"""Cutting the input into units of work, from the sorted list of files and their footers alone.

A unit is what one task tokenizes and what a crash can lose. It is a few row-group ranges: many small files make
one unit, a large file makes several. The same input and settings give the same units on any cluster.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from tokenization.job import RowGroupRange, Unit
from tokenization.parquet import Footer

MIB = 1 << 20
MIN_UNIT_BYTES = 4 * MIB
MAX_UNIT_BYTES = 1024 * MIB
# Enough units that the slowest one does not hold up a large cluster's end, few enough to schedule and record.
AIMED_UNITS = 2048

# litgpt's and litdata's habitual chunk: 8,012 blocks of 2,048 tokens and their successor. 64 MB in int32.
BASE_CHUNK_TOKENS = 2049 * 8012
MAX_CHUNK_FACTOR = 4
BYTES_PER_CHUNK_FACTOR = 1 << 40


def default_unit_bytes(input_bytes: int) -> int:
    """Target size of a unit, in bytes of text, for an input of `input_bytes` bytes of parquet files."""
    return max(MIN_UNIT_BYTES, min(MAX_UNIT_BYTES, math.ceil(input_bytes / AIMED_UNITS)))


def default_chunk_tokens(input_bytes: int) -> int:
    """64 MB chunks in int32; up to four times that from 4 TiB of parquet on, where the index would grow too long."""
    return BASE_CHUNK_TOKENS * max(1, min(MAX_CHUNK_FACTOR, input_bytes // BYTES_PER_CHUNK_FACTOR))


def plan_units(footers: Iterable[tuple[int, Footer]], unit_bytes: int, limit_rows: int | None = None) -> list[Unit]:
    """Pack row groups, in order, until a unit holds at least `unit_bytes` of text.

    Args:
        footers: (index of the file, its footer), sorted by path.
        unit_bytes: target size of a unit, in bytes of text; a row group is never cut.
        limit_rows: plan only the first so many rows.
    """
    units: list[Unit] = []
    ranges: list[RowGroupRange] = []
    rows = text_bytes = planned_rows = 0

    def close() -> None:
        nonlocal ranges, rows, text_bytes
        if rows:
            overshoot = 0 if limit_rows is None else planned_rows - limit_rows
            units.append(Unit(len(units), tuple(ranges), rows, text_bytes, rows - overshoot if overshoot > 0 else None))
        ranges, rows, text_bytes = [], 0, 0

    for file_index, footer in footers:
        for group, (group_rows, group_bytes) in enumerate(zip(footer.rows, footer.text_bytes)):
            if limit_rows is not None and planned_rows >= limit_rows:
                break
            if group_rows == 0:
                continue
            if ranges and ranges[-1].file_index == file_index and ranges[-1].last == group:
                ranges[-1] = RowGroupRange(file_index, ranges[-1].first, group + 1)
            else:
                ranges.append(RowGroupRange(file_index, group, group + 1))
            rows += group_rows
            text_bytes += group_bytes
            planned_rows += group_rows
            if text_bytes >= unit_bytes:
                close()
    close()
    return units
