"""The driver's watch over the training processes: who hangs, since when, and ending all of them when nothing moves."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pretraining.events import record_event
from pretraining.failures import Failure, name_of
from pretraining.heartbeat import PHASES, STEP_PHASES, Beat
from pretraining.node_watcher import NodeWatcher, Seen
from pretraining.settings import Settings
from utils import console
from utils.console import human_seconds

HANGS_NAME = "hangs"
_POLL_INTERVAL_S = 1.0
_ANSWER_TIMEOUT_S = 10.0
_TOO_MANY_FAILED_LOOKS = 30
_STEPS_WAITED_FOR = 10
_MIN_TIMEOUT_S, _MAX_TIMEOUT_S = 60.0, 600.0
_WARM_UP_STEPS = 2  # they compile, allocate and tune
_TIMES_THE_LONGEST = 10
# Phases whose earlier length tells how long they may take, and the least for which one is waited. A shared file system
# that stalls for some minutes is no hang.
_MIN_SLOW_TIMEOUT_S = {"validation": 60.0, "save": 600.0}


class Watchers:
    """The node watchers of a cluster, one actor on each node, as one."""

    def __init__(self) -> None:
        self._actors: dict[str, Any] = {}
        self._failed_looks = 0
        self._start = ray.remote(num_cpus=0, max_restarts=0)(NodeWatcher)

    def start(self) -> None:
        """On every node that has none yet; nodes come and go between two starts of the workers."""
        for node in ray.nodes():
            if node["Alive"] and node["NodeID"] not in self._actors:
                pinned = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                self._actors[node["NodeID"]] = self._start.options(scheduling_strategy=pinned).remote(node["NodeID"])

    def look(self, token: str) -> list[Seen]:
        """The processes on all nodes that answer, by rank."""
        return sorted(itertools.chain.from_iterable(self._ask("look", token)), key=lambda seen: seen.rank)

    def stacks(self, token: str) -> dict[int, tuple[str, str]]:
        return {rank: text for texts in self._ask("stacks", token) for rank, text in texts.items()}

    def error(self, token: str, rank: int) -> dict[str, Any] | None:
        return next((error for error in self._ask("error", token, rank) if error), None)

    def log(self, token: str, rank: int) -> str:
        return next((text for text in self._ask("log", token, rank) if text), "")

    def end(self, token: str) -> None:
        self._ask("end", token)

    def forget(self, token: str) -> None:
        self._ask("forget", token)

    def close(self) -> None:
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors.clear()

    def _ask(self, method: str, *arguments: Any) -> list[Any]:
        asked = {getattr(actor, method).remote(*arguments): node for node, actor in self._actors.items()}
        if not asked:
            return []
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_TIMEOUT_S)
        answers = []
        for reference in ready:
            try:
                answers.append(ray.get(reference))
            except ray.exceptions.RayActorError:  # its node is gone
                self._actors.pop(asked[reference], None)
            except ray.exceptions.RayTaskError as error:  # a file that is being made; the next look sees it
                self._failed_looks += 1
                if self._failed_looks == _TOO_MANY_FAILED_LOOKS:
                    console.warn(f"the processes cannot be watched on a node: {str(error).splitlines()[-1]}")
        return answers


class Watchdog:
    """Watches one start of the workers, in a thread, while the driver waits for them. Ends them when one hangs.

    Args:
        token: of this start.
    """

    def __init__(self, watchers: Watchers, token: str, settings: Settings):
        self._watchers, self._token, self._settings = watchers, token, settings
        self._out_dir = Path(settings.out_dir)
        self._step_times_s: deque[float] = deque(maxlen=64)
        self._last_step: tuple[int, float] | None = None
        self.seen: list[Seen] = []
        """The processes at the last look, which were still alive then."""
        self.hang: Failure | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._stop.set()
        self._thread.join()

    def step_timeout_s(self) -> float:
        """For what is part of a step, or for a process that was stopped."""
        if self._settings.train.step_timeout is not None:
            return self._settings.train.step_timeout
        if not self._step_times_s:
            return _MAX_TIMEOUT_S
        median_s = statistics.median(self._step_times_s)
        # A GPU's whole step may pass in one wait, so a step of many minutes needs more than the maximum.
        return max(min(max(_STEPS_WAITED_FOR * median_s, _MIN_TIMEOUT_S), _MAX_TIMEOUT_S), 2 * median_s)

    def timeout_s(self, seen: Seen, others: list[Seen]) -> float:
        """How long a process may stay as it is: in a step it may wait for another one that saves, validates or starts.

        Args:
            others: all processes of the run.
        """
        in_step = all(one.beat.phase in STEP_PHASES and one.beat.steps_done >= _WARM_UP_STEPS for one in others)
        if in_step or seen.state in ("T", "t"):
            return self.step_timeout_s()
        return max(self._slow_timeout_s(one.beat) for one in others)

    def _slow_timeout_s(self, beat: Beat) -> float:
        if beat.steps_done >= _WARM_UP_STEPS and beat.phase in STEP_PHASES:
            return self.step_timeout_s()
        limit_s = self._settings.train.slow_timeout
        least_s = _MIN_SLOW_TIMEOUT_S.get(beat.phase)
        if least_s is None or not beat.longest_s:
            return limit_s
        return min(max(_TIMES_THE_LONGEST * beat.longest_s, least_s), limit_s)

    def _run(self) -> None:
        while not self._stop.wait(_POLL_INTERVAL_S):
            try:
                if seen := self._watchers.look(self._token):
                    self.seen = seen
                    self._measure_step(seen[0])
                    late = [one for one in seen if one.state and one.beat.phase != "end"]
                    if any(one.idle_s > self.timeout_s(one, late) for one in late):
                        self._end(seen)
                        return
            except ray.exceptions.RayError:  # the cluster is going away, and the driver's main thread says so
                return

    def _measure_step(self, first: Seen) -> None:
        """Steps may be shorter than the time between two looks: the mean over them counts then."""
        now = time.monotonic()
        if self._last_step is None or first.beat.steps_done <= _WARM_UP_STEPS:
            self._last_step = (first.beat.steps_done, now)
            return
        steps, at = self._last_step
        if first.beat.steps_done > steps:
            self._step_times_s.append((now - at) / (first.beat.steps_done - steps))
            self._last_step = (first.beat.steps_done, now)

    def _end(self, seen: list[Seen]) -> None:
        said = self._watchers.stacks(self._token)
        stacks = {rank: text for rank, (text, _) in said.items()}
        step = max(one.beat.step for one in seen)
        blamed = blame(seen, stacks)
        who = name_of(blamed[0]) if blamed else "no process stood out when all"
        self.hang = Failure(f"{who} hung.", f"rank {blamed[0].rank} hung" if blamed else "all hung", step)
        self._watchers.end(self._token)  # before anything is written: out_dir's file system may be what hangs
        directory = self._write(seen, said, step)
        world_size = self._settings.num_nodes * (self._settings.num_devices or 1)
        unseen = sorted(set(range(world_size)) - {one.rank for one in seen})
        message = f"hang: {describe(seen, blamed, unseen)}"
        if directory is not None:
            message += f" The stacks of all threads are in {directory}."
        record_event(
            self._out_dir, "hang", message, step=step, ranks=[one.rank for one in blamed] or unseen,
            phases={str(one.rank): one.beat.phase for one in seen}, stacks=str(directory),
        )  # fmt: skip

    def _write(self, seen: list[Seen], said: dict[int, tuple[str, str]], step: int) -> Path | None:
        """Keep what the processes said; None where it cannot be written."""
        try:
            directory = _new_directory(self._out_dir / HANGS_NAME, step)
            for one in seen:
                stacks, collectives = said.get(one.rank, ("", ""))
                text = f"{name_of(one)}: {status_of(one)}\n\n{stacks or 'it did not say where it is'}\n"
                (directory / f"rank-{one.rank}.txt").write_text(text)
                if collectives:
                    (directory / f"rank-{one.rank}-collectives.json").write_text(collectives)
            return directory
        except OSError as error:
            console.warn(f"{self._out_dir / HANGS_NAME}: {error.strerror}; the stacks are lost")
            return None


def _new_directory(parent: Path, step: int) -> Path:
    for number in itertools.count(1):
        directory = parent / f"step-{step:08d}-{number}"
        with contextlib.suppress(FileExistsError):
            directory.mkdir(parents=True)
            return directory
    raise AssertionError


def blame(seen: list[Seen], stacks: dict[int, str]) -> list[Seen]:
    """The processes that the others wait for; none where nothing tells them from the others."""
    tests: tuple[Callable[[Seen], bool], ...] = (
        lambda one: one.state in ("", "T", "t"),
        lambda one: one.state == "D",
        lambda one: _place(one) == min(map(_place, seen)),
        lambda one: not _waits_for_others(stacks.get(one.rank, "")),
    )
    for test in tests:
        found = [one for one in seen if test(one)]
        if found and len(found) < len(seen):
            return found
    return seen if len(seen) == 1 else []


def _place(seen: Seen) -> tuple[int, int]:
    return seen.beat.step, PHASES.index(seen.beat.phase)


def _waits_for_others(stacks: str) -> bool:
    """Whether the thread that trains stands in a collective."""
    threads = stacks.split("\n\n")
    training = [thread for thread in threads if "pretraining/trainer.py" in thread]
    innermost = "\n".join(training[0].splitlines()[1:5]) if training else ""
    return "torch/distributed/" in innermost


def status_of(seen: Seen) -> str:
    state = {"": "gone", "T": "stopped by a signal", "t": "stopped by a debugger", "D": "waiting in the kernel"}
    where = f"in the phase '{seen.beat.phase}' after step {seen.beat.step} since {human_seconds(seen.idle_s)}"
    return f"{state[seen.state]}, {where}" if seen.state in state else where


def describe(seen: list[Seen], blamed: list[Seen], unseen: list[int]) -> str:
    """A paragraph: who is where since when, and who waits for whom."""
    shown = [f"{name_of(one)} is {status_of(one)}" for one in blamed[:3]]
    if len(blamed) > 3:
        shown.append(f"{len(blamed) - 3} more likewise")
    if unseen:
        shown.append(f"of ranks {', '.join(map(str, unseen[:8]))} nothing is heard: their node does not answer")
    others = [one for one in seen if one not in blamed]
    waiting: dict[str, list[Seen]] = {}
    for one in others:
        waiting.setdefault(one.beat.phase, []).append(one)
    rest = [
        f"{'rank ' + str(group[0].rank) if len(group) == 1 else f'{len(group)} ranks'} in '{phase}' since "
        f"{human_seconds(min(one.idle_s for one in group))}"
        for phase, group in waiting.items()
    ]
    if not shown:
        return f"no process gets on, and none stands out: {'; '.join(rest)}."
    return f"{'; '.join(shown)}." + (f" The others wait: {'; '.join(rest)}." if rest else "")
