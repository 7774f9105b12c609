"""What the parts of step 1 hand to each other: the plan, the job, its units, and the record of a finished unit.

A unit's chunks are OUT/{train,val}/NODE/chunk-UNIT-i.bin; its record is a line of OUT/progress.jsonl.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from utils.chunks import Chunk

SPLITS = ("train", "val")
HASH_RANGE = 1 << 64
CHUNK_PATTERN = re.compile(r"chunk-\d{7,}-\d+\.bin")


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """A file of the input directory."""

    path: str
    """Relative to the input directory, with '/'."""
    bytes: int
    mtime_ns: int | None = None
    """When it was last written; None: not known, as for remote files."""
    fault: str = ""
    """Why it cannot be used, where its kind or name says so already."""


class Piece(NamedTuple):
    """What units are packed from: the least that is read of a file at a time, in the file's order."""

    first: int
    last: int
    """Row groups first .. last - 1 of a parquet file, record batches of an Arrow file; of a JSON lines file the lines
    that begin in these bytes."""
    rows: int | None
    """None: not known before it is read."""
    text_bytes: int
    """Uncompressed, as the footer says; of JSON lines as a sample suggests."""


@dataclasses.dataclass(frozen=True)
class InputRange:
    """Consecutive pieces of one file."""

    file_index: int
    first: int
    last: int
    """As in `Piece`."""


@dataclasses.dataclass(frozen=True)
class Unit:
    """The work of one task."""

    index: int
    ranges: tuple[InputRange, ...]
    rows: int | None
    """None: not known before they are read."""
    text_bytes: int
    """As in `Piece`."""
    max_rows: int | None = None
    """Stop after so many rows (--limit_documents ends inside this unit)."""

    @property
    def most_rows(self) -> int:
        """How many are read of it at most; sys.maxsize where neither a limit nor a count is known."""
        return next(rows for rows in (self.max_rows, self.rows, sys.maxsize) if rows is not None)


@dataclasses.dataclass(frozen=True)
class InputStamp:
    """What an input file was when the work was planned."""

    bytes: int
    mtime_ns: int | None
    """None: not known, as for remote files."""
    fingerprint: str
    """Of a parquet file's footer, of the two ends of other files."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What all units of a run have in common."""

    input_dir: str
    """A URL, or an absolute path: workers run in other directories."""
    paths: tuple[str, ...]
    """Of the input files, relative to input_dir."""
    output_dir: str
    text_column: str
    tokenizer_sha256: str
    dtype: str
    chunk_tokens: int
    bos_id: int | None
    """Put before every document; None: no BOS."""
    eos_id: int | None
    """Put after every document; None: no EOS."""
    val_threshold: int
    """A document whose text hash is below it is validation data."""
    parse_special_tokens: bool
    shuffle_seed: int | None
    """Shuffle the documents inside a unit; None: keep their order."""
    quarantine: bool
    """Leave out what cannot be read, a row group or a line, instead of failing."""
    stamps: tuple[InputStamp, ...] = ()
    """Of each of `paths`; empty: files are taken as they are found."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the settings and the input amount to."""

    job: Job
    units: list[Unit]
    inputs: list[dict[str, Any]]
    """path, bytes, fingerprint of each usable file, and the rows of those whose footer says them; sorted by path."""
    quarantined: list[dict[str, Any]]
    """Files left out, with the reason."""
    settings: dict[str, Any]
    """Those that shape the result; for the manifest."""
    tokenizer: dict[str, Any]
    tokenizer_json: Path
    fingerprint: str
    """SHA-256 of settings, tokenizer and inputs: the identity of the result."""

    @property
    def text_bytes(self) -> int:
        return sum(unit.text_bytes for unit in self.units)


@dataclasses.dataclass(slots=True)
class SplitRecord:
    """What a unit put into one split."""

    chunks: list[Chunk] = dataclasses.field(default_factory=list)
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    """UTF-8 bytes of the documents, before tokenization."""


@dataclasses.dataclass(slots=True)
class UnitRecord:
    """The result of a unit; as JSON, a line of progress.jsonl."""

    unit: int
    folder: str
    """Sub-folder of train/ and val/ with the chunks; it stands for the node that did the work."""
    train: SplitRecord
    val: SplitRecord
    skipped_null: int = 0
    skipped_empty: int = 0
    min_hash: int = HASH_RANGE
    """Smallest text hash in the unit: that document can become validation data if no hash is below the threshold."""
    line_bytes: int = 0
    """Of JSON lines that are not compressed: those of all lines, so that the unit's share of a file shows."""
    checked_documents: int = 0
    quarantined: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    encoder: str = ""
    """Library that encoded: gigatoken or tokenizers."""
    reference_documents: int = 0
    """Documents that tokenizers encoded, or lines of them: all, or those that gigatoken may not take."""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    """Spent in read, hash, encode, check, assemble, write."""
    cpu_seconds: float = 0.0
    """Processor time of the worker process on this unit, all threads, whatever else the machine was doing."""
    peak_bytes: int = 0
    """Largest resident memory of the worker process so far."""

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> UnitRecord:
        """Raises KeyError or TypeError where it is not the record of a unit."""
        for split in SPLITS:
            chunks = [Chunk(**chunk) for chunk in record[split]["chunks"]]
            record[split] = SplitRecord(**{**record[split], "chunks": chunks})
        return cls(**record)

    @property
    def documents(self) -> int:
        return self.train.documents + self.val.documents

    @property
    def tokens(self) -> int:
        return self.train.tokens + self.val.tokens


def chunk_name(unit: int, chunk: int) -> str:
    return f"chunk-{unit:07d}-{chunk}.bin"


def fingerprint_of_identity(settings: dict[str, Any], tokenizer: dict[str, Any], inputs: list[dict[str, Any]]) -> str:
    """SHA-256 of what shapes a tokenization's result."""
    identity = {"settings": settings, "tokenizer": tokenizer, "inputs": inputs}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
