"""Tokenization on this machine alone: a few processes, without a cluster around them.

A process holds one end of a pipe: it reads a unit, and answers with the unit's record or with the exception that was
raised. A process that dies closes its end; its unit goes to a new process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing.connection
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from tokenization.encoder import PreparedTokenizer
from tokenization.job import Job, Unit, UnitRecord
from tokenization.worker_process import start_process
from tokenization.workers import MAX_RETRIES, WorkerDied, Workers
from utils.errors import UserError
from utils.machine import raise_open_file_limit


@dataclasses.dataclass
class _Worker:
    process: Any
    pipe: Connection
    unit: Unit | None = None
    job: Job | None = None
    """The last one that it got."""


class LocalWorkers(Workers):
    """`num_workers` processes of this machine.

    Args:
        load_tokenizer: prepares the tokenizer; called once, while the processes start.
        max_retries: how often a unit is tried again when its process died.

    Raises:
        UserError: the system's limits do not allow so many processes.
    """

    def __init__(
        self, num_workers: int, load_tokenizer: Callable[[], PreparedTokenizer], max_retries: int = MAX_RETRIES
    ):
        raise_open_file_limit(256 + 4 * num_workers)  # each process takes three descriptors here
        self._max_retries = max_retries
        self._deaths: dict[int, int] = {}
        self._tokenizer: PreparedTokenizer | None = None
        self._workers: list[_Worker] = []
        try:
            for _ in range(num_workers):
                self._workers.append(self._start())
        except OSError as error:  # EMFILE: open files; EAGAIN: processes; ENOMEM
            self.close()
            raise UserError(
                f"--num_workers={num_workers}: so many processes cannot be started here ({error.strerror}, after "
                f"{len(self._workers)}). Give fewer, or raise the limits that `ulimit -n` and `ulimit -u` show."
            ) from error
        self._tokenizer = load_tokenizer()
        for worker in self._workers:
            self._send(worker, self._tokenizer)

    def _start(self) -> _Worker:
        worker = _Worker(*start_process())
        if self._tokenizer is not None:
            self._send(worker, self._tokenizer)
        return worker

    @staticmethod
    def _send(worker: _Worker, message: Any) -> None:
        with contextlib.suppress(OSError):  # it has died: `finished` sees that, and starts another
            worker.pipe.send(message)

    def num_free(self) -> int:
        return sum(worker.unit is None for worker in self._workers)

    def submit(self, job: Job, unit: Unit) -> None:
        worker = next(worker for worker in self._workers if worker.unit is None)
        self._hand(worker, job, unit)

    def _hand(self, worker: _Worker, job: Job, unit: Unit) -> None:
        new_job = None if worker.job is job else job  # it lists all input files: not with every unit
        worker.unit, worker.job = unit, job
        self._send(worker, (new_job, unit))

    def finished(self) -> list[tuple[Unit, UnitRecord | Exception]]:
        done: list[tuple[Unit, UnitRecord | Exception]] = []
        while not done:
            pipes = {worker.pipe: i for i, worker in enumerate(self._workers) if worker.unit is not None}
            for pipe in multiprocessing.connection.wait(list(pipes)):
                i = pipes[pipe]
                unit = self._workers[i].unit
                try:
                    done.append((unit, pipe.recv()))
                    self._workers[i].unit = None
                except (EOFError, OSError):
                    if (death := self._replace(i)) is not None:
                        done.append((unit, death))
        return done

    def _replace(self, i: int) -> WorkerDied | None:
        """Start a process in place of one that died, and give it the unit; or say that this happened too often."""
        dead = self._workers[i]
        dead.process.join()
        self._deaths[dead.unit.index] = deaths = self._deaths.get(dead.unit.index, 0) + 1
        if deaths > self._max_retries:
            return WorkerDied(f"unit {dead.unit.index}, exit code {dead.process.exitcode}")
        dead.pipe.close()
        self._workers[i] = self._start()
        self._hand(self._workers[i], dead.job, dead.unit)
        return None

    def close(self) -> None:
        """End all processes, whatever they are doing: it has no record yet, and will be done again."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()
