"""Commands that are killed on the way, with everything that they started, and given again: time and memory of it all.

Memory is the proportional set size (PSS) of the command and all its descendants: pages that processes share count once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import psutil

from utils import console
from utils.errors import UserError

SAMPLE_S = 0.25


@dataclasses.dataclass
class Kill:
    """When a command is killed: as soon as `reached` says so."""

    reached: Callable[[], bool]
    where: str
    """For the report."""


@dataclasses.dataclass
class Stage:
    """What a command took, all its tries together."""

    name: str
    seconds: float = 0.0
    """From the shell's view, with what the killed tries had done in vain."""
    tries_s: list[float] = dataclasses.field(default_factory=list)
    killed: list[str] = dataclasses.field(default_factory=list)
    peak_pss_bytes: int = 0
    peak_rss_bytes: int = 0
    """Of the largest process."""
    output: str = ""
    """Of the last try."""

    def as_json(self) -> dict[str, Any]:
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "output"}


def run_stage(name: str, script: str, *arguments: Any, kills: list[Kill], log: Path) -> Stage:
    """Run a script of this checkout until it has ended well, killed once at each of `kills`.

    Raises:
        UserError: it failed.
    """
    command = [sys.executable, str(harness.ROOT / script), *map(str, arguments)]
    stage, left = Stage(name), list(kills)
    while True:
        start = time.perf_counter()
        code = _run_once(command, stage, left[0] if left else None, log)
        stage.tries_s.append(time.perf_counter() - start)
        stage.seconds += stage.tries_s[-1]
        stage.output = log.read_text(errors="replace")
        if code is None:
            stage.killed.append(left.pop(0).where)
            console.say(f"{name}: killed {stage.killed[-1]}, after {console.human_seconds(stage.tries_s[-1])}")
        elif code:
            raise UserError(f"{' '.join(command)} left with {code}:\n{stage.output[-5000:]}")
        else:
            break
    if left:
        console.warn(f"{name}: ended before it could be killed {left[0].where}; with more text there is time for it")
    console.say(f"{name}: {console.human_seconds(stage.seconds)}, {console.human_bytes(stage.peak_pss_bytes)}")
    return stage


def _run_once(command: list[str], stage: Stage, kill: Kill | None, log: Path) -> int | None:
    """The exit code; None where it was killed."""
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=harness.ROOT, start_new_session=True
        )
    ended = threading.Event()
    sampler = threading.Thread(target=_sample, args=(process.pid, stage, ended))
    sampler.start()
    try:
        while process.poll() is None:
            if kill is not None and kill.reached():
                _kill_all(process)
                # It may have ended by itself just before.
                return None if process.returncode == -signal.SIGKILL else process.returncode
            time.sleep(0.002 if kill is not None else 0.05)
        return process.returncode
    except BaseException:
        _kill_all(process)
        raise
    finally:
        ended.set()
        sampler.join()


def _kill_all(process: subprocess.Popen) -> None:
    """SIGKILL to the command's process group and to whatever it started beyond it, at once."""
    beyond = _tree(process.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for other in beyond:
        with contextlib.suppress(psutil.NoSuchProcess):
            other.kill()
    process.wait()
    psutil.wait_procs(beyond, timeout=30)


def _tree(pid: int) -> list[psutil.Process]:
    try:
        top = psutil.Process(pid)
        return [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _sample(pid: int, stage: Stage, ended: threading.Event) -> None:
    while not ended.wait(SAMPLE_S):
        pss = 0
        for process in _tree(pid):
            with contextlib.suppress(psutil.Error, OSError):
                memory = process.memory_full_info()
                pss += memory.pss
                stage.peak_rss_bytes = max(stage.peak_rss_bytes, memory.rss)
        stage.peak_pss_bytes = max(stage.peak_pss_bytes, pss)
