"""What a checkpoint's directory must hold; looked at without torch, so that a wrong path is reported at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from utils import console
from utils.errors import UserError
from utils.manifest import MANIFEST_NAME, damaged_files, read_manifest

LIT_MODEL = "lit_model.pth"
MODEL_CONFIG = "model_config.yaml"
DCP_METADATA = ".metadata"
EMBEDDING = "transformer.wte.weight"
HEAD = "lm_head.weight"


def read_checkpoint_manifest(checkpoint_dir: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint whose files have the sizes that it lists; None where it has none.

    Raises:
        UserError: this is no checkpoint's directory, or files have changed; every changed file is named.
    """
    if not checkpoint_dir.is_dir():
        raise UserError(
            f"checkpoint_dir={checkpoint_dir}: no such directory. Give one that distributed_pretrain.py made: "
            "OUT_DIR/final or OUT_DIR/step-.."
        )
    if not any((checkpoint_dir / name).exists() for name in (LIT_MODEL, MODEL_CONFIG)):
        raise UserError(nothing_there(checkpoint_dir))  # alone: every other fault would only follow from this one
    manifest = read_manifest(checkpoint_dir, kind="checkpoint")
    if manifest is None:
        console.warn(
            f"{checkpoint_dir} has no {MANIFEST_NAME}: what it was trained on, and whether its files are the ones that "
            "were written, cannot be checked."
        )
        return None
    entries = manifest["files"]
    if not (checkpoint_dir / LIT_MODEL).is_dir():  # consolidated: the shards are elsewhere now
        entries = [entry for entry in entries if not entry["name"].startswith(f"{LIT_MODEL}/")]
    # Sizes only: the weights' own checksums are checked while they are read.
    damaged = damaged_files(checkpoint_dir, entries, checksums=False)
    if damaged:
        raise UserError([f"{problem}. Copy the checkpoint again, or take an earlier one." for problem in damaged])
    return manifest


def nothing_there(directory: Path) -> str:
    """Why there are no weights, and where they may be."""
    message = f"checkpoint_dir={directory}: no {LIT_MODEL} in it"
    consolidated = directory / f"{LIT_MODEL}.consolidated"
    if consolidated.is_file():
        return f"{message}, but {consolidated.name}. Rename it: mv {consolidated} {directory}/{LIT_MODEL}"
    if (directory / DCP_METADATA).is_file():
        return f"{message}: these are the shards themselves. Give the directory above: {directory.resolve().parent}"
    checkpoints = sorted(entry.parent for entry in directory.glob(f"*/{LIT_MODEL}"))
    if checkpoints:
        return f"{message}. Give one of the checkpoints below it: {', '.join(map(str, checkpoints[-5:]))}"
    makers = "distributed_pretrain.py, `litgpt pretrain` or `litgpt download`"
    return f"{message}. Give a checkpoint directory that {makers} made."
