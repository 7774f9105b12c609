"""How processes share the model and the global batch; whether they come out even."""

from __future__ import annotations

from typing import TYPE_CHECKING

from utils.errors import UserError

if TYPE_CHECKING:
    from pretraining.settings import Settings


def shard_size(settings: Settings, world_size: int, local_size: int) -> int:
    """Processes that share one copy of the model by FSDP2, tensor parallelism apart.

    Args:
        world_size, local_size: processes in total, and on a node.

    Raises:
        UserError: copies of this size do not fill the processes, or tensor parallelism does not fill a node or a copy.
    """
    parallel = settings.parallel
    tensor = parallel.tensor_parallel_size
    if local_size % tensor:
        raise UserError(
            f"--parallel.tensor_parallel_size={tensor}: does not divide the {local_size} processes of a node (--num_devices), "
            "and must not reach over nodes. Give a divisor."
        )
    data_parallel = world_size // tensor
    if parallel.sharding != "hybrid":
        return data_parallel if parallel.sharding == "full" else 1
    copy = parallel.shard_size or local_size
    if copy % tensor:
        raise UserError(
            f"--parallel.shard_size={copy}: not a multiple of --parallel.tensor_parallel_size={tensor}. Give a multiple."
        )
    if world_size % copy:
        raise UserError(
            f"--parallel.shard_size={copy}: copies of so many processes do not fill {world_size} processes. Give a divisor."
        )
    return copy // tensor


def check_batch(settings: Settings, world_size: int) -> int:
    """Micro-batches a process computes between two optimizer steps.

    Raises:
        UserError: the global batch does not divide evenly.
    """
    parallel, train = settings.parallel, settings.train
    if world_size % parallel.tensor_parallel_size:
        raise UserError(
            f"--parallel.tensor_parallel_size={parallel.tensor_parallel_size}: does not divide {world_size} processes."
        )
    at_once = train.micro_batch_size * (world_size // parallel.tensor_parallel_size)
    if train.global_batch_size % at_once:
        lower = train.global_batch_size // at_once * at_once
        near = f"{lower} or {lower + at_once}" if lower else f"{at_once}"
        raise UserError(
            f"--train.global_batch_size={train.global_batch_size}: not a multiple of --train.micro_batch_size="
            f"{train.micro_batch_size} times {at_once // train.micro_batch_size} processes. Use {near}, or another micro-batch."
        )
    return train.global_batch_size // at_once
