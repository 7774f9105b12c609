"""What each process spends its steps on: computing, waiting for the others, waiting for data; and who is slow.

No step waits for it. A process measures its forward and backward passes, on a GPU by events that are read a step later,
when they are there anyway; the figures of the step before travel in the step's one all-reduce (see step_sums).

All processes take equally long for a step, since they wait for each other in every block. So a slow one shows in what
is left of the step without the waiting.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from pretraining.events import record_event

KINDS = ("compute", "wait", "data")
SLOW_FACTOR = 1.15
SLOW_STEPS = 50


class StepClock:
    """The times of one process in the forward and backward passes of a step.

    Args:
        model: sharded by FSDP2.
        device: a GPU's times are those of its current stream.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device):
        self._is_cuda = device.type == "cuda"
        self._events: list[torch.cuda.Event] = []  # reused: making one takes a call to the driver
        self._num_used = 0
        self._sections: list[tuple[str, Any, Any]] = []
        self._started = self._ended = None
        self.seconds_before = [0.0] * len(KINDS)
        """What the step before was spent on, in the order of KINDS; zeros: there was none."""
        self.data_wait_s = 0.0
        """For how long the process itself has waited for data in this step; a GPU may have been busy meanwhile."""
        # FSDP2 has no public place for this. On a GPU these calls let its stream wait, on a CPU the process itself:
        # there it gathers within `unshard`.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                for group in module._get_fsdp_state()._fsdp_param_groups:
                    for name in ("unshard", "wait_for_unshard", "post_backward", "finalize_backward"):
                        setattr(group, name, self._timed("wait", getattr(group, name)))

    def begin(self, batches: Iterator[Any]) -> Callable[[], Any]:
        """A step begins; the one before has waited for its device.

        Returns:
            A function that gives the next of `batches`.
        """
        self.seconds_before = self._seconds_of_step()
        self._num_used, self._sections, self._ended, self.data_wait_s = 0, [], None, 0.0
        self._started = self._mark()
        read = self._timed("data", lambda: next(batches))

        def next_batch() -> Any:
            started = time.perf_counter()
            batch = read()
            self.data_wait_s += time.perf_counter() - started
            return batch

        return next_batch

    def end(self) -> None:
        """The last backward pass is done, or on its way to the device."""
        self._ended = self._mark()

    def _seconds_of_step(self) -> list[float]:
        if self._ended is None:
            return [0.0] * len(KINDS)
        seconds = dict.fromkeys(KINDS, 0.0)
        for kind, first, last in self._sections:
            seconds[kind] += self._between(first, last)
        seconds["compute"] = max(0.0, self._between(self._started, self._ended) - seconds["wait"] - seconds["data"])
        return list(seconds.values())

    def _mark(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        if self._num_used == len(self._events):
            self._events.append(torch.cuda.Event(enable_timing=True))
        event = self._events[self._num_used]
        self._num_used += 1
        event.record()
        return event

    def _between(self, first: Any, last: Any) -> float:
        return first.elapsed_time(last) / 1000 if self._is_cuda else last - first

    def _timed(self, kind: str, call: Callable) -> Callable:
        """`call`, its time within a step counted as waiting of this kind."""

        @functools.wraps(call)
        def timed_call(*args: Any, **kwargs: Any) -> Any:
            if self._started is None or self._ended is not None:  # a validation
                return call(*args, **kwargs)
            first = self._mark()
            result = call(*args, **kwargs)
            self._sections.append((kind, first, self._mark()))
            return result

        return timed_call


class Slowness:
    """Which ranks compute longer than the median, many steps in a row."""

    def __init__(self, num_ranks: int):
        self._slow_for = np.zeros(num_ranks, dtype=np.int64)
        self._named: set[int] = set()

    def add(self, compute_s: np.ndarray) -> list[int]:
        """Count a step; returns the ranks that are to be named now, each once."""
        slow = compute_s > SLOW_FACTOR * lower_median(compute_s)
        self._slow_for = np.where(slow, self._slow_for + 1, 0)
        found = [rank for rank in np.flatnonzero(self._slow_for == SLOW_STEPS).tolist() if rank not in self._named]
        self._named.update(found)
        return found


def lower_median(values: np.ndarray) -> float:
    """Of two processes the faster one counts."""
    return float(np.sort(values)[(len(values) - 1) // 2])


class SlowRanks:
    """The times of all processes, step by step; names those that are slow for long. Every process makes one.

    Args:
        model, device: see StepClock.
        place: of this process, for people: node and device.
        out_dir: where rank 0 writes events.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device, place: str, out_dir: Path):
        self.clock = StepClock(model, device)
        self._places: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(self._places, place)
        self._out_dir = out_dir
        self._slowness = Slowness(len(self._places))
        self._start_again()

    def _start_again(self) -> None:
        self._sums, self._num_steps = np.zeros((len(self._places), len(KINDS))), 0

    def add(self, seconds: list[float], step: int) -> None:
        """Count a step.

        Args:
            seconds: of each rank, one after the other, in the order of KINDS.
            step: optimizer steps done.
        """
        times = np.array(seconds).reshape(len(self._places), len(KINDS))
        compute_s = times[:, KINDS.index("compute")]
        if not compute_s.all():  # the first step of a start
            return
        self._sums += times
        self._num_steps += 1
        for rank in self._slowness.add(compute_s):
            if dist.get_rank() == 0:
                self._name(rank, compute_s[rank], lower_median(compute_s), step)

    def _name(self, rank: int, compute_s: float, median_s: float, step: int) -> None:
        message = (
            f"slow: rank {rank} ({self._places[rank]}) computes for {1000 * compute_s:.0f} ms per step, the median is "
            f"{1000 * median_s:.0f} ms; it was more than {SLOW_FACTOR - 1:.0%} slower in each of the last {SLOW_STEPS} "
            "steps, and the others wait for it."
        )
        record_event(
            self._out_dir, "slow rank", message, step=step, rank=rank, compute_s=compute_s, median_compute_s=median_s
        )

    def record(self) -> dict[str, float | int]:
        """Seconds per step since the last call: least, median and most among the ranks; and the slowest of them.

        Nothing for a start's first step, whose times travel with the second one.
        """
        if not self._num_steps:
            return {}
        means = self._sums / self._num_steps
        values: dict[str, float | int] = {}
        for kind, of_ranks in zip(KINDS, means.T):
            values[f"rank_{kind}_s_min"] = float(of_ranks.min())
            values[f"rank_{kind}_s_median"] = lower_median(of_ranks)
            values[f"rank_{kind}_s_max"] = float(of_ranks.max())
        values["slowest_rank"] = int(means[:, KINDS.index("compute")].argmax())
        self._start_again()
        return values
