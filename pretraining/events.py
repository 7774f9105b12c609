"""events.jsonl beside metrics.jsonl: what went wrong during a run, and what was done about it.

One JSON object per line: `time` (UTC), `event`, and what belongs to it; docs/pretrain.md lists them. Nothing is ever
removed from it, unlike from metrics.jsonl, which is cut back when steps are done again.
"""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

from utils import console
from utils.metrics_file import read_records

EVENTS_NAME = "events.jsonl"


def record_event(out_dir: str | os.PathLike, event: str, message: str, tell: bool = True, **facts: Any) -> None:
    """Append an event, in one write, and tell the user; `message` is a paragraph for a person.

    Args:
        tell: False where the user is told otherwise.
    """
    now = datetime.datetime.now(datetime.UTC)
    record = {"time": now.isoformat(timespec="seconds"), "event": event, **facts, "message": message}
    if tell:
        console.warn(message)
    line = json.dumps(record).encode() + b"\n"
    try:
        descriptor = os.open(Path(out_dir) / EVENTS_NAME, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)
    except OSError as error:  # a full disk, say; what happened matters more than its record
        console.warn(f"{EVENTS_NAME}: {error.strerror}")


def read_events(out_dir: str | os.PathLike) -> list[dict[str, Any]]:
    return read_records(Path(out_dir) / EVENTS_NAME)
