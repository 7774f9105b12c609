"""One interface to the kinds of input files: what planning needs of each, and the texts of some of it.

A file's ending says its kind. Texts come as Arrow arrays of a few MB; memory is bounded by what is decoded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set

import pyarrow as pa

from tokenization.arrow_files import read_batches_summary, stream_batches
from tokenization.input_files import FileEntry
from tokenization.input_names import is_arrow, is_jsonl
from tokenization.job import InputRange, Job, UnitRecord
from tokenization.jsonl import read_summary, stream_jsonl
from tokenization.parquet import read_footer, stream_texts
from tokenization.threads import submit_ahead
from tokenization.units import InputSummary

FILE_THREADS = 32


def read_summaries(
    url: str, entries: Sequence[FileEntry], text_column: str
) -> Iterator[tuple[FileEntry, InputSummary | None, str | None]]:
    """Footers, record batches, and samples of JSON lines, in the order of `entries`; read in parallel, a bounded number
    ahead.

    Yields:
        (entry, summary, None), or (entry, None, reason) for a file that cannot be used.
    """

    def read(entry: FileEntry) -> InputSummary:
        read_any = read_footer
        if is_jsonl(entry.path):
            read_any = read_summary
        elif is_arrow(entry.path):
            read_any = read_batches_summary
        return read_any(url, entry, text_column)

    for future, entry in zip(submit_ahead(read, entries, num_threads=FILE_THREADS), entries):
        try:
            yield entry, future.result(), None
        except ValueError as error:
            yield entry, None, str(error)


def stream_range(
    job: Job, piece: InputRange, record: UnitRecord, excluded: Set[tuple[int, int | None]] = frozenset()
) -> Iterator[pa.Array]:
    """The text column of some row groups, record batches or lines, a few MB at a time, in bounded memory.

    Args:
        record: counts what was read, where the plan did not know it, and lists damaged lines that are left out.
        excluded: keys of what was found damaged and is to be left out.

    Yields:
        arrays of string or large_string; rows in the order of the file.

    Raises:
        DamagedInput: a part cannot be read.
        OSError: the file could not be read.
        UserError: the file is not the one that was planned, or was replaced meanwhile.
    """
    i = piece.file_index
    if is_jsonl(job.paths[i]):
        if (i, None) not in excluded:
            yield from stream_jsonl(job, piece, record)
        return
    groups = [group for group in range(piece.first, piece.last) if (i, group) not in excluded]
    if groups:
        stamp = job.stamps[i] if job.stamps else None
        stream = stream_batches if is_arrow(job.paths[i]) else stream_texts
        yield from stream(job.input_dir, job.paths[i], i, groups, job.text_column, stamp)
