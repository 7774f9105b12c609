"""config.json and generation_config.json of Hugging Face transformers, made from a litgpt model configuration.

What a family cannot express is refused, field by field, never dropped. Nothing heavy is imported, so that a training
run can ask `export_problems` before it starts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from export.hf_families import ANY, FAMILIES, PLAIN

if TYPE_CHECKING:
    from litgpt import Config

# `transformers_version` of config.json. transformers looks at it where a vocabulary has more than 100,000 tokens, since
# some of Mistral's tokenizers were published with a wrong regular expression. Tried: 4.57.6 suspects every model whose
# entry is missing or below 5.0.0, 5.3.0 every one without the entry, 5.24.0 every Mistral below 5.0.0. They then advise
# fix_mistral_regex=True, which silently changes the ids of a tokenizer that was right. None suspects 5.0.0.
_TRANSFORMERS_VERSION = "5.0.0"


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
    if config.mlp_class_name == "LLaMAMoE":
        return "qwen3_moe" if config.norm_qk else "mixtral"
    if config.norm_qk:
        return "olmo2" if config.norm_qk_type == "olmo2" else "qwen3"
    if config.attn_bias and not config.bias:
        return "qwen2"
    if config.norm_class_name == "LayerNorm" and config.mlp_class_name == "GptNeoxMLP":
        if not config.bias:
            return "falcon"
        return "phi" if config.shared_attention_norm else "gpt_neox"
    if config.norm_class_name == "LayerNorm":  # litgpt leaves out its weights where OLMo is in the name
        return "olmo" if "OLMo" in name else "stablelm"
    if config.sliding_window_size is not None or name.lower().startswith(("mistral", "mathstral")):
        return "mistral"
    return "llama"


def export_problems(config: Config) -> list[str]:
    """Why a model of this configuration cannot become a Hugging Face model; empty if it can."""
    model_type = family_of(config)
    needs = {**PLAIN, **FAMILIES[model_type].needs}
    problems = [
        f"{field} is {getattr(config, field)!r}, {FAMILIES[model_type].architecture} has {needed!r} only"
        for field, needed in needs.items()
        if needed is not ANY and getattr(config, field) != needed
    ]
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
    if model_type == "gpt_neox" and config.n_query_groups != config.n_head:
        problems.append("n_query_groups differs from n_head, GPT-NeoX has no grouped queries")
    if model_type == "falcon" and config.shared_attention_norm and config.n_query_groups != 1:
        problems.append("n_query_groups is not 1, Falcon with one norm per block has one group only")
    if model_type in ("gpt_neox", "falcon", "phi", "stablelm", "olmo"):
        if config.head_size * config.n_head != config.n_embd:
            problems.append("head_size * n_head differs from n_embd")
        if model_type != "olmo" and "OLMo" in config.name:
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
    if model_type not in ("gpt_neox", "falcon"):
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
