"""Everything that is known about a run before it starts: checked, counted, and comparable between runs."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from pathlib import Path
from typing import Any

from export.hf_config import export_problems
from pretraining.data import count_blocks
from pretraining.data_order import interleave
from pretraining.loggers import check_logger
from pretraining.model_config import resolve_model_config
from pretraining.process_layout import micro_batches_per_step, shard_size
from pretraining.settings import Settings
from utils import console
from utils.chunks import Index, read_index
from utils.errors import Problems, UserError
from utils.manifest import read_manifest
from utils.tokenizer import read_tokenizer_info


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run in figures; plain values only, it travels to the workers."""

    model_config: dict[str, Any]
    """Fields of litgpt's Config."""
    context_tokens: int
    train_directories: list[str]
    val_directories: list[str]
    weights: list[float] | None
    train_blocks: int
    """Sequences of the training data, one epoch."""
    val_blocks: int
    tokens_per_step: int
    total_steps: int
    warmup_steps: int
    decay_steps: int
    bits_per_nat: float | None
    """Bits per byte of text for a loss of one nat per token; None: bytes unknown."""
    tokenizer: dict[str, Any] | None
    """TokenizerInfo.record() of the dataset."""
    data_identity: list[str]
    """A hash of each dataset's index."""


def data_directories(settings: Settings) -> tuple[list[Path], list[float] | None]:
    """The dataset directories and their weights; raises UserError when none or both ways are given."""
    if (settings.dataset_path is None) == (settings.data_mixture is None):
        raise UserError(
            "--dataset_path: give one directory with train/ and val/, made by merge_files.py, or several as data_mixture "
            "(not both)."
        )
    if settings.dataset_path is not None:
        return [Path(settings.dataset_path)], None
    weights = list(settings.data_mixture.values())
    if any(not weight > 0 for weight in weights):
        raise UserError(f"data_mixture: weights must be above 0, got {weights}.")
    read = set(interleave(weights).tolist())
    without = [path for i, path in enumerate(settings.data_mixture) if i not in read]
    if without:
        raise UserError(
            f"data_mixture: the weight of {', '.join(without)} is too small to be read at all; weights are rounded to 0.1% of their "
            "sum. Raise it, or leave the dataset out."
        )
    return [Path(path) for path in settings.data_mixture], weights


def make_plan(settings: Settings) -> Plan:
    """Check all that can be checked without a GPU, a cluster or torch.

    Raises:
        UserError: with every problem found.
    """
    problems = Problems()
    _check_numbers(settings, problems)
    problems.collect(check_logger, settings.logger_name)
    config = problems.collect(resolve_model_config, settings)
    context = None
    if config is not None:
        for reason in export_problems(config):
            console.warn(
                f"this model cannot be exported to Hugging Face when it is trained: {reason}. litgpt will load it; for "
                "transformers and lm-eval choose another model."
            )
        context = settings.train.max_seq_length or config.block_size
        if context > config.block_size:
            problems.add(
                f"--train.max_seq_length={context}: the model's block_size is {config.block_size}. Give at most that, or raise "
                "model_config.block_size."
            )
        if settings.parallel.loss == "fused" and config.final_logit_softcapping:
            problems.add(
                f"--parallel.loss=fused: has no soft-capping of logits, which {config.name} needs. Use --parallel.loss=chunked."
            )
    located = problems.collect(data_directories, settings)
    train, val, manifests = [], [], []
    for directory in located[0] if located else []:
        if not directory.is_dir():
            problems.add(
                f"--dataset_path={directory}: no such directory. Give the output of merge_files.py (it holds train/ and val/)."
            )
            continue
        for split, indexes in (("train", train), ("val", val)):
            index = problems.collect(read_index, directory / split, "--dataset_path")
            manifest = problems.collect(read_manifest, directory / split, "dataset") if index else None
            indexes.append(index)
            if split == "train":
                manifests.append(manifest)
            if index is not None and manifest is None:
                console.warn(
                    f"{directory / split} has no manifest.json: its tokenizer and its bytes of text are unknown and were not checked."
                )
    tokenizer = next((manifest["tokenizer"] for manifest in manifests if manifest and manifest.get("tokenizer")), None)
    _check_vocabulary(settings, config, manifests, problems)
    if config is not None and context < config.block_size:
        console.say(
            f"context: trained on {context:,} tokens; the exported model will claim {config.block_size:,}, model_config.block_size"
        )
    if (
        settings.initial_checkpoint_dir is not None
        and not (Path(settings.initial_checkpoint_dir) / "lit_model.pth").exists()
    ):
        problems.add(
            f"--initial_checkpoint_dir={settings.initial_checkpoint_dir}: no lit_model.pth in it. Give an exported or litgpt "
            "directory, or a checkpoint of this script."
        )
    _check_out_dir(settings, problems)

    if config is not None and context > 0:
        for indexes in (train, val):
            for index in indexes:
                if index is not None and count_blocks(index, context + 1) == 0:
                    problems.add(
                        f"--dataset_path={index.directory}: {index.tokens} tokens in {len(index.chunks)} chunks hold no sequence of "
                        f"{context + 1}. Give more text, or a smaller --train.max_seq_length."
                    )
    problems.raise_if_any()

    batch = settings.train.global_batch_size
    train_blocks = sum(count_blocks(index, context + 1) for index in train)
    total = _total_steps(settings, batch * context, train_blocks)
    warmup = _warmup_steps(settings, batch * context, total)
    if warmup >= total > 1:
        console.warn(f"the learning rate warms up for {warmup} steps of a run of {total}: it never reaches its course")
    return Plan(
        model_config=dataclasses.asdict(config),
        context_tokens=context,
        train_directories=[str(index.directory.resolve()) for index in train],
        val_directories=[str(index.directory.resolve()) for index in val],
        weights=located[1],
        train_blocks=train_blocks,
        val_blocks=sum(count_blocks(index, context + 1) for index in val),
        tokens_per_step=batch * context,
        total_steps=total,
        warmup_steps=min(warmup, total),
        decay_steps=math.ceil(settings.train.lr_decay_fraction * total),
        bits_per_nat=_bits_per_nat(val, located[1]),
        tokenizer=tokenizer,
        data_identity=[_identity(index) for index in train],
    )


def _check_numbers(settings: Settings, problems: Problems) -> None:
    train, parallel = settings.train, settings.parallel
    positive = {
        "train.global_batch_size": train.global_batch_size,
        "train.micro_batch_size": train.micro_batch_size,
        "train.max_tokens": train.max_tokens,
        "train.max_steps": train.max_steps,
        "train.epochs": train.epochs,
        "train.max_time": train.max_time,
        "train.max_seq_length": train.max_seq_length,
        "train.save_interval": train.save_interval,
        "train.log_interval": train.log_interval,
        "train.max_norm": train.max_norm,
        "train.max_nonfinite_steps": train.max_nonfinite_steps,
        "eval.interval": settings.eval.interval,
        "eval.max_iters": settings.eval.max_iters,
        "optimizer.lr": settings.optimizer.lr,
        "optimizer.eps": settings.optimizer.eps,
        "num_nodes": settings.num_nodes,
        "num_devices": settings.num_devices,
        "parallel.shard_size": parallel.shard_size,
        "parallel.loss_chunk_tokens": parallel.loss_chunk_tokens,
        "parallel.cpu_threads": parallel.cpu_threads,
        "checkpoint.keep_last": settings.checkpoint.keep_last,
        "checkpoint.keep_every_steps": settings.checkpoint.keep_every_steps,
    }
    for name, value in positive.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            problems.add(
                f"--{name}={value}: must be above 0 (null or leaving it out turns it off where it has an off value)."
            )
    all_positive = not problems.found
    for name, value in {
        "train.min_lr": train.min_lr,
        "train.z_loss": train.z_loss,
        "optimizer.weight_decay": settings.optimizer.weight_decay,
    }.items():
        if not (math.isfinite(value) and value >= 0):
            problems.add(f"--{name}={value}: must not be negative.")
    for name, value in {
        "train.lr_warmup_fraction": train.lr_warmup_fraction,
        "train.lr_decay_fraction": train.lr_decay_fraction,
    }.items():
        if value is not None and not 0 <= value <= 1:
            problems.add(f"--{name}={value}: a fraction, from 0 to 1.")
    given = [
        name
        for name in ("lr_warmup_steps", "lr_warmup_tokens", "lr_warmup_fraction")
        if getattr(train, name) is not None
    ]
    if len(given) > 1:
        problems.add(f"--train.{given[0]} and --train.{given[1]}: give one of them.")
    if train.max_tokens is None and train.max_steps is None and train.epochs is None:
        problems.add(
            "--train.max_tokens: say how long to train, by --train.max_tokens, --train.max_steps or --train.epochs."
        )
    if train.min_lr > settings.optimizer.lr and train.lr_schedule != "constant":
        problems.add(f"--train.min_lr={train.min_lr}: above the peak --optimizer.lr={settings.optimizer.lr}. Lower it.")
    if parallel.loss == "fused" and train.z_loss:
        problems.add("--parallel.loss=fused: has no z-loss. Use --parallel.loss=chunked, or --train.z_loss=0.")
    if settings.num_devices and all_positive:  # they divide by these numbers
        problems.collect(micro_batches_per_step, settings, settings.num_nodes * settings.num_devices)
        problems.collect(shard_size, settings, settings.num_nodes * settings.num_devices, settings.num_devices)
    if parallel.shard_size is not None and parallel.sharding != "hybrid":
        problems.add(
            f"--parallel.shard_size={parallel.shard_size}: only has a meaning with --parallel.sharding=hybrid, "
            f"not {parallel.sharding}. Set that, or leave it out."
        )


def _check_vocabulary(settings: Settings, config: Any, manifests: list, problems: Problems) -> None:
    records = [manifest["tokenizer"] for manifest in manifests if manifest and manifest.get("tokenizer")]
    if len({record["sha256"] for record in records}) > 1:
        problems.add("data_mixture: the datasets were made with different tokenizers. Make them with one.")
    info = problems.collect(read_tokenizer_info, settings.tokenizer_dir) if settings.tokenizer_dir is not None else None
    if info is not None and records and info.sha256 != records[0]["sha256"]:
        problems.add(
            f"--tokenizer_dir={settings.tokenizer_dir}: not the tokenizer that made the dataset (sha256 {info.sha256[:12]}.. against "
            f"{records[0]['sha256'][:12]}..). Give that one, or tokenize again."
        )
    sizes = [record["vocab_size"] for record in records] + ([info.vocab_size] if info else [])
    if config is not None and sizes and config.padded_vocab_size > 1.25 * max(sizes):
        spare = (config.padded_vocab_size - max(sizes)) * config.n_embd * (1 if settings.train.tie_embeddings else 2)
        console.warn(
            f"the model has {config.padded_vocab_size:,} embeddings for {max(sizes):,} tokens: "
            f"--model_config.padded_vocab_size={max(sizes)} saves {console.human_count(spare)} parameters"
        )
    if config is not None and sizes and max(sizes) > config.padded_vocab_size:
        problems.add(
            f"--model_name={settings.model_name}: has {config.padded_vocab_size} embeddings, the tokenizer {max(sizes)} tokens. Set "
            f"model_config.padded_vocab_size to at least {max(sizes)}, or use the model's own tokenizer."
        )


def _check_out_dir(settings: Settings, problems: Problems) -> None:
    out_dir = Path(settings.out_dir).absolute()
    existing = next(path for path in (out_dir, *out_dir.parents) if path.exists())
    if not existing.is_dir():
        problems.add(f"--out_dir={settings.out_dir}: {existing} is a file. Give a directory.")
    elif not os.access(existing, os.W_OK | os.X_OK):
        problems.add(f"--out_dir={settings.out_dir}: no permission to write into {existing}. Give another directory.")


def _total_steps(settings: Settings, tokens_per_step: int, train_blocks: int) -> int:
    train = settings.train
    limits = []
    if train.max_tokens is not None:
        limits.append(train.max_tokens // tokens_per_step)
    if train.max_steps is not None:
        limits.append(train.max_steps)
    if train.epochs is not None:
        limits.append(math.ceil(train.epochs * train_blocks / train.global_batch_size))
    return max(1, min(limits))


def _warmup_steps(settings: Settings, tokens_per_step: int, total_steps: int) -> int:
    train = settings.train
    if train.lr_warmup_tokens is not None:
        steps = math.ceil(train.lr_warmup_tokens / tokens_per_step)
    elif train.lr_warmup_fraction is not None:
        steps = math.ceil(train.lr_warmup_fraction * total_steps)
    else:
        steps = train.lr_warmup_steps or 0
    return steps


def _bits_per_nat(val: list[Index], weights: list[float] | None) -> float | None:
    """tokens / bytes / ln 2, over the validation data; mixtures by their weights."""
    bytes_per_token = []
    for index in val:
        manifest = read_manifest(index.directory)
        text_bytes = manifest["content"].get("text_bytes") if manifest else None
        if not text_bytes or not index.tokens:
            return None
        bytes_per_token.append(text_bytes / index.tokens)
    shares = weights or [1.0] * len(val)
    mean = sum(share * value for share, value in zip(shares, bytes_per_token)) / sum(shares)
    return 1 / (mean * math.log(2))


def _identity(index: Index) -> str:
    """What the blocks of a dataset are: sizes and order of its chunks, and its tokens as far as a manifest vouches for them."""
    manifest = read_manifest(index.directory) or {}
    files = {entry["name"]: entry.get("xxh3_128") for entry in manifest.get("files", []) if isinstance(entry, dict)}
    digest = hashlib.sha256()
    for chunk in index.chunks:
        digest.update(f"{chunk.name} {chunk.tokens} {chunk.bytes} {files.get(chunk.name)}\n".encode())
    return digest.hexdigest()
