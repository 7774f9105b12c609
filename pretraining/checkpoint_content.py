"""What a checkpoint holds beside weights and optimizer state: configurations, tokenizer files, and its manifest."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml
from litgpt.config import Config
from litgpt.utils import save_config

from pretraining.plan import Plan
from pretraining.run_identity import result_settings
from pretraining.settings import Settings
from utils.manifest import as_input, made_by
from utils.tokenizer import copy_tokenizer_files


def write_configs(directory: Path, config: Config, settings: Settings) -> None:
    """Write model_config.yaml, hyperparameters.yaml and the tokenizer's files, which litgpt looks for."""
    save_config(config, directory)
    hyperparameters = dataclasses.asdict(dataclasses.replace(settings, address=None))
    hyperparameters["optimizer"]["betas"] = list(hyperparameters["optimizer"]["betas"])
    (directory / "hyperparameters.yaml").write_text(yaml.safe_dump(hyperparameters, sort_keys=False))
    if settings.tokenizer_dir is not None:
        copy_tokenizer_files(settings.tokenizer_dir, directory)


def checkpoint_manifest(
    settings: Settings, plan: Plan, num_parameters: int, epoch: int, state: dict[str, Any], files: list[dict[str, Any]]
) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Args:
        epoch: of the next position to be read.
        state: the primitives of meta.pt.
        files: entries as manifest.file_entry makes them.
    """
    known = state["val_loss"] is not None and plan.bits_per_nat is not None
    return {
        "kind": "checkpoint",
        "made_by": made_by("distributed_pretrain.py", "torch", "lightning", "litgpt", "litdata", "ray"),
        "settings": result_settings(settings, plan),
        "tokenizer": plan.tokenizer,
        "content": {
            "parameters": num_parameters,
            "step": state["step"],
            "tokens": state["tokens"],
            "position": state["position"],
            "left_out": state["left_out"],
            "epoch": epoch,
            "sequences_per_epoch": plan.train_blocks,
            "val_loss": state["val_loss"],
            "val_bits_per_byte": state["val_loss"] * plan.bits_per_nat if known else None,
        },
        "files": files,
        "inputs": [as_input(directory) for directory in plan.train_directories + plan.val_directories],
    }
