"""What a training process is doing, where another process of its node can read it even while this one is stopped.

    DIRECTORY/                    on the node, in its temporary files
      rank-3.beat                 one page of shared memory: see _LAYOUT
      rank-3.json                 who the process is
      rank-3.stacks               where its threads are, written on SIGUSR2, in whatever state the process is
      rank-3.ask                  a pipe: what is written to it asks for the next file
      rank-3.collectives          torch's flight recorder, as JSON: the last collectives, and which are not complete
      rank-3.error                its Python exception, if one ended it

Writing costs about a microsecond: no system call, no lock. pretraining.node_watcher reads it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import mmap
import os
import signal
import struct
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# In the order of a step. The first is before the first step has ended; `save` is what holds up training, `ending` what
# comes after the last step, or after the request to stop.
PHASES = (
    "start",
    "reading data",
    "forward and backward pass",
    "reduction and update",
    "validation",
    "save",
    "ending",
    "end",
)
STEP_PHASES = PHASES[1:4]

STACKS_SIGNAL = signal.SIGUSR2
# step, phase, steps done since the start of the process, time.monotonic() of the last change, Beat.longest_s
_LAYOUT = struct.Struct("<qqqdd")


def beats_directory(token: str, node_id: str) -> Path:
    """Of one start of the workers (`token`) on one node: nodes may share a machine."""
    return Path(tempfile.gettempdir()) / f"pretraining-{token}-{node_id[:12]}"


@dataclasses.dataclass(frozen=True)
class Process:
    """Who a training process is, for people and for its node's watcher."""

    rank: int
    pid: int
    started: int
    """Its start time in clock ticks, from /proc: a process id alone may be taken again."""
    out_dir: str
    """Of its run: several may use a node."""
    node: str
    device: str
    """Such as "GPU 3", or "process 1" on a CPU."""
    log: str | None
    """Its standard error, in a file on its node."""


class Heartbeat:
    """The writing end. Without a path it is written for nobody, at the same cost.

    Args:
        path: of the page, `rank-N.beat`.
        place: of the process, for people: node and device.
    """

    def __init__(self, path: Path | None = None, place: str = "unknown node"):
        self.place = place
        if path is None:
            self._page = mmap.mmap(-1, mmap.PAGESIZE)
        else:
            with open(path, "w+b") as file:
                file.truncate(mmap.PAGESIZE)
                self._page = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        self._step, self._phase, self._steps_done = 0, 0, 0
        self._began = time.monotonic()
        self._longest_s: dict[int, float] = {}
        self.beat("start")

    def beat(self, phase: str, longest_s: float = 0.0) -> None:
        """Now in `phase`.

        Args:
            longest_s: where its length says little of how long it may take: what this has taken so far at most.
        """
        now = time.monotonic()
        self._longest_s[self._phase] = max(now - self._began, self._longest_s.get(self._phase, 0.0))
        self._phase, self._began = PHASES.index(phase), now
        self._longest_s[self._phase] = max(longest_s, self._longest_s.get(self._phase, 0.0))
        self._write()

    def again(self) -> None:
        """Still in the same phase, and getting on."""
        self._write()

    def step_done(self, step: int) -> None:
        """Say how many optimizer steps are done."""
        self._steps_done += 1
        self._step = step
        self._write()

    def _write(self) -> None:
        longest_s = self._longest_s[self._phase]
        _LAYOUT.pack_into(self._page, 0, self._step, self._phase, self._steps_done, time.monotonic(), longest_s)


@dataclasses.dataclass(frozen=True)
class Beat:
    step: int
    phase: str
    steps_done: int
    """Since the process started: the first is slower."""
    changed: float
    """time.monotonic() of the node."""
    longest_s: float
    """For how long this process has been in this phase before, at most; 0: it never was."""


def read_beat(path: Path) -> Beat:
    """The reading end. May raise OSError or ValueError while the file is being made."""
    while True:
        with open(path, "rb") as file:
            before = file.read(_LAYOUT.size)
            file.seek(0)
            if before != file.read(_LAYOUT.size):  # caught in the middle of a change
                continue
        if len(before) < _LAYOUT.size:
            raise ValueError(f"{path}: not written yet")
        step, phase, steps_done, changed, longest_s = _LAYOUT.unpack(before)
        return Beat(step, PHASES[phase], steps_done, changed, longest_s)


@contextlib.contextmanager
def watched(
    directory: Path, rank: int, out_dir: str, node: str, device: str, collectives: Callable[[], bytes]
) -> Iterator[Heartbeat]:
    """Make this process visible to its node's watcher for the length of the block.

    Args:
        collectives: gives the content of rank-N.collectives.
    """
    directory.mkdir(parents=True, exist_ok=True)
    heartbeat = Heartbeat(directory / f"rank-{rank}.beat", f"node {node}, {device}")
    log = os.readlink("/proc/self/fd/2")
    log_file = log if log.startswith("/") else None
    process = Process(rank, os.getpid(), start_time(os.getpid()), out_dir, node, device, log_file)
    with open(directory / f"rank-{rank}.stacks", "w") as stacks:
        # From C, in whichever thread the signal meets: a lock of the interpreter that is held does not matter.
        faulthandler.register(STACKS_SIGNAL, file=stacks, all_threads=True)
        with contextlib.suppress(FileExistsError):
            os.mkfifo(directory / f"rank-{rank}.ask")
        answer = threading.Thread(target=_answer, args=(directory, rank, collectives), name="collectives", daemon=True)
        answer.start()
        write_whole(directory / f"rank-{rank}.json", dataclasses.asdict(process))
        try:
            yield heartbeat
            heartbeat.beat("end")
        except BaseException as error:
            write_whole(
                directory / f"rank-{rank}.error",
                {
                    "time": time.time(),
                    "summary": "".join(traceback.format_exception_only(error)).strip(),
                    "traceback": traceback.format_exc(),
                },
            )
            raise
        finally:
            faulthandler.unregister(STACKS_SIGNAL)


def _answer(directory: Path, rank: int, collectives: Callable[[], bytes]) -> None:
    with contextlib.suppress(OSError):
        (directory / f"rank-{rank}.ask").read_bytes()  # waits
        temporary = directory / f"rank-{rank}.collectives.new"
        temporary.write_bytes(collectives())
        os.replace(temporary, directory / f"rank-{rank}.collectives")


def write_whole(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(content))
    os.replace(temporary, path)


def start_time(pid: int) -> int:
    """Field 22 of /proc/PID/stat. Raises OSError where there is no such process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
