"""metrics.jsonl in a run's directory: one JSON object per logged step, appended by rank 0 of the training processes."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

METRICS_NAME = "metrics.jsonl"


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
    return list(whole_records(path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)))


def whole_records(lines: list[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.endswith("\n"):
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict):
                    yield record
