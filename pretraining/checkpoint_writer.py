"""Writing a sharded checkpoint in the background: it is complete when rank 0 renames its directory (`_publish`).

The state is copied to main memory, which is all that training waits for. A thread then writes this process's file and
agrees with its peers that every file is whole; rank 0 adds the manifest and renames the directory. A failure on any
process leaves no checkpoint, and `CheckpointWriter.error` says why on all. checkpoint.py draws the layout.
"""

from __future__ import annotations

import datetime
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import DTensor

from pretraining.checkpoint import WEIGHTS_NAME, checkpoints_to_delete, list_checkpoints
from pretraining.parallelism import model_weights
from pretraining.settings import CheckpointSettings
from utils import console
from utils.console import human_bytes
from utils.errors import UserError
from utils.files import fsync_directory, remove_temporaries, temporary_sibling
from utils.manifest import damaged_files, file_entry, write_manifest

# A slow file system is no reason to give a save up; a process that died is noticed by Ray, not by this.
_GROUP_TIMEOUT = datetime.timedelta(hours=6)


def shortage(directory: Path, needed_bytes: int) -> str | None:
    """Why `needed_bytes` would not fit into `directory`, or None."""
    try:
        free = shutil.disk_usage(directory).free
    except OSError as error:
        return _reason(error)
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
        settings: which checkpoints stay, and what a failed save does.
    """

    def __init__(
        self,
        out_dir: Path,
        model: torch.nn.Module,
        optimizers: list[torch.optim.Optimizer],
        write_extras: Callable[[Path], None],
        make_manifest: Callable[[list[dict[str, Any]], dict[str, Any]], dict[str, Any]],
        settings: CheckpointSettings,
    ):
        self.out_dir, self.model, self.optimizers = out_dir, model, optimizers
        self._write_extras, self._make_manifest, self._settings = write_extras, make_manifest, settings
        # The writing thread has its own group to talk to its peers: collectives of the training loop run meanwhile.
        self._group = dist.new_group(backend="gloo", timeout=_GROUP_TIMEOUT)
        self._rank = dist.get_rank()
        self._staged: Any = None  # the copy in main memory, reused
        self._thread: threading.Thread | None = None
        self.error: str | None = None
        """Why the last save failed; the same on every process."""
        self.last_good: Path | None = None
        self.longest_s = 0.0
        """That writing a checkpoint has taken so far, in the background or not."""

    def save(self, name: str, primitives: dict[str, Any], asynchronous: bool) -> float:
        """Start to write the checkpoint `name`; returns the seconds for which the caller was held up.

        Failures do not raise: see `error`, which is set when the save has ended.

        Args:
            primitives: plain values for meta.pt, the step among them.
        """
        started = time.perf_counter()
        self.wait()
        state = {
            "model": model_weights(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizers),
        }
        # Rank 0 decides. Another node may not even see the directory; comparing the files will tell.
        needed_bytes = self.state_bytes()
        start = [(shortage(self.out_dir, needed_bytes), temporary_sibling(self.out_dir / name))]
        dist.broadcast_object_list(start, group=self._group)
        missing, temporary = start[0]
        if missing:
            self.error = f"{self.out_dir / name} could not be written: {missing}"
            return time.perf_counter() - started
        if asynchronous:
            self._staged = state = _copy_to_host(state, self._staged)
            self._thread = threading.Thread(
                target=self._write, args=(temporary, name, state, primitives), name="checkpoint"
            )
            self._thread.start()
        else:
            self._write(temporary, name, state, primitives)
        return time.perf_counter() - started

    def check_space(self) -> None:
        """Raises UserError on every process when not even one checkpoint fits."""
        missing = [shortage(self.out_dir, self.state_bytes()) if self._rank == 0 else None]
        dist.broadcast_object_list(missing, group=self._group)
        if missing[0]:
            raise UserError(f"--out_dir={self.out_dir}: {missing[0]}. Free space, or use another directory.")

    def state_bytes(self) -> int:
        """Size of a checkpoint: weights, and the optimizers' moments (one of Muon, two of AdamW)."""
        moments = 0
        for optimizer in self.optimizers:
            per_parameter = 1 if isinstance(optimizer, torch.optim.Muon) else 2
            moments += per_parameter * sum(
                p.numel() * p.element_size() for g in optimizer.param_groups for p in g["params"]
            )
        return moments + sum(p.numel() * p.element_size() for p in self.model.parameters())

    def wait(self) -> None:
        """Return when no save is under way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait_and_report(self, final: bool = False) -> None:
        """Wait, and warn of a failed save or raise UserError, as on_error says; on all processes alike.

        Args:
            final: whether it was the run's last one: without it a run has not succeeded, whatever on_error says.
        """
        self.wait()
        if self.error is None:
            return
        message = f"checkpoint: {self.error}. Older checkpoints are whole; the newest is {self.last_good or 'none'}."
        self.error = None
        if self._settings.on_error == "stop" or final:
            raise UserError(
                f"{message} Free space or fix the directory and run the same command; --checkpoint.on_error=continue "
                "trains on."
            )
        if self._rank == 0:
            console.warn(f"{message} Training goes on (--checkpoint.on_error=continue).")

    def _write(self, temporary: Path, name: str, state: dict, primitives: dict[str, Any]) -> None:
        device = next(self.model.parameters()).device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a new thread begins with device 0, which belongs to another process
        started = time.perf_counter()
        try:
            self._write_with_peers(temporary, name, state, primitives)
            self.longest_s = max(self.longest_s, time.perf_counter() - started)
        except BaseException as error:  # a peer is gone or did not answer in time; uncaught, nobody would hear of it
            self.error = f"{self.out_dir / name} could not be written: {_reason(error)}"

    def _write_with_peers(self, temporary: Path, name: str, state: dict, primitives: dict[str, Any]) -> None:
        # A step of its own: saving is collective, and a process that failed before it would leave the others waiting.
        failures, _ = self._on_all(lambda: (temporary / WEIGHTS_NAME).mkdir(parents=True, exist_ok=True))
        entries: list[dict[str, Any]] = []
        if not failures:
            failures, entries = self._on_all(lambda: self._write_shard(temporary, state))
        if self._rank == 0 and not failures:
            try:
                self._publish(temporary, name, entries, primitives)
            except Exception as error:
                failures = [_reason(error)]
        if self._rank == 0 and failures:
            shutil.rmtree(temporary, ignore_errors=True)
        outcome = [failures[0] if failures else None]
        dist.broadcast_object_list(outcome, group=self._group)
        self.error = None if outcome[0] is None else f"{self.out_dir / name} could not be written: {outcome[0]}"
        if self.error is None:
            self.last_good = self.out_dir / name

    def _on_all(self, work: Callable[[], Any]) -> tuple[list[str], list[Any]]:
        """Do `work` on every process; returns on each the reasons of those that failed, and the others' results."""
        failure, result = None, None
        try:
            result = work()
        except BaseException as error:  # CheckpointException is a BaseException
            failure = _reason(error)
        outcomes: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(outcomes, (failure, result), group=self._group)
        return [failure for failure, _ in outcomes if failure], [result for _, result in outcomes if result]

    def _write_shard(self, temporary: Path, state: dict) -> dict[str, Any] | None:
        """This process's part; returns the entry of its file for the manifest."""
        weights = temporary / WEIGHTS_NAME
        # Without copying ahead: where CUDA exists that would wait for the training stream every 10 MB, though the state
        # is in main memory (torch/distributed/checkpoint/filesystem.py, _OverlappingCpuLoader).
        writer = dcp.FileSystemWriter(weights, sync_files=True, per_thread_copy_ahead=0)
        dcp.save(state, storage_writer=writer, process_group=self._group)
        # A process whose pieces are all held by others as well writes no file.
        name = f"{WEIGHTS_NAME}/__{self._rank}_0.distcp"
        return file_entry(temporary, name) if (temporary / name).is_file() else None

    def _publish(self, temporary: Path, name: str, shards: list[dict[str, Any]], primitives: dict[str, Any]) -> None:
        """Complete the directory and give it its name; see `_write` for what happens when this fails."""
        self._write_extras(temporary)
        with open(temporary / WEIGHTS_NAME / "meta.pt", "wb") as file:
            torch.save(primitives, file)
            file.flush()
            os.fsync(file.fileno())
        known = {entry["name"] for entry in shards}
        others = [str(path.relative_to(temporary)) for path in sorted(temporary.rglob("*")) if path.is_file()]
        entries = shards + [file_entry(temporary, other) for other in others if other not in known]
        entries.sort(key=lambda entry: entry["name"])
        if damage := damaged_files(temporary, entries, checksums=False):
            raise RuntimeError(
                f"{damage[0]}, though its process wrote it: out_dir must be a directory that all nodes share"
            )
        write_manifest(temporary, self._make_manifest(entries, primitives))
        fsync_directory(temporary / WEIGHTS_NAME)
        final = self.out_dir / name
        if final.exists():
            # The same step again, after a resume from an older checkpoint: it is ours, and damaged or incomplete.
            os.rename(final, temporary_sibling(final))
        os.rename(temporary, final)
        fsync_directory(self.out_dir)
        remove_temporaries(self.out_dir)
        published, _ = list_checkpoints(self.out_dir)
        keep = self._settings
        # In the middle of bad steps the run may have to go back to any of the older ones.
        keep_last = None if primitives.get("bad_in_a_row") else keep.keep_last
        for old in checkpoints_to_delete(published, primitives["step"], keep_last, keep.keep_every_steps):
            # Renamed first, so that a crash in the middle leaves no directory that looks like a checkpoint.
            doomed = temporary_sibling(old.path)
            os.rename(old.path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _reason(error: BaseException) -> str:
    """The innermost cause of an error, in one line."""
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

    Fresh memory costs a page fault every 4 KiB; reusing it makes the copy several times faster. torch's own stager does
    the same, but took up to twice as long on two CPU processes, and training waits for it.
    """
    if isinstance(value, dict):
        before = previous if isinstance(previous, dict) else {}
        return {key: _copy_to_host(item, before.get(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [_copy_to_host(item, None) for item in value]
    if isinstance(value, DTensor):
        old = previous.to_local() if isinstance(previous, DTensor) else None
        local = _copy_to_host(value.to_local(), old)
        # DTensor.from_local would move the copy back to the mesh's device.
        return DTensor(local, value._spec, requires_grad=False)
    if isinstance(value, torch.Tensor):
        value = value.detach()
        fits = isinstance(previous, torch.Tensor) and previous.shape == value.shape and previous.dtype == value.dtype
        copy = previous
        if not fits:  # page-locked memory where the source is a GPU: the copy then runs at the bus's full speed
            copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        return copy.copy_(value)
    return value
