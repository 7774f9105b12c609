"""metrics.jsonl in a run's directory, and its like: one JSON object per line, appended while others read."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

METRICS_NAME = "metrics.jsonl"


def read_metrics(run_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """What `read_records` gives for a run's metrics.jsonl; for `run_dir` itself, if it is a file."""
    path = Path(run_dir)
    return read_records(path / METRICS_NAME if path.is_dir() else path)


def read_records(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of a file in its order, one per line; none where there is no file.

    Lines that are no whole JSON object, as a crash leaves them, are left out.
    """
    return whole_records(Path(path).read_bytes()) if Path(path).is_file() else []


def whole_records(lines: bytes) -> list[dict[str, Any]]:
    records = []
    for line in lines.decode(errors="replace").split("\n")[:-1]:  # what follows the last newline is half written
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records
