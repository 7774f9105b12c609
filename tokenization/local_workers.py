"""Tokenization on this machine alone: a few processes, ready in two seconds, without a cluster around them.

A process holds one end of a pipe: it reads a unit, and answers with the unit's record or with the exception that was
raised. A process that dies closes its end; its unit goes to a new process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tokenization.encoder import PreparedTokenizer, import_gigatoken, load_reference
from tokenization.job import Job, Unit, UnitRecord
from tokenization.tokenize_unit import process_encoder, tokenize_unit
from tokenization.workers import MAX_RETRIES, WorkerDied, Workers
from utils.errors import UserError
from utils.machine import raise_open_file_limit

FOLDER = "0"
"""Sub-folder of train/ and val/: this machine is the only node."""


@dataclasses.dataclass
class _Worker:
    process: Any
    pipe: Connection
    unit: Unit | None = None
    job: Job | None = None
    """The last one that it got."""


_early: list[_Worker] = []


def start_early(tokenizer_json: Path) -> None:
    """Start the first process of the next `LocalWorkers`, which imports and loads while its work is being planned.

    Where there turns out to be no work, `end_early` ends it, or this process's own end.

    Args:
        tokenizer_json: the file, as far as it is known by now.
    """
    with contextlib.suppress(OSError):  # LocalWorkers will say it
        _early.append(_start_process(tokenizer_json))


def end_early() -> None:
    while _early:
        worker = _early.pop()
        worker.process.kill()
        worker.process.join()
        worker.pipe.close()


def _start_process(tokenizer_json: Path | None = None) -> _Worker:
    # The helper process of multiprocessing. Its start unblocks SIGINT, so it must not happen in _deaf.
    multiprocessing.resource_tracker.ensure_running()
    context = multiprocessing.get_context("spawn")  # not fork: Arrow's threads would not survive it
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, tokenizer_json), name="tokenize", daemon=True)
    with _deaf(), _without_main():
        process.start()
    theirs.close()  # so that the pipe ends with the process
    return _Worker(process, ours)


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
        worker = _early.pop() if _early else _start_process()
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


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Start a child in here that does not import the script, as multiprocessing would have it: it needs nothing of it,
    and the command line's parser alone takes 0.2 s of each process."""
    main = sys.modules["__main__"]
    file = main.__dict__.pop("__file__", None)
    try:
        yield
    finally:
        if file is not None:
            main.__file__ = file


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Start a child in here: Ctrl-C and SIGTERM would leave the parent between the child's start and its first message,
    which the child would miss. They are raised at the end of the block instead.

    Ctrl-C reaches the whole process group, but it is the parent that ends its children, so the child inherits the
    blocked signal; the parent's other threads take it all the same.
    """
    caught: list[int] = []
    handlers = {
        number: signal.signal(number, lambda n, _: caught.append(n)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if caught:
        signal.raise_signal(caught[0])


def serve(pipe: Connection, tokenizer_json: Path | None = None) -> None:
    """The process: the tokenizer first, then units until the pipe ends.

    Args:
        tokenizer_json: a file to load before the tokenizer comes, which it is probably made from.
    """
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with contextlib.suppress(Exception):  # whoever needs it hears of it
        import_gigatoken()
        if tokenizer_json:
            load_reference(tokenizer_json.read_bytes())
    try:
        tokenizer, job = pipe.recv(), None
        while True:
            new_job, unit = pipe.recv()
            job = new_job or job
            try:
                encoder = process_encoder(job, lambda: tokenizer)
                answer = tokenize_unit(job, unit, FOLDER, encoder)
            except BaseException as error:  # a panic in Rust code is not an Exception
                answer = _as_message(error)
            pipe.send(answer)
    except (EOFError, OSError):  # the parent is gone or has closed
        return


def _as_message(error: BaseException) -> Exception:
    """The error as the parent gets it: itself if it survives the pipe, else its text."""
    text = "".join(traceback.format_exception(error))
    try:
        error.add_note(text)
        if isinstance(pickle.loads(pickle.dumps(error)), Exception):
            return error
    except Exception:
        pass
    return RuntimeError(text)


def _die_with_parent() -> None:
    """Do not even finish the current unit: whoever takes over the work may be writing the same files already."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
