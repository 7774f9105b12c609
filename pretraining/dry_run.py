"""The dry run: what a run will need, before it starts and without a GPU. Memory per process, steps, disk."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from litgpt.config import Config

from pretraining.evaluation_plan import evaluation_lines
from pretraining.memory import MemoryPlan, plan_memory
from pretraining.model import training_flops_per_token
from pretraining.plan import Plan
from pretraining.process_layout import computed_by, micro_batches_per_step
from pretraining.settings import Settings
from pretraining.throughput import PEAK_FLOPS
from utils import console
from utils.console import human_bytes, human_count
from utils.errors import UserError
from utils.files import free_bytes
from utils.metrics_file import read_records

MFUS = (0.3, 0.4, 0.5)
FASTEST_NAME = "find_fastest.jsonl"


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
    flops_per_token = training_flops_per_token(
        Config(**plan.model_config), memory.num_parameters, plan.context_tokens, settings.train.tie_embeddings
    )
    lines = {
        "model": f"{plan.model_config['name']}, {memory.num_parameters:,} parameters",
        "processes": f"{world_size}: {settings.num_nodes} x {num_devices} per node, precision {precision}",
        "data": f"{plan.train_blocks:,} sequences of {plan.context_tokens} tokens, {human_count(epoch_tokens)} tokens "
        f"per epoch{'' if settings.tokens is None else ' (--tokens; no dataset was read)'}",
        "steps": f"{plan.total_steps:,} of {human_count(plan.tokens_per_step)} tokens ({accumulation} x "
        f"{settings.train.micro_batch_size} sequences per {computed_by(settings)})",
        "tokens": f"{human_count(tokens)}, {tokens / epoch_tokens:.2f} epochs",
        **evaluation_lines(settings),
        **_durations(settings, plan, tokens, flops_per_token, world_size),
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


def _durations(settings: Settings, plan: Plan, tokens: int, flops_per_token: float, num_gpus: int) -> dict[str, str]:
    """Hours and GPU-hours of training steps: at usual shares of an H100's peak, and as find_fastest measured here."""
    if settings.accelerator == "cpu":
        return {}

    def hours(tokens_per_s_per_device: float) -> str:
        needed = tokens / (tokens_per_s_per_device * num_gpus) / 3600
        return f"{needed:,.1f} h, {needed * num_gpus:,.0f} GPU-hours"

    lines = {}
    for mfu in MFUS:
        rate = mfu * PEAK_FLOPS["H100"] / flops_per_token
        lines[f"H100, {mfu:.0%} MFU"] = f"{hours(rate)} ({rate:,.0f} tokens/s per GPU)"
    if measured := fastest_rate(Path(settings.out_dir) / FASTEST_NAME, settings, plan):
        lines["as measured"] = f"{hours(measured)} ({measured:,.0f} tokens/s per GPU, {FASTEST_NAME})"
    return lines


def fastest_rate(path: Path, settings: Settings, plan: Plan) -> float | None:
    """Tokens/s per device that `tools.find_fastest` measured for these settings, the newest; None where it did not.

    Args:
        path: find_fastest.jsonl, one trial per line.
    """
    wanted = {
        "model": plan.model_config,
        "context_tokens": plan.context_tokens,
        "num_nodes": settings.num_nodes,
        "num_devices": settings.num_devices,
        "parallel": dataclasses.asdict(settings.parallel),
    }
    wanted = json.loads(json.dumps(wanted))
    rate = None
    for row in read_records(path):
        try:
            used = row["settings"]
            same = (
                row["outcome"] == "ok"
                and used["train"]["micro_batch_size"] == settings.train.micro_batch_size
                and {name: used[name] for name in wanted} == wanted
            )
            rate = row["tokens_per_s_per_device"] if same else rate
        except (KeyError, TypeError):  # of another version
            continue
    return rate


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
    if disk_bytes > free and settings.tokens is None:  # made-up data is planned for where the run will not be
        problems.append(
            f"--out_dir={settings.out_dir}: {human_bytes(free)} free, checkpoints need {human_bytes(disk_bytes)}. "
            "Use a larger file system, or a smaller --checkpoint.keep_last."
        )
    if settings.accelerator != "cpu" and memory.total > 80e9:
        problems.append(
            f"--train.micro_batch_size={settings.train.micro_batch_size}: a process needs about "
            f"{human_bytes(memory.total)}, an 80 GB GPU holds less. Lower it, use "
            "--parallel.activation_checkpointing=full, more processes, or for long sequences "
            "--parallel.context_parallel_size."
        )
    return problems
