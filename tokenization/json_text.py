"""The texts of JSON lines: one column of each object, by Arrow's parser where it is exact, else by Python's.

Arrow's is two to three times faster. But it takes several objects on one line, or one object on several, and it refuses
what others read: a column twice in one object (the last one counts, as in Python), a number that no double can hold.
Which parser takes a line depends on that line alone, and not on what is read with it.
"""

from __future__ import annotations

import codecs
import json
from typing import Any

import pyarrow as pa
import pyarrow.json as pj

BLANKS = b" \t\r"
KINDS = {bool: "true or false", float: "a number", list: "a list", dict: "an object", str: "a text", type(None): "null"}
# An integer of thousands of digits, in whatever column, is no reason to refuse a line.
_decode = json.JSONDecoder(parse_int=float).decode


def texts_of_lines(lines: bytes, column: str) -> tuple[pa.Array, list[tuple[int, str]]]:
    """The texts of whole lines, the last of which may lack its end.

    Returns:
        a string array with an entry for each line that is neither damaged nor blank, null where the object has no such
        column or null in it; and the damaged lines: position among `lines`, from 0, and what is wrong.
    """
    texts = _by_arrow(lines, lines.count(b"\n") + (not lines.endswith(b"\n")), column)
    if texts is not None:
        return texts, []
    numbered = [(i, line) for i, raw in enumerate(lines.split(b"\n")) if (line := raw.strip(BLANKS))]
    parts: list[pa.Array] = [pa.array([], pa.string())]
    damaged: list[tuple[int, str]] = []
    _by_halves(numbered, column, parts, damaged)
    return pa.concat_arrays(parts), damaged


def _by_halves(
    lines: list[tuple[int, bytes]], column: str, parts: list[pa.Array], damaged: list[tuple[int, str]]
) -> None:
    """Arrow says of many lines that it refuses one, and not which: look in each half."""
    texts = _by_arrow(b"\n".join(line for _, line in lines), len(lines), column) if lines else None
    if texts is not None:
        parts.append(texts)
    elif len(lines) > 1:
        half = len(lines) // 2
        _by_halves(lines[:half], column, parts, damaged)
        _by_halves(lines[half:], column, parts, damaged)
    elif lines:
        try:
            parts.append(pa.array([text_of_row(read_row(lines[0][1]), column)], pa.string()))
        except ValueError as error:
            damaged.append((lines[0][0], str(error)))


def _by_arrow(lines: bytes, num_lines: int, column: str) -> pa.Array | None:
    """The texts, or None where Arrow refuses a line, or where not every line is one object."""
    # A line of JSON ends between } and { only where an object ends too: no string holds a bare line end, and inside an
    # object a comma stands there. So each line holds whole objects, and as many rows as lines means one on each.
    ends = lines.count(b"}\n{") + lines.count(b"}\r\n{")
    if ends != num_lines - 1 or lines.startswith(codecs.BOM_UTF8):
        return None
    try:
        table = pj.read_json(
            pa.BufferReader(lines),
            read_options=pj.ReadOptions(use_threads=False, block_size=len(lines) + 1),
            parse_options=pj.ParseOptions(
                explicit_schema=pa.schema([(column, pa.string())]), unexpected_field_behavior="ignore"
            ),
        )
        if table.num_rows != num_lines:
            return None
        texts = table.column(0).combine_chunks()
        texts.validate(full=True)  # the parser does not check whether text is UTF-8
        return texts
    except (pa.ArrowException, UnicodeDecodeError) as error:
        if isinstance(error, MemoryError):  # as Arrow's own is
            raise
        return None


def read_row(line: bytes) -> dict[str, Any]:
    """Raises ValueError saying what is wrong with the line."""
    try:
        # Other columns may hold what is not UTF-8, as with Arrow: what matters is the text.
        row = _decode(line.decode(errors="surrogateescape"))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}: character {error.pos + 1})") from error
    except RecursionError as error:
        raise ValueError("not JSON that can be read (nested too deeply)") from error
    if not isinstance(row, dict):
        raise ValueError(f"not a JSON object, but {KINDS[type(row)]}")
    return row


def text_of_row(row: dict[str, Any], column: str) -> str | None:
    """Raises ValueError where it is not text."""
    text = row.get(column)
    if text is None:
        return None
    if not isinstance(text, str):
        raise ValueError(f"column {column!r} is {KINDS[type(text)]}, not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"column {column!r} is not UTF-8, or holds half of a surrogate pair") from error
    return text
