"""Sharded checkpoints that are complete or absent: their layout, which one to take, which to delete, and loading.

    OUT_DIR/
      step-00001000/                 final/ likewise
        lit_model.pth/               torch's distributed checkpoint: one file a process, .metadata
          __0_0.distcp  __1_0.distcp  .metadata
          meta.pt                    Lightning's file: step and positions, primitives only
        model_config.yaml  hyperparameters.yaml  tokenizer files
        manifest.json                sizes and checksums of all of them, written last

pretraining/checkpoint_writer.py writes it under a temporary name (utils.files) and renames it when the manifest is on disk.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError
from utils.files import fsync_directory
from utils.manifest import MANIFEST_NAME, damaged_files, read_manifest

if TYPE_CHECKING:
    import torch

WEIGHTS_NAME = "lit_model.pth"
FINAL_NAME = "final"
_STEP_NAME = re.compile(r"step-(\d{8,})$")


def step_name(step: int) -> str:
    return f"step-{step:08d}"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int
    manifest: dict[str, Any]


def list_checkpoints(out_dir: str | os.PathLike) -> tuple[list[Checkpoint], list[str]]:
    """The published checkpoints of a run, newest first, and a line on each directory that is none."""
    found, skipped = [], []
    out_dir = Path(out_dir)
    for path in sorted(out_dir.iterdir()) if out_dir.is_dir() else []:
        if not path.is_dir() or not (_STEP_NAME.match(path.name) or path.name == FINAL_NAME):
            continue
        try:
            manifest = read_manifest(path, "checkpoint")
            step = None if manifest is None else manifest["content"].get("step")
        except UserError as error:
            skipped.append(str(error))
            continue
        if manifest is None:
            skipped.append(f"{path}: no {MANIFEST_NAME}, so it was never completed")
        elif not isinstance(step, int):
            skipped.append(f"{path}: its {MANIFEST_NAME} names no step")
        else:
            found.append(Checkpoint(path, step, manifest))
    return sorted(found, key=lambda checkpoint: checkpoint.step, reverse=True), skipped


def find_newest_good(out_dir: str | os.PathLike, checksums: bool) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose files are what its manifest says, and a line on each that was passed over."""
    checkpoints, skipped = list_checkpoints(out_dir)
    for checkpoint in checkpoints:
        entries = checkpoint.manifest["files"]
        with ThreadPoolExecutor(max_workers=8) as pool:  # hashing releases the interpreter's lock
            check = functools.partial(_damage, checkpoint.path, checksums)
            damage = list(pool.map(check, entries))
        problems = [problem for problems in damage for problem in problems]
        if not problems:
            return checkpoint, skipped
        skipped.append(f"{checkpoint.path}: {'; '.join(problems[:3])}")
    return None, skipped


def _damage(directory: Path, checksums: bool, entry: dict[str, Any]) -> list[str]:
    return damaged_files(directory, [entry], checksums)


def rename_final_to_its_step(out_dir: str | os.PathLike) -> None:
    """A run that is made longer goes on from final/: give that checkpoint its step's name."""
    final = next((found for found in list_checkpoints(out_dir)[0] if found.path.name == FINAL_NAME), None)
    if final is None:  # or damaged: the run's new end will replace it
        return
    target = Path(out_dir) / step_name(final.step)
    if not target.exists():
        os.rename(final.path, target)
        fsync_directory(out_dir)


def checkpoints_to_delete(
    checkpoints: list[Checkpoint], step: int, keep_last: int | None, keep_every_steps: int | None
) -> list[Checkpoint]:
    """Those that may be deleted when that of `step` was published; `checkpoints` newest first.

    Later ones are damaged: the run went on from before them. They stay, and do not count.
    """
    if keep_last is None:
        return []
    checkpoints = [checkpoint for checkpoint in checkpoints if checkpoint.step <= step]
    return [
        checkpoint
        for checkpoint in checkpoints[max(1, keep_last) :]
        if checkpoint.path.name != FINAL_NAME and not (keep_every_steps and checkpoint.step % keep_every_steps == 0)
    ]


# --- loading ----------------------------------------------------------------------------------------------------------


def load_training_state(path: Path, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """Fill model and optimizers from `path`/lit_model.pth, whatever number of processes wrote it.

    The optimizers' settings (weight decay, betas, eps, momentum) stay those they were made with.

    Returns:
        The primitives of meta.pt.
    """
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    options = [
        [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        for optimizer in optimizers
    ]
    reader = dcp.FileSystemReader(path / WEIGHTS_NAME)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizers)}
    dcp.load(state, storage_reader=reader)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizers, state["optimizer"])
    for optimizer, own in zip(optimizers, options):
        for group, values in zip(optimizer.param_groups, own):
            group.update(values)
    return torch.load(path / WEIGHTS_NAME / "meta.pt", weights_only=True)


def load_initial_weights(directory: str | os.PathLike, model: torch.nn.Module) -> None:
    """Weights only, from a litgpt or exported directory (lit_model.pth a file) or a checkpoint of ours (a directory).

    Raises:
        UserError: there is none, or its parameters are not those of the model.
    """
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    from pretraining.parallelism import fill_local_shard

    path = Path(directory) / WEIGHTS_NAME
    flag = f"--initial_checkpoint_dir={directory}"
    if path.is_dir():
        state = {"model": get_model_state_dict(model)}
        reader = dcp.FileSystemReader(path)
        saved = {
            name.removeprefix("model."): tuple(metadata.size)
            for name, metadata in reader.read_metadata().state_dict_metadata.items()
            if name.startswith("model.")
        }
        _check_shapes(flag, saved, {name: tuple(tensor.shape) for name, tensor in state["model"].items()})
        if _is_tied(model):  # the one tensor behind both names would take whichever is loaded last
            head = {"model": {"lm_head.weight": torch.empty_like(state["model"]["lm_head.weight"])}}
            dcp.load(head, storage_reader=reader)
            dcp.load(
                {"model": {"transformer.wte.weight": state["model"]["transformer.wte.weight"]}}, storage_reader=reader
            )
            _check_tied(
                flag, _same_everywhere(head["model"]["lm_head.weight"], state["model"]["transformer.wte.weight"])
            )
        dcp.load(state, storage_reader=reader)
        set_model_state_dict(model, state["model"])
        return
    weights = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
    weights = weights.get("model", weights)
    parameters = dict(model.named_parameters())
    if _is_tied(model):
        # Of the shared weight's two names the model lists one, and the file has one or both.
        if {"lm_head.weight", "transformer.wte.weight"} <= set(weights):
            _check_tied(flag, torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"]))
        if "transformer.wte.weight" in weights:
            weights["lm_head.weight"] = weights.pop("transformer.wte.weight")
        if "transformer.wte.weight" in parameters:
            parameters["lm_head.weight"] = parameters.pop("transformer.wte.weight")
    _check_shapes(
        flag,
        {name: tuple(tensor.shape) for name, tensor in weights.items()},
        {name: tuple(parameter.shape) for name, parameter in parameters.items()},
    )
    for name, parameter in parameters.items():
        fill_local_shard(parameter, functools.partial(_rows, weights[name]))


def _rows(full: torch.Tensor, first: int, count: int) -> torch.Tensor:
    return full[first : first + count]


def _is_tied(model: torch.nn.Module) -> bool:
    return model.lm_head.weight is model.transformer.wte.weight


def _same_everywhere(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors spread alike are equal, on every process."""
    import torch
    import torch.distributed as dist

    mine, other = (tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in (a, b))
    same = torch.tensor(float(torch.equal(mine, other)), device=mine.device)
    dist.all_reduce(same, dist.ReduceOp.MIN)
    return bool(same.item())


def _check_tied(flag: str, same: bool) -> None:
    if not same:
        raise UserError(
            f"{flag}: its output layer and its embedding differ, and --train.tie_embeddings=true would lose one of them. Leave it "
            "false, or start from a model with tied embeddings."
        )


def _check_shapes(flag: str, saved: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    """Raises UserError when the saved parameters are not those of the model."""
    problems = [f"{flag}: no weights for {name}." for name in sorted(set(wanted) - set(saved))[:3]]
    problems += [f"{flag}: {name} is not a part of this model." for name in sorted(set(saved) - set(wanted))[:3]]
    problems += [
        f"{flag}: {name} has shape {saved[name]}, the model's is {shape}."
        for name, shape in wanted.items()
        if name in saved and saved[name] != shape
    ][:3]
    if problems:
        raise UserError(problems)
