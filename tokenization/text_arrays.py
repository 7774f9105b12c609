"""Arrow columns of any text type as arrays of string or large_string of a bounded size."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenization.encoder_choice import arrow_text_buffers

# Text per batch. Large enough that the cost per batch vanishes, small enough for the processor's caches.
BATCH_BYTES = 4 << 20
MAX_BATCH_ROWS = 1 << 16
MAX_BATCH_BYTES = 8 << 20


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
