"""Arrow columns of any text type as arrays of string or large_string of a bounded size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

# Text per batch. At 4 MB the cost per batch is a twentieth of the time; at much more the processor's caches are too
# small.
BATCH_BYTES = 7 << 20
MAX_BATCH_ROWS = 1 << 16
MAX_BATCH_BYTES = 8 << 20  # where rows are longer than was expected


def arrow_text_buffers(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Views of the buffers of a string array without nulls.

    Returns:
        offsets, shape (n + 1,), int32 or int64, into the bytes, shape (size,), uint8. No copy is made.
    """
    offset_type = np.int64 if pa.types.is_large_string(texts.type) else np.int32
    _, offsets, data = texts.buffers()
    offsets = np.frombuffer(offsets, offset_type)[texts.offset : texts.offset + len(texts) + 1]
    return offsets, np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)


# By hand, where pyarrow would import pandas, 0.15 s and 40 MB of every worker, to ask whether it has to do with it.


def rows_of(texts: pa.Array, rows: np.ndarray | list[int]) -> pa.Array:
    """Some rows of the array, by a mask of shape (n,), bool, or by their numbers."""
    rows = np.asarray(rows)
    if rows.dtype == bool:
        bits = pa.py_buffer(np.packbits(rows, bitorder="little"))
        return texts.filter(pa.Array.from_buffers(pa.bool_(), len(rows), [None, bits]))
    return texts.take(pa.Array.from_buffers(pa.int64(), len(rows), [None, pa.py_buffer(rows.astype(np.int64))]))


def as_mask(found: pa.BooleanArray) -> np.ndarray:
    """An array without nulls as shape (n,), bool."""
    return np.frombuffer(found.cast(pa.uint8()).buffers()[1], bool, len(found))


def _is_text(arrow_type: pa.DataType) -> bool:
    if pa.types.is_dictionary(arrow_type):
        arrow_type = arrow_type.value_type
    return pa.types.is_string(arrow_type) or pa.types.is_large_string(arrow_type) or pa.types.is_string_view(arrow_type)


def check_text_column(schema: pa.Schema, text_column: str) -> None:
    """Raises ValueError that says why a file with this schema has no such column of text."""
    if text_column not in schema.names:
        raise ValueError(f"no column {text_column!r} (it has {', '.join(schema.names)})")
    if schema.names.count(text_column) > 1:
        raise ValueError(f"{schema.names.count(text_column)} columns are called {text_column!r}")
    arrow_type = schema.field(text_column).type
    if not _is_text(arrow_type):
        raise ValueError(f"column {text_column!r} is {arrow_type}, not text")


def joined(held: list[pa.Array]) -> pa.Array:
    """One array of all of them; empties the list, so that nothing is held twice."""
    texts = held[0] if len(held) == 1 else pa.concat_arrays(held)
    held.clear()
    return texts


def gathered(arrays: Iterable[pa.Array]) -> Iterator[pa.Array]:
    """The same rows in fewer arrays: small ones that follow one another are joined, to half a batch at least.

    An encoder's call takes milliseconds however little text it gets, and row groups of 1,000 documents, as FineWeb has
    them, are less than that.

    Args:
        arrays: all of one type.
    """
    held: list[pa.Array] = []
    held_rows = held_bytes = 0
    for texts in arrays:
        if held and (held_bytes + texts.nbytes > BATCH_BYTES or held_rows + len(texts) > MAX_BATCH_ROWS):
            yield joined(held)
            held_rows = held_bytes = 0
        held.append(texts)
        held_rows += len(texts)
        held_bytes += texts.nbytes
        if 2 * held_bytes > BATCH_BYTES or 2 * held_rows > MAX_BATCH_ROWS:
            yield joined(held)
            held_rows = held_bytes = 0
    if held:
        yield joined(held)


def as_plain_text(column: pa.Array) -> Iterator[pa.Array]:
    """The column as arrays of string or large_string, each of a bounded size or of one row."""
    if pa.types.is_dictionary(column.type):
        values = column.dictionary
        if pa.types.is_string_view(values.type):
            column = pa.DictionaryArray.from_arrays(column.indices, values.cast(pa.large_string()))
            values = column.dictionary
        value_bytes = np.append(pc.binary_length(values).fill_null(0).to_numpy(zero_copy_only=False), 0)
        indices = column.indices.cast(pa.int64()).fill_null(len(values)).to_numpy(zero_copy_only=False)
        for piece in _pieces(column, value_bytes[indices]):
            yield piece.dictionary_decode()
        return
    if pa.types.is_string_view(column.type):
        column = column.cast(pa.large_string())
    yield from _pieces(column, np.diff(arrow_text_buffers(column)[0]))


def _pieces(column: pa.Array, row_bytes: np.ndarray) -> Iterator[pa.Array]:
    """Slices of at most MAX_BATCH_BYTES, or of one row that is longer."""
    ends = np.cumsum(row_bytes, dtype=np.int64)
    first = 0
    while first < len(column):
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + MAX_BATCH_BYTES, side="right")))
        yield column.slice(first, last - first)
        first = last
