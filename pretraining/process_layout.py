"""How processes share the model and the global batch, and whether they come out even."""

from __future__ import annotations

import datetime

from pretraining.settings import Settings
from utils.errors import UserError

_GROUP_EXTRA_S = 600


def group_timeout(settings: Settings) -> datetime.timedelta:
    """Of collectives: beyond what the watchdog allows anything to take, since it ends a hang and says who hangs."""
    slowest_s = max(settings.train.slow_timeout, settings.train.step_timeout or 0)
    return datetime.timedelta(seconds=int(slowest_s) + _GROUP_EXTRA_S)


def shard_size(settings: Settings, world_size: int, local_size: int) -> int:
    """Processes that share one copy of the model.

    Args:
        world_size, local_size: processes in total, and on a node.

    Raises:
        UserError: copies of this size do not fill the processes.
    """
    parallel = settings.parallel
    if parallel.sharding != "hybrid":
        return world_size if parallel.sharding == "full" else 1
    size = parallel.shard_size or local_size
    if world_size % size:
        raise UserError(
            f"--parallel.shard_size={size}: copies of so many processes do not fill {world_size} processes. Give a "
            "divisor."
        )
    return size


def num_context_groups(settings: Settings, world_size: int) -> int:
    """Groups of processes that share sequences; all processes, where none do.

    Raises:
        UserError: groups do not fill a node.
    """
    size, local_size = settings.parallel.context_parallel_size, world_size // settings.num_nodes
    if local_size % size:
        fitting = listed([n for n in range(1, local_size + 1) if local_size % n == 0])
        raise UserError(
            f"--parallel.context_parallel_size={size}: groups of so many processes do not fill the {local_size} "
            f"processes of a node (--num_devices). Give {fitting}."
        )
    return world_size // size


def computed_by(settings: Settings) -> str:
    """Who computes a micro-batch, in words."""
    size = settings.parallel.context_parallel_size
    return f"group of {size} processes" if size > 1 else "process"


def listed(numbers: list[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last


def micro_batches_per_step(settings: Settings, world_size: int) -> int:
    """Micro-batches that each process, or each group that shares sequences, computes per optimizer step.

    Raises:
        UserError: the global batch does not divide evenly.
    """
    train = settings.train
    num_groups = num_context_groups(settings, world_size)
    at_once = train.micro_batch_size * num_groups
    if train.global_batch_size % at_once:
        lower = train.global_batch_size // at_once * at_once
        size = settings.parallel.context_parallel_size
        computers = "processes" if size == 1 else f"groups of {size} processes"
        near = f"{lower} or {lower + at_once}" if lower else f"{at_once}"
        raise UserError(
            f"--train.global_batch_size={train.global_batch_size}: not a multiple of --train.micro_batch_size="
            f"{train.micro_batch_size} times {num_groups} {computers}. Use {near}, or another micro-batch."
        )
    return train.global_batch_size // at_once
