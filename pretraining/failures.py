"""How a training process ended, in one paragraph; whether the run goes on, and from where."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretraining.checkpoint import find_newest_good
from pretraining.events import record_event
from pretraining.node_watcher import Seen
from utils import console
from utils.errors import UserError

FAILURES_NAME = "failures"
EXIT_FAILED = 3
"""The training processes died or hung, more often in a row than --max_failures allows."""


class UnevenPlacement(UserError):
    """Ray put the processes on its nodes unevenly; with the next start that may be otherwise."""


class TrainingEnded(Exception):
    """The processes are not started again; the message says why."""


@dataclasses.dataclass(frozen=True)
class Failure:
    message: str
    """Who, of what, and where to read on; for a person."""
    cause: str
    """Short; equal for two failures that happened in the same way."""
    step: int | None
    """Optimizer steps that were done."""


def name_of(seen: Seen) -> str:
    process = seen.process
    return f"rank {process.rank} (node {process.node}, {process.device}, pid {process.pid})"


def cause_of_death(exit_status: int | None, out_of_memory: bool, log: str, said_by_ray: str) -> str:
    """Of what a process died, from what is left of it.

    Args:
        exit_status: as waitpid gives it; None: unknown.
        out_of_memory: whether the kernel ended a process of its node for memory.
        log: its standard error.
        said_by_ray: Ray's account.
    """
    number = None
    if exit_status is not None:
        number = os.WTERMSIG(exit_status) if os.WIFSIGNALED(exit_status) else 0
    elif match := re.search(r"\*\*\* (SIG[A-Z]+) received", log):
        number = signal.Signals[match[1]]
    if "OutOfMemory" in said_by_ray or "running low on memory" in said_by_ray:
        return "out of memory: Ray ended it, because its node's memory (not a GPU's) was nearly full"
    if number in (None, signal.SIGKILL) and out_of_memory:
        return "SIGKILL: the kernel ended it, because its node's memory (not a GPU's) was full"
    if number:
        return f"{signal.Signals(number).name} ({signal.strsignal(number)})"
    if exit_status is not None:
        return f"exit code {os.waitstatus_to_exitcode(exit_status)}"
    return "an unknown cause; most often SIGKILL, from a person, a scheduler or the kernel out of memory"


def last_words(log: str) -> str:
    """The line of a process's standard error that says most."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    fatal = [line for line in lines if line.startswith("Fatal Python error") or line.startswith("terminate called")]
    return fatal[-1] if fatal else ""


def failure_of(
    error: Exception, seen: list[Seen], errors: dict[int, dict[str, Any]], log_of: Callable[[int], str], out_dir: Path
) -> Failure:
    """What ended a start of the workers, told by the process that failed first.

    Args:
        error: what Ray Train raised.
        seen: the processes, as their nodes' watchers see them now.
        errors: the Python exceptions that they left: time, summary, traceback.
        log_of: gives the standard error of a rank.
        out_dir: where the whole log is copied to.
    """
    by_rank = {one.rank: one for one in seen}
    step = max((one.beat.step for one in seen), default=None)
    failures = getattr(error, "worker_failures", {})
    # Those that lost a peer fail too. A process that is dead cannot have failed of that.
    dead = [rank for rank in sorted(failures) if getattr(failures[rank], "health_check_failure", None) is not None]
    if not set(failures) & set(by_rank):
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        what = "did not start" if not seen else "were ended by Ray"
        return Failure(f"the training processes {what}: {lines[-1] if lines else error!r}", type(error).__name__, step)
    raised = sorted((one["time"], rank) for rank, one in errors.items() if rank in failures)
    rank = dead[0] if dead else raised[0][1] if raised else min(failures)
    if rank not in by_rank:
        return Failure(f"rank {rank} died: {failures[rank]}".splitlines()[0], f"rank {rank}", step)
    one, log = by_rank[rank], log_of(rank)
    if dead:
        cause = cause_of_death(one.exit_status, one.ran_out_of_memory, log, str(failures[rank]))
        what = f"died of {cause}"
        words = last_words(log)
    else:
        cause = errors.get(rank, {}).get("summary", str(failures[rank]))
        what, words = "failed", cause
        log += "\n" + errors.get(rank, {}).get("traceback", "")
    path = out_dir / FAILURES_NAME / f"step-{one.beat.step:08d}-rank-{rank}.log"
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_text(log)
        where = f" Its log is in {path}."
    except OSError as error:
        where = f" Its log could not be kept: {path}: {error.strerror}."
    more = f", and {len(dead) - 1} more with it" if len(dead) > 1 else ""
    message = (
        f"{name_of(one)} {what} in the phase '{one.beat.phase}' after step {one.beat.step}{more}"
        f"{': ' + words if words else ''}.{where}"
    )
    return Failure(message, f"rank {rank}, {cause}", step)


class Restarts:
    """Counts failures in a row. A new complete checkpoint is progress, and the count starts again.

    Args:
        max_failures: failures in a row after each of which the workers are started again (-1: without end).
    """

    def __init__(self, out_dir: Path, max_failures: int):
        self._out_dir, self._max_failures = out_dir, max_failures
        self._newest_step = self._newest()[1]
        self._in_a_row: list[Failure] = []

    def _newest(self) -> tuple[Path | None, int]:
        newest, _ = find_newest_good(self._out_dir, checksums=False)
        return (newest.path, newest.step) if newest else (None, 0)

    def add(self, failure: Failure) -> None:
        """Tell the user what failed and what happens next.

        Raises:
            TrainingEnded: the workers are not to be started again.
        """
        path, newest_step = self._newest()
        if newest_step > self._newest_step:
            self._in_a_row = []
        self._newest_step = newest_step
        self._in_a_row.append(failure)
        count = len(self._in_a_row)
        from_where = f"{path} (step {newest_step})" if path else "the beginning, since no checkpoint was due yet"
        lost = max(0, failure.step - newest_step) if failure.step is not None else None
        left = None if self._max_failures < 0 else self._max_failures - count
        if left is not None and left < 0:
            message = f"{failure.message} {self._verdict()} The same command goes on from {from_where}:"
            record_event(self._out_dir, "end", message, cause=failure.cause, step=failure.step, failures=count)
            raise TrainingEnded(message)
        again = f"; {console.counted(lost, 'step')} after it are done again" if lost else ""
        more = (
            ""
            if left is None
            else f" {console.counted(left, 'restart')} left until there is a new checkpoint (--max_failures)."
        )
        record_event(
            self._out_dir, "restart", f"{failure.message} The workers start again from {from_where}{again}.{more}",
            cause=failure.cause, step=failure.step, from_step=newest_step, lost_steps=lost, restarts_left=left,
        )  # fmt: skip

    def _verdict(self) -> str:
        count = len(self._in_a_row)
        if count == 1:
            return "It is not started again (--max_failures=0)."
        if len({(failure.cause, failure.step) for failure in self._in_a_row}) == 1:
            return (
                f"It was the same each of {count} times, at the same step: not chance, but the data of that step, the "
                "settings or the software. Starting again would not help."
            )
        return f"There were {count} failures in a row without a new checkpoint (--max_failures={self._max_failures})."
