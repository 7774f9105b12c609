"""Everything that is known about a run before it starts: checked, counted, and comparable between runs. No torch."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any

from pretraining.checkpoint import WEIGHTS_NAME
from pretraining.checks import check_model, check_numbers, check_out_dir, warn_of_documents, warn_of_repetition
from pretraining.data_order import interleave
from pretraining.dataset_index import check_index_agrees
from pretraining.documents import Separator, separator_of
from pretraining.evaluation_plan import check_evaluations
from pretraining.loggers import check_logger
from pretraining.model_config import resolve_model_config
from pretraining.settings import Settings
from utils import console
from utils.chunks import Index, read_index
from utils.errors import Problems, UserError
from utils.manifest import read_manifest
from utils.tokenizer import read_tokenizer_info

WARN_UNREAD_SHARE = 0.02


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
    separators: list[Separator] | None
    """Per dataset, the token between its documents; None: documents are not masked from one another."""
    tokenizer: dict[str, Any] | None
    """TokenizerInfo.record() of the dataset."""
    data_identity: list[str]
    """A hash of each dataset's index."""


def data_directories(settings: Settings) -> tuple[list[Path], list[float] | None]:
    """The dataset directories and their weights; raises UserError when none or both ways are given."""
    if (settings.dataset_path is None) == (settings.data_mixture is None):
        raise UserError(
            "--dataset_path: give one directory with train/ and val/, made by merge_files.py, or several as "
            "data_mixture (not both)."
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
            f"data_mixture: the weight of {', '.join(without)} is too small to be read at all; weights are rounded to "
            "0.1% of their sum. Raise it, or leave the dataset out."
        )
    return [Path(path) for path in settings.data_mixture], weights


def make_plan(settings: Settings) -> Plan:
    """Check all that can be checked without a GPU, a cluster or torch.

    Raises:
        UserError: with every problem found.
    """
    problems = Problems()
    check_numbers(settings, problems)
    problems.collect(check_logger, settings.logger_name)
    config = problems.collect(resolve_model_config, settings)
    context = _check_context(settings, config, problems) if config is not None else None
    if config is not None:
        check_model(settings, config, problems)
    located = problems.collect(data_directories, settings) if settings.tokens is None else ([], None)
    train, val, manifests = _read_datasets(located[0] if located else [], context, problems)
    if settings.tokens is None:
        _check_vocabulary(settings, config, manifests, problems)
    separators = _separators(settings, config, train, manifests, problems)
    if config is not None and context < config.block_size:
        console.say(
            f"context: trained on {context:,} tokens; the exported model will claim {config.block_size:,}, "
            "model_config.block_size"
        )
    weights_file = Path(settings.initial_checkpoint_dir or "") / WEIGHTS_NAME
    if settings.initial_checkpoint_dir is not None and not weights_file.exists():
        problems.add(
            f"--initial_checkpoint_dir={settings.initial_checkpoint_dir}: no {WEIGHTS_NAME} in it. Give an exported or "
            "litgpt directory, or a checkpoint of this script."
        )
    check_out_dir(settings, problems)
    check_evaluations(settings, context, manifests, problems)
    if config is not None and context > 0:
        for index in train + val:
            if index is not None and _count_blocks(index, context) == 0:
                problems.add(
                    f"--dataset_path={index.directory}: {index.tokens} tokens in {len(index.chunks)} chunks hold no "
                    f"sequence of {context + 1}. Give more text, or a smaller --train.max_seq_length."
                )
    problems.raise_if_any()
    for split, indexes in (("train", train), ("val", val)) if settings.tokens is None else ():
        _say_unread(split, indexes, context)

    tokens_per_step = settings.train.global_batch_size * context
    train_blocks = sum(_count_blocks(index, context) for index in train)
    if settings.tokens is not None:
        train_blocks = max(1, int(settings.tokens) // (context + 1))
    total = _total_steps(settings, tokens_per_step, train_blocks)
    warmup = _warmup_steps(settings, tokens_per_step, total)
    if warmup >= total > 1:
        console.warn(f"the learning rate warms up for {warmup} steps of a run of {total}: it never reaches its course")
    warn_of_repetition(settings, total * settings.train.global_batch_size / train_blocks, train_blocks * context)
    return Plan(
        model_config=dataclasses.asdict(config),
        context_tokens=context,
        train_directories=[str(index.directory.resolve()) for index in train],
        val_directories=[str(index.directory.resolve()) for index in val],
        weights=located[1],
        train_blocks=train_blocks,
        val_blocks=sum(_count_blocks(index, context) for index in val),
        tokens_per_step=tokens_per_step,
        total_steps=total,
        warmup_steps=min(warmup, total),
        decay_steps=math.ceil(settings.train.lr_decay_fraction * total),
        bits_per_nat=_bits_per_nat(val, located[1]),
        separators=separators,
        tokenizer=next(
            (manifest["tokenizer"] for manifest in manifests if manifest and manifest.get("tokenizer")), None
        ),
        data_identity=[identity_of(index) for index in train],
    )


def _count_blocks(index: Index, context_tokens: int) -> int:
    """Blocks of a dataset: litdata cuts each chunk into blocks and drops the chunk's incomplete last one."""
    return sum(chunk.tokens // (context_tokens + 1) for chunk in index.chunks)


def _say_unread(split: str, indexes: list[Index], context_tokens: int) -> None:
    """The tokens that `_count_blocks` leaves out, many where the chunks are small."""
    tokens = sum(index.tokens for index in indexes)
    unread = tokens - sum(_count_blocks(index, context_tokens) for index in indexes) * (context_tokens + 1)
    said = (
        f"{split}: {unread / tokens:.2%} of {tokens:,} tokens are not read: they fill no sequence at their chunk's end"
    )
    if unread > WARN_UNREAD_SHARE * tokens:
        console.warn(f"{said}. merge_files.py gathers small chunks into larger ones, which lose less.")
    else:
        console.say(said)


def _check_context(settings: Settings, config: Any, problems: Problems) -> int:
    """The context in tokens, checked against the model."""
    context = settings.train.max_seq_length or config.block_size
    if context > config.block_size:
        problems.add(
            f"--train.max_seq_length={context}: the model's block_size is {config.block_size}. Give at most that, or "
            "raise model_config.block_size."
        )
    return context


def _read_datasets(directories: list[Path], context_tokens: int | None, problems: Problems) -> tuple[list, list, list]:
    """The indexes of train/ and val/ of each dataset, and the manifests of train/; None where they are missing."""
    train, val, manifests = [], [], []
    for directory in directories:
        if not directory.is_dir():
            problems.add(
                f"--dataset_path={directory}: no such directory. Give the output of merge_files.py (it holds train/ "
                "and val/)."
            )
            continue
        for split, indexes in (("train", train), ("val", val)):
            index = problems.collect(read_index, directory / split, "--dataset_path")
            manifest = problems.collect(read_manifest, directory / split, "dataset") if index else None
            if index is not None and manifest is not None:
                problems.collect(check_index_agrees, index, manifest)
            indexes.append(index)
            if split == "train":
                manifests.append(manifest)
                if manifest is not None:
                    warn_of_documents(directory, manifest, context_tokens)
            if index is not None and manifest is None:
                console.warn(
                    f"{directory / split} has no manifest.json: its tokenizer and its bytes of text are unknown and "
                    "were not checked."
                )
    return train, val, manifests


def _check_vocabulary(settings: Settings, config: Any, manifests: list, problems: Problems) -> None:
    records = [manifest["tokenizer"] for manifest in manifests if manifest and manifest.get("tokenizer")]
    if len({record["sha256"] for record in records}) > 1:
        problems.add("data_mixture: the datasets were made with different tokenizers. Make them with one.")
    info = problems.collect(read_tokenizer_info, settings.tokenizer_dir) if settings.tokenizer_dir is not None else None
    if info is not None and records and info.sha256 != records[0]["sha256"]:
        made = problems.collect(read_manifest, info.directory) or {"kind": None}  # an export's file may be rewritten
        if made["kind"] != "export" or (made["tokenizer"] or {}).get("sha256") != records[0]["sha256"]:
            problems.add(
                f"--tokenizer_dir={settings.tokenizer_dir}: not the tokenizer that made the dataset (sha256 "
                f"{info.sha256[:12]}... against {records[0]['sha256'][:12]}...). Give that one, or tokenize again."
            )
    sizes = [record["vocab_size"] for record in records] + ([info.vocab_size] if info else [])
    if config is not None and sizes and config.padded_vocab_size > 1.25 * max(sizes):
        spare = (config.padded_vocab_size - max(sizes)) * config.n_embd * (1 if settings.train.tie_embeddings else 2)
        console.warn(
            f"the model has {config.padded_vocab_size:,} embeddings for {max(sizes):,} tokens: "
            f"--model_config.padded_vocab_size={max(sizes)} saves {console.human_count(spare)} parameters"
        )
    if config is not None and sizes and max(sizes) > config.padded_vocab_size:
        model = f"--model_name={settings.model_name}" if settings.model_name else "model_config"
        problems.add(
            f"{model}: has {config.padded_vocab_size} embeddings, the tokenizer {max(sizes)} tokens. Set "
            f"model_config.padded_vocab_size to at least {max(sizes)}, or use the model's own tokenizer."
        )


def _separators(
    settings: Settings, config: Any, train: list[Index | None], manifests: list, problems: Problems
) -> list[Separator] | None:
    if not settings.train.document_masking:
        return None
    if config is not None and config.latent_attention:
        problems.add(
            f"--train.document_masking=true: not possible for {config.name}, whose latent attention is litgpt's own "
            "and takes no mask of documents. Leave it out, or choose another model."
        )
    present = [(index.directory, manifest) for index, manifest in zip(train, manifests) if index is not None]
    return [problems.collect(separator_of, directory, manifest) for directory, manifest in present]


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
        return math.ceil(train.lr_warmup_tokens / tokens_per_step)
    if train.lr_warmup_fraction is not None:
        return math.ceil(train.lr_warmup_fraction * total_steps)
    return train.lr_warmup_steps or 0


def _bits_per_nat(val: list[Index], weights: list[float] | None) -> float | None:
    """tokens / bytes / ln 2, over the validation data; mixtures by their weights."""
    if not val:
        return None
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


def identity_of(index: Index) -> str:
    """A hash of what the blocks hold: sizes and order of the chunks, and their checksums where a manifest has them."""
    manifest = read_manifest(index.directory) or {}
    files = {entry["name"]: entry.get("xxh3_128") for entry in manifest.get("files", []) if isinstance(entry, dict)}
    digest = hashlib.sha256()
    for chunk in index.chunks:
        digest.update(f"{chunk.name} {chunk.tokens} {chunk.bytes} {files.get(chunk.name)}\n".encode())
    return digest.hexdigest()
