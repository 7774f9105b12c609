"""config.json and generation_config.json of Hugging Face transformers, made from a litgpt model configuration.

`FAMILIES` has one entry per model type of transformers: which litgpt fields need to have which values, and how the rest
becomes config.json. What a family cannot express is refused, field by field, never dropped. Nothing heavy is imported,
so that a training run can ask `export_problems` before it starts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from litgpt import Config

# Fields of litgpt's Config with the one value that most families can express. Fields of experts, latent attention and
# so on that are not named here only matter when one of these has another value.
_PLAIN = {
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
}
_ANY = object()
_GELU = "gelu_pytorch_tanh"
_GEMMA = {"mlp_class_name": "GemmaMLP", "scale_embeddings": True, "gelu_approximate": "tanh"}
_POST_NORMS = {"post_attention_norm": True, "post_mlp_norm": True}

# `transformers_version` of config.json. transformers looks at it where a vocabulary has more than 100,000 tokens, since
# some of Mistral's tokenizers were published with a wrong regular expression. Tried: 4.57.6 suspects every model whose
# entry is missing or below 5.0.0, 5.3.0 every one without the entry, 5.24.0 every Mistral below 5.0.0. They then advise
# fix_mistral_regex=True, which silently changes the ids of a tokenizer that was right. None suspects 5.0.0.
_TRANSFORMERS_VERSION = "5.0.0"


@dataclasses.dataclass(frozen=True)
class Family:
    """A model type of transformers."""

    architecture: str
    needs: dict[str, Any]
    """Fields whose value is not that of `_PLAIN`; `_ANY` where every value can be expressed."""
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


_ROPE_ANY = {"rope_adjustments": _ANY, "rope_condense_ratio": _ANY}
_SOFTCAPS_AND_WINDOW = {
    "attention_scores_scalar": _ANY,
    "attention_logit_softcapping": _ANY,
    "final_logit_softcapping": _ANY,
    "sliding_window_size": _ANY,
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM", _ROPE_ANY, lambda c: {**_silu_and_rope(c), "attention_bias": False, "mlp_bias": False}
    ),
    "mistral": Family(
        "MistralForCausalLM",
        {**_ROPE_ANY, "sliding_window_size": _ANY},
        lambda c: {**_silu_and_rope(c), "sliding_window": c.sliding_window_size},
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        {"sliding_window_size": _ANY, "rotary_percentage": _ANY},
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
        | {"rope_adjustments": _ANY, "rope_local_base_freq": _ANY},
        lambda c: {**_gemma_2_and_3(c), "rope_local_base_freq": float(c.rope_local_base_freq)},
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        {"norm_class_name": "LayerNorm", "bias": True, "attn_bias": _ANY, "mlp_class_name": "GptNeoxMLP"}
        | {"parallel_residual": _ANY, "rotary_percentage": _ANY},
        lambda c: {
            "hidden_act": "gelu" if c.gelu_approximate == "none" else _GELU,
            "use_parallel_residual": c.parallel_residual,
            "attention_bias": True,
            "layer_norm_eps": c.norm_eps,
            "rotary_emb_base": c.rope_base,
            "rotary_pct": c.rotary_percentage,
        },
    ),
}


def family_of(config: Config) -> str:
    """The model type of transformers that comes nearest; `export_problems` says whether it fits.

    The name decides only where litgpt itself looks at it: "Gemma" (its norms add one to the weight) and Phi (its
    weights are stored joined).
    """
    name = config.name
    if "Gemma" in name:
        if config.norm_qk:
            return "gemma3_text"
        return "gemma2" if config.post_mlp_norm else "gemma"
    if name.lower().startswith(("phi-3", "phi-4")):
        return "phi3"
    if config.norm_qk:
        return "olmo2" if config.norm_qk_type == "olmo2" else "qwen3"
    if config.attn_bias and not config.bias:
        return "qwen2"
    if config.norm_class_name == "LayerNorm" and config.mlp_class_name == "GptNeoxMLP":
        return "gpt_neox"
    if config.sliding_window_size is not None or name.lower().startswith(("mistral", "mathstral")):
        return "mistral"
    return "llama"


def export_problems(config: Config) -> list[str]:
    """Why a model of this configuration cannot become a Hugging Face model; empty if it can."""
    model_type = family_of(config)
    needs = {**_PLAIN, **FAMILIES[model_type].needs}
    problems = [
        f"{field} is {getattr(config, field)!r}, {FAMILIES[model_type].architecture} has {needed!r} only"
        for field, needed in needs.items()
        if needed is not _ANY and getattr(config, field) != needed
    ]
    if config.mlp_class_name == "LLaMAMoE":
        problems.append("mixtures of experts are not supported")
    if (config.rope_adjustments or {}).keys() & {"beta_fast", "beta_slow"}:
        problems.append("rope_adjustments of YaRN are not supported")
    elif config.rope_adjustments and config.rope_condense_ratio != 1:
        problems.append("rope_adjustments and rope_condense_ratio together cannot be expressed")
    windows = set(config.sliding_window_indices or []) if config.sliding_window_size is not None else {1}
    if model_type in ("mistral", "phi3") and windows != {1}:
        problems.append(f"sliding_window_indices differ between layers, {model_type} has one window for all")
    if model_type == "gemma3_text":
        if config.rope_local_base_freq is None:
            problems.append("rope_local_base_freq is not set, Gemma 3 needs it")
        elif config.sliding_window_size is None or config.rope_indices != config.sliding_window_indices:
            problems.append("rope_indices and sliding_window_indices differ, in Gemma 3 they are the same layers")
    if model_type == "gpt_neox":
        if config.n_query_groups != config.n_head:
            problems.append("n_query_groups differs from n_head, GPT-NeoX has no grouped queries")
        if config.head_size * config.n_head != config.n_embd:
            problems.append("head_size * n_head differs from n_embd")
        if "OLMo" in config.name:  # litgpt's LayerNorm has no weights then
            problems.append("'OLMo' in the name makes litgpt's LayerNorm one without weights")
    return problems


def hf_config(
    config: Config, tied: bool, dtype: str, bos_id: int | None, eos_id: int | None, pad_id: int | None = None
) -> dict[str, Any]:
    """The content of config.json.

    Args:
        tied: whether lm_head equals the embedding and is not stored.
        dtype: of the stored weights, such as "bfloat16".
        bos_id, eos_id, pad_id: of the tokenizer; None where it has none. They are always written, since transformers
            puts a family's own numbers where they are missing.
    """
    model_type = family_of(config)
    family = FAMILIES[model_type]
    fields = {
        "architectures": [family.architecture],
        "model_type": model_type,
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "max_position_embeddings": config.block_size,
        "initializer_range": 0.02,
        "attention_dropout": 0.0,
        "tie_word_embeddings": tied,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "torch_dtype": dtype,
        "transformers_version": _TRANSFORMERS_VERSION,
        "use_cache": True,
    }
    if model_type != "gpt_neox":
        fields |= {
            "num_key_value_heads": config.n_query_groups,
            "head_dim": config.head_size,
            "rms_norm_eps": config.norm_eps,
        }
    return fields | family.fields(config)


def generation_config(bos_id: int | None, eos_id: int | None, pad_id: int | None = None) -> dict[str, Any]:
    """The content of generation_config.json: without an end token generation never stops.

    Where no padding was chosen, finished texts of a batch are filled up with EOS.
    """
    ids = {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": eos_id if pad_id is None else pad_id}
    return {name: value for name, value in ids.items() if value is not None}
