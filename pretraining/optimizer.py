"""Optimizers from torch.optim, which parameters decay, the global gradient norm, and the learning-rate schedule."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.distributed as dist

from pretraining.muon import SharedMuon
from pretraining.plan import Plan
from pretraining.settings import OptimizerSettings, Settings


def make_optimizers(model: torch.nn.Module, settings: OptimizerSettings) -> list[torch.optim.Optimizer]:
    """One optimizer, or two for muon.

    Matrices decay. The embedding does not (a row that is not seen would only shrink), nor does an output layer that
    shares its weights, nor do norms and biases.
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
            [group for group in groups if group["params"]],
            lr=settings.lr,
            betas=tuple(settings.betas),
            eps=settings.eps,
            fused=True,
        )
    ]
    if hidden:
        # Scaled like this Muon's updates have the size of AdamW's, so one learning rate serves both (arXiv:2502.16982).
        optimizers.append(
            SharedMuon(
                hidden,
                lr=settings.lr,
                weight_decay=settings.weight_decay,
                momentum=settings.momentum,
            )
        )
    return optimizers


def set_learning_rate(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def update_scales(model: torch.nn.Module, settings: Settings) -> None:
    """To be called whenever weights have changed; with float8 their scales follow them, in one all-reduce."""
    if settings.precision == "float8-mixed":
        from pretraining.float8 import update_scales  # torchao is an extra

        update_scales(model)


@torch.no_grad()
def global_gradient_norm(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    """The 2-norm of the whole gradient, equal on every process; a float32 scalar.

    Squares are summed over each process's pieces in float64, then over the processes that hold different pieces.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    mesh, placements = gradients[0].device_mesh, gradients[0].placements  # FSDP2 lays all of them out alike
    pieces = [gradient.to_local() for gradient in gradients]
    squares = torch.zeros((), dtype=torch.float64, device=pieces[0].device)
    if norms := torch._foreach_norm([piece for piece in pieces if piece.numel()], 2, dtype=torch.float32):
        squares += torch.stack(norms).double().square().sum()
    for dimension, placement in enumerate(placements):
        if placement.is_shard():
            dist.all_reduce(squares, group=mesh.get_group(dimension))
    return squares.sqrt().float()


def apply_gradients(optimizers: list[torch.optim.Optimizer], norm: torch.Tensor, max_norm: float | None) -> None:
    """Update the weights, with gradients scaled down to max_norm where their global norm is above (None: never)."""
    if max_norm is not None:
        groups = (group for optimizer in optimizers for group in optimizer.param_groups)
        scale_gradients([parameter for group in groups for parameter in group["params"]], norm, max_norm)
    for optimizer in optimizers:
        optimizer.step()


def drop_gradients(optimizers: list[torch.optim.Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def scale_gradients(parameters: list[torch.nn.Parameter], norm: torch.Tensor, max_norm: float) -> None:
    """Scale all gradients so that their global norm is at most max_norm, as torch.nn.utils.clip_grad_norm_ does."""
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    pieces = [gradient.to_local() if hasattr(gradient, "to_local") else gradient for gradient in gradients]
    torch._foreach_mul_([piece for piece in pieces if piece.numel()], factor)


def make_schedule(settings: Settings, plan: Plan) -> Callable[[int], float]:
    """The run's learning rate as a function of the step."""
    return functools.partial(
        learning_rate,
        peak=settings.optimizer.lr,
        minimum=settings.train.min_lr,
        total_steps=plan.total_steps,
        warmup_steps=plan.warmup_steps,
        schedule=settings.train.lr_schedule,
        decay_steps=plan.decay_steps,
    )


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
