"""What Ray prints on the driver's terminal of its workers, without the hundreds of lines of one that dies."""

from __future__ import annotations

from typing import Any

import ray._private.worker
from ray._private.ray_logging import global_worker_stdstream_dispatcher

_CRASH_STARTS = ("*** SIG", "Fatal Python error: ")
_HANDLER_NAME = "ray_print_logs"


def hide_crash_reports() -> None:
    """Show a worker's lines up to its crash; the rest is in its log, of which pretraining.failures keeps a copy.

    Ray has no setting for it: it shows all lines of its workers or none, and tells of each dead one by itself.
    """
    print_lines = ray._private.worker.print_to_stdstream
    crashed: set[Any] = set()

    def print_without_crashes(data: dict[str, Any], ignore_prefix: bool = False) -> None:
        pid, lines = data.get("pid"), data["lines"]
        if pid == "raylet":
            lines = [line for line in lines if "A worker died or was killed" not in line]
        elif data["is_err"]:
            if pid in crashed:
                return
            first = next((i for i, line in enumerate(lines) if line.startswith(_CRASH_STARTS)), None)
            if first is not None:
                crashed.add(pid)
                lines = lines[:first]
        if lines:
            print_lines({**data, "lines": lines}, ignore_prefix)

    ray._private.worker.print_to_stdstream = print_without_crashes
    global_worker_stdstream_dispatcher.remove_handler(_HANDLER_NAME)
    global_worker_stdstream_dispatcher.add_handler(_HANDLER_NAME, print_without_crashes)
