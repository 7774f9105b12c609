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


def read_metrics(run_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """All whole records of a run, in the order of the file; none where there is no file.

    Lines that are no whole JSON object, as a crash leaves them, are left out.

    Args:
        run_dir: the run's directory, or the file itself.
    """
    path = Path(run_dir)
    path = path / METRICS_NAME if path.is_dir() else path
    if not path.is_file():
        return []
    return list(_whole_records(path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)))


def read_steps(run_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """What `read_metrics` gives, merged into one record per step and sorted by step.

    The last record of a step wins, as a restarted run logs steps again. What only an earlier one has stays: a validation
    may have a line of its own beside the step's.
    """
    by_step: dict[int, dict[str, Any]] = {}
    for record in read_metrics(run_dir):
        step = record.get("step")
        if isinstance(step, int):
            by_step[step] = {**by_step.get(step, {}), **record}
    return [by_step[step] for step in sorted(by_step)]


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
