"""The metrics of a run, one record per step: for its curves and for the model card."""

from __future__ import annotations

import os
from typing import Any

from utils.metrics_file import read_metrics


def read_steps(run_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """What `read_metrics` gives, merged into one record per step and sorted by step.

    The last record of a step wins, as a restarted run logs steps again. What only an earlier one has stays: a
    validation may have a line of its own beside the step's.
    """
    by_step: dict[int, dict[str, Any]] = {}
    for record in read_metrics(run_dir):
        step = record.get("step")
        if isinstance(step, int):
            by_step[step] = {**by_step.get(step, {}), **record}
    return [by_step[step] for step in sorted(by_step)]
