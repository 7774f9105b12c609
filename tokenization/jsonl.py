"""JSON lines files, plain or compressed: what planning needs of them, and the texts of some of their lines.

A plain file is cut into ranges of bytes, wherever these end: a line belongs to the range in which it begins.

    file       {"text": "a"}\\n{"text": "b"}\\n{"text": "c"}\\n
    ranges     |-------- 0 --------|---------- 1 ----------|
    lines      a, b                 c

A compressed file can only be read from its beginning, so it is one range.
"""

from __future__ import annotations

import codecs
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from tokenization.input_files import (
    DamagedInput,
    FileEntry,
    check_stamp,
    ends_of,
    fingerprint_of_ends,
    is_input_failure,
    open_member,
    reading_failed,
)
from tokenization.input_names import compression_of
from tokenization.job import InputRange, Job, Piece, UnitRecord
from tokenization.json_text import BLANKS, read_row, text_of_row, texts_of_lines
from tokenization.line_ranges import count_lines_before, lines_of_range
from utils.console import human_bytes

SAMPLE_READ_BYTES = 16 << 10
# A compressed file's sample is larger: it ends with a whole block, and zstd's are of 128 KiB.
COMPRESSED_SAMPLE_BYTES, MAX_SAMPLE_BYTES = 512 << 10, 4 << 20
MIN_PIECE_BYTES = 4 << 10
PIECES_PER_UNIT = 8
# Where hardly anything of the lines is text, units are still to be of a bounded number of bytes.
MIN_TEXT_SHARE = 1 / 16
# A unit with more damaged lines lists the first ones, and counts the others with the last of these.
MAX_LINES_LISTED = 1000


class DamagedLine(DamagedInput):
    """A line that is not an object with text, or too long."""

    parts = "lines"

    def __init__(self, file_index: int, line: int, reason: str):
        self.file_index, self.line, self.reason = file_index, line, reason
        self.place, self.key = f"line {line}", (file_index, line)
        super().__init__(file_index, line, reason)

    def entry(self, path: str) -> dict[str, Any]:
        return {"path": path, "line": self.line, "rows": 1, "reason": self.reason}


class DamagedCompression(DamagedInput):
    """A compressed file that cannot be decompressed to its end. Nothing of it is taken: its checksum comes last."""

    parts = "files"

    def __init__(self, file_index: int, reason: str):
        self.file_index, self.reason = file_index, reason
        self.place, self.key = "the compressed data", (file_index, None)
        super().__init__(file_index, reason)

    def entry(self, path: str) -> dict[str, Any]:
        return {"path": path, "row_group": None, "rows": None, "reason": self.reason}


@dataclasses.dataclass(frozen=True)
class JsonlSummary:
    """What planning needs of a JSON lines file."""

    url: str
    path: str
    bytes: int
    text_share: float
    """Bytes of text per byte of the file, in a sample."""
    fingerprint: str
    """Changes when the size or one of the two ends of the file changes; 16 hexadecimal digits."""
    num_rows: None = None
    """Not known: that would take reading all of it."""

    def pieces(self, unit_bytes: int, max_rows: int | None) -> Iterator[Piece]:
        """A fraction of a unit each; with `max_rows`, which takes reading, the number of rows of each."""
        step = max(self.bytes, 1)
        if not compression_of(self.path):
            step = max(MIN_PIECE_BYTES, math.ceil(unit_bytes / self.text_share / PIECES_PER_UNIT))
        for first in range(0, self.bytes, step):
            last = min(first + step, self.bytes)
            rows = None if max_rows is None else self._count_rows(first, last, max_rows)
            yield Piece(first, last, rows, math.ceil((last - first) * self.text_share))

    def _count_rows(self, first: int, last: int, max_rows: int) -> int:
        """Lines that are not blank. Of a compressed file no more are counted than show that it has too many."""
        filesystem, path = open_member(self.url, self.path)
        compression, rows = compression_of(path), 0
        try:
            with filesystem.open_input_file(path) as source:
                for lines in lines_of_range(source, compression, first, last):
                    rows += (
                        1 if lines.data is None else sum(1 for line in lines.data.split(b"\n") if line.strip(BLANKS))
                    )
                    if compression and rows > max_rows:
                        break
        except OSError as error:
            if not compression or is_input_failure(error):
                raise reading_failed(self.url, self.path, error) from error
            rows = max(rows, 1)  # the worker is to find what is damaged
        return rows


def read_summary(url: str, entry: FileEntry, text_column: str) -> JsonlSummary:
    """Raises ValueError saying what is wrong with the file, UserError when it could not be read at all."""
    if entry.fault:
        raise ValueError(entry.fault)
    filesystem, path = open_member(url, entry.path)
    compression = compression_of(path)
    try:
        with filesystem.open_input_file(path) as source:
            size, head, tail = ends_of(source)
            start = source.read_at(min(size, COMPRESSED_SAMPLE_BYTES), 0) if compression else head
    except OSError as error:
        raise reading_failed(url, entry.path, error) from error
    sample, is_whole = start, len(start) == size
    if compression:
        sample = _decompressed(start, compression, is_whole)
    bytes_per_byte = max(1.0, len(sample) / max(len(start), 1))
    sample = sample.removeprefix(codecs.BOM_UTF8)
    if not is_whole:
        sample = sample[: sample.rfind(b"\n") + 1]
        if not compression:
            sample += tail[tail.find(b"\n") + 1 :]
    share = bytes_per_byte * max(MIN_TEXT_SHARE, _text_share(sample, text_column))
    return JsonlSummary(url, entry.path, entry.bytes, share, fingerprint_of_ends(size, head, tail))


def _decompressed(head: bytes, compression: str, is_whole: bool) -> bytes:
    """The beginning of a compressed file, as far as `head` has it."""
    if not head:
        raise ValueError(f"not a readable {compression} file (it is empty)")
    parts: list[bytes] = []
    try:
        with pa.CompressedInputStream(pa.BufferReader(head), compression) as stream:
            while sum(map(len, parts)) < MAX_SAMPLE_BYTES and (part := stream.read(SAMPLE_READ_BYTES)):
                parts.append(part)
    except OSError as error:
        if is_whole or not parts:  # else it only ends where the sample does
            raise ValueError(f"not a readable {compression} file ({error})") from error
    return b"".join(parts)


def _text_share(sample: bytes, text_column: str) -> float:
    """Bytes of text per byte of some whole lines; raises ValueError where none of them can be used."""
    columns: dict[str, None] = {}
    faults, text_bytes, has_row = [], 0, False
    for line in sample.split(b"\n"):
        if not line.strip(BLANKS):
            continue
        try:
            row = read_row(line.strip(BLANKS))
            columns.update(dict.fromkeys(row))
            text = text_of_row(row, text_column)
        except ValueError as error:
            faults.append(str(error))
            continue
        has_row = True
        text_bytes += len(text.encode()) if text else 0
    if columns and text_column not in columns:
        raise ValueError(f"no column {text_column!r} (it has {', '.join(columns)})")
    if faults and not has_row:
        raise ValueError(faults[0] if columns else f"not JSON lines (its first line is {faults[0]})")
    return text_bytes / len(sample) if has_row else 1.0


def stream_jsonl(job: Job, piece: InputRange, record: UnitRecord) -> Iterator[pa.Array]:
    """The texts of the lines that begin in a range of bytes, a few MB at a time, in bounded memory.

    Args:
        record: counts the lines' bytes, and with `job.quarantine` lists damaged lines.

    Yields:
        string arrays; rows in the order of the file.

    Raises:
        DamagedLine: only without `job.quarantine`.
        DamagedCompression: with and without it.
        OSError: the file could not be read.
        UserError: the file is not the one that was planned, or was replaced meanwhile.
    """
    url, path = job.input_dir, job.paths[piece.file_index]
    stamp = job.stamps[piece.file_index] if job.stamps else None
    compression = compression_of(path)
    filesystem, full_path = open_member(url, path)
    try:
        with filesystem.open_input_file(full_path) as source:
            check_stamp(url, path, stamp, lambda: fingerprint_of_ends(*ends_of(source)))
            num_lines = 0  # of this range so far
            before = 0 if compression else None
            for lines in lines_of_range(source, compression, piece.first, piece.last):
                if lines.data is None:
                    texts, damaged = None, [(0, f"it is {human_bytes(lines.num_bytes)} long, and no document is")]
                else:
                    texts, damaged = texts_of_lines(lines.data, job.text_column)
                for position, reason in damaged:
                    if before is None:
                        with filesystem.open_input_file(full_path) as again:
                            before = count_lines_before(again, piece.first, piece.last)
                    line = DamagedLine(piece.file_index, before + num_lines + position + 1, reason)
                    if not job.quarantine:
                        raise line
                    _list_damaged(line, path, record)
                num_lines += 1 if lines.data is None else lines.data.count(b"\n")
                record.line_bytes += 0 if compression else lines.num_bytes
                if texts is not None:
                    yield texts
    except OSError as error:
        check_stamp(url, path, stamp)
        if not compression or is_input_failure(error):
            raise
        raise DamagedCompression(piece.file_index, str(error)) from error
    check_stamp(url, path, stamp)


def _list_damaged(line: DamagedLine, path: str, record: UnitRecord) -> None:
    if len(record.quarantined) >= MAX_LINES_LISTED and record.quarantined[-1]["path"] == path:
        record.quarantined[-1]["rows"] += 1
    else:
        record.quarantined.append(line.entry(path))
