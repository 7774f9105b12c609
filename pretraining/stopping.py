"""Why a run ends early, with a checkpoint: out of time, the file `stop`, or a node that will be taken away."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from pretraining.settings import STOP_NAME
from utils import console

_POLL_INTERVAL_S = 10.0


class Stopping:
    """What rank 0 knows is passed on with each step's sums, so that all processes stop at the same step.

    Args:
        is_first: whether this is rank 0; the others never ask by themselves.
        max_time_s: seconds from now on (None: no limit).
        preempted_nodes: asks Ray for the nodes that will be taken away, and returns None where there are none; all
            processes must ask at the same step.
    """

    def __init__(
        self, out_dir: Path, is_first: bool, max_time_s: float | None, preempted_nodes: Callable[[], list[str] | None]
    ):
        self._stop_file, self._is_first, self._preempted_nodes = out_dir / STOP_NAME, is_first, preempted_nodes
        self._last_poll = time.monotonic()
        self._end = None if max_time_s is None else time.monotonic() + max_time_s

    def wanted(self) -> bool:
        out_of_time = self._end is not None and time.monotonic() > self._end
        return self._is_first and (out_of_time or self._stop_file.exists())

    def poll_is_due(self) -> bool:
        """Whether it is time for all processes to ask about nodes that are taken away."""
        return self._is_first and time.monotonic() - self._last_poll > _POLL_INTERVAL_S

    def poll(self) -> bool:
        """Whether a node will be taken away."""
        self._last_poll = time.monotonic()
        nodes = self._preempted_nodes()
        if nodes is not None and self._is_first:
            console.warn(f"a node will be taken away (nodes {nodes}): saving a checkpoint, then ending")
            self._stop_file.touch()
        return nodes is not None
