"""The model types of transformers that a litgpt model can become: what each can express, and its part of config.json.

`FAMILIES` has one entry per model type: which fields of litgpt's configuration need to have which values, and how the
rest becomes config.json. Nothing heavy is imported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from litgpt import Config

# Fields of litgpt's Config with the one value that most families can express. Fields of experts, latent attention and
# so on that are not named here only matter when one of these has another value.
PLAIN = {
    "norm_class_name": "RMSNorm",
    "norm_qk": False,
    "post_attention_norm": False,
    "post_mlp_norm": False,
    "parallel_residual": False,
    "shared_attention_norm": False,
    "attn_bias": False,
    "attention_scores_scalar": None,
    "sliding_window_size": None,
    "attention_logit_softcapping": None,
    "rotary_percentage": 1.0,
    "rope_condense_ratio": 1,
    "rope_adjustments": None,
    "rope_interleave": False,
    "rope_local_base_freq": None,
    "bias": False,
    "mlp_class_name": "LLaMAMLP",
    "scale_embeddings": False,
    "lm_head_bias": False,
    "final_logit_softcapping": None,
    "norm_1": True,
    "norm_2": True,
    "latent_attention": None,
    "n_shared_expert": None,
    "n_expert_groups": None,
    "first_k_dense_replace": None,
    "routed_scaling_factor": 1.0,
}
ANY = object()
_GELU = "gelu_pytorch_tanh"
_GELU_NAMES = {"none": "gelu", "tanh": _GELU}
_GEMMA = {"mlp_class_name": "GemmaMLP", "scale_embeddings": True, "gelu_approximate": "tanh"}
_POST_NORMS = {"post_attention_norm": True, "post_mlp_norm": True}


@dataclasses.dataclass(frozen=True)
class Family:
    """A model type of transformers."""

    architecture: str
    needs: dict[str, Any]
    """Fields whose value is not that of `PLAIN`; `ANY` where every value can be expressed."""
    fields: Callable[[Config], dict[str, Any]]
    """What config.json holds besides what `hf_config` gives every family."""


def _rope(config: Config) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, which every release of transformers and vLLM reads."""
    adjustments = dict(config.rope_adjustments or {})
    scaling = None
    if "low_freq_factor" in adjustments:
        adjustments["original_max_position_embeddings"] = adjustments.pop("original_max_seq_len")
        scaling = {"rope_type": "llama3", **adjustments}
    elif "factor" in adjustments:
        scaling = {"rope_type": "linear", "factor": adjustments["factor"]}
    elif config.rope_condense_ratio != 1:
        scaling = {"rope_type": "linear", "factor": float(config.rope_condense_ratio)}
    return {"rope_theta": float(config.rope_base), "rope_scaling": scaling}


def _layer_types(config: Config) -> list[str]:
    indices = config.sliding_window_indices if config.sliding_window_size is not None else [0] * config.n_layer
    return ["sliding_attention" if slides else "full_attention" for slides in indices]


def _gemma_2_and_3(config: Config) -> dict[str, Any]:
    # transformers' default attention leaves the soft cap out (the logits of a small model then differ by 0.03).
    capped = {"_attn_implementation": "eager"} if config.attention_logit_softcapping is not None else {}
    return {
        **capped,
        "hidden_activation": _GELU,
        "query_pre_attn_scalar": config.attention_scores_scalar or config.head_size,
        "attn_logit_softcapping": config.attention_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
        "sliding_window": config.sliding_window_size,
        "layer_types": _layer_types(config),
        "attention_bias": False,
        **_rope(config),
    }


def _silu_and_rope(config: Config) -> dict[str, Any]:
    return {"hidden_act": "silu", **_rope(config)}


_ROPE_ANY = {"rope_adjustments": ANY, "rope_condense_ratio": ANY}
_EXPERTS = {"mlp_class_name": "LLaMAMoE"}
_SOFTCAPS_AND_WINDOW = {
    "attention_scores_scalar": ANY,
    "attention_logit_softcapping": ANY,
    "final_logit_softcapping": ANY,
    "sliding_window_size": ANY,
}

_LAYER_NORM = {"norm_class_name": "LayerNorm"}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM", _ROPE_ANY, lambda c: {**_silu_and_rope(c), "attention_bias": False, "mlp_bias": False}
    ),
    "mistral": Family(
        "MistralForCausalLM",
        {**_ROPE_ANY, "sliding_window_size": ANY},
        lambda c: {**_silu_and_rope(c), "sliding_window": c.sliding_window_size},
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        {"sliding_window_size": ANY, "rotary_percentage": ANY},
        lambda c: {
            **_silu_and_rope(c),
            "sliding_window": c.sliding_window_size,
            "original_max_position_embeddings": c.block_size,
            "partial_rotary_factor": c.rotary_percentage,
        },
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        {**_ROPE_ANY, "attn_bias": True},
        lambda c: {**_silu_and_rope(c), "use_sliding_window": False},
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        {**_ROPE_ANY, **_EXPERTS},
        lambda c: {
            **_silu_and_rope(c),
            "intermediate_size": c.moe_intermediate_size or c.intermediate_size,
            "sliding_window": None,
            "num_local_experts": c.n_expert,
            "num_experts_per_tok": c.n_expert_per_token,
        },
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {**_ROPE_ANY, **_EXPERTS, "norm_qk": True, "norm_qk_type": "default"},
        lambda c: {
            **_silu_and_rope(c),
            "use_sliding_window": False,
            "attention_bias": False,
            "num_experts": c.n_expert,
            "num_experts_per_tok": c.n_expert_per_token,
            "norm_topk_prob": True,  # litgpt's softmax is over the chosen experts alone
            "moe_intermediate_size": c.moe_intermediate_size or c.intermediate_size,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {**_ROPE_ANY, "norm_qk": True, "norm_qk_type": "default"},
        lambda c: {**_silu_and_rope(c), "use_sliding_window": False, "attention_bias": False},
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        {**_ROPE_ANY, **_POST_NORMS, "norm_qk": True, "norm_qk_type": "olmo2", "norm_1": False, "norm_2": False},
        lambda c: {**_silu_and_rope(c), "attention_bias": False},
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        {**_ROPE_ANY, **_GEMMA},
        lambda c: {**_rope(c), "hidden_act": _GELU, "hidden_activation": _GELU, "attention_bias": False},
    ),
    "gemma2": Family("Gemma2ForCausalLM", {**_GEMMA, **_POST_NORMS, **_SOFTCAPS_AND_WINDOW}, _gemma_2_and_3),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        {**_GEMMA, **_POST_NORMS, **_SOFTCAPS_AND_WINDOW, "norm_qk": True, "norm_qk_type": "default"}
        | {"rope_adjustments": ANY, "rope_local_base_freq": ANY},
        lambda c: {**_gemma_2_and_3(c), "rope_local_base_freq": float(c.rope_local_base_freq)},
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        {"norm_class_name": "LayerNorm", "bias": True, "attn_bias": ANY, "mlp_class_name": "GptNeoxMLP"}
        | {"parallel_residual": ANY, "rotary_percentage": ANY},
        lambda c: {
            "hidden_act": _GELU_NAMES[c.gelu_approximate],
            "use_parallel_residual": c.parallel_residual,
            "attention_bias": True,
            "layer_norm_eps": c.norm_eps,
            "rotary_emb_base": c.rope_base,
            "rotary_pct": c.rotary_percentage,
        },
    ),
    "phi": Family(
        "PhiForCausalLM",
        {**_LAYER_NORM, "bias": True, "attn_bias": ANY, "mlp_class_name": "GptNeoxMLP", "parallel_residual": True}
        | {"shared_attention_norm": True, "rotary_percentage": ANY, "lm_head_bias": True},
        lambda c: {
            "hidden_act": _GELU_NAMES[c.gelu_approximate],
            "layer_norm_eps": c.norm_eps,
            "partial_rotary_factor": c.rotary_percentage,
            **_rope(c),
        },
    ),
    "falcon": Family(
        "FalconForCausalLM",
        {**_LAYER_NORM, "mlp_class_name": "GptNeoxMLP", "parallel_residual": True, "shared_attention_norm": ANY},
        lambda c: {
            # One norm before attention and MLP is its first architecture, two are the one of the larger models.
            "new_decoder_architecture": not c.shared_attention_norm,
            "num_ln_in_parallel_attn": 1 if c.shared_attention_norm else 2,
            "multi_query": True,
            "num_kv_heads": c.n_query_groups,
            "parallel_attn": True,
            "alibi": False,
            "bias": False,
            "ffn_hidden_size": c.intermediate_size,
            "activation": _GELU_NAMES[c.gelu_approximate],
            "layer_norm_epsilon": c.norm_eps,
            **_rope(c),
        },
    ),
    "stablelm": Family(
        "StableLmForCausalLM",
        {**_LAYER_NORM, "attn_bias": False, "rotary_percentage": ANY},
        lambda c: {
            **_silu_and_rope(c),
            "layer_norm_eps": c.norm_eps,
            "partial_rotary_factor": c.rotary_percentage,
            "use_qkv_bias": False,
            "qk_layernorm": False,
            "use_parallel_residual": False,
        },
    ),
    "olmo": Family(
        "OlmoForCausalLM",
        {**_LAYER_NORM, "norm_eps": 1e-5},
        lambda c: {**_silu_and_rope(c), "attention_bias": False, "clip_qkv": None},
    ),
}
