"""Arrow files, in Arrow's file format and in its stream format: what planning needs of them, and their text.

Hugging Face's `save_to_disk` and its cache write streams, Arrow's and Polars' writers files; a magic number tells which
one it is. Both are sequences of record batches, which are what row groups are of a parquet file. Local files are
memory-mapped: of other columns nothing is read.

A stream has no footer, so its record batches are walked through from its beginning; in a mapped file that touches a
page of each. A remote one is read as a whole for that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

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
from tokenization.job import InputStamp
from tokenization.parquet import Footer
from tokenization.text_arrays import as_plain_text, check_text_column, gathered

MAGIC = b"ARROW1"
CONTINUATION, END_OF_STREAM = b"\xff\xff\xff\xff", b"\xff\xff\xff\xff\0\0\0\0"


class CorruptRecordBatch(DamagedInput):
    """A record batch whose text cannot be used, though the file could be walked through."""

    parts = "record batches"

    def __init__(self, file_index: int, record_batch: int, rows: int, reason: str):
        self.file_index, self.record_batch, self.rows, self.reason = file_index, record_batch, rows, reason
        self.place, self.key = f"record batch {record_batch}", (file_index, record_batch)
        super().__init__(file_index, record_batch, rows, reason)

    def entry(self, path: str) -> dict[str, Any]:
        return {"path": path, "record_batch": self.record_batch, "rows": self.rows, "reason": self.reason}


def read_batches_summary(url: str, entry: FileEntry, text_column: str) -> Footer:
    """Rows and text of each record batch, as of a parquet file's row groups.

    Raises:
        ValueError: says what is wrong with the file.
        UserError: it could not be read at all.
    """
    if entry.fault:
        raise ValueError(entry.fault)
    if not entry.bytes:
        raise ValueError("not a readable Arrow file (it is empty)")
    rows, text_bytes = [], []
    try:
        with _open(url, entry.path) as source:
            is_file = _is_file(source)
            schema = _reader(source, is_file).schema
            check_text_column(schema, text_column)
            for _, batch in _record_batches(source, is_file, schema, text_column):
                rows.append(batch.num_rows)
                text_bytes.append(batch.column(0).nbytes)
            end = source.tell()
            if not is_file:
                _check_end_of_stream(source, end)
            fingerprint = fingerprint_of_ends(*ends_of(source))
    except (OSError, pa.ArrowException) as error:
        if is_input_failure(error):
            raise reading_failed(url, entry.path, error) from error
        raise ValueError(f"not a readable Arrow file ({error})") from error
    return Footer(tuple(rows), tuple(text_bytes), fingerprint)


@contextlib.contextmanager
def _open(url: str, path: str) -> Iterator[pa.NativeFile]:
    filesystem, full_path = open_member(url, path)
    is_local = isinstance(filesystem, pafs.LocalFileSystem)
    with pa.memory_map(full_path) if is_local else filesystem.open_input_file(full_path) as source:
        yield source


def _is_file(source: pa.NativeFile) -> bool:
    """Whether it is of Arrow's file format; else it can only be a stream."""
    return source.read_at(len(MAGIC), 0) == MAGIC


def _reader(source: pa.NativeFile, is_file: bool, options: pa.ipc.IpcReadOptions | None = None) -> Any:
    open_reader = pa.ipc.open_file if is_file else pa.ipc.open_stream
    source.seek(0)  # a reader before this one has moved the position, and in a remote file `_is_file` has
    return open_reader(source, options=options)


def _record_batches(
    source: pa.NativeFile, is_file: bool, schema: pa.Schema, text_column: str, wanted: Sequence[int] | None = None
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Number and content of some record batches, or of all, with the text column alone."""
    fields = [schema.names.index(text_column)]
    reader = _reader(source, is_file, pa.ipc.IpcReadOptions(included_fields=fields, use_threads=False))
    if is_file:
        for number in range(reader.num_record_batches) if wanted is None else wanted:
            yield number, reader.get_batch(number)
        return
    for number, batch in enumerate(reader):
        if wanted is None or number in wanted:
            yield number, batch
        if wanted is not None and number >= wanted[-1]:
            return


def _check_end_of_stream(source: pa.NativeFile, end: int) -> None:
    """A stream that was cut off between two record batches reads as a shorter one, and a second one behind it not at
    all. Streams as Arrow wrote them before 0.15 have another end, and are taken as they are."""
    size = source.size()
    if end != size:
        raise ValueError(f"not a readable Arrow file ({size - end:,} bytes follow the end of its stream)")
    if source.read_at(4, 0) == CONTINUATION and source.read_at(8, max(0, size - 8)) != END_OF_STREAM:
        raise ValueError("not a readable Arrow file (its stream has no end: it was cut off)")


def stream_batches(
    url: str,
    path: str,
    file_index: int,
    record_batches: Sequence[int],
    text_column: str,
    stamp: InputStamp | None = None,
) -> Iterator[pa.Array]:
    """The text column of some record batches, a few MB at a time. Arguments, what is yielded, and errors are those of
    `parquet.stream_texts`, with CorruptRecordBatch."""
    return gathered(_stream_batches(url, path, file_index, record_batches, text_column, stamp))


def _stream_batches(
    url: str, path: str, file_index: int, record_batches: Sequence[int], text_column: str, stamp: InputStamp | None
) -> Iterator[pa.Array]:
    number, rows = record_batches[0], 0
    try:
        with _open(url, path) as source:
            check_stamp(url, path, stamp, lambda: fingerprint_of_ends(*ends_of(source)))
            is_file = _is_file(source)
            schema = _reader(source, is_file).schema
            batches = _record_batches(source, is_file, schema, text_column, record_batches)
            for number, batch in batches:  # noqa: B007 - in errors
                column, rows = batch.column(0), batch.num_rows
                is_plain = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
                column.validate(full=not is_plain)  # what is plain is looked at piece by piece
                for texts in as_plain_text(column) if rows else ():
                    texts.validate(full=True)
                    yield texts
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        check_stamp(url, path, stamp)
        if is_input_failure(error):
            raise
        raise CorruptRecordBatch(file_index, number, rows, f"{type(error).__name__}: {error}") from error
    check_stamp(url, path, stamp)
