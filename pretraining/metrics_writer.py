"""Writing metrics.jsonl, and cutting it and samples.jsonl back before a resumed run writes the same steps again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from utils.files import atomic_write
from utils.metrics_file import METRICS_NAME, read_records

SAMPLES_NAME = "samples.jsonl"


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


def rewind_metrics(out_dir: str | os.PathLike, step: int) -> list[dict[str, Any]]:
    """Drop the records after `step`, which the resumed run will write again; returns the others, of metrics.jsonl."""
    samples = Path(out_dir) / SAMPLES_NAME
    if samples.exists():
        _rewind(samples, step)
    return _rewind(Path(out_dir) / METRICS_NAME, step)


def _rewind(path: Path, step: int) -> list[dict[str, Any]]:
    records = [record for record in read_records(path) if record.get("step", 0) <= step]
    with atomic_write(path) as file:
        file.writelines(json.dumps(record).encode() + b"\n" for record in records)
    return records


def samples_of(out_dir: str | os.PathLike, step: int) -> list[dict[str, Any]]:
    """What the model wrote at a step, as samples.jsonl has it."""
    return [record for record in read_records(Path(out_dir) / SAMPLES_NAME) if record.get("step") == step]
