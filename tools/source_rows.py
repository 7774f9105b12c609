"""Which row of which input file each document of a dataset was.

Nothing records it, and nothing has to: a unit is a list of row groups, of record batches, or of lines, that
follows from the files and the settings; its documents are the rows of these in order, without null and empty texts; a
hash of the text says which are validation data; and a shuffle inside the unit follows from its seed. So a unit is read
again as it was read then.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tokenization.input_files import DamagedInput, FileEntry, list_input_files
from tokenization.input_formats import read_summaries, stream_range
from tokenization.input_names import is_arrow, is_jsonl
from tokenization.job import CHUNK_PATTERN, InputRange, SplitRecord, Unit, UnitRecord
from tokenization.plan import make_job
from tokenization.text_arrays import arrow_text_buffers
from tokenization.tokenize_unit import is_validation, shuffled, text_hashes
from tokenization.units import UnitPacker


class NotTold(Exception):
    """A document's row cannot be told with certainty; says why."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of an input file."""

    path: str
    """Of the file, relative to the input directory."""
    row_group: int
    """Or record batch; in JSON lines the byte at which the range of lines begins that was read for a unit."""
    row: int
    """In the row group, or of these lines without blank and damaged ones, from 0."""

    def __str__(self) -> str:
        if is_jsonl(self.path):
            return f"{self.path}, row {self.row} of the lines from byte {self.row_group} on"
        what = "record batch" if is_arrow(self.path) else "row group"
        return f"{self.path}, {what} {self.row_group}, row {self.row}"


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The rows of a unit that hold text, in their order; arrays of shape (documents,)."""

    file: np.ndarray
    row_group: np.ndarray
    row: np.ndarray
    hashes: np.ndarray


class Source:
    """The input files of a tokenization, cut into its units again from what planning reads of them.

    Args:
        input_dir: the input directory, a local path or a URL.
        manifest: of the tokens, or of the dataset that was merged from them.

    Raises:
        UserError: there is no such directory, or no input file in it.
    """

    def __init__(self, input_dir: str, manifest: dict[str, Any]):
        settings, inputs = manifest["settings"], manifest["inputs"]
        entries = {entry.path: entry for entry in list_input_files(input_dir)}
        self.missing = [entry["path"] for entry in inputs if entry["path"] not in entries]
        self.unlisted = sorted(set(entries) - {entry["path"] for entry in inputs})
        self.changed: list[str] = []
        """What differs from the recorded inputs, a line per file."""
        packer = UnitPacker(settings["unit_bytes"], settings["limit_documents"])
        here = [entries.get(entry["path"], FileEntry(entry["path"], 0, fault="missing")) for entry in inputs]
        summaries = read_summaries(input_dir, here, settings["text_column"])
        for i, (recorded, (entry, summary, reason)) in enumerate(zip(inputs, summaries)):
            if recorded["path"] in self.missing:
                continue
            if summary is None:
                self.changed.append(f"{entry.path}: {reason}")
                continue
            found = {"bytes": entry.bytes, "rows": summary.num_rows, "fingerprint": summary.fingerprint}
            differing = [key for key, value in found.items() if value != recorded.get(key)]
            if differing:
                was = ", ".join(f"{key} was {recorded[key]}, is {found[key]}" for key in differing)
                self.changed.append(f"{entry.path}: another file than was tokenized: {was}")
            packer.add(i, summary)
        self.units: list[Unit] = packer.finish()
        self.is_whole = not self.missing and not self.changed
        mtimes_ns = {entry.path: entry.mtime_ns for entry in here}
        self.job = make_job(input_dir, "", settings, inputs, manifest["tokenizer"]["sha256"], mtimes_ns)

    def rows(self, unit: int, split: str, num_documents: int) -> list[Row]:
        """The row of each document of a unit that went to a split, in the order of the chunks.

        Args:
            num_documents: how many the dataset has of this unit.

        Raises:
            NotTold: the unit, read again, does not give as many.
        """
        if not self.is_whole:
            raise NotTold("the input files are not those that were tokenized")
        rows = self._rows_of(unit)
        is_val = self._is_val(rows.hashes, split, num_documents)
        chosen = np.flatnonzero(is_val == (split == "val"))
        if len(chosen) != num_documents:
            raise NotTold(
                f"unit {unit}, read again, has {len(chosen):,} documents for {split}, the dataset {num_documents:,}"
            )
        if self.job.shuffle_seed is not None:
            chosen = chosen[shuffled(self.job.shuffle_seed, unit, len(chosen))]
        places = zip(rows.file[chosen].tolist(), rows.row_group[chosen].tolist(), rows.row[chosen].tolist())
        return [Row(self.job.paths[file], row_group, row) for file, row_group, row in places]

    def _is_val(self, hashes: np.ndarray, split: str, num_documents: int) -> np.ndarray:
        is_val = is_validation(hashes, self.job.val_threshold)
        expected = int(is_val.sum()) if split == "val" else int((~is_val).sum())
        if expected != num_documents and not is_val.any() and len(hashes):
            # A small input has no hash below the threshold: then the smallest of all is validation data.
            is_val = hashes == hashes.min()
        return is_val

    @functools.lru_cache(maxsize=4)  # noqa: B019 - a source lives as long as the command
    def _rows_of(self, unit: int) -> _Rows:
        if unit >= len(self.units):
            raise NotTold(f"the input files make {len(self.units)} units, not {unit + 1}")
        excluded: set[tuple[int, int | None]] = set()
        while True:
            try:
                return self._read(self.units[unit], excluded)
            except DamagedInput as error:
                if not self.job.quarantine:
                    path = self.job.paths[error.file_index]
                    raise NotTold(f"{path}, {error.place}: {error.reason}") from error
                excluded.add(error.key)

    def _read(self, unit: Unit, excluded: set[tuple[int, int | None]]) -> _Rows:
        parts: list[tuple[np.ndarray, ...]] = []
        rows_left = unit.most_rows
        for piece in self._parts_of(unit):
            first = 0
            for texts in self._stream(piece, excluded) if rows_left else ():
                texts = texts[:rows_left]
                rows_left -= len(texts)
                numbers = np.arange(first, first + len(texts))
                first += len(texts)
                is_text = np.diff(arrow_text_buffers(texts.fill_null(""))[0]) > 0
                kept = texts.filter(pa.array(is_text))
                if len(kept):
                    same = np.full(len(kept), piece.file_index), np.full(len(kept), piece.first)
                    parts.append((*same, numbers[is_text], text_hashes(kept)))
                if not rows_left:
                    break
        columns = zip(*parts) if parts else [[np.empty(0, np.int64)]] * 3 + [[np.empty(0, np.uint64)]]
        return _Rows(*map(np.concatenate, columns))

    def _parts_of(self, unit: Unit) -> Iterator[InputRange]:
        """Single row groups, and ranges of lines, in which rows are numbered."""
        for piece in unit.ranges:
            if is_jsonl(self.job.paths[piece.file_index]):
                yield piece
            else:
                for group in range(piece.first, piece.last):
                    yield InputRange(piece.file_index, group, group + 1)

    def _stream(self, piece: InputRange, excluded: Set[tuple[int, int | None]] = frozenset()) -> Iterator[pa.Array]:
        return stream_range(self.job, piece, UnitRecord(0, "", SplitRecord(), SplitRecord()), excluded)

    def text_of(self, row: Row) -> str:
        """The document itself."""
        left, file_index = row.row, self.job.paths.index(row.path)
        last = self.job.stamps[file_index].bytes if is_jsonl(row.path) else row.row_group + 1
        for texts in self._stream(InputRange(file_index, row.row_group, last)):
            if left < len(texts):
                return texts[left].as_py()
            left -= len(texts)
        raise NotTold(f"{row}: there is no such row")


class DatasetRows:
    """The rows of a merged dataset's documents, by chunk and number.

    Args:
        manifest: of the dataset; it names the units' chunks, also where small ones were gathered into a larger one.
    """

    def __init__(self, source: Source, manifest: dict[str, Any]):
        self._source, self._split = source, manifest["split"]
        self._documents: dict[int, int] = {}
        self._parts: dict[str, list[tuple[int, int, int | None, int]]] = {}
        """By chunk: first document and the one after the last, the unit, and its documents before."""
        for entry in manifest["files"]:
            first = 0
            for part in entry.get("gathered", [entry]):
                unit, end = unit_of(part["name"]), first + part["documents"]
                before = self._documents.get(unit, 0)
                self._parts.setdefault(entry["name"], []).append((first, end, unit, before))
                self._documents[unit] = before + part["documents"]
                first = end

    def row(self, chunk: str, document: int) -> Row:
        """Raises NotTold where the row is not certain."""
        for first, end, unit, before in self._parts.get(chunk, ()):
            if first <= document < end and unit is not None:
                return self._source.rows(unit, self._split, self._documents[unit])[before + document - first]
        raise NotTold(f"{chunk} is not named after a unit")


def unit_of(chunk_name: str) -> int | None:
    """The unit that a chunk was made of; None where another program named it."""
    name = Path(chunk_name).name
    return int(name.split("-")[1]) if CHUNK_PATTERN.fullmatch(name) else None
