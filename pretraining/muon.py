"""Muon with the work shared: within a copy of the model, each process orthogonalises whole matrices of its own.

torch.optim.Muon on DTensors runs its matrix products as DTensor plans them, with an exchange in almost each of the 15
of a matrix. Here a matrix travels twice, as in section 2.3 of arXiv:2502.16982: as many matrices of one shape as there
are processes go to one process each, in one exchange, and come back cut up in another.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Shard


class SharedMuon(torch.optim.Muon):
    """torch.optim.Muon for matrices that FSDP2 shards: its arguments, state and formulas, with AdamW's update size
    (`adjust_lr_fn="match_rms_adamw"`).

    On a CPU it computes in float32 instead of bfloat16, which only the newest CPUs have units for. All parameters have
    one device mesh and one placement, as FSDP2 gives them.
    """

    def __init__(self, params, **options: Any):
        super().__init__(params, adjust_lr_fn="match_rms_adamw", **options)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update; a closure is not called."""
        for group in self.param_groups:
            of_shape: dict[torch.Size, list[torch.Tensor]] = collections.defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    of_shape[parameter.shape].append(parameter)
            for parameters in of_shape.values():
                together = _num_shards(parameters[0])
                for i in range(0, len(parameters), together):
                    self._update(parameters[i : i + together], group)

    def _update(self, parameters: list[torch.Tensor], group: dict) -> None:
        momentum = group["momentum"]
        updates = []
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter.grad)
            buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
            updates.append(parameter.grad.lerp(buffer, momentum) if group["nesterov"] else buffer)
        updates = orthogonalize_sharded(updates, group["ns_coefficients"], group["ns_steps"], group["eps"])
        rows, columns = parameters[0].shape
        scale = 0.2 * math.sqrt(max(rows, columns))  # of "match_rms_adamw"
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-group["lr"] * scale)


def orthogonalize_sharded(
    matrices: Sequence[torch.Tensor], coefficients: tuple[float, float, float], num_steps: int, eps: float
) -> list[torch.Tensor]:
    """`orthogonalize`, for (rows, columns) matrices that are DTensors of one layout, or none of them is.

    The results are laid out as the matrices are, and of their dtype.
    """
    stacked = torch.stack(list(matrices))
    if not isinstance(stacked, DTensor):
        return list(orthogonalize(stacked, coefficients, num_steps, eps).to(stacked.dtype).unbind())
    whole = stacked.redistribute(placements=[Shard(0) if p.is_shard() else p for p in stacked.placements])
    local = whole.to_local()
    if local.size(0):
        local = orthogonalize(local, coefficients, num_steps, eps).to(stacked.dtype)
    back = DTensor.from_local(
        local, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
    return list(back.redistribute(placements=stacked.placements).unbind())


def orthogonalize(
    matrices: torch.Tensor, coefficients: tuple[float, float, float], num_steps: int, eps: float
) -> torch.Tensor:
    """Newton-Schulz's iteration towards the nearest matrix with orthonormal rows or columns, for each of them.

    X <- a X + (b A + c A A) X with A = X X^T, from X = G / |G|; https://kellerjordan.github.io/posts/muon/.

    Args:
        matrices: (n, rows, columns).
        coefficients: a, b, c.

    Returns:
        (n, rows, columns), in float32 on a CPU, in bfloat16 elsewhere.
    """
    a, b, c = coefficients
    is_tall = matrices.size(1) > matrices.size(2)
    x = matrices.float() if matrices.device.type == "cpu" else matrices.bfloat16()
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(num_steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def _num_shards(parameter: torch.Tensor) -> int:
    """Processes that share a parameter's rows."""
    if not isinstance(parameter, DTensor):
        return 1
    sizes = zip(parameter.placements, parameter.device_mesh.shape, strict=True)
    return math.prod(size for placement, size in sizes if placement.is_shard())
