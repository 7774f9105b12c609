"""metrics.jsonl in a run's directory: one JSON object per logged step, appended by rank 0 of the training processes."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.files import atomic_write

METRICS_NAME = "metrics.jsonl"


class MetricsFile:
    """The writing end; one process only."""

    def __init__(self, out_dir: Path):
        self._file = open(out_dir / METRICS_NAME, "a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append a record, one line, at once."""
        self._file.write(json.dumps(record, allow_nan=True) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Flush to disk: a checkpoint must not be newer than the records that lead to it."""
        os.fsync(self._file.fileno())


def read_metrics(out_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """All complete records; a last line that a crash cut short is left out."""
    path = Path(out_dir) / METRICS_NAME
    if not path.is_file():
        return []
    return list(_whole_records(path.read_text(encoding="utf-8").splitlines(keepends=True)))


def _whole_records(lines: list[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.endswith("\n"):
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict):
                    yield record


def rewind_metrics(out_dir: str | os.PathLike, step: int) -> list[dict[str, Any]]:
    """Drop the records after `step`, which the resumed run will write again; returns the others."""
    records = [record for record in read_metrics(out_dir) if record.get("step", 0) <= step]
    with atomic_write(Path(out_dir) / METRICS_NAME) as file:
        file.writelines(json.dumps(record).encode() + b"\n" for record in records)
    return records
