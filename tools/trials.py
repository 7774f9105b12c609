"""Which combinations of settings find_fastest tries, which of them fit, and what is kept of those that ran."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pretraining.plan import Plan
from pretraining.process_layout import num_context_groups, shard_size
from pretraining.settings import Settings
from tokenization.chunk_writer import chunk_header, dtype_for_vocabulary
from utils.chunks import CODE_OF_DTYPE, INDEX_NAME
from utils.errors import UserError
from utils.files import write_json
from utils.manifest import file_entry, write_manifest

RESULTS_NAME = "find_fastest.jsonl"

RECOMPUTATION = ("none", "selective", "full")  # from the fastest to the one that needs least memory

# Larger micro-batches keep a GPU no busier, and take memory that less recomputation could use.
_MAX_MICRO_BATCH_TOKENS = 65_536
_MIN_SEQUENCES_PER_STEP = 8

_DATA_SEQUENCES = 64
_DOCUMENT_TOKENS = 1000

_TRAIN_SETTINGS = (
    "global_batch_size", "micro_batch_size", "tie_embeddings", "z_loss", "router_aux_loss", "document_masking",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Combination:
    """One value for each setting that is tried; the names are the settings' own."""

    micro_batch_size: int
    activation_checkpointing: str
    sharding: str
    reduce_every_micro_batch: bool
    loss_chunk_tokens: int
    compile: bool

    def apply(self, settings: Settings) -> Settings:
        values = dataclasses.asdict(self)
        micro_batch_size = values.pop("micro_batch_size")
        shard = settings.parallel.shard_size if self.sharding == "hybrid" else None
        return dataclasses.replace(
            settings,
            train=dataclasses.replace(settings.train, micro_batch_size=micro_batch_size),
            parallel=dataclasses.replace(settings.parallel, shard_size=shard, **values),
        )

    def as_yaml(self) -> str:
        values = dataclasses.asdict(self)
        lines = ["train:", f"  micro_batch_size: {values.pop('micro_batch_size')}", "parallel:"]
        return "\n".join([*lines, *(f"  {name}: {json.dumps(value).strip(chr(34))}" for name, value in values.items())])


def combinations(settings: Settings, search: Any, context_tokens: int) -> list[Combination]:
    """Every combination that is sensible for these processes, whether it fits or not.

    Args:
        settings: accelerator and num_devices are settled.
        search: for each field of Combination the values to try, or None for a choice of this function's.

    Raises:
        UserError: none divides the global batch evenly.
    """
    world_size = settings.num_nodes * settings.num_devices
    num_groups = num_context_groups(settings, world_size)  # of processes that compute a micro-batch together
    per_group = settings.train.global_batch_size // num_groups
    process_tokens = context_tokens // settings.parallel.context_parallel_size

    def evenly(size: int) -> bool:
        return settings.train.global_batch_size % (size * num_groups) == 0

    sizes = search.micro_batch_size
    if sizes is None:
        powers = [2**power for power in range(max(1, per_group).bit_length())]
        small = [size for size in powers if size * process_tokens <= _MAX_MICRO_BATCH_TOKENS]
        sizes = sorted({*small, settings.train.micro_batch_size})
    if not any(map(evenly, sizes)):
        raise UserError(
            f"--train.global_batch_size={settings.train.global_batch_size}: over {world_size} processes it does not "
            f"divide into micro-batches of {' or '.join(map(str, sizes))}. Give a multiple of their number."
        )
    shardings = search.sharding
    if shardings is None and world_size == 1:
        shardings = ["full"]
    elif shardings is None:
        shardings = ["full", "hybrid", "replicate"] if settings.num_nodes > 1 else ["full", "replicate"]
    compiles = search.compile or [settings.accelerator == "cuda" or settings.parallel.compile]
    found = []
    for size, sharding, compiled, recomputation, chunk in itertools.product(
        filter(evenly, sizes),
        shardings,
        compiles,
        search.activation_checkpointing or RECOMPUTATION,
        search.loss_chunk_tokens or [settings.parallel.loss_chunk_tokens],
    ):
        # Where nothing is accumulated, or gradients are whole in any case, both values do the same.
        matters = per_group > size and sharding != "replicate"
        for reduces in search.reduce_every_micro_batch or ([False, True] if matters else [False]):
            found.append(Combination(size, recomputation, sharding, reduces, chunk, compiled))
    shard_size(settings, world_size, settings.num_devices)
    return found


def worth_trying(tried: list[Combination], fits: Callable[[Combination], bool], search: Any) -> list[Combination]:
    """Those that fit, and that nothing which fits beats beforehand: recomputing more, or reducing more often, costs
    time and saves only memory. A setting whose values the user listed is never left out.

    Args:
        fits: asked as seldom as possible, because planning the memory of a compiled model takes seconds.
    """

    def costs(one: Combination) -> dict[str, int]:
        found = {}
        if search.activation_checkpointing is None:
            found["activation_checkpointing"] = RECOMPUTATION.index(one.activation_checkpointing)
        if search.reduce_every_micro_batch is None:
            found["reduce_every_micro_batch"] = int(one.reduce_every_micro_batch)
        return found

    def rest(one: Combination) -> dict[str, Any]:
        return {name: value for name, value in dataclasses.asdict(one).items() if name not in costs(one)}

    def beats(one: Combination, other: Combination) -> bool:
        return rest(one) == rest(other) and all(cost <= costs(other)[name] for name, cost in costs(one).items())

    chosen: list[Combination] = []
    for one in sorted(tried, key=lambda one: sum(costs(one).values())):
        if not any(beats(other, one) for other in chosen) and fits(one):
            chosen.append(one)
    return [one for one in tried if one in chosen]


def for_trial(settings: Settings, directory: Path) -> Settings:
    """The settings of a few steps on the made-up tokens in `directory`, with as many micro-batches as are needed for
    `_MIN_SEQUENCES_PER_STEP` sequences, at least two where the run has several, and at most the run's own number."""
    num_groups = num_context_groups(settings, settings.num_nodes * settings.num_devices)
    size = settings.train.micro_batch_size
    real = settings.train.global_batch_size // (size * num_groups)
    accumulation = min(real, max(2, -(-_MIN_SEQUENCES_PER_STEP // size)))
    train = dataclasses.replace(
        settings.train,
        global_batch_size=accumulation * size * num_groups,
        max_steps=1000,
        max_tokens=None,
        epochs=None,
        max_time=None,
        save_interval=None,
        log_interval=10**9,  # one record, for the last step, is about all of them
        max_nonfinite_steps=10**9,
        spike_sigma=None,
        max_spikes=None,
    )
    evaluation = dataclasses.replace(
        settings.eval, interval=None, initial_validation=False, final_validation=False, tasks=None, prompts=None
    )
    return dataclasses.replace(
        settings,
        dataset_path=str(directory),
        data_mixture=None,
        tokenizer_dir=None,
        initial_checkpoint_dir=None,
        out_dir=str(directory),
        profile_steps=0,
        train=train,
        eval=evaluation,
        # Where communication is left out copies differ, and are not to be blamed for it.
        parallel=dataclasses.replace(settings.parallel, compare_copies_every=None),
    )


def identity(settings: Settings, plan: Plan) -> dict[str, Any]:
    """What the speed of a run depends on, besides the device and the software; the same for two runs that are as fast.

    Args:
        settings: accelerator, num_devices and precision are settled.
    """
    train = settings.train
    return {
        "model": plan.model_config,
        "context_tokens": plan.context_tokens,
        "num_nodes": settings.num_nodes,
        "num_devices": settings.num_devices,
        "accelerator": settings.accelerator,
        "precision": settings.precision,
        "optimizer": settings.optimizer.name,
        "train": {name: getattr(train, name) for name in _TRAIN_SETTINGS},
        "parallel": dataclasses.asdict(settings.parallel),
    }


class Results:
    """find_fastest.jsonl: a line per trial that ended, on disk as soon as it did."""

    def __init__(self, path: Path):
        self.path, self.rows = path, []
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        for line in lines:
            with contextlib.suppress(ValueError):  # half written, by a process that was killed
                self.rows.append(json.loads(line))
        self._torn = bool(lines) and not lines[-1].endswith(b"\n")

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """The newest row whose entries of `key` are equal."""
        wanted = json.loads(json.dumps(key))
        return next((row for row in reversed(self.rows) if {name: row.get(name) for name in wanted} == wanted), None)

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        with open(self.path, "ab") as file:
            file.write(b"\n" * self._torn + json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._torn = False
        self.rows.append(row)
        return row


def write_made_up_dataset(directory: Path, vocab_size: int, block_tokens: int) -> None:
    """directory/train and directory/val, each one chunk of random tokens in litdata's format (see utils/chunks.py).

    Token 0 starts a document each 1,000 tokens, in case that documents are masked from one another.
    """
    dtype = dtype_for_vocabulary(vocab_size)
    tokens = np.random.default_rng(0).integers(vocab_size, size=_DATA_SEQUENCES * block_tokens).astype(dtype)
    tokens[tokens == 0] = 1
    tokens[::_DOCUMENT_TOKENS] = 0
    header = chunk_header(np.array([len(tokens)]), dtype)
    size = header.nbytes + tokens.nbytes
    for split in ("train", "val"):
        (directory / split).mkdir(parents=True)
        with open(directory / split / "chunk-0.bin", "wb") as file:
            file.write(header.tobytes())
            file.write(tokens.tobytes())
        chunk = {"chunk_bytes": size, "chunk_size": 1, "dim": len(tokens), "filename": "chunk-0.bin"}
        config = {"item_loader": "TokensLoader", "data_format": [f"no_header_tensor:{CODE_OF_DTYPE[dtype]}"]}
        write_json(directory / split / INDEX_NAME, {"chunks": [chunk], "config": config})
        entry = {**file_entry(directory / split, "chunk-0.bin"), "documents": 1, "tokens": len(tokens)}
        parts = {
            "settings": {"bos_id": 0, "eos_id": 0},
            "tokenizer": None,
            "content": {},
            "files": [entry],
            "inputs": [],
        }
        write_manifest(directory / split, {"kind": "dataset", **parts})
