"""On each node: what its training processes are doing, how they ended, and ending them. A Ray actor of the driver's.

It runs beside the processes and needs nothing from them, so it works when they are stopped or hang in the kernel.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import select
import signal
import struct
import time
from pathlib import Path
from typing import Any

from pretraining.heartbeat import STACKS_SIGNAL, Beat, Process, beats_directory, read_beat, start_time

_LOG_BYTES = 1 << 20
_STACKS_WAIT_S = 3.0
# struct pidfd_info of linux/pidfd.h: mask, cgroup, 11 numbers, exit code; the request's number holds the size, 64.
_PIDFD_INFO = struct.Struct("<QQ11Ii")
_PIDFD_GET_INFO, _PIDFD_INFO_EXIT = 0xC040FF0B, 1 << 3


@dataclasses.dataclass(frozen=True)
class Seen:
    """One training process, as its node's watcher saw it."""

    process: Process
    beat: Beat
    idle_s: float
    """Since the beat changed."""
    state: str
    """Letter in /proc/PID/stat: T stopped, D in the kernel, R or S alive; "" where the process is gone."""
    exit_status: int | None
    """As waitpid gives it; None: it runs, or this kernel (before 6.15) does not tell others than the parent."""
    ran_out_of_memory: bool
    """The kernel has ended a process of this node for its memory since the first look at this start."""

    @property
    def rank(self) -> int:
        return self.process.rank


class NodeWatcher:
    """Sees the processes that wrote their heartbeats on this node under the `token` of a start."""

    def __init__(self, node_id: str):
        self._node_id = node_id
        self._pidfds: dict[tuple[str, int], int] = {}
        self._oom_kills: dict[str, int] = {}

    def look(self, token: str) -> list[Seen]:
        """All processes of a start, whatever became of them."""
        found = []
        oom_kills = _oom_kills()
        before = self._oom_kills.setdefault(token, oom_kills)
        for path in sorted(beats_directory(token, self._node_id).glob("rank-*.json")):
            process = Process(**json.loads(path.read_text()))
            key = (token, process.rank)
            if key not in self._pidfds:
                self._pidfds[key] = _open(process)
            state = _state(process)
            beat = read_beat(path.with_suffix(".beat"))
            found.append(
                Seen(
                    process=process,
                    beat=beat,
                    idle_s=time.monotonic() - beat.changed,
                    state=state,
                    exit_status=None if state else _exit_status(self._pidfds[key]),
                    ran_out_of_memory=oom_kills > before,
                )
            )
        return found

    def error(self, token: str, rank: int) -> dict[str, Any] | None:
        """The Python exception that ended a process: time, summary, traceback."""
        path = beats_directory(token, self._node_id) / f"rank-{rank}.error"
        return json.loads(path.read_text()) if path.is_file() else None

    def log(self, token: str, rank: int) -> str:
        """The end of a process's standard error."""
        path = beats_directory(token, self._node_id) / f"rank-{rank}.json"
        with contextlib.suppress(OSError):
            if log := Process(**json.loads(path.read_text())).log:
                return Path(log).read_bytes()[-_LOG_BYTES:].decode(errors="replace")
        return ""

    def stacks(self, token: str) -> dict[int, tuple[str, str]]:
        """By rank, where each thread is, and the last collectives ("": it does not answer).

        A stopped process goes on for it: end it right afterwards.
        """
        running = [seen for seen in self.look(token) if seen.state]
        for seen in running:
            self._signal(token, seen.process, STACKS_SIGNAL)
            self._signal(token, seen.process, signal.SIGCONT)
            self._ask_for_collectives(token, seen.rank)
        directory = beats_directory(token, self._node_id)
        texts: dict[int, str] = {}
        deadline = time.monotonic() + _STACKS_WAIT_S
        while time.monotonic() < deadline:
            before = texts
            texts = {seen.rank: (directory / f"rank-{seen.rank}.stacks").read_text() for seen in running}
            answered = all((directory / f"rank-{seen.rank}.collectives").exists() for seen in running)
            if texts == before and all(texts.values()) and answered:
                break
            time.sleep(0.2)
        for seen in running:  # in the kernel: only the kernel can say where
            if not texts[seen.rank]:
                with contextlib.suppress(OSError):
                    texts[seen.rank] = Path(f"/proc/{seen.process.pid}/stack").read_text()
        found = {}
        for rank, text in texts.items():
            threads = [thread for thread in text.split("\n\n") if "<no Python frame>" not in thread]
            path = directory / f"rank-{rank}.collectives"
            found[rank] = ("\n\n".join(threads), path.read_text() if path.exists() else "")
        return found

    def _ask_for_collectives(self, token: str, rank: int) -> None:
        path = beats_directory(token, self._node_id) / f"rank-{rank}.ask"
        with contextlib.suppress(OSError):  # nobody reads it
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))

    def end(self, token: str) -> None:
        """SIGKILL, which works on stopped processes too."""
        for seen in self.look(token):
            if seen.state:
                self._signal(token, seen.process, signal.SIGKILL)

    def forget(self, token: str) -> None:
        """Remove what a start has left on this node."""
        for key in [key for key in self._pidfds if key[0] == token]:
            descriptor = self._pidfds.pop(key)
            if descriptor >= 0:
                os.close(descriptor)
        directory = beats_directory(token, self._node_id)
        with contextlib.suppress(OSError):
            for path in directory.iterdir():
                path.unlink()
            directory.rmdir()

    def _signal(self, token: str, process: Process, number: signal.Signals) -> None:
        descriptor = self._pidfds[token, process.rank]
        with contextlib.suppress(OSError):
            if descriptor >= 0:
                signal.pidfd_send_signal(descriptor, number)
            elif start_time(process.pid) == process.started:
                os.kill(process.pid, number)


def _open(process: Process) -> int:
    """A descriptor that means this process and never another one; -1: it is gone, or this kernel or Python has none."""
    if not hasattr(os, "pidfd_open"):
        return -1
    try:
        descriptor = os.pidfd_open(process.pid)
        if start_time(process.pid) == process.started:
            return descriptor
        os.close(descriptor)
    except OSError:
        pass
    return -1


def _state(process: Process) -> str:
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" or int(fields[19]) != process.started else fields[0]


def _exit_status(descriptor: int) -> int | None:
    if descriptor < 0 or not select.select([descriptor], [], [], 0)[0]:
        return None
    info = bytearray(_PIDFD_INFO.pack(_PIDFD_INFO_EXIT, *[0] * 13))
    try:
        fcntl.ioctl(descriptor, _PIDFD_GET_INFO, info)
    except OSError:
        return None
    mask, *_, status = _PIDFD_INFO.unpack(info)
    return status if mask & _PIDFD_INFO_EXIT else None


def _oom_kills() -> int:
    """How many processes the kernel has ended for memory: on the machine, or in this container."""
    counts = [0]
    for name in ("/proc/vmstat", "/sys/fs/cgroup/memory.events"):
        with contextlib.suppress(OSError):
            counts += [int(count) for count in re.findall(r"^oom_kill (\d+)$", Path(name).read_text(), re.M)]
    return max(counts)
