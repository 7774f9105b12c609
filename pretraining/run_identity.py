"""What makes two invocations parts of one run: the settings that shape the result, kept in checkpoints' manifests."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from pretraining.plan import Plan
from pretraining.settings import Settings
from utils.errors import UserError
from utils.manifest import differences

# What must not change between the parts of one run: with it the sequence of batches or the model would change.
_FIXED_SETTINGS = (
    "model.",
    "context_tokens",
    "data",
    "data_weights",
    "seed",
    "train.global_batch_size",
    "train.tie_embeddings",
    "optimizer.name",
)
# Splitting the MLPs over processes was a setting once; manifests of that time have it, with 1 where it was off.
_REMOVED_SETTING = "parallel.tensor_parallel_size"


def result_settings(settings: Settings, plan: Plan) -> dict[str, Any]:
    """What shapes the trained model, for its manifest."""
    return {
        **_values_that_count(settings),
        "model": plan.model_config,
        "context_tokens": plan.context_tokens,
        "data": plan.data_identity,
        "data_weights": plan.weights,
    }


def _values_that_count(settings: Any) -> dict[str, Any]:
    """The fields that shape the result, as a manifest keeps them; settings.py marks the others."""
    values = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.metadata.get("result", True):
            values[field.name] = _values_that_count(value) if dataclasses.is_dataclass(value) else value
    return json.loads(json.dumps(values))


def check_same_run(manifest_settings: dict[str, Any], current: dict[str, Any], out_dir: str) -> list[str]:
    """What differs from the settings that the checkpoints in out_dir were made with, as "NAME: was A, is B".

    Raises:
        UserError: what differs would make another run of it.
    """
    before = {**manifest_settings, "parallel": dict(manifest_settings.get("parallel", {}))}
    tensor_parallel_size = before["parallel"].pop("tensor_parallel_size", 1)
    before["parallel"].setdefault("reduce_dtype", "fp32")  # gradients were summed in float32 before that could be set
    before["parallel"].pop("loss", None)  # there is one loss now, and it is as exact as any of the four were
    before["train"] = {"document_masking": False, "router_aux_loss": 0.0, **before.get("train", {})}  # once no settings
    if tensor_parallel_size > 1:
        raise UserError(
            f"--out_dir={out_dir}: holds checkpoints of a run with {_REMOVED_SETTING}={tensor_parallel_size}. Tensor "
            "parallelism is no longer part of this toolkit, and the optimizer's state depends on it. Use another "
            "directory; to train on from these weights, give the checkpoint as --initial_checkpoint_dir."
        )
    changed = differences(before, json.loads(json.dumps(current)))  # as a manifest keeps them
    if current.get("precision") is None:
        changed.pop("precision", None)
    fixed = {name: text for name, text in changed.items() if name.startswith(_FIXED_SETTINGS)}
    if fixed:
        hashes = {"data": "data: another dataset, or another merge of it"}
        raise UserError(
            f"--out_dir={out_dir}: holds checkpoints of a run with other settings: "
            f"{'; '.join(hashes.get(name, text) for name, text in fixed.items())}. Use another directory; to train on "
            "from these weights, give the checkpoint as --initial_checkpoint_dir."
        )
    return list(changed.values())
