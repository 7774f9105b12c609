"""Optimizers from torch.optim, which parameters decay, the global gradient norm, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pretraining.settings import OptimizerSettings


def make_optimizers(model: torch.nn.Module, settings: OptimizerSettings) -> list[torch.optim.Optimizer]:
    """One optimizer, or two for muon.

    Matrices decay. The embedding does not (a row that is not seen would only shrink), nor does an output layer that shares
    its weights, nor norms and biases.
    """
    table = model.transformer.wte.weight
    decayed, plain, hidden = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or parameter is table:
            plain.append(parameter)
        elif settings.name == "muon" and name.startswith("transformer.h.") and parameter.ndim == 2:
            hidden.append(parameter)
        else:
            decayed.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [part for group in groups for part in _split_by_mesh(group)],
            lr=settings.lr,
            betas=tuple(settings.betas),
            eps=settings.eps,
            fused=True,
        )
    ]
    if hidden:
        # With this scaling Muon's updates have the size of AdamW's, so one learning rate serves both (arXiv:2502.16982).
        optimizers.append(
            torch.optim.Muon(
                hidden,
                lr=settings.lr,
                weight_decay=settings.weight_decay,
                momentum=settings.momentum,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return optimizers


def _split_by_mesh(group: dict[str, Any]) -> list[dict[str, Any]]:
    """The group as one of each device mesh: a fused update cannot mix meshes, which tensor parallelism makes."""
    parts: dict[Any, list[torch.nn.Parameter]] = defaultdict(list)
    for parameter in group["params"]:
        parts[getattr(parameter, "device_mesh", None)].append(parameter)
    return [{**group, "params": parameters} for parameters in parts.values()]


def set_learning_rate(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


@torch.no_grad()
def global_gradient_norm(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    """The 2-norm of the whole gradient, equal on every process; a float32 scalar.

    Squares are summed over each process's pieces, then over the processes that hold different pieces. Parameters may lie
    on different meshes (those under tensor parallelism do), which torch.nn.utils.clip_grad_norm_ cannot mix.
    """
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    pieces: dict[tuple, list[torch.Tensor]] = defaultdict(list)
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        if isinstance(gradient, DTensor):
            mesh = gradient.device_mesh
            # Not is_shard(): that is false for the strided pieces of what tensor parallelism split before FSDP2.
            groups = tuple(
                mesh.get_group(dimension) for dimension, how in enumerate(gradient.placements) if not how.is_replicate()
            )
            pieces[groups].append(gradient.to_local())
        else:
            pieces[()].append(gradient)
    total = torch.zeros((), dtype=torch.float64)
    for groups, gradients in pieces.items():
        norms = torch._foreach_norm([gradient for gradient in gradients if gradient.numel()], 2, dtype=torch.float32)
        device = gradients[0].device
        squares = (
            torch.stack(norms).double().square().sum() if norms else torch.zeros((), dtype=torch.float64, device=device)
        )
        for group in groups:
            dist.all_reduce(squares, group=group)
        total = total.to(device) + squares
    return total.sqrt().float()


@torch.no_grad()
def scale_gradients(parameters: list[torch.nn.Parameter], norm: torch.Tensor, max_norm: float) -> None:
    """Scale all gradients so that their global norm is at most max_norm, as torch.nn.utils.clip_grad_norm_ does."""
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    pieces = [gradient.to_local() if hasattr(gradient, "to_local") else gradient for gradient in gradients]
    torch._foreach_mul_([piece for piece in pieces if piece.numel()], factor)


def learning_rate(
    step: int,
    *,
    peak: float,
    minimum: float,
    total_steps: int,
    warmup_steps: int,
    schedule: str,
    decay_steps: int,
) -> float:
    """The rate of the update that takes step `step` to `step + 1`.

    It rises linearly to `peak` over the first `warmup_steps` updates (update number warmup_steps has the peak), then:
    cosine: half a cosine down to `minimum` at the last step (Loshchilov and Hutter, arXiv:1608.03983);
    linear: a straight line down to `minimum`;
    wsd: stays at `peak`, then a straight line to `minimum` over the last `decay_steps` (arXiv:2404.06395);
    constant: stays at `peak`.

    Args:
        step: updates done so far, from 0.
        total_steps: updates of the whole run.
        decay_steps: only used by wsd.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    start = max(warmup_steps, total_steps - decay_steps) if schedule == "wsd" else warmup_steps
    if step < start:
        return peak
    fraction = min(1.0, (step + 1 - start) / max(1, total_steps - start))
    down = 0.5 * (1.0 + math.cos(math.pi * fraction)) if schedule == "cosine" else 1.0 - fraction
    return minimum + down * (peak - minimum)
