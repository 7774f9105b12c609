"""What happens beside the steps: the profiler's trace and memory snapshot, and the collection of garbage."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from pretraining.heartbeat import Heartbeat
from pretraining.settings import Settings

STEPS_PER_COLLECTION = 100


@contextlib.contextmanager
def garbage_collected() -> Iterator[Callable[[], None]]:
    """Python's collector is off; what is yielded is called after each step, and collects after so many.

    Left to itself the collector pauses each process at a step of its own, and all others wait for it there: with many
    processes some pause falls into every step. Now they pause at the same one.
    """
    steps = 0

    def after_step() -> None:
        nonlocal steps
        steps += 1
        if steps % STEPS_PER_COLLECTION == 0:
            gc.collect(1)  # the young ones: what a step leaves in circles

    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield after_step
    finally:
        if was_on:
            gc.enable()


@contextlib.contextmanager
def profiled(settings: Settings, directory: Path, rank: int, heartbeat: Heartbeat) -> Iterator[Callable[[], None]]:
    """Write a trace of settings.profile_steps steps of rank 0 to `directory`; call what is yielded after each step.

    With settings.profile_memory the trace has every allocation, and on a GPU memory.pickle is written beside it, for
    https://pytorch.org/memory_viz: what held which memory, and the line that asked for it.
    """
    if not settings.profile_steps or rank != 0:
        yield lambda: None
        return
    directory.mkdir(exist_ok=True)
    on_gpu = settings.accelerator == "cuda"
    if settings.profile_memory and on_gpu:
        torch.cuda.memory._record_memory_history(max_entries=1_000_000)

    def write(profiler: torch.profiler.profile) -> None:
        heartbeat.beat("save")  # it can take minutes
        profiler.export_chrome_trace(str(directory / "trace.json"))
        if settings.profile_memory and on_gpu:
            torch.cuda.memory._dump_snapshot(str(directory / "memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)

    with torch.profiler.profile(
        # Two steps of warm-up: the first ones allocate, compile and tune.
        schedule=torch.profiler.schedule(wait=1, warmup=1, active=settings.profile_steps, repeat=1),
        on_trace_ready=write,
        record_shapes=True,
        profile_memory=settings.profile_memory,
        with_stack=settings.profile_memory,
    ) as profiler:
        yield profiler.step
