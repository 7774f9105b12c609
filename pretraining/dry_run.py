"""The dry run: what a run will need, before it starts and without a GPU. Memory per process, steps, disk."""

from __future__ import annotations

import dataclasses

from pretraining.memory import MemoryPlan, plan_memory
from pretraining.plan import Plan
from pretraining.process_layout import micro_batches_per_step
from pretraining.settings import Settings
from utils import console
from utils.console import human_bytes, human_count
from utils.errors import UserError
from utils.files import free_bytes


def print_dry_run(settings: Settings, plan: Plan) -> None:
    """The plan in figures; raises UserError at its end if something does not fit."""
    num_devices = settings.num_devices or 1
    if settings.num_devices is None:
        console.warn("--num_devices is not given: planned with one process per node.")
    world_size = settings.num_nodes * num_devices
    precision = settings.precision or ("32-true" if settings.accelerator == "cpu" else "bf16-mixed")
    settings = dataclasses.replace(settings, precision=precision)
    accumulation = micro_batches_per_step(settings, world_size)
    memory = plan_memory(settings, plan, world_size, num_devices)
    tokens = plan.total_steps * plan.tokens_per_step
    epoch_tokens = plan.train_blocks * plan.context_tokens
    num_checkpoints = _num_checkpoints(settings, plan)
    disk_bytes = num_checkpoints * memory.checkpoint
    lines = {
        "model": f"{plan.model_config['name']}, {memory.num_parameters:,} parameters",
        "processes": f"{world_size}: {settings.num_nodes} x {num_devices} per node, precision {precision}",
        "data": f"{plan.train_blocks:,} sequences of {plan.context_tokens} tokens, {human_count(epoch_tokens)} tokens "
        "per epoch",
        "steps": f"{plan.total_steps:,} of {human_count(plan.tokens_per_step)} tokens ({accumulation} x "
        f"{settings.train.micro_batch_size} sequences per process)",
        "tokens": f"{human_count(tokens)}, {tokens / epoch_tokens:.2f} epochs",
        "memory per process": human_bytes(memory.total),
        "  parameters": human_bytes(memory.parameters),
        "  gradients": human_bytes(memory.gradients),
        "  optimizer": human_bytes(memory.optimizer),
        "  accumulation": f"{human_bytes(memory.unsharded_gradients)} (whole gradients; 0 with "
        "--parallel.reduce_every_micro_batch=true)",
        "  gathered weights": human_bytes(memory.gathered),
        "  activations": f"{human_bytes(memory.activations)} (estimate, checkpointing: "
        f"{settings.parallel.activation_checkpointing})",
        "  logits": f"{human_bytes(memory.logits)}; later in their place: "
        f"{human_bytes(memory.recomputed + memory.reductions)} (a block computed again, gradients on their way)",
        "  overhead": f"{human_bytes(memory.overhead)} (CUDA, NCCL, fragmentation)",
        "checkpoint": f"{human_bytes(memory.checkpoint)} on disk; {num_checkpoints} at once = "
        f"{human_bytes(disk_bytes)}",
    }
    for name, value in lines.items():
        console.result(f"{name:<18} {value}")
    if problems := _problems(settings, memory, disk_bytes):
        raise UserError(problems)
    console.result("no problems found")


def _num_checkpoints(settings: Settings, plan: Plan) -> int:
    """Checkpoints on disk at the same time, at most: kept ones, the final one, and one that is being written."""
    every = settings.train.save_interval
    during = (plan.total_steps - 1) // every if every else 0
    keep = settings.checkpoint
    if keep.keep_last is None:
        return during + 1
    permanent = plan.total_steps // keep.keep_every_steps if keep.keep_every_steps else 0
    return min(during + 1, keep.keep_last + 1 + permanent)


def _problems(settings: Settings, memory: MemoryPlan, disk_bytes: int) -> list[str]:
    problems = []
    free = free_bytes(settings.out_dir)
    if disk_bytes > free:
        problems.append(
            f"--out_dir={settings.out_dir}: {human_bytes(free)} free, checkpoints need {human_bytes(disk_bytes)}. "
            "Use a larger file system, or a smaller --checkpoint.keep_last."
        )
    if settings.accelerator != "cpu" and memory.total > 80e9:
        problems.append(
            f"--train.micro_batch_size={settings.train.micro_batch_size}: a process needs about "
            f"{human_bytes(memory.total)}, an 80 GB GPU holds less. Lower it, use "
            "--parallel.activation_checkpointing=full, or more processes."
        )
    return problems
