"""Loading what a run starts from: the whole state of a checkpoint, or weights alone."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from pretraining.checkpoint import WEIGHTS_NAME, Checkpoint, first_whole, list_checkpoints
from pretraining.events import record_event
from pretraining.parallelism import fill_local_shard, local_shard, model_weights
from utils.errors import UserError
from utils.manifest import damaged_files

_HASHING_THREADS = 2  # of each process; hashing releases the interpreter's lock
_EMBEDDING, _HEAD = "transformer.wte.weight", "lm_head.weight"


def agree_on_checkpoint(out_dir: Path, verify: str, still_working: Callable[[], None]) -> Checkpoint | None:
    """The newest checkpoint whose files are what its manifest says, the same on every process. Collective.

    Each process compares its share of the files, so that a large checkpoint is read at the speed of all nodes.

    Args:
        verify: "checksums" or "sizes".
        still_working: called after each file.
    """
    found: list[Any] = [list_checkpoints(out_dir) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)  # rank 0's word: a network file system may be late
    checkpoints, skipped = found[0]
    newest = first_whole(checkpoints, skipped, lambda one: _damage(one, verify == "checksums", still_working))
    if dist.get_rank() == 0:
        for line in skipped:
            message, taken = f"skipped checkpoint {line}", newest and str(newest.path)
            record_event(out_dir, "checkpoint refused", message, step=newest.step if newest else 0, taken=taken)
    return newest


def _damage(checkpoint: Checkpoint, checksums: bool, still_working: Callable[[], None]) -> list[str]:
    """What is wrong with any of a checkpoint's files, on every process."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    entries = sorted(checkpoint.manifest["files"], key=str)  # the shards follow each other, and are about equal in size
    mine: list[str] = []

    def compare(entry: dict[str, Any]) -> list[str]:
        return damaged_files(checkpoint.path, [entry], checksums=checksums)

    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        for problems in pool.map(compare, entries[rank::world_size]):
            mine += problems
            still_working()
    everyones: list[Any] = [None] * world_size
    dist.all_gather_object(everyones, mine)
    return [problem for problems in everyones for problem in problems]


def load_training_state(path: Path, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """Fill model and optimizers from `path`/lit_model.pth, whatever number of processes wrote it.

    The optimizers' settings (weight decay, betas, eps, momentum) stay those they were made with.

    Returns:
        The primitives of meta.pt.
    """
    options = [
        [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        for optimizer in optimizers
    ]
    state = {"model": model_weights(model), "optimizer": get_optimizer_state_dict(model, optimizers)}
    dcp.load(state, storage_reader=dcp.FileSystemReader(path / WEIGHTS_NAME))
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizers, state["optimizer"])
    for optimizer, own in zip(optimizers, options):
        for group, values in zip(optimizer.param_groups, own):
            group.update(values)
    return torch.load(path / WEIGHTS_NAME / "meta.pt", weights_only=True)


def load_initial_weights(directory: str | os.PathLike, model: torch.nn.Module) -> None:
    """Weights alone, from a litgpt or exported directory (lit_model.pth is a file) or from a checkpoint (a directory).

    Raises:
        UserError: there are none, or their parameters are not those of the model.
    """
    path = Path(directory) / WEIGHTS_NAME
    load = _load_sharded_weights if path.is_dir() else _load_weights_file
    load(path, model, f"--initial_checkpoint_dir={directory}")


def _load_sharded_weights(path: Path, model: torch.nn.Module, flag: str) -> None:
    weights = model_weights(model)
    reader = dcp.FileSystemReader(path)
    saved = {
        name.removeprefix("model."): tuple(metadata.size)
        for name, metadata in reader.read_metadata().state_dict_metadata.items()
        if name.startswith("model.")
    }
    _check_shapes(flag, saved, weights)
    if _is_tied(model):  # the one tensor behind both names would take whichever is loaded last
        head = torch.empty_like(weights[_HEAD])
        dcp.load({"model": {_HEAD: head}}, storage_reader=reader)
        dcp.load({"model": {_EMBEDDING: weights[_EMBEDDING]}}, storage_reader=reader)
        _check_tied(flag, _same_everywhere(head, weights[_EMBEDDING]))
    dcp.load({"model": weights}, storage_reader=reader)
    set_model_state_dict(model, weights)


def _load_weights_file(path: Path, model: torch.nn.Module, flag: str) -> None:
    weights = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
    weights = weights.get("model", weights)
    parameters = dict(model.named_parameters())
    if _is_tied(model):  # of the shared weight's two names the model lists one, and the file has one or both
        if {_HEAD, _EMBEDDING} <= set(weights):
            _check_tied(flag, torch.equal(weights[_HEAD], weights[_EMBEDDING]))
        for names in (weights, parameters):
            if _EMBEDDING in names:
                names[_HEAD] = names.pop(_EMBEDDING)
    _check_shapes(flag, {name: tuple(tensor.shape) for name, tensor in weights.items()}, parameters)
    for name, parameter in parameters.items():
        fill_local_shard(parameter, functools.partial(_rows, weights[name]))


def _rows(full: torch.Tensor, first: int, count: int) -> torch.Tensor:
    return full[first : first + count]


def _is_tied(model: torch.nn.Module) -> bool:
    return model.lm_head.weight is model.transformer.wte.weight


def _same_everywhere(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors that are sharded alike are equal, on every process."""
    mine, other = local_shard(a), local_shard(b)
    same = torch.tensor(float(torch.equal(mine, other)), device=mine.device)
    dist.all_reduce(same, dist.ReduceOp.MIN)
    return bool(same.item())


def _check_tied(flag: str, same: bool) -> None:
    if not same:
        raise UserError(
            f"{flag}: its output layer and its embedding differ, and --train.tie_embeddings=true would lose one of "
            "them. Leave it false, or start from a model with tied embeddings."
        )


def _check_shapes(flag: str, saved: dict[str, tuple[int, ...]], wanted: dict[str, torch.Tensor]) -> None:
    """Raises UserError when the saved parameters are not those of the model."""
    problems = [f"{flag}: no weights for {name}." for name in sorted(set(wanted) - set(saved))[:3]]
    problems += [f"{flag}: {name} is not a part of this model." for name in sorted(set(saved) - set(wanted))[:3]]
    problems += [
        f"{flag}: {name} has shape {saved[name]}, the model's is {tuple(tensor.shape)}."
        for name, tensor in wanted.items()
        if name in saved and saved[name] != tuple(tensor.shape)
    ][:3]
    if problems:
        raise UserError(problems)
