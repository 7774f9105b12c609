"""The parquet files of a dataset: finds them, reads their footers, streams their text.

They are at a local path, or at a URL that pyarrow (`s3://`, `gs://`, `abfs://`, `hdfs://`, `hf://datasets/...`) or
fsspec reads.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import xxhash

from tokenization.threads import submit_ahead
from utils.errors import UserError

FOOTER_THREADS = 32
# Text per batch. Large enough that the cost per batch vanishes, small enough for the processor's caches.
BATCH_BYTES = 4 << 20
MAX_BATCH_ROWS = 1 << 16
READ_BUFFER_BYTES = 4 << 20


class CorruptRowGroup(Exception):
    """A row group whose pages cannot be read, though the file's footer could."""

    def __init__(self, file_index: int, row_group: int, rows: int, reason: str):
        self.file_index, self.row_group, self.rows, self.reason = file_index, row_group, rows, reason
        super().__init__(file_index, row_group, rows, reason)


def is_input_failure(error: Exception) -> bool:
    """Whether reading failed, and not whether what was read is wrong: another try may succeed, so nothing may be
    quarantined. pyarrow sets errno for errors of the operating system, and only describes those of object stores."""
    remote = ("AWS Error", "HTTP", "Connection", "timed out", "Timeout")
    return isinstance(error, OSError) and (error.errno is not None or any(word in str(error) for word in remote))


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """A file of the input directory."""

    path: str
    """Relative to the input directory, with '/'."""
    bytes: int


@dataclasses.dataclass(frozen=True)
class Footer:
    """What planning needs from a parquet file's footer."""

    rows: tuple[int, ...]
    """Of each row group."""
    text_bytes: tuple[int, ...]
    """Of the text column in each row group, uncompressed."""
    fingerprint: str
    """Changes when a row group's rows, size or place in the file changes; 16 hexadecimal digits."""


@functools.cache
def open_input(url: str) -> tuple[Any, str]:
    """The pyarrow file system of `url`, and the path in it.

    Raises:
        UserError: no file system for such a URL, or it does not answer.
    """
    if "://" not in url:
        return pafs.LocalFileSystem(), url
    try:
        return pafs.FileSystem.from_uri(url)
    except Exception as pyarrow_error:
        try:
            return pafs.FileSystem.from_uri(f"fsspec+{url}")
        except Exception as error:
            raise UserError(
                f"--input_dir={url}: neither pyarrow ({pyarrow_error}) nor fsspec ({error}) opens this URL. "
                "Give a local path, or a URL of a file system that one of them knows."
            ) from error


def list_parquet_files(url: str) -> list[FileEntry]:
    """All *.parquet files at and below `url`, sorted by path; hidden ones (., _) are left out.

    Raises:
        UserError: nothing there, or no parquet file in it.
    """
    filesystem, base = open_input(url)
    base = base.rstrip("/")
    try:
        info = filesystem.get_file_info(base)
        if info.type == pafs.FileType.File:
            return [FileEntry(info.base_name, info.size)]
        found = filesystem.get_file_info(pafs.FileSelector(base, recursive=True, allow_not_found=True))
    except OSError as error:
        raise UserError(
            f"--input_dir={url}: cannot be listed ({error}). Check the path and the credentials."
        ) from error
    entries = []
    for file in found:
        path = file.path[len(base) :].lstrip("/")
        hidden = any(part.startswith((".", "_")) for part in path.split("/"))
        if file.type == pafs.FileType.File and path.endswith(".parquet") and not hidden:
            entries.append(FileEntry(path, file.size))
    if not entries:
        what = "no such directory" if info.type == pafs.FileType.NotFound and not found else "no *.parquet file in it"
        raise UserError(
            f"--input_dir={url}: {what}. Give the directory of the parquet files, for example made by "
            "`python examples/make_demo_corpus.py` or `hf download HuggingFaceFW/fineweb --repo-type dataset`."
        )
    return sorted(entries, key=lambda entry: entry.path)


def _member(url: str, path: str) -> tuple[Any, str]:
    filesystem, base = open_input(url)
    base = base.rstrip("/")
    return filesystem, base if base.endswith("/" + path) or base == path else f"{base}/{path}"


def read_footer(url: str, entry: FileEntry, text_column: str) -> Footer:
    """Raises ValueError saying what is wrong with the file, UserError when it could not be read at all."""
    filesystem, path = _member(url, entry.path)
    try:
        with filesystem.open_input_file(path) as file, pq.ParquetFile(file, pre_buffer=False) as parquet:
            metadata, schema = parquet.metadata, parquet.schema_arrow
    except (OSError, pa.ArrowException) as error:
        if is_input_failure(error):
            raise UserError(f"--input_dir={url}: {entry.path}: reading failed ({error}). Try again.") from error
        raise ValueError(f"not a readable parquet file ({error})") from error
    if text_column not in schema.names:
        raise ValueError(f"no column {text_column!r} (it has {', '.join(schema.names)})")
    if not _is_text(schema.field(text_column).type):
        raise ValueError(f"column {text_column!r} is {schema.field(text_column).type}, not text")

    column = leaf_index(metadata, text_column)
    rows, text_bytes, places = [], [], []
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        chunk = group.column(column)
        rows.append(group.num_rows)
        text_bytes.append(chunk.total_uncompressed_size)
        places.append((group.num_rows, chunk.total_compressed_size, chunk.data_page_offset))
    fingerprint = xxhash.xxh3_64_hexdigest(repr(places).encode())
    return Footer(tuple(rows), tuple(text_bytes), fingerprint)


def leaf_index(metadata: Any, column: str) -> int:
    """Position of a top-level column among the leaves, which row groups count: a struct before it has several."""
    return [metadata.schema.column(i).path for i in range(metadata.num_columns)].index(column)


def _is_text(arrow_type: pa.DataType) -> bool:
    if pa.types.is_dictionary(arrow_type):
        arrow_type = arrow_type.value_type
    return pa.types.is_string(arrow_type) or pa.types.is_large_string(arrow_type) or pa.types.is_string_view(arrow_type)


def read_footers(
    url: str, entries: Sequence[FileEntry], text_column: str
) -> Iterator[tuple[FileEntry, Footer | None, str | None]]:
    """Footers in the order of `entries`, read in parallel, a bounded number ahead.

    Yields:
        (entry, footer, None), or (entry, None, reason) for a file that cannot be used.
    """
    read = functools.partial(read_footer, url, text_column=text_column)
    for entry, future in zip(entries, submit_ahead(read, entries, num_threads=FOOTER_THREADS)):
        try:
            yield entry, future.result(), None
        except ValueError as error:
            yield entry, None, str(error)


def stream_texts(
    url: str, path: str, file_index: int, row_groups: Sequence[int], text_column: str
) -> Iterator[pa.Array]:
    """The text column of some row groups, a few MB at a time, in bounded memory.

    Args:
        file_index: only named in errors.

    Yields:
        arrays of string or large_string; rows in the order of the file.

    Raises:
        CorruptRowGroup: a page cannot be decoded.
        OSError: the file could not be read.
    """
    filesystem, full_path = _member(url, path)
    group, rows = row_groups[0], 0
    try:
        # A read buffer instead of pre_buffer: a row group of a million rows must not be held as a whole.
        with (
            filesystem.open_input_file(full_path) as source,
            pq.ParquetFile(
                source, pre_buffer=False, buffer_size=READ_BUFFER_BYTES, page_checksum_verification=True
            ) as parquet,
        ):
            column = leaf_index(parquet.metadata, text_column)
            for group in row_groups:
                metadata = parquet.metadata.row_group(group)
                rows = metadata.num_rows
                if rows == 0:
                    continue
                row_bytes = max(1, metadata.column(column).total_uncompressed_size // rows)
                batch_rows = min(MAX_BATCH_ROWS, max(1, BATCH_BYTES // row_bytes))
                for batch in parquet.iter_batches(batch_rows, [group], [text_column], use_threads=False):
                    texts = _as_plain_text(batch.column(0))
                    texts.validate(full=True)  # parquet readers do not check whether text is UTF-8
                    yield texts
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        if is_input_failure(error):
            raise
        raise CorruptRowGroup(file_index, group, rows, f"{type(error).__name__}: {error}") from error


def _as_plain_text(column: pa.Array) -> pa.Array:
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return column
    return column.cast(pa.large_string())
