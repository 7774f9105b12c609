"""Parquet files: reads their footers, streams their text."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from tokenization.input_files import DamagedInput, FileEntry, check_stamp, is_input_failure, open_member, reading_failed
from tokenization.job import InputStamp, Piece
from tokenization.text_arrays import (
    BATCH_BYTES,
    MAX_BATCH_BYTES,
    MAX_BATCH_ROWS,
    as_plain_text,
    check_text_column,
    gathered,
    joined,
)

# Sizes as encoded in the file. A row group of a million rows must not be held as a whole; one that is small is read at
# once, without the copies of a buffer.
READ_BUFFER_BYTES, MAX_READ_AT_ONCE_BYTES = 4 << 20, 16 << 20
# The footer says what is encoded. A row of a dictionary takes a few bits there and can be of any length here, so
# batches start with a row, grow as fast as this, and end early where the text is longer than the footer suggests.
BATCH_GROWTH = 8
# What one read may decode if each of its rows were as long as the whole dictionary page.
MAX_DECODED_BYTES = 512 << 20


class CorruptRowGroup(DamagedInput):
    """A row group whose pages cannot be read, though the file's footer could."""

    parts = "row groups"

    def __init__(self, file_index: int, row_group: int, rows: int, reason: str):
        self.file_index, self.row_group, self.rows, self.reason = file_index, row_group, rows, reason
        self.place, self.key = f"row group {row_group}", (file_index, row_group)
        super().__init__(file_index, row_group, rows, reason)

    def entry(self, path: str) -> dict[str, Any]:
        return {"path": path, "row_group": self.row_group, "rows": self.rows, "reason": self.reason}


@dataclasses.dataclass(frozen=True)
class Footer:
    """What planning needs from a parquet file's footer, and of an Arrow file."""

    rows: tuple[int, ...]
    """Of each row group, or record batch."""
    text_bytes: tuple[int, ...]
    """Of the text column in each row group, uncompressed."""
    fingerprint: str
    """Changes when a row group's rows, size or place in the file changes; 16 hexadecimal digits."""

    @property
    def num_rows(self) -> int:
        return sum(self.rows)

    def pieces(self, unit_bytes: int, max_rows: int | None) -> Iterator[Piece]:
        """The row groups, which are never cut, whatever the size of a unit."""
        for group, (rows, text_bytes) in enumerate(zip(self.rows, self.text_bytes)):
            yield Piece(group, group + 1, rows, text_bytes)


def read_footer(url: str, entry: FileEntry, text_column: str) -> Footer:
    """Raises ValueError saying what is wrong with the file, UserError when it could not be read at all."""
    if entry.fault:
        raise ValueError(entry.fault)
    filesystem, path = open_member(url, entry.path)
    try:
        with (
            filesystem.open_input_file(path) as file,
            pq.ParquetFile(file, pre_buffer=False, buffer_size=READ_BUFFER_BYTES) as parquet,
        ):
            metadata, schema = parquet.metadata, parquet.schema_arrow
            if text_column in schema.names and _has_signed_footer(file, metadata):
                _check_not_encrypted(parquet, text_column)
    except (OSError, pa.ArrowException) as error:
        if is_input_failure(error):
            raise reading_failed(url, entry.path, error) from error
        raise ValueError(f"not a readable parquet file ({error})") from error
    check_text_column(schema, text_column)
    column = leaf_index(metadata, text_column)
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    text_bytes = tuple(group.column(column).total_uncompressed_size for group in groups)
    return Footer(tuple(group.num_rows for group in groups), text_bytes, _fingerprint(metadata, column))


def _fingerprint(metadata: Any, column: int) -> str:
    places = []
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        chunk = group.column(column)
        places.append((group.num_rows, chunk.total_compressed_size, chunk.data_page_offset))
    return xxhash.xxh3_64_hexdigest(repr(places).encode())


def _has_signed_footer(file: Any, metadata: Any) -> bool:
    """Whether columns may be encrypted: a plain footer of such a file is followed by its signature, and no other is.

    To ask the metadata itself for an encrypted column ends the process: Arrow's exception is caught nowhere.
    """
    file.seek(file.size() - 8)
    return int.from_bytes(file.read(4), "little") != metadata.serialized_size


def _check_not_encrypted(parquet: pq.ParquetFile, text_column: str) -> None:
    """Raises ValueError where a reader without keys is refused: before it reads a page, if the column is encrypted."""
    for group in range(parquet.metadata.num_row_groups):
        try:
            next(parquet.iter_batches(1, [group], [text_column], use_threads=False), None)
        except OSError as error:
            if "crypt" not in str(error):
                raise
            raise ValueError(f"column {text_column!r} is encrypted ({error})") from error


def leaf_index(metadata: Any, column: str) -> int:
    """Position of a top-level column among the leaves, which row groups count: a struct before it has several."""
    return [metadata.schema.column(i).path for i in range(metadata.num_columns)].index(column)


def stream_texts(
    url: str,
    path: str,
    file_index: int,
    row_groups: Sequence[int],
    text_column: str,
    stamp: InputStamp | None = None,
) -> Iterator[pa.Array]:
    """The text column of some row groups, a few MB at a time, in bounded memory.

    Args:
        file_index: only named in errors.
        stamp: what the file was when the work was planned; None: whatever it is.

    Yields:
        arrays of string or large_string; rows in the order of the file.

    Raises:
        CorruptRowGroup: a page cannot be decoded.
        OSError: the file could not be read.
        UserError: the file is not the one that was planned, or was replaced meanwhile.
    """
    return gathered(_stream_texts(url, path, file_index, row_groups, text_column, stamp))


def _stream_texts(
    url: str, path: str, file_index: int, row_groups: Sequence[int], text_column: str, stamp: InputStamp | None
) -> Iterator[pa.Array]:
    filesystem, full_path = open_member(url, path)
    group, rows, decoded = row_groups[0], 0, 0
    try:
        with (
            filesystem.open_input_file(full_path) as source,
            pq.ParquetFile(source, pre_buffer=False, buffer_size=READ_BUFFER_BYTES) as parquet,
        ):
            check_stamp(url, path, stamp, lambda: _fingerprint_of_readable(parquet, source, text_column))
            column = leaf_index(parquet.metadata, text_column)
            reader = _reader(source, parquet.metadata, column, row_groups)
            for group in row_groups:
                rows = parquet.metadata.row_group(group).num_rows
                if rows:
                    decoded = yield from _stream_row_group(reader, group, column, text_column, decoded)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        check_stamp(url, path, stamp)
        if is_input_failure(error):
            raise
        raise CorruptRowGroup(file_index, group, rows, f"{type(error).__name__}: {error}") from error
    check_stamp(url, path, stamp)


def _reader(source: Any, metadata: Any, column: int, row_groups: Sequence[int]) -> pq.ParquetFile:
    encoded_bytes = max(
        (metadata.row_group(group).column(column).total_compressed_size for group in row_groups), default=0
    )
    return pq.ParquetFile(
        source,
        metadata=metadata,
        pre_buffer=False,
        buffer_size=READ_BUFFER_BYTES if encoded_bytes > MAX_READ_AT_ONCE_BYTES else 0,
        page_checksum_verification=True,
    )


def _fingerprint_of_readable(parquet: pq.ParquetFile, source: Any, text_column: str) -> str | None:
    names, metadata = parquet.schema_arrow.names, parquet.metadata
    # An encrypted column would end the process; a signed footer that was planned has been looked at.
    if text_column not in names or (_has_signed_footer(source, metadata) and not _is_readable(parquet, text_column)):
        return None
    return _fingerprint(metadata, leaf_index(metadata, text_column))


def _is_readable(parquet: pq.ParquetFile, text_column: str) -> bool:
    try:
        _check_not_encrypted(parquet, text_column)
    except ValueError:
        return False
    return True


def _stream_row_group(
    parquet: pq.ParquetFile, group: int, column: int, text_column: str, decoded: int
) -> Generator[pa.Array, None, int]:
    """`decoded`: bytes per row of the row group before, 0 for the first; returns this one's."""
    metadata = parquet.metadata.row_group(group)
    chunk = metadata.column(column)
    row_bytes = max(1, chunk.total_uncompressed_size // metadata.num_rows)
    num_batches = max(-(-metadata.num_rows * row_bytes // BATCH_BYTES), -(-metadata.num_rows // MAX_BATCH_ROWS))
    batch_rows = -(-metadata.num_rows // num_batches)
    dictionary_bytes = chunk.data_page_offset - chunk.dictionary_page_offset if chunk.dictionary_page_offset else 0
    most_rows = min(batch_rows, max(1, MAX_DECODED_BYTES // max(dictionary_bytes, 1)))
    # A row group that is encoded like the last one, and was no longer when decoded, needs no careful start.
    read_rows = most_rows if 0 < decoded <= 2 * row_bytes else 1
    held: list[pa.Array] = []
    held_rows = held_bytes = total_bytes = 0
    for batch in parquet.iter_batches(read_rows, [group], [text_column], use_threads=False):
        read_bytes = 0
        for texts in as_plain_text(batch.column(0)):
            texts.validate(full=True)  # parquet readers do not check whether text is UTF-8
            held.append(texts)
            held_rows += len(texts)
            held_bytes += texts.nbytes
            read_bytes += texts.nbytes
            if held_rows >= batch_rows or held_bytes >= MAX_BATCH_BYTES:
                yield joined(held)
                held_rows = held_bytes = 0
        total_bytes += read_bytes
        read_rows = min(read_rows * BATCH_GROWTH, most_rows)
        fitting = MAX_BATCH_BYTES * batch.num_rows // max(read_bytes, 1)
        # The reader asks for its batch size before every batch.
        parquet.reader.set_batch_size(max(1, min(read_rows, batch_rows - held_rows, fitting)))
    if held:
        yield joined(held)
    return max(1, total_bytes // metadata.num_rows)
