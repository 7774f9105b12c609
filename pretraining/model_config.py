"""litgpt's Config for a run, without importing litgpt or torch."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.util
import sys
from typing import Any

from pretraining.settings import Settings
from utils.errors import UserError


@functools.cache
def litgpt_config_module():
    """litgpt/config.py by itself: importing the package around it costs eight seconds, for torch and transformers."""
    if "litgpt.config" in sys.modules:
        return sys.modules["litgpt.config"]
    origin = importlib.util.find_spec("litgpt").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("_litgpt_config_alone", f"{origin}/config.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


def model_names() -> list[str]:
    return sorted(litgpt_config_module().name_to_config)


def resolve_model_config(settings: Settings) -> Any:
    """litgpt's Config for --model_name and model_config.

    Raises:
        UserError: neither is given, the name is unknown (with the nearest names), or a key or size is wrong.
    """
    module = litgpt_config_module()
    sizes = dict(settings.model_config or {})
    name = settings.model_name
    known = {field.name for field in dataclasses.fields(module.Config)}
    unknown = sorted(set(sizes) - known)
    if unknown:
        hints = [
            f"{key} (did you mean {near[0]}?)" if (near := difflib.get_close_matches(key, known, 1)) else key
            for key in unknown
        ]
        raise UserError(f"model_config: litgpt's Config has no {', '.join(hints)}.")
    if name is None and not sizes:
        raise UserError("--model_name: give the name of a model ('list' prints them), or sizes under model_config.")
    try:
        if name is None:
            return module.Config(**{"name": "custom", **sizes})
        own_name = sizes.pop("name", None)
        config = module.Config.from_name(name.rpartition("/")[2] if name.count("/") == 1 else name, **sizes)
        config.name = own_name or config.name
        return config
    except ValueError as error:
        near = ", ".join(difflib.get_close_matches(name or "", model_names(), 3, cutoff=0.4))
        raise UserError(
            f"--model_name={name}: {error}. {f'Near: {near}. ' if near else ''}`--model_name list` prints all names."
        ) from error
    except (AssertionError, TypeError) as error:
        raise UserError(
            f"model_config: these sizes do not fit together ({error or 'n_embd must be a multiple of n_head'})."
        ) from error


def has_grouped_experts(config: Any) -> bool:
    """Whether the model's experts are computed by experts.py: Mixtral's and Qwen 3's are. Others stay litgpt's own."""
    other = config.bias or config.n_expert_groups or config.n_shared_expert or config.routed_scaling_factor != 1.0
    return config.mlp_class_name == "LLaMAMoE" and not other


def inactive_parameters(config: Any) -> int:
    """Parameters of the experts that a token does not pass through, over all layers."""
    if config.mlp_class_name != "LLaMAMoE":
        return 0
    num_layers = config.n_layer - (config.first_k_dense_replace or 0)
    width = config.moe_intermediate_size or config.intermediate_size
    return num_layers * (config.n_expert - config.n_expert_per_token) * 3 * config.n_embd * width


def joined_parameters(config: Any) -> int:
    """Of the copy that a grouped product makes of its weights, one matrix of each expert of a layer."""
    width = config.moe_intermediate_size or config.intermediate_size
    return config.n_expert * config.n_embd * width if has_grouped_experts(config) else 0
