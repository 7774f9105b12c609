"""Sharded checkpoints that are complete or absent, written while training goes on.

    OUT_DIR/
      step-00001000/                 final/ likewise
        lit_model.pth/               torch's distributed checkpoint: one file a process, .metadata
          __0_0.distcp  __1_0.distcp  .metadata
          meta.pt                    Lightning's file: step and positions, primitives only
        model_config.yaml  hyperparameters.yaml  tokenizer files
        manifest.json                sizes and checksums of all of them, written last

It is written as .tmp-step-00001000-NONCE and renamed when the manifest is on disk.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.console import human_bytes
from utils.errors import UserError
from utils.files import TEMPORARY_PREFIX, fsync_directory
from utils.manifest import MANIFEST_NAME, damaged_files, file_entry, read_manifest, write_manifest

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


def remove_unfinished(out_dir: str | os.PathLike) -> list[str]:
    """Delete what interrupted saves left; returns the names."""
    removed = []
    for path in Path(out_dir).glob(f"{TEMPORARY_PREFIX}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        removed.append(path.name)
    return removed


def free_final_name(out_dir: str | os.PathLike) -> None:
    """A run that is made longer goes on from final/: give that checkpoint its step's name."""
    final = Path(out_dir) / FINAL_NAME
    manifest = read_manifest(final, "checkpoint") if final.is_dir() else None
    if manifest is None:
        return
    target = Path(out_dir) / step_name(manifest["content"]["step"])
    if not target.exists():
        os.rename(final, target)
        fsync_directory(out_dir)


def superfluous(checkpoints: list[Checkpoint], keep_last: int | None, keep_every_steps: int | None) -> list[Checkpoint]:
    """Those that may be deleted; `checkpoints` newest first."""
    if keep_last is None:
        return []
    return [
        checkpoint
        for checkpoint in checkpoints[max(1, keep_last) :]
        if checkpoint.path.name != FINAL_NAME and not (keep_every_steps and checkpoint.step % keep_every_steps == 0)
    ]


# --- loading ----------------------------------------------------------------------------------------------------------


def load_training_state(path: Path, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """Fill model and optimizers from `path`/lit_model.pth, whatever number of processes wrote it.

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

    reader = dcp.FileSystemReader(path / WEIGHTS_NAME)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizers)}
    dcp.load(state, storage_reader=reader)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizers, state["optimizer"])
    return torch.load(path / WEIGHTS_NAME / "meta.pt", weights_only=True)


def load_initial_weights(directory: str | os.PathLike, model: torch.nn.Module) -> None:
    """Weights only, from a litgpt or exported directory (lit_model.pth a file) or a checkpoint of ours (a directory).

    Raises:
        UserError: there is none, or its parameters are not those of the model.
    """
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    from utils.model import fill

    path = Path(directory) / WEIGHTS_NAME
    flag = f"--initial_checkpoint_dir={directory}"
    if path.is_dir():
        state = {"model": get_model_state_dict(model)}
        dcp.load(state, storage_reader=dcp.FileSystemReader(path))
        set_model_state_dict(model, state["model"])
        return
    weights = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
    weights = weights.get("model", weights)
    parameters = dict(model.named_parameters())
    if model.lm_head.weight is model.transformer.wte.weight:
        weights.pop("lm_head.weight", None) if "transformer.wte.weight" in weights else None
        parameters.pop("lm_head.weight", None)
    problems = [f"{flag}: no weights for {name}." for name in sorted(set(parameters) - set(weights))[:3]]
    problems += [f"{flag}: {name} is not a part of this model." for name in sorted(set(weights) - set(parameters))[:3]]
    problems += [
        f"{flag}: {name} has shape {tuple(weights[name].shape)}, the model's is {tuple(parameter.shape)}."
        for name, parameter in parameters.items()
        if name in weights and weights[name].shape != parameter.shape
    ][:3]
    if problems:
        raise UserError(problems)
    for name, parameter in parameters.items():
        fill(parameter, functools.partial(_rows, weights[name]))


def _rows(full: torch.Tensor, first: int, count: int) -> torch.Tensor:
    return full[first : first + count]


# --- saving -----------------------------------------------------------------------------------------------------------


def shortage(directory: Path, needed_bytes: int) -> str | None:
    """Why `needed_bytes` would not fit into `directory`, or None."""
    free = shutil.disk_usage(directory).free
    if free >= needed_bytes:
        return None
    return f"no space: a checkpoint needs {human_bytes(needed_bytes)}, {human_bytes(free)} are free"


class CheckpointWriter:
    """Saves in the background. Every process makes one and calls `save` at the same steps.

    Args:
        out_dir: of the run, on a file system that all nodes see.
        model, optimizers: what is saved.
        write_extras: called on rank 0 with the checkpoint's directory, writes configs and tokenizer files there.
        make_manifest: called on rank 0 with the list of file entries and the primitives; returns the manifest.
        keep_last, keep_every_steps: see training_settings.CheckpointSettings.
    """

    def __init__(
        self,
        out_dir: Path,
        model: torch.nn.Module,
        optimizers: list[torch.optim.Optimizer],
        write_extras: Callable[[Path], None],
        make_manifest: Callable[[list[dict[str, Any]], dict[str, Any]], dict[str, Any]],
        keep_last: int | None,
        keep_every_steps: int | None,
    ):
        import torch.distributed as dist

        self.out_dir, self.model, self.optimizers = out_dir, model, optimizers
        self._write_extras, self._make_manifest = write_extras, make_manifest
        self._keep_last, self._keep_every_steps = keep_last, keep_every_steps
        # The writing thread talks to its peers through a group of its own: collectives of the training loop run meanwhile.
        self._group = dist.new_group(backend="gloo")
        self._rank = dist.get_rank()
        self._staged: Any = None  # the copy in main memory, reused
        self._thread: threading.Thread | None = None
        self.error: str | None = None
        """Why the last save failed; the same on every process."""
        self.last_good: Path | None = None
        self.last_save_s: float | None = None
        """Duration of the last complete save, from the call to the rename."""

    def save(self, name: str, primitives: dict[str, Any], asynchronous: bool) -> float:
        """Start to write the checkpoint `name`; returns the seconds for which the caller was held up.

        Failures do not raise: see `error`, which is set when the save has ended.
        """
        import torch.distributed as dist
        from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

        started = time.perf_counter()
        self.wait()
        state = {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizers),
        }
        start = [(shortage(self.out_dir, self.state_bytes()), uuid.uuid4().hex[:12])]
        dist.broadcast_object_list(start, group=self._group)
        missing, nonce = start[0]
        if missing:
            self.error = f"{self.out_dir / name} could not be written: {missing}"
            return time.perf_counter() - started
        temporary = self.out_dir / f"{TEMPORARY_PREFIX}{name}-{nonce}"
        if asynchronous:
            self._staged = state = _copy_to_host(state, self._staged)
            self._thread = threading.Thread(
                target=self._write, args=(temporary, name, state, primitives, started), name="checkpoint"
            )
            self._thread.start()
        else:
            self._write(temporary, name, state, primitives, started)
        return time.perf_counter() - started

    def state_bytes(self) -> int:
        """Size of a checkpoint: weights, and as many optimizer moments as there are (two, before the first step)."""
        moments = 0
        for optimizer in self.optimizers:
            per_parameter = 1 if type(optimizer).__name__ == "Muon" else 2
            moments += per_parameter * sum(
                p.numel() * p.element_size() for g in optimizer.param_groups for p in g["params"]
            )
        return moments + sum(p.numel() * p.element_size() for p in self.model.parameters())

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Return when no save is under way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, temporary: Path, name: str, state: dict, primitives: dict[str, Any], started: float) -> None:
        import torch.distributed as dist

        failure, entry = None, None
        try:
            entry = self._write_shard(temporary, state)
        except BaseException as error:  # CheckpointException is a BaseException
            failure = _reason(error)
        outcomes: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(outcomes, (failure, entry), group=self._group)
        failures = [failure for failure, _ in outcomes if failure]
        if self._rank == 0 and not failures:
            try:
                self._publish(temporary, name, [entry for _, entry in outcomes if entry], primitives)
            except Exception as error:
                failures = [_reason(error)]
        if self._rank == 0 and failures:
            shutil.rmtree(temporary, ignore_errors=True)
        outcome = [failures[0] if failures else None]
        dist.broadcast_object_list(outcome, group=self._group)
        self.error = None if outcome[0] is None else f"{self.out_dir / name} could not be written: {outcome[0]}"
        if self.error is None:
            self.last_good = self.out_dir / name
            self.last_save_s = time.perf_counter() - started

    def _write_shard(self, temporary: Path, state: dict) -> dict[str, Any] | None:
        """This process's part; returns the entry of its file for the manifest."""
        import torch.distributed.checkpoint as dcp

        weights = temporary / WEIGHTS_NAME
        weights.mkdir(parents=True, exist_ok=True)
        dcp.save(state, storage_writer=dcp.FileSystemWriter(weights, sync_files=True), process_group=self._group)
        # A process whose pieces are all held by others as well writes no file.
        name = f"{WEIGHTS_NAME}/__{self._rank}_0.distcp"
        return file_entry(temporary, name) if (temporary / name).is_file() else None

    def _publish(self, temporary: Path, name: str, shards: list[dict[str, Any]], primitives: dict[str, Any]) -> None:
        import torch

        self._write_extras(temporary)
        with open(temporary / WEIGHTS_NAME / "meta.pt", "wb") as file:
            torch.save(primitives, file)
            file.flush()
            os.fsync(file.fileno())
        known = {entry["name"] for entry in shards}
        others = [str(path.relative_to(temporary)) for path in sorted(temporary.rglob("*")) if path.is_file()]
        entries = shards + [file_entry(temporary, other) for other in others if other not in known]
        entries.sort(key=lambda entry: entry["name"])
        write_manifest(temporary, self._make_manifest(entries, primitives))
        fsync_directory(temporary / WEIGHTS_NAME)
        final = self.out_dir / name
        if (
            final.exists()
        ):  # the same step again, after a resume from an older checkpoint: ours, and damaged or incomplete
            os.rename(final, self.out_dir / f"{TEMPORARY_PREFIX}replaced-{name}-{uuid.uuid4().hex[:12]}")
        os.rename(temporary, final)
        fsync_directory(self.out_dir)
        remove_unfinished(self.out_dir)
        published, _ = list_checkpoints(self.out_dir)
        for old in superfluous(published, self._keep_last, self._keep_every_steps):
            # Renamed first, so that a crash in the middle leaves no directory that looks like a checkpoint.
            doomed = self.out_dir / f"{TEMPORARY_PREFIX}old-{old.path.name}"
            os.rename(old.path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _reason(error: BaseException) -> str:
    """The innermost cause of an error, in a line."""
    failures = getattr(error, "failures", None)  # torch.distributed.checkpoint.api.CheckpointException
    if failures:
        error = next(iter(failures.values()))[0]
    while error.__cause__ is not None:
        error = error.__cause__
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    if "unexpected pos" in reason:
        # What torch.save's zip writer says when it closes a file of which a write has failed; the errno is lost there.
        reason = f"a file could not be written to its end (disk full, or over a quota) [{reason}]"
    return reason


def _copy_to_host(value: Any, previous: Any) -> Any:
    """A copy in main memory of the tensors of a state dict, into the tensors of `previous` where they fit.

    Fresh memory costs a page fault every 4 KiB; reusing it makes the copy several times faster.
    """
    import torch
    from torch.distributed.tensor import DTensor

    if isinstance(value, dict):
        before = previous if isinstance(previous, dict) else {}
        copies = {key: _copy_to_host(item, before.get(key)) for key, item in value.items()}
        return copies
    if isinstance(value, (list, tuple)):
        before = (
            previous if isinstance(previous, (list, tuple)) and len(previous) == len(value) else [None] * len(value)
        )
        return type(value)(_copy_to_host(item, old) for item, old in zip(value, before))
    if isinstance(value, DTensor):
        old = previous.to_local() if isinstance(previous, DTensor) else None
        local = _copy_to_host(value.to_local(), old)
        # Not DTensor.from_local: that would move the copy back to the mesh's device.
        return DTensor(local, value._spec, requires_grad=False)
    if isinstance(value, torch.Tensor):
        value = value.detach()
        fits = isinstance(previous, torch.Tensor) and previous.shape == value.shape and previous.dtype == value.dtype
        copy = previous
        if not fits:  # page-locked memory where the source is a GPU: the copy then runs at the bus's full speed
            copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        return copy.copy_(value)
    return value
