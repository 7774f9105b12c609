"""Every family: trained a few steps on two processes, exported; equal logits and equal generation in both libraries.

The models are small, and odd where a mistake would hide: grouped queries, a head size that is not width / heads,
sliding windows shorter than the tokens, RoPE scaling over thousands of positions, exact and padded vocabularies.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from export_checkpoints import TINY
from pretrain_ranks import run_ranks, settings_of
from tiny_runs import tokenize_dataset, write_config

PADDED = {"vocab_size": 1024, "padded_vocab_size": 1088}
FAMILIES = {
    "llama-2": ("Llama-2-7b-hf", {}),
    "llama-2-32k": ("LLaMA-2-7B-32K", {"block_size": 4096}),
    "llama-3": ("Llama-3-8B", {"n_query_groups": 2, **PADDED}),
    "llama-3.1": ("Llama-3.1-8B", {"n_query_groups": 2, "block_size": 16384}),
    "llama-3.2": ("Llama-3.2-1B", {"n_query_groups": 1, "block_size": 16384, "head_size": 32}),
    "tinyllama": ("tiny-llama-1.1b", {"n_query_groups": 2}),
    "smollm2": ("SmolLM2-135M", {"n_query_groups": 1}),
    "mistral": ("Mistral-7B-v0.1", {"n_query_groups": 2, "sliding_window_size": 16}),
    "mistral-0.3": ("Mistral-7B-v0.3", {"n_query_groups": 2, "head_size": 32}),
    "pythia": ("pythia-14m", PADDED),
    "pythia-sequential": ("pythia-14m", {"parallel_residual": False, "rotary_percentage": 0.5}),
    "qwen-2.5": ("Qwen2.5-0.5B", {"n_query_groups": 2}),
    "qwen-3": ("Qwen3-0.6B", {"n_query_groups": 2, "head_size": 32}),
    "gemma": ("Gemma-2b", {"n_query_groups": 1, "head_size": 32}),
    "gemma-2": (
        "Gemma-2-2b",
        {"n_query_groups": 2, "head_size": 32, "sliding_window_size": 16, "attention_scores_scalar": 40, "n_layer": 3},
    ),
    "gemma-3": (
        "Gemma-3-1b-it",
        {"n_query_groups": 1, "head_size": 32, "sliding_window_size": 16, "n_layer": 7, "block_size": 8192},
    ),
    "gemma-3-scaled": (
        "Gemma-3-4b-it",
        {"n_query_groups": 2, "head_size": 32, "sliding_window_size": 16, "n_layer": 7, "block_size": 8192},
    ),
    "phi-3": ("Phi-3-mini-4k-instruct", {"sliding_window_size": 16}),
    "phi-4": ("phi-4", {"n_query_groups": 2}),
    "phi-4-mini": ("Phi-4-mini-instruct", {"n_query_groups": 2, **PADDED}),
    "olmo-2": ("OLMo-2-1124-7B", {"n_query_groups": 4}),
    "mixtral": ("Mixtral-8x7B-v0.1", {"n_query_groups": 2, "n_expert": 4}),
    "qwen-3-moe": (
        "Qwen3-30B-A3B",
        {"n_query_groups": 2, "head_size": 32, "n_expert": 6, "n_expert_per_token": 3, "moe_intermediate_size": 48},
    ),
    "phi-1.5": ("phi-1_5", {}),
    "phi-2-grouped": ("phi-2", {"n_query_groups": 2}),
    "falcon-7b": ("falcon-7b", {"n_query_groups": 1}),
    "falcon-40b": ("falcon-40b", {"n_query_groups": 2}),
    "stablelm": ("stablelm-3b-4e1t", PADDED),
    "olmo": ("OLMo-1B-hf", {"norm_eps": 1e-5}),
    "olmo-2-grouped": ("OLMo-2-1124-7B", {"n_query_groups": 2}),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, documents, tokenizer_dir) -> Path:
    """FAMILY/final for each; all are trained by the same two processes."""
    from litgpt.config import Config

    directory = tmp_path_factory.mktemp("families")
    dataset = tokenize_dataset(directory / "data", documents[:40], tokenizer_dir)
    runs = []
    for name, (model, sizes) in FAMILIES.items():
        config = Config.from_name(model, **{**TINY, **sizes})
        fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        path = write_config(
            directory / f"{name}.yaml",
            model_config=fields,
            # A rate at which norms and biases, which begin at 1 and 0, leave these values within a few steps.
            optimizer={"lr": 0.03},
            train={"max_steps": 4, "lr_warmup_steps": 1, "save_interval": None, "max_seq_length": 32},
            eval={"interval": None},
        )
        runs.append(settings_of(path, dataset, directory / name, 2))
    run_ranks(runs, 2, directory / "job")
    return directory


@pytest.fixture(autouse=True)
def one_thread():
    """Operations on tensors this small only wait for other threads."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def export(checkpoint: Path, target: Path, **settings) -> None:
    import convert_pretrained_checkpoint

    convert_pretrained_checkpoint.main(convert_pretrained_checkpoint.Settings(str(checkpoint), str(target), **settings))


def load_both(directory: Path):
    from litgpt import GPT, Config
    from transformers import AutoModelForCausalLM

    lit_model = GPT(Config.from_file(directory / "model_config.yaml"))
    lit_model.load_state_dict(torch.load(directory / "lit_model.pth", weights_only=True))
    hf_model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return lit_model.eval(), hf_model.eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_greedy_generation_agree(checkpoints, tmp_path, name):
    export(checkpoints / name / "final", tmp_path / "model")
    lit_model, hf_model = load_both(tmp_path / "model")
    assert hf_model.config.tie_word_embeddings is False
    norms = [parameter for key, parameter in lit_model.named_parameters() if "norm" in key and key.endswith("weight")]
    assert all((norm - 1).abs().max() > 1e-2 for norm in norms)  # else one that is not applied would not show
    tokens = torch.randint(0, 1000, (3, 64), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.allclose(hf_model(tokens).logits, lit_model(tokens), atol=1e-4, rtol=0)
    assert greedy_transformers(hf_model, tokens[:1, :8]) == greedy_litgpt(lit_model, tokens[:1, :8])


def greedy_litgpt(model, prompt: torch.Tensor, num_tokens: int = 24) -> list[int]:
    from litgpt.generate.base import generate

    if model.config.attention_logit_softcapping is not None:
        # With a key-value cache, litgpt 0.5.13 adds its boolean mask to capped scores: what it then generates is not
        # what its own forward pass finds most likely. So here without cache.
        tokens = prompt
        with torch.no_grad():
            for _ in range(num_tokens):
                tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), dim=1)
        return tokens[0].tolist()
    model.max_seq_length = 64
    model.set_kv_cache(batch_size=1, max_seq_length=64)
    generated = generate(model, prompt[0], max_returned_tokens=prompt.size(1) + num_tokens, temperature=0.0, top_p=0.0)
    model.clear_kv_cache()
    return generated.tolist()


def greedy_transformers(model, prompt: torch.Tensor, num_tokens: int = 24) -> list[int]:
    generated = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return generated[0].tolist()


@pytest.mark.parametrize("name", ["llama-3", "gemma-3", "pythia", "phi-4-mini"])
def test_tied_weights(checkpoints, tmp_path, name):
    """The same family once more, with an output layer that equals the embedding."""
    from export.checkpoint_weights import find_weights

    tied = tmp_path / "tied"
    tied.mkdir()
    state = {n: t.rows(0, t.num_rows) for n, t in find_weights(checkpoints / name / "final").items()}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    torch.save(state, tied / "lit_model.pth")
    (tied / "model_config.yaml").write_bytes((checkpoints / name / "final" / "model_config.yaml").read_bytes())
    export(tied, tmp_path / "model")
    lit_model, hf_model = load_both(tmp_path / "model")
    assert hf_model.config.tie_word_embeddings is True
    tokens = torch.randint(0, 1000, (2, 64), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert torch.allclose(hf_model(tokens).logits, lit_model(tokens), atol=1e-4, rtol=0)


def test_every_model_of_litgpt_is_taken_or_refused_with_a_reason():
    """Configurations at their real sizes; what is taken must be a configuration that transformers reads."""
    from litgpt.config import Config, name_to_config
    from transformers import AutoConfig

    from export.hf_config import export_problems, family_of, hf_config

    refused = set()
    for name in name_to_config:
        config = Config.from_name(name)
        if export_problems(config):
            refused.add(name)
            continue
        fields = hf_config(config, False, "bfloat16", 1, 2)
        read = AutoConfig.for_model(family_of(config), **{k: v for k, v in fields.items() if k != "model_type"})
        assert read.num_hidden_layers == config.n_layer and read.vocab_size == config.padded_vocab_size
    families = ("llama", "mistral", "gemma", "qwen2.5", "olmo-2", "pythia", "smollm2", "phi-3", "phi-4")
    assert not [name for name in refused if name.lower().startswith(families)]
    assert all(not name.startswith("Qwen3") or "-A" in name for name in refused)  # mixtures of experts only
