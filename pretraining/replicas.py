"""Whether the copies of the model that a run holds are still equal, bit for bit.

Copies (hybrid and replicated sharding) get the same gradients and make the same updates, so they never differ; where
they do, a processor or its memory computed something wrong without saying so. Sums of the numbers' bits, as integers,
are compared: any single flipped bit shows, and nothing but eight bytes per process travels.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist

from pretraining.parallelism import local_shard
from pretraining.settings import Settings
from utils.errors import UserError

_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
_MULTIPLIER = 0x9E3779B97F4A7C15 - 2**64  # odd; SplitMix64's increment, as a signed number


def fingerprint(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """An int64 scalar that any one changed bit changes; tensors that change places change it too."""
    total = None
    for tensor in tensors:
        bits = local_shard(tensor).contiguous().flatten().view(_INTEGERS[tensor.element_size()])
        part = bits.sum(dtype=torch.int64)
        total = part if total is None else total * _MULTIPLIER + part
    return total


def state_tensors(parameters: list[torch.Tensor], optimizers: list[torch.optim.Optimizer]) -> list[torch.Tensor]:
    """Weights and optimizer state that this process holds, in an order that is the same on all."""
    states = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
    return [*parameters, *(value for value in states if isinstance(value, torch.Tensor))]


def check_replicas(
    parameters: list[torch.Tensor], optimizers: list[torch.optim.Optimizer], step: int, settings: Settings
) -> None:
    """Compare the copies where it is time to; called by all processes after each step.

    Raises:
        UserError: on all of them, naming the processes that differ from the others that hold the same piece.
    """
    mesh = parameters[0].device_mesh.mesh  # (replicate, shard), or (shard,) where there is one copy
    every = settings.parallel.compare_copies_every
    if mesh.ndim < 2 or mesh.size(0) < 2 or not every or step % every:
        return
    mine = fingerprint(state_tensors(parameters, optimizers)).view(1)
    everyones = torch.empty(dist.get_world_size(), dtype=torch.int64, device=mine.device)
    dist.all_gather_into_tensor(everyones, mine)
    values = everyones.tolist()
    suspects = []
    for ranks in mesh.T.tolist():  # those that hold the same piece
        found = [values[rank] for rank in ranks]
        usual = max(set(found), key=found.count)
        odd = [rank for rank in ranks if values[rank] != usual]
        suspects += ranks if odd and found.count(usual) * 2 <= len(found) else odd  # with two copies, either
    if suspects:
        raise UserError(
            f"at step {step} copies of the model are no longer equal: processes {', '.join(map(str, suspects))} hold "
            "other bits than their copies. A processor or its memory computes wrongly without saying so. Look for it: "
            "python -m tools.check_cluster. Remove the checkpoints that may have it, and run the same command."
        )
