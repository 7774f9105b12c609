"""Which values of the settings make no sense, by themselves or together."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pretraining.model_config import has_grouped_experts
from pretraining.process_layout import listed, micro_batches_per_step, shard_size
from pretraining.settings import Settings
from utils import console
from utils.errors import Problems, UserError

WORTHWHILE_EPOCHS = 4
_POSITIVE = (
    "train.global_batch_size", "train.micro_batch_size", "train.max_tokens", "train.max_steps", "train.epochs",
    "train.max_time", "train.step_timeout", "train.slow_timeout",
    "train.max_seq_length", "train.save_interval", "train.log_interval", "train.max_norm",
    "train.max_nonfinite_steps", "eval.interval", "eval.max_iters", "eval.sample_tokens",
    "eval.sample_temperature", "optimizer.lr", "optimizer.eps", "num_nodes",
    "num_devices", "tokens", "parallel.shard_size", "parallel.loss_chunk_tokens", "parallel.cpu_threads",
    "checkpoint.keep_last", "checkpoint.keep_every_steps", "train.spike_sigma", "train.max_spikes",
    "parallel.compare_copies_every", "parallel.context_parallel_size",
)  # fmt: skip
_NOT_NEGATIVE = ("train.min_lr", "train.z_loss", "train.router_aux_loss", "optimizer.weight_decay")
_FRACTIONS = ("train.lr_warmup_fraction", "train.lr_decay_fraction")


def check_numbers(settings: Settings, problems: Problems) -> None:
    """Add a problem for each number that is out of its range, and for settings that contradict each other."""
    train, parallel = settings.train, settings.parallel
    for name, value in _values(settings, _POSITIVE):
        if not (math.isfinite(value) and value > 0):
            problems.add(
                f"--{name}={value}: must be above 0 (null or leaving it out turns it off where it has an off value)."
            )
    all_positive = not problems.found
    for name, value in _values(settings, _NOT_NEGATIVE):
        if not (math.isfinite(value) and value >= 0):
            problems.add(f"--{name}={value}: must not be negative.")
    for name, value in _values(settings, _FRACTIONS):
        if not 0 <= value <= 1:
            problems.add(f"--{name}={value}: a fraction, from 0 to 1.")
    warmups = ("train.lr_warmup_steps", "train.lr_warmup_tokens", "train.lr_warmup_fraction")
    given = [name for name, _ in _values(settings, warmups)]
    if len(given) > 1:
        problems.add(f"--{given[0]} and --{given[1]}: give one of them.")
    if train.max_tokens is None and train.max_steps is None and train.epochs is None:
        problems.add(
            "--train.max_tokens: say how long to train, by --train.max_tokens, --train.max_steps or --train.epochs."
        )
    if settings.tokens is not None and not settings.dry_run:
        problems.add("--tokens: only says how large a dataset to plan for. Give --dry_run too, or leave it out.")
    if train.min_lr > settings.optimizer.lr and train.lr_schedule != "constant":
        problems.add(f"--train.min_lr={train.min_lr}: above the peak --optimizer.lr={settings.optimizer.lr}. Lower it.")
    if settings.num_devices and all_positive:  # they divide by these numbers
        world_size = settings.num_nodes * settings.num_devices
        problems.collect(micro_batches_per_step, settings, world_size)
        problems.collect(shard_size, settings, world_size, settings.num_devices)
    if parallel.shard_size is not None and parallel.sharding != "hybrid":
        problems.add(
            f"--parallel.shard_size={parallel.shard_size}: only has a meaning with --parallel.sharding=hybrid, "
            f"not {parallel.sharding}. Set that, or leave it out."
        )


def check_model(settings: Settings, config: Any, problems: Problems) -> None:
    """Add a problem for each setting that the model's sizes do not allow.

    Args:
        config: litgpt's Config of the model.
    """
    problems.collect(check_float8, settings, config)
    if settings.precision == "float8-mixed" and settings.num_devices and not problems.found:
        problems.collect(check_float8_shards, settings, config)
    problems.collect(check_context_parallel, settings, config)
    problems.collect(check_experts, settings, config)


def check_context_parallel(settings: Settings, config: Any) -> None:
    """Raises UserError where processes cannot share the model's sequences."""
    size = settings.parallel.context_parallel_size
    if size <= 1:
        return
    if config.latent_attention:
        raise UserError(
            f"--parallel.context_parallel_size={size}: not possible for {config.name}, whose latent attention is "
            "litgpt's own and exchanges no heads between processes. Leave it out, or choose another model."
        )
    context_tokens = settings.train.max_seq_length or config.block_size
    shared = {"attention heads of the model": config.n_head, "tokens of a sequence": context_tokens}
    odd = [f"{number} {name}" for name, number in shared.items() if number % size]
    if odd:
        common = math.gcd(*shared.values(), settings.num_devices or 0)
        fitting = listed([n for n in range(1, common + 1) if common % n == 0])
        raise UserError(
            f"--parallel.context_parallel_size={size}: does not divide the {' nor the '.join(odd)}, of which each "
            f"process takes an equal part. Use {fitting}, or another --train.max_seq_length."
        )


def check_experts(settings: Settings, config: Any) -> None:
    """Raises UserError where the load-balancing loss of this model's experts is asked for and not known, or litgpt
    cannot make the experts."""
    if config.n_shared_expert and config.moe_intermediate_size is None:
        raise UserError(
            f"--model_config.n_shared_expert={config.n_shared_expert}: litgpt takes the width of shared experts from "
            "moe_intermediate_size. Give that too."
        )
    if settings.train.router_aux_loss > 0 and not has_grouped_experts(config):
        raise UserError(
            f"--train.router_aux_loss={settings.train.router_aux_loss}: {config.name} has no experts that are chosen "
            "as Mixtral's or Qwen 3's are. Leave it out, or choose another model."
        )


def check_float8(settings: Settings, config: Any) -> None:
    """Raises UserError where the model's sizes do not fit float8: the products want multiples of 16.

    Args:
        config: litgpt's Config of the model.
    """
    if settings.precision != "float8-mixed":
        return
    if config.mlp_class_name == "LLaMAMoE":
        raise UserError(
            "--precision=float8-mixed: not for mixtures of experts, whose experts get any number of tokens. Use "
            "bf16-mixed."
        )
    context_tokens = settings.train.max_seq_length or config.block_size
    parts = max(1, settings.parallel.context_parallel_size)
    tokens_name = f"train.micro_batch_size * context{f' / {parts}' if parts > 1 else ''}"
    sizes = {
        tokens_name: settings.train.micro_batch_size * context_tokens // parts,
        "n_embd": config.n_embd,
        "n_head * head_size": config.n_head * config.head_size,
        "n_query_groups * head_size": (config.n_query_groups or config.n_head) * config.head_size,
        "intermediate_size": config.intermediate_size,
    }
    odd = [f"{name} is {size}" for name, size in sizes.items() if size and size % 16]
    if odd:
        raise UserError(
            f"--precision=float8-mixed: {', '.join(odd)}; products in float8 need sizes that 16 divides. Change the "
            "model's sizes, or use bf16-mixed."
        )


def check_float8_shards(settings: Settings, config: Any) -> None:
    """As `check_even_rows`, of the model's weights, before it is made.

    Args:
        settings: num_devices is known, and numbers make sense.
    """
    rows = [config.n_embd]
    if config.intermediate_size:
        rows.append(config.intermediate_size)
    if not config.latent_attention:
        rows.append((config.n_head + 2 * (config.n_query_groups or config.n_head)) * config.head_size)
    check_even_rows(rows, shard_size(settings, settings.num_nodes * settings.num_devices, settings.num_devices))


def check_even_rows(rows: Iterable[int], num_shards: int) -> None:
    """Raises UserError where a weight for float8 cannot be shared out evenly: torchao gathers shards as they are, FSDP2
    wants them padded, and without this check processes would wait for each other forever.

    Args:
        rows: number of rows of each weight.
        num_shards: processes that share a copy of the model.
    """
    for number in rows:
        if number % num_shards:
            raise UserError(
                f"--precision=float8-mixed: {num_shards} processes share a copy of the model, and a weight has "
                f"{number} rows; all need equally many. Use another number of processes (or, with "
                "--parallel.sharding=hybrid, another --parallel.shard_size), or bf16-mixed."
            )


def check_out_dir(settings: Settings, problems: Problems) -> None:
    out_dir = Path(settings.out_dir).absolute()
    existing = next(path for path in (out_dir, *out_dir.parents) if path.exists())
    if not existing.is_dir():
        problems.add(f"--out_dir={settings.out_dir}: {existing} is a file. Give a directory.")
    elif not os.access(existing, os.W_OK | os.X_OK):
        problems.add(f"--out_dir={settings.out_dir}: no permission to write into {existing}. Give another directory.")


def _values(settings: Settings, names: tuple[str, ...]) -> list[tuple[str, float]]:
    """The numbers of these settings, without those that are null."""
    found = []
    for name in names:
        section, _, field = name.rpartition(".")
        value = getattr(getattr(settings, section) if section else settings, field)
        if value is not None:
            found.append((name, value))
    return found


def warn_of_repetition(settings: Settings, epochs: float, epoch_tokens: int) -> None:
    if epochs > WORTHWHILE_EPOCHS:
        given = [name for name in ("max_tokens", "max_steps", "epochs") if getattr(settings.train, name) is not None]
        console.warn(
            f"{' and '.join(f'--train.{name}={getattr(settings.train, name):,}' for name in given)}: that is "
            f"{epochs:,.0f} epochs of the dataset's {console.human_count(epoch_tokens)} tokens. Up to about "
            f"{WORTHWHILE_EPOCHS} epochs repeated text is worth nearly as much as new text, then less and less "
            "(Muennighoff et al. 2023, arXiv:2305.16264). Use more text, or a lower limit."
        )


def warn_of_documents(directory: Path, manifest: dict[str, Any], context_tokens: int | None) -> None:
    """Warn where documents have no end, or are packed into blocks of another context; None: that is not known."""
    made_with = manifest.get("settings", {})
    if made_with.get("bos_id") is not None and made_with.get("eos_id") is None:
        console.warn(
            f"{directory}: its documents begin with BOS and do not end with EOS, so the model will not learn to stop: "
            "what it writes runs on into another document. Tokenize with --add_eos=true if that matters."
        )
    packed = manifest.get("pack_tokens")
    if packed is not None and context_tokens is not None and context_tokens + 1 != packed:
        console.warn(
            f"{directory}: packed into blocks of {packed:,} tokens, for a context of {packed - 1:,}. A context of "
            f"{context_tokens:,} cuts it at other places, so that more documents are cut than without packing. Give "
            f"--train.max_seq_length={packed - 1}, or merge again with --pack_tokens={context_tokens + 1}."
        )
