"""What optimize_dataset.py asks of the processes that tokenize, wherever they are."""

from __future__ import annotations

import abc

from tokenization.job import Job, Unit, UnitRecord

MAX_RETRIES = 3
"""How often a unit is tried again when its process died."""


class WorkerDied(Exception):
    """A unit was given up: each process that worked on it was killed, as often as is allowed."""


class Workers(abc.ABC):
    """Processes that tokenize one unit at a time each: LocalWorkers on this machine, RayWorkers on a cluster.

    A unit whose process dies is tried again alone; the other units do not notice.
    """

    @abc.abstractmethod
    def num_free(self) -> int:
        """Units that can be submitted now."""

    @abc.abstractmethod
    def submit(self, job: Job, unit: Unit) -> None:
        """Have a unit tokenized; returns at once. Only while `num_free` is positive."""

    @abc.abstractmethod
    def finished(self) -> list[tuple[Unit, UnitRecord | Exception]]:
        """Wait for units to finish: each with its record, or with what went wrong. Empty when the wait grew long."""
