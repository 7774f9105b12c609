"""Which checkpoints a run has, which one to take and which to delete; a checkpoint is complete or absent. The layout:

    OUT_DIR/
      step-00001000/                 final/ likewise
        lit_model.pth/               torch's distributed checkpoint: one file per process, .metadata
          __0_0.distcp  __1_0.distcp  .metadata
          meta.pt                    Lightning's file: step and positions, primitives only
        model_config.yaml  hyperparameters.yaml  tokenizer files
        manifest.json                sizes and checksums of all of them, written last

checkpoint_writer.py writes it under a temporary name (utils.files) and renames it when the manifest is on disk;
checkpoint_loading.py reads it.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import fsync_directory
from utils.manifest import MANIFEST_NAME, damaged_files, read_manifest

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
    """The published checkpoints of a run, newest first, and a line on each directory that is not one."""
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

    def damage(checkpoint: Checkpoint) -> list[str]:
        return damaged_files(checkpoint.path, checkpoint.manifest["files"], checksums=checksums)

    return first_whole(checkpoints, skipped, damage), skipped


def first_whole(
    checkpoints: list[Checkpoint], skipped: list[str], damage: Callable[[Checkpoint], list[str]]
) -> Checkpoint | None:
    """The first of which `damage` says nothing; adds a line on each before it to `skipped`."""
    for checkpoint in checkpoints:
        problems = damage(checkpoint)
        if not problems:
            return checkpoint
        skipped.append(f"{checkpoint.path}: {'; '.join(problems[:3])}")
    return None


def rename_final_to_its_step(out_dir: Path, newest: Checkpoint | None = None) -> Checkpoint | None:
    """A run that is made longer goes on from final/: give that checkpoint its step's name.

    Returns:
        `newest`, under its new name if it was that one.
    """
    final = next((found for found in list_checkpoints(out_dir)[0] if found.path.name == FINAL_NAME), None)
    if final is None or (out_dir / step_name(final.step)).exists():  # None: damaged, and the run's new end replaces it
        return newest
    renamed = dataclasses.replace(final, path=out_dir / step_name(final.step))
    os.rename(final.path, renamed.path)
    fsync_directory(out_dir)
    return renamed if newest == final else newest


def checkpoints_to_delete(
    checkpoints: list[Checkpoint], step: int, keep_last: int | None, keep_every_steps: int | None
) -> list[Checkpoint]:
    """Those that may be deleted once the checkpoint of `step` is published; `checkpoints` newest first.

    Later ones are damaged, since the run went on from before them. They stay, and do not count.
    """
    if keep_last is None:
        return []
    checkpoints = [checkpoint for checkpoint in checkpoints if checkpoint.step <= step]
    return [
        checkpoint
        for checkpoint in checkpoints[max(1, keep_last) :]
        if checkpoint.path.name != FINAL_NAME and not (keep_every_steps and checkpoint.step % keep_every_steps == 0)
    ]
