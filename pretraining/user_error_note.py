"""How a worker's user error reaches the driver: a file in out_dir.

The workers are started again after other errors (--max_failures), and the user's would come again each time. What Ray
Train tells the driver may be only that other processes lost the one that failed; the note says why.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from utils.errors import UserError
from utils.files import write_json

RAY_NAME = ".ray"  # in out_dir: what Ray Train and its workers leave for the driver while a run lasts


def note_path(out_dir: str | Path) -> Path:
    return Path(out_dir) / RAY_NAME / "user_error.json"


def leave_note(out_dir: str | Path, error: UserError) -> None:
    with contextlib.suppress(OSError):  # a full disk may be the very problem
        path = note_path(out_dir)
        path.parent.mkdir(exist_ok=True)
        write_json(path, error.problems)


def read_note(out_dir: str | Path) -> list[str] | None:
    """The problems that a worker noted, or None."""
    try:
        return json.loads(note_path(out_dir).read_bytes())
    except (OSError, ValueError):
        return None
