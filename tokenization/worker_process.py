"""A process of this machine that tokenizes: its start, and its end with the process that started it.

The first one is started before the modules that it needs are imported here: its own imports and its tokenizer take most
of a short run's time.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple


class WorkerProcess(NamedTuple):
    process: Any
    pipe: Connection
    """This side's end."""

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


_early: list[WorkerProcess] = []


def start_early(tokenizer_json: Path) -> None:
    """Start the process that the next `start_process` gives, so that it imports and loads while its work is planned.

    Where there turns out to be no work, `end_early` ends it, or this process's own end.

    Args:
        tokenizer_json: the file, as far as it is known by now.
    """
    with contextlib.suppress(OSError):  # the next start reports it
        _early.append(_start(tokenizer_json))


def end_early() -> None:
    while _early:
        _early.pop().end()


def start_process() -> WorkerProcess:
    """A process that serves `unit_server.serve_units`.

    Raises:
        OSError: the system's limits do not allow it.
    """
    return _early.pop() if _early else _start(None)


def _start(tokenizer_json: Path | None) -> WorkerProcess:
    # The helper process of multiprocessing. Its start unblocks SIGINT, so it must not happen in _deaf.
    multiprocessing.resource_tracker.ensure_running()
    context = multiprocessing.get_context("spawn")  # not fork: Arrow's threads would not survive it
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, tokenizer_json), name="tokenize", daemon=True)
    with _deaf(), _without_main():
        process.start()
    theirs.close()  # so that the pipe ends with the process
    return WorkerProcess(process, ours)


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


def serve(pipe: Connection, tokenizer_json: Path | None) -> None:
    """The process."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    # At the top of the file the parent would import it too, for 0.2 s, before it starts the process.
    from tokenization.unit_server import serve_units

    serve_units(pipe, tokenizer_json)


def _die_with_parent() -> None:
    """Do not even finish the current unit: whoever takes over the work may be writing the same files already."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
