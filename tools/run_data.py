"""What a run read at which step, from the manifest of one of its checkpoints and the datasets that this names."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pretraining.checkpoint import list_checkpoints
from pretraining.data import Sequences, rank_micro_batches, read_micro_batch
from pretraining.left_out import LeftOut, read_left_out
from pretraining.plan import identity_of
from pretraining.settings import TrainSettings
from tools.provenance_places import find_recorded
from utils.chunks import Index, read_index
from utils.errors import UserError
from utils.manifest import read_manifest
from utils.metrics_file import read_metrics


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's directory and the newest of its checkpoints, or the one that was asked for."""

    directory: Path
    checkpoint_dir: Path
    manifest: dict[str, Any]

    @property
    def left_out(self) -> LeftOut:
        """Positions that the run went back over; it knows of more than an early checkpoint does."""
        found = read_left_out(self.directory)
        return found if found.ranges else LeftOut.of(self.manifest["content"])

    @functools.cached_property
    def _records(self) -> list[dict[str, Any]]:
        return read_metrics(self.directory)

    @property
    def last_step(self) -> int:
        """The last one that is known to have been run."""
        return max([*(record.get("step", 0) for record in self._records), self.manifest["content"]["step"]])

    def digests(self) -> dict[int, str]:
        """`batch_digest` of each logged step; of what was logged twice, the last."""
        return {record["step"]: record["batch_digest"] for record in self._records if record.get("batch_digest")}


def find_run(run_dir: str) -> Run:
    """Raises UserError where `run_dir` is neither a run's directory with a checkpoint in it, nor a checkpoint."""
    directory = Path(run_dir)
    if not directory.is_dir():
        raise UserError(f"{run_dir}: no such directory. Give the --out_dir of distributed_pretrain.py.")
    manifest = read_manifest(directory)
    if manifest is not None and manifest["kind"] == "checkpoint":
        return Run(directory.absolute().parent, directory, manifest)
    checkpoints, skipped = list_checkpoints(directory)
    if not checkpoints:
        raise UserError(
            f"{run_dir}: no checkpoint in it, and only a checkpoint says what a run reads. Give the --out_dir of a run "
            "that has saved one." + "".join(f"\n  {line}" for line in skipped)
        )
    return Run(directory, checkpoints[0].path, checkpoints[0].manifest)


def training_inputs(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of the training datasets among a checkpoint's inputs; those of validation follow them."""
    return manifest["inputs"][: len(manifest["settings"]["data"])]


def find_datasets(run: Run, dataset_dir: str | None) -> list[Path]:
    """The training datasets, in the order of the run.

    Raises:
        UserError: one is not here, or is not the one that the run read.
    """
    found = []
    for recorded, identity in zip(training_inputs(run.manifest), run.manifest["settings"]["data"]):
        if dataset_dir is not None:
            names = [Path(dataset_dir) / "train", Path(dataset_dir) / Path(recorded["path"]).parent.name / "train"]
            directory = next((name for name in [*names, Path(dataset_dir)] if (name / "index.json").is_file()), None)
        else:
            directory = find_recorded(recorded, run.checkpoint_dir)
        if directory is None:
            raise UserError(
                f"{run.directory}: its dataset {recorded['path']} is not there. Give the directory with train/ and "
                "val/ as --dataset_dir; of a mixture, the directory above all of them."
            )
        if identity_of(read_index(directory, "--dataset_dir")) != identity:
            raise UserError(
                f"{directory}: not the dataset that this run read: its chunks, their order or their checksums differ "
                "from those of the checkpoint's manifest. Give the right one as --dataset_dir."
            )
        found.append(directory)
    return found


class RunData:
    """The global batches of a run.

    Args:
        settings: of a checkpoint's manifest.
        directories: of the training datasets, in the order of the run.
        left_out: the positions that the run leaves out.
    """

    def __init__(self, settings: dict[str, Any], directories: list[Path], left_out: LeftOut):
        self._left_out = left_out
        batch = settings["train"]["global_batch_size"]
        self.global_batch_size = batch
        self.block_tokens = settings["context_tokens"] + 1
        self._train = TrainSettings(global_batch_size=batch, micro_batch_size=batch)
        self.sequences = Sequences(directories, settings["data_weights"], self.block_tokens, settings["seed"])
        self.indexes: list[Index] = [read_index(directory, "--dataset_dir") for directory in directories]

    def batches(self, steps: range) -> Iterator[np.ndarray]:
        """The positions of each global batch; a step has the number that metrics.jsonl gives it, from 1."""
        numbers = rank_micro_batches(range(steps.start - 1, steps.stop - 1), self._train, rank=0, world_size=1)
        return map(self._left_out.positions, numbers)

    def positions(self, step: int) -> np.ndarray:
        """Those of the batch that took the run to `step`."""
        return next(self.batches(range(step, step + 1)))

    def digest(self, step: int) -> str:
        """What metrics.jsonl records as `batch_digest`."""
        return f"{read_micro_batch(self.sequences, self.positions(step), pin_memory=False).digest:016x}"
