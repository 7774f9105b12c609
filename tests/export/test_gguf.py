"""model.gguf: what is in it, what is refused, and (slow) what llama.cpp itself makes of it beside transformers."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from client_environments import answer_of, environment_with
from conftest import ROOT
from export_checkpoints import write_random_weights
from published_tokenizers import install_packages, write_tokenizer
from tokenizers import Tokenizer

from export.gguf_tokenizer import pre_tokenizer_name
from utils.errors import UserError

LLAMA_CPP = "xllamacpp==2026.10.11549"
MODELS = {
    "Llama 3": ("Llama-3-8B", {"n_query_groups": 2}),
    "Llama 3.2": ("Llama-3.2-1B", {"n_query_groups": 2, "block_size": 16384}),
    "Mistral": ("Mistral-7B-v0.3", {"n_query_groups": 2}),
    "Qwen 2.5": ("Qwen2.5-0.5B", {"n_query_groups": 2}),
    "Qwen 3": ("Qwen3-0.6B", {"n_query_groups": 2}),
}
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace("{1,3}", "")
TEXTS = (
    "Return a new list, and then the value of each.\n\n    x = [1, 2, 3]  # Ünïcödé 🙂 I'LL we've\r\n\r\n" * 4,
    "  1234567 12 345\t\tdon't DON'T  '' ...---\n\n\n   中文字符 한국어 ١٢٣ e\u0301 <|end_of_text|> end   ",
)


def split_at(expression: str) -> dict:
    isolated = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [isolated, byte_level]}


PRE_TOKENIZERS = {
    "gpt-2": {},
    "llama-bpe": {"pre_tokenizer": split_at(LLAMA_3), "ignore_merges": True},
    "smaug-bpe": {"pre_tokenizer": split_at(LLAMA_3)},
    "qwen2": {"pre_tokenizer": split_at(QWEN_2)},
}


def write_checkpoint(
    directory: Path, tokenizer_dir: Path, model: str, sizes: dict, tokenizer: dict | None = None, adds_bos: bool = True
) -> Path:
    """A random model with the tests' tokenizer; `tokenizer` changes how that splits text, `adds_bos` what is put
    before it."""
    shutil.copytree(tokenizer_dir, directory)
    content = json.loads((directory / "tokenizer.json").read_bytes())
    for key, value in (tokenizer or {}).items():
        (content["model"] if key in content["model"] else content)[key] = value
    (directory / "tokenizer.json").write_text(json.dumps(content))
    settings = json.loads((directory / "tokenizer_config.json").read_bytes()) | {"add_bos_token": adds_bos}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    write_random_weights(directory, model, sizes)
    return directory


def export(checkpoint: Path, target: Path, **settings) -> Path:
    import convert_pretrained_checkpoint

    convert_pretrained_checkpoint.main(convert_pretrained_checkpoint.Settings(str(checkpoint), str(target), **settings))
    return target


def test_the_file_says_what_the_model_is(tmp_path, tokenizer_dir, capsys):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tokenizer_dir, *MODELS["Llama 3.2"])
    target = export(checkpoint, tmp_path / "model", formats="gguf", dtype="bfloat16", pad_token="<|end_of_text|>")
    assert f"llama-cli -m {target}/model.gguf" in capsys.readouterr().out
    assert not list(target.glob("*.safetensors")) and not (target / "lit_model.pth").exists()

    reader = gguf.GGUFReader(target / "model.gguf")
    found = {name: field.contents() for name, field in reader.fields.items()}
    assert found["general.architecture"] == "llama" and found["general.name"] == "model"
    assert found["llama.context_length"] == 16384 and found["llama.attention.head_count_kv"] == 2
    assert found["tokenizer.ggml.pre"] == "gpt-2" and found["tokenizer.ggml.add_bos_token"]
    assert [found[f"tokenizer.ggml.{kind}_token_id"] for kind in ("bos", "eos", "padding")] == [0, 1, 1]
    assert found["tokenizer.ggml.token_type"][:3] == [3, 3, 1]  # control, control, normal
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.attn_q.weight"] == "BF16" and kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["rope_freqs.weight"] == "F32"


@pytest.mark.parametrize("adds_bos", [True, False])
def test_llama_cpp_is_told_whether_training_put_bos_before_a_text(tmp_path, tokenizer_dir, adds_bos):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tokenizer_dir, *MODELS["Llama 3"], adds_bos=adds_bos)
    reader = gguf.GGUFReader(export(checkpoint, tmp_path / "model", formats="gguf") / "model.gguf")
    found = {name: field.contents() for name, field in reader.fields.items()}
    assert found["tokenizer.ggml.add_bos_token"] is adds_bos and found["tokenizer.ggml.add_eos_token"] is False
    assert found["tokenizer.ggml.bos_token_id"] == 0, "it is named all the same"


def test_low_frequencies_are_divided_by_the_factor_and_high_ones_stay(tmp_path, tokenizer_dir):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tokenizer_dir, *MODELS["Llama 3.2"])
    target = export(checkpoint, tmp_path / "model", formats="gguf")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(target / "model.gguf").tensors}
    factors = tensors["rope_freqs.weight"]
    np.testing.assert_allclose(factors[[0, 1, -2, -1]], [1, 1, 32, 32], rtol=1e-6)
    assert factors.shape == (8,) and 1 < factors[4] < 32


def test_way_to_split_text_is_told_from_tokenizer_json(tokenizer_dir):
    content = json.loads((tokenizer_dir / "tokenizer.json").read_bytes())

    def name(**changes) -> str:
        model = {key: value for key, value in changes.items() if key in ("ignore_merges", "byte_fallback", "type")}
        others = {key: value for key, value in changes.items() if key not in model}
        return pre_tokenizer_name({**content, **others, "model": {**content["model"], **model}})

    for expected, changes in PRE_TOKENIZERS.items():
        assert name(**changes) == expected
    assert name(normalizer={"type": "NFC"}) == "gpt-2"
    digits = {"type": "Digits", "individual_digits": True}
    for changes, reason in (
        ({"normalizer": {"type": "Lowercase"}}, "normalizes text by Lowercase"),
        ({"type": "Unigram"}, "Unigram, not BPE"),
        ({"byte_fallback": True}, "byte_fallback"),
        ({"ignore_merges": True}, "has no name there"),
        ({"pre_tokenizer": split_at(r"\p{L}+")}, "has no name there"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits]}}, "Digits"),
        ({"pre_tokenizer": None}, "has no name there"),
    ):
        with pytest.raises(ValueError, match=reason):
            name(**changes)


@pytest.mark.parametrize(
    ("model", "sizes", "reason"),
    [
        ("Gemma-2-2b", {"n_query_groups": 2, "head_size": 16}, "models of type gemma2 are not supported"),
        ("OLMo-2-1124-7B", {"n_query_groups": 4}, "models of type olmo2 are not supported"),
        ("Mistral-7B-v0.1", {"sliding_window_size": 64, "n_query_groups": 2}, "sliding_window_size is 64"),
    ],
)
def test_what_llama_cpp_would_run_wrong_is_refused(tmp_path, tokenizer_dir, model, sizes, reason):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tokenizer_dir, model, sizes)
    with pytest.raises(UserError, match=reason):
        export(checkpoint, tmp_path / "model", formats="gguf")
    assert not (tmp_path / "model").exists()


def test_a_tokenizer_that_llama_cpp_has_not_is_refused_and_nothing_is_left(tmp_path, tokenizer_dir):
    changes = {"normalizer": {"type": "Lowercase"}}
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tokenizer_dir, *MODELS["Llama 3"], changes)
    with pytest.raises(UserError, match=r"does not split text as this tokenizer does.*--formats=all"):
        export(checkpoint, tmp_path / "model", formats="gguf")
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="needs the tokenizer"):
        export(checkpoint, tmp_path / "model", formats="gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory) -> Path:
    return environment_with([LLAMA_CPP, "numpy"], tmp_path_factory.mktemp("environment"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "pre_tokenizer", "adds_bos"),
    [
        *((model, "gpt-2", True) for model in MODELS),
        *(("Llama 3", name, True) for name in PRE_TOKENIZERS if name != "gpt-2"),
        ("Llama 3", "gpt-2", False),
    ],
)
def test_llama_cpp_gives_ids_probabilities_and_text_of_transformers(
    tmp_path, tokenizer_dir, llama_cpp, model, pre_tokenizer, adds_bos
):
    changes = PRE_TOKENIZERS[pre_tokenizer]
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tokenizer_dir, *MODELS[model], changes, adds_bos)
    compare_with_transformers(llama_cpp, checkpoint, tmp_path, TEXTS, f"{model}, {pre_tokenizer}", adds_bos)


def compare_with_transformers(
    llama_cpp: Path,
    checkpoint: Path,
    tmp_path: Path,
    texts: tuple[str, ...],
    name: str,
    adds_bos: bool = True,
    texts_to_tokenize: tuple[str, ...] = (),
) -> None:
    """Export a checkpoint for both, and hold against each other what they make of the texts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    expected_by, tested = export(checkpoint, tmp_path / "hf"), export(checkpoint, tmp_path / "gguf", formats="gguf")
    tokenizer = AutoTokenizer.from_pretrained(expected_by)
    reference = AutoModelForCausalLM.from_pretrained(expected_by, dtype=torch.float32).eval()

    script = ROOT / "tests" / "export" / "llama_cpp_of_an_export.py"
    questions = json.dumps({"continue": texts, "tokenize": texts_to_tokenize})
    answers = json.loads(answer_of([llama_cpp, script, tested / "model.gguf", 24], 300, questions))
    for text, found in zip(texts, answers["continue"], strict=True):
        ids = tokenizer(text)["input_ids"]
        assert found["ids"] == ids and (ids[0] == tokenizer.bos_token_id) == adds_bos
        prompt = torch.tensor([ids])
        with torch.no_grad():
            expected = reference(prompt, use_cache=False).logits[0, -1].log_softmax(-1)
        difference = float((torch.tensor(found["log_probabilities"]) - expected).abs().max())
        print(f"\n{LLAMA_CPP}, {name}: log-probabilities differ by at most {difference:.2g}")
        assert difference <= 1e-4
        mask = torch.ones_like(prompt)
        length = {"max_new_tokens": 24, "min_new_tokens": 24}
        generated = reference.generate(prompt, attention_mask=mask, do_sample=False, **length)
        assert found["continuation"] == generated[0, len(ids) :].tolist()
    assert answers["tokenize"] == [tokenizer(text)["input_ids"] for text in texts_to_tokenize]


@pytest.fixture(scope="module")
def llama_3_tokenizer(tmp_path_factory) -> Path:
    packages = install_packages(tmp_path_factory.mktemp("packages"))
    return write_tokenizer(packages, "Llama 3", tmp_path_factory.mktemp("tokenizer") / "published")


@pytest.mark.slow
def test_llama_cpp_agrees_on_the_tokenizer_that_meta_published(tmp_path, llama_3_tokenizer, llama_cpp, documents):
    """The ids are of real documents, and of the texts of all tokens, next to each other in random order."""
    checkpoint = shutil.copytree(llama_3_tokenizer, tmp_path / "checkpoint")
    sizes = {"n_query_groups": 2, "vocab_size": 128_000, "padded_vocab_size": 128_256}
    write_random_weights(checkpoint, "Llama-3-8B", sizes)
    vocabulary = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    order = np.random.default_rng(0).permutation(128_256)
    of_tokens = [vocabulary.decode(some.tolist(), skip_special_tokens=False) for some in np.array_split(order, 1000)]
    chat = (
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|> <|reserved_special_token_250|>\n  <|end_of_text|>",
    )
    compare_with_transformers(
        llama_cpp, checkpoint, tmp_path, TEXTS + chat, "Llama 3 as published", True, (*of_tokens, *documents)
    )
    fields = gguf.GGUFReader(tmp_path / "gguf" / "model.gguf").fields
    found = {name: fields[f"tokenizer.ggml.{name}"].contents() for name in ("pre", "bos_token_id", "eos_token_id")}
    assert found == {"pre": "llama-bpe", "bos_token_id": 128_000, "eos_token_id": 128_001}
    assert len(fields["tokenizer.ggml.tokens"].data) == 128_256


def test_without_the_package_the_message_says_what_to_install(tmp_path, tokenizer_dir, monkeypatch):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tokenizer_dir, *MODELS["Llama 3"])
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="pip install gguf"):
        export(checkpoint, tmp_path / "model", formats="gguf")
