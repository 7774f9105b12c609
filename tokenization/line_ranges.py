"""The lines of a JSON lines file that begin in a range of its bytes, wherever the range begins and ends."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa

READ_BYTES = 4 << 20
SHORT_READ_BYTES = 64 << 10
# What is longer is no document: it is held up to six times, as bytes, as an object and as tokens.
MAX_LINE_BYTES = 256 << 20


class Lines(NamedTuple):
    """Consecutive whole lines of a file."""

    data: bytes | None
    """None: one line that is too long."""
    num_bytes: int
    """In the file: a byte order mark at its beginning is no part of the lines, but of these."""


def lines_of_range(source: pa.NativeFile, compression: str | None, first: int, last: int) -> Iterator[Lines]:
    """Those that begin in bytes first .. last - 1 of a plain file; of a compressed one all lines."""
    if compression:
        source.seek(0)
        with pa.CompressedInputStream(source, compression) as stream:
            yield from _whole_lines(stream, 0, None)
    else:
        start = _next_line(source, first, last)
        source.seek(start)
        yield from _whole_lines(source, start, last)


def _next_line(source: pa.NativeFile, first: int, last: int) -> int:
    """Where the first line begins that begins at `first` or later; anything from `last` on where none does before."""
    if first == 0:
        return 0
    at = first - 1  # a line may begin at `first` itself
    source.seek(at)
    while at < last and (data := source.read(SHORT_READ_BYTES)):
        found = data.find(b"\n")
        if found >= 0:
            return at + found + 1
        at += len(data)
    return max(at, last)


def _whole_lines(source: Any, start: int, last: int | None) -> Iterator[Lines]:
    """The lines that begin before `last`, a few MB at a time; `source` stands at a line's beginning, at `start`."""
    at = read_to = start  # the first byte that is not yielded, and the first that is not read
    held: list[bytes] = []
    is_too_long = False
    while last is None or at < last:
        wanted = READ_BYTES if last is None else min(READ_BYTES, max(last - read_to, SHORT_READ_BYTES))
        data = source.read(wanted)
        if not data:
            if at < read_to:
                yield Lines(None if is_too_long else _without_mark(b"".join(held), at), read_to - at)
            return
        # The line end at `last` - 1 or behind it is the last one of the range.
        cut = -1 if last is None else data.find(b"\n", max(0, last - 1 - read_to))
        cut = (cut if cut >= 0 else data.rfind(b"\n")) + 1
        read_to += len(data)
        if not cut:
            if not is_too_long:
                held.append(data)
            if read_to - at > MAX_LINE_BYTES:
                is_too_long = True
                held.clear()
            continue
        begin = 0
        if is_too_long:
            begin = data.find(b"\n") + 1
            end_of_line = read_to - len(data) + begin
            yield Lines(None, end_of_line - at)
            at, is_too_long = end_of_line, False
        if begin < cut:
            block = b"".join([*held, memoryview(data)[begin:cut]])
            held.clear()
            yield Lines(_without_mark(block, at), len(block))
            at += len(block)
            del block
        if cut < len(data):
            held.append(data[cut:])


def _without_mark(block: bytes, at: int) -> bytes:
    return block.removeprefix(codecs.BOM_UTF8) if at == 0 else block


def count_lines_before(source: pa.NativeFile, first: int, last: int) -> int:
    """How many lines of a plain file begin before those of a range. It takes reading all of them."""
    left = _next_line(source, first, last)
    source.seek(0)
    num_lines = 0
    while left and (data := source.read(min(READ_BYTES, left))):
        num_lines, left = num_lines + data.count(b"\n"), left - len(data)
    return num_lines
