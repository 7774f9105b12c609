"""BOS and EOS of an export are those of training, by the ids that clients give to a text, special tokens included."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import gguf
import pytest
from conftest import ROOT
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from export.hf_config import hf_config
from export.tokenizer_files import tokenizer_of_training, write_tokenizer
from utils.errors import UserError
from utils.tokenizer import read_tokenizer_info

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


def template(*single: str) -> dict:
    pieces = [
        {"Sequence": {"id": "A", "type_id": 0}} if token == "$A" else {"SpecialToken": {"id": token, "type_id": 0}}
        for token in single
    ]
    special = {token: {"id": token, "ids": [i], "tokens": [token]} for i, token in enumerate((BOS, EOS))}
    return {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": special}


def sequence(*processors: dict) -> dict:
    return {"type": "Sequence", "processors": list(processors)}


POST_PROCESSORS = {
    "none": None,
    "byte level": BYTE_LEVEL,
    "BOS": template(BOS, "$A"),
    "BOS and EOS": template(BOS, "$A", EOS),
    "byte level, BOS": sequence(BYTE_LEVEL, template(BOS, "$A")),
    "byte level, EOS, nested": sequence(sequence(BYTE_LEVEL), template("$A", EOS)),
    "Roberta's": {
        "type": "RobertaProcessing", "sep": [EOS, 1], "cls": [BOS, 0], "trim_offsets": True, "add_prefix_space": False,
    },
}  # fmt: skip
TRAINED_WITH = {"BOS": (0, None), "EOS": (None, 1), "both": (0, 1)}


def tokenizer_with(directory: Path, source: Path, post_processor: dict | None, **settings) -> Path:
    """A copy of the tokenizer in `source` with another post-processor and more entries in tokenizer_config.json."""
    shutil.copytree(source, directory)
    content = json.loads((directory / "tokenizer.json").read_bytes()) | {"post_processor": post_processor}
    (directory / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((directory / "tokenizer_config.json").read_bytes()) | settings
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


SPLIT_OTHERWISE = "helloWorld 2024 ABCdef"
"""Text that the expression of `large_tokenizer` splits in other places than that of `fix_mistral_regex`."""


def large_tokenizer(directory: Path, source: Path) -> Path:
    """A copy of the tokenizer in `source` with 101,024 entries, which splits text by a regular expression first, as
    Llama 3's and Mistral's: transformers suspects such a one of a mistake in Mistral's."""
    shutil.copytree(source, directory)
    path = directory / "tokenizer.json"
    content = json.loads(path.read_bytes())
    pattern = {"type": "Split", "pattern": {"Regex": r"\p{L}+|\p{N}{1,3}| |[^\p{L}\p{N} ]+"}, "behavior": "Isolated"}
    byte_level = {**content["pre_tokenizer"], "use_regex": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{**pattern, "invert": False}, byte_level]}
    content["model"]["vocab"] |= {f"unused {i}": 1024 + i for i in range(100_000)}
    path.write_text(json.dumps(content))
    return directory


def trained_with(*ids: tuple[int | None, int | None]) -> dict:
    """The manifest of a checkpoint that was trained on datasets with these ids of BOS and EOS."""
    return {"inputs": [{"manifest": {"settings": {"bos_id": bos_id, "eos_id": eos_id}}} for bos_id, eos_id in ids]}


def export_tokenizer(
    source: Path, target: Path, checkpoint: dict | None, pad_token: str | None = None, check=True
) -> Path:
    from litgpt import Config

    from utils.files import write_json

    target.mkdir()
    info = tokenizer_of_training(read_tokenizer_info(source), checkpoint)
    config = Config.from_name("Llama-3-8B")
    write_json(target / "config.json", hf_config(config, False, "float32", info.bos_id, info.eos_id))
    write_tokenizer(info, target, context_tokens=512, pad_token=pad_token, check=check)
    return target


def contradicting_export(directory: Path, tokenizer_dir: Path, post_processor: str, trained: str) -> Path:
    """An exported tokenizer in `directory`/model whose source says other things than training did."""
    bos_id, eos_id = TRAINED_WITH[trained]
    # What tokenizer_config.json says is not what training did, either.
    source = tokenizer_with(
        directory / "source", tokenizer_dir, POST_PROCESSORS[post_processor], add_bos_token=bos_id is None,
        add_eos_token=eos_id is None,
    )  # fmt: skip
    return export_tokenizer(source, directory / "model", trained_with((bos_id, eos_id)))


def ids_of_training(tokenizer_dir: Path, trained: str, text: str) -> list[int]:
    """The ids that a prompt has: those of the text, after the BOS that training put before it, if any."""
    bos_id, _ = TRAINED_WITH[trained]
    plain = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    return plain if bos_id is None else [bos_id, *plain]


def ids_by_client(directory: Path, text: str) -> dict[str, list[int]]:
    from litgpt.tokenizer import Tokenizer as LitgptTokenizer

    return {
        "tokenizers": Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text).ids,
        "transformers": AutoTokenizer.from_pretrained(directory)(text)["input_ids"],
        "litgpt": LitgptTokenizer(directory).encode(text).tolist(),
    }


@pytest.mark.parametrize("trained", TRAINED_WITH)
@pytest.mark.parametrize("post_processor", POST_PROCESSORS)
def test_every_client_puts_the_bos_of_training_and_no_eos(tmp_path, tokenizer_dir, documents, post_processor, trained):
    bos_id, _ = TRAINED_WITH[trained]
    directory = contradicting_export(tmp_path, tokenizer_dir, post_processor, trained)
    expected = ids_of_training(tokenizer_dir, trained, documents[0])
    assert ids_by_client(directory, documents[0]) == dict.fromkeys(("tokenizers", "transformers", "litgpt"), expected)
    # The ByteLevel post-processor leaves the space before a word out of the word's place.
    places = AutoTokenizer.from_pretrained(directory)(" and the", return_offsets_mapping=True)["offset_mapping"]
    assert ((4, 8) not in places) == ("byte level" in post_processor), places
    settings = json.loads((directory / "tokenizer_config.json").read_bytes())
    assert settings["add_bos_token"] == (bos_id is not None) and settings["add_eos_token"] is False
    info = read_tokenizer_info(directory)
    assert info.adds_bos == (bos_id is not None) and not info.adds_eos and (info.bos_id, info.eos_id) == (0, 1)


@pytest.mark.parametrize("checkpoint", [None, {"inputs": [{"manifest": None}]}], ids=["no manifest", "plain litdata"])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_without_manifests_the_tokenizers_own_configuration_counts(tmp_path, tokenizer_dir, checkpoint, adds_bos):
    source = tokenizer_with(
        tmp_path / "source", tokenizer_dir, None if adds_bos else template(BOS, "$A"), add_bos_token=adds_bos
    )
    directory = export_tokenizer(source, tmp_path / "model", checkpoint)
    assert all((ids[0] == 0) == adds_bos for ids in ids_by_client(directory, "and the").values())


def test_a_tokenizer_json_that_does_as_training_did_stays_as_it_is(tmp_path, tokenizer_dir):
    directory = export_tokenizer(tokenizer_dir, tmp_path / "model", trained_with((0, 1)))
    assert (directory / "tokenizer.json").read_bytes() == (tokenizer_dir / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("check", [True, False])
def test_truncation_and_padding_are_not_exported(tmp_path, tokenizer_dir, documents, check):
    source = tokenizer_with(tmp_path / "source", tokenizer_dir, None)
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=16, pad_id=1, pad_token=EOS)
    tokenizer.save(str(source / "tokenizer.json"))
    directory = export_tokenizer(source, tmp_path / "model", trained_with((0, 1)), check=check)
    plain = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json")).encode(documents[0], add_special_tokens=False)
    assert all(ids == [0, *plain.ids] for ids in ids_by_client(directory, documents[0]).values())


def test_names_come_from_training_where_the_tokenizer_names_others(tmp_path, tokenizer_dir):
    source = tokenizer_with(tmp_path / "source", tokenizer_dir, None, bos_token=EOS, eos_token=None)
    (source / "special_tokens_map.json").write_text(json.dumps({"bos_token": EOS, "unk_token": EOS}))
    (source / "generation_config.json").unlink()
    directory = export_tokenizer(source, tmp_path / "model", trained_with((0, 1)))
    loaded = AutoTokenizer.from_pretrained(directory)
    assert (loaded.bos_token, loaded.eos_token) == (BOS, EOS)
    names = json.loads((directory / "special_tokens_map.json").read_bytes())
    assert names == {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS}  # transformers 4 reads this file last


def test_datasets_that_differ_are_warned_of_and_a_foreign_tokenizer_is_refused(tokenizer_dir, capsys):
    info = read_tokenizer_info(tokenizer_dir)
    assert tokenizer_of_training(info, trained_with((None, 1), (0, 1))).adds_bos
    assert "different BOS tokens (ids: None, 0)" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"has the token 5000, tokenizer\.json ends at 1023"):
        tokenizer_of_training(info, trained_with((5000, 1)))


def test_context_spaces_and_padding(tmp_path, tokenizer_dir):
    directory = export_tokenizer(tokenizer_dir, tmp_path / "model", None)
    loaded = AutoTokenizer.from_pretrained(directory)
    assert loaded.model_max_length == 512 and loaded.pad_token is None
    assert json.loads((directory / "tokenizer_config.json").read_bytes())["clean_up_tokenization_spaces"] is False
    stated = tokenizer_with(tmp_path / "source", tokenizer_dir, None, clean_up_tokenization_spaces=True)
    padded = AutoTokenizer.from_pretrained(export_tokenizer(stated, tmp_path / "padded", None, pad_token="!"))
    assert padded.clean_up_tokenization_spaces is True and padded.pad_token == "!"


# A whole export, from a checkpoint whose manifest leads to data that step 1 made --------------------------------------


@pytest.fixture
def released_run(tmp_path) -> Path:
    """Trained on documents with BOS before and EOS after them."""
    shutil.unpack_archive(ROOT / "tests" / "released" / "run.tar.xz", tmp_path)
    return tmp_path / "run" / "step-00000006"


def export(checkpoint: Path, target: Path, **settings) -> Path:
    import convert_pretrained_checkpoint

    settings = {"verify": "weights", **settings}
    convert_pretrained_checkpoint.main(convert_pretrained_checkpoint.Settings(str(checkpoint), str(target), **settings))
    return target


@pytest.mark.parametrize("with_bos", [True, False])
def test_lm_eval_and_the_others_give_the_ids_of_a_run_whose_tokenizer_says_otherwise(released_run, tmp_path, with_bos):
    path = released_run / "tokenizer.json"
    content = json.loads(path.read_bytes())
    if with_bos:
        content["post_processor"] = None  # with add_bos_token in tokenizer_config.json: a case of the hub
    path.write_text(json.dumps(content))
    manifest = json.loads((released_run / "manifest.json").read_bytes())
    manifest["files"] = [entry for entry in manifest["files"] if entry["name"] != "tokenizer.json"]
    for dataset in manifest["inputs"]:
        assert dataset["manifest"]["settings"]["bos_id"] == 0 and dataset["manifest"]["settings"]["eos_id"] == 1
        dataset["manifest"]["settings"]["bos_id"] = 0 if with_bos else None
    (released_run / "manifest.json").write_text(json.dumps(manifest))
    directory = export(released_run, tmp_path / "model")

    from lm_eval.models.huggingface import HFLM

    evaluated = HFLM(pretrained=str(directory), device="cpu", batch_size=1)
    plain = Tokenizer.from_file(str(path)).encode("and then", add_special_tokens=False).ids
    expected = [0, *plain] if with_bos else plain
    assert ids_by_client(directory, "and then") == dict.fromkeys(("tokenizers", "transformers", "litgpt"), expected)
    assert evaluated.tok_encode("and then") == expected
    context, continuation = evaluated._encode_pair("and then", " the text")
    assert context + continuation == [*expected, *evaluated.tok_encode(" the text", add_special_tokens=False)]
    assert ("(put before every text)" in (directory / "README.md").read_text()) == with_bos


def test_a_pad_token_is_named_in_every_file_and_one_of_training_is_warned_of(released_run, tmp_path, capsys):
    directory = export(released_run, tmp_path / "model", pad_token="!")
    for name, key, value in (
        ("config.json", "pad_token_id", 2),
        ("generation_config.json", "pad_token_id", 2),
        ("tokenizer_config.json", "pad_token", "!"),
    ):
        assert json.loads((directory / name).read_bytes())[key] == value, name
    assert "--pad_token" not in capsys.readouterr().err
    with pytest.raises(UserError, match=r"--pad_token=<pad>: not a token .* special tokens are: <\|begin_of_text\|>"):
        export(released_run, tmp_path / "other", pad_token="<pad>")
    export(released_run, tmp_path / "eos", pad_token=EOS, dry_run=True)
    assert f"--pad_token={EOS}: texts begin or end with it" in capsys.readouterr().err
    with pytest.raises(UserError, match="pad_token: was '!', is None"):
        export(released_run, tmp_path / "model")


def state_pad_token(run: Path, pad_token, of_map=None) -> None:
    """Let the tokenizer of a checkpoint name a pad token in tokenizer_config.json; `of_map`: in the other file."""
    config = json.loads((run / "tokenizer_config.json").read_bytes())
    if pad_token is not None:
        config["pad_token"] = pad_token
    (run / "tokenizer_config.json").write_text(json.dumps(config))
    if of_map is not None:
        (run / "special_tokens_map.json").write_text(json.dumps({"eos_token": EOS, "pad_token": of_map}))
    manifest = json.loads((run / "manifest.json").read_bytes())
    manifest["files"] = [entry for entry in manifest["files"] if not entry["name"].startswith("tokenizer_config")]
    (run / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("pad_token", "of_map"), [("!", None), ({"content": "!", "lstrip": False}, "#"), (None, "!")], ids=str
)
def test_a_pad_token_that_the_tokenizer_names_is_named_in_every_file(released_run, tmp_path, capsys, pad_token, of_map):
    state_pad_token(released_run, pad_token, of_map)
    directory = export(released_run, tmp_path / "model")
    assert "pad" not in capsys.readouterr().err
    for name in ("config.json", "generation_config.json"):
        assert json.loads((directory / name).read_bytes())["pad_token_id"] == 2, name
    assert AutoTokenizer.from_pretrained(directory).pad_token_id == 2
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (directory / name).is_file():
            named = json.loads((directory / name).read_bytes())["pad_token"]
            assert (named["content"] if isinstance(named, dict) else named) == "!", name
    reader = gguf.GGUFReader(export(released_run, tmp_path / "gguf", formats="gguf") / "model.gguf")
    assert reader.fields["tokenizer.ggml.padding_token_id"].contents() == 2
    chosen = export(released_run, tmp_path / "chosen", pad_token="#")
    assert json.loads((chosen / "config.json").read_bytes())["pad_token_id"] == 4
    assert AutoTokenizer.from_pretrained(chosen).pad_token_id == 4, "the flag decides"


@pytest.mark.parametrize("pad_token", [EOS, BOS])
def test_a_pad_token_of_the_tokenizer_that_texts_begin_or_end_with_is_warned_of(
    released_run, tmp_path, capsys, pad_token
):
    state_pad_token(released_run, pad_token)
    directory = export(released_run, tmp_path / "model")
    warning = f"the tokenizer's pad token is {pad_token}: texts begin or end with it"
    assert warning in capsys.readouterr().err
    number = [BOS, EOS].index(pad_token)
    # By this entry transformers would keep the token's embedding from being trained.
    assert json.loads((directory / "config.json").read_bytes())["pad_token_id"] is None
    assert AutoTokenizer.from_pretrained(directory).pad_token_id == number
    assert json.loads((directory / "generation_config.json").read_bytes())["pad_token_id"] == number
    export(released_run, tmp_path / "chosen", pad_token="!")
    assert "texts begin or end with it" not in capsys.readouterr().err


@pytest.mark.parametrize("pad_token", ["<pad>", ["!"]], ids=str)
def test_a_pad_token_of_the_tokenizer_that_is_no_token_is_left_out(released_run, tmp_path, capsys, pad_token):
    state_pad_token(released_run, pad_token, of_map="<pad>")
    directory = export(released_run, tmp_path / "model")
    assert f"pad token is {pad_token!r}, which tokenizer.json does not have" in capsys.readouterr().err
    loaded = AutoTokenizer.from_pretrained(directory)
    assert loaded.pad_token is None and len(loaded) == 280, "a client would add it beyond the embedding"
    assert json.loads((directory / "config.json").read_bytes())["pad_token_id"] is None
    assert json.loads((directory / "generation_config.json").read_bytes())["pad_token_id"] == 1, "EOS"


def test_verify_takes_an_export_of_before_the_tokenizers_pad_token_was_looked_for(released_run, tmp_path):
    from tools.provenance import CHANGED, Node
    from tools.provenance_deep import check_values

    state_pad_token(released_run, "!")
    directory = export(released_run, tmp_path / "model")
    manifest = json.loads((directory / "manifest.json").read_bytes())
    made = json.loads((released_run / "manifest.json").read_bytes())
    config = json.loads((directory / "config.json").read_bytes())
    for pad_id, wrong in ((2, 0), (None, 0), (5, 1)):
        (directory / "config.json").write_text(json.dumps(config | {"pad_token_id": pad_id}))
        node = Node("export")
        check_values(node, directory, manifest, released_run, made)
        assert [status for status, _ in node.lines].count(CHANGED) == wrong, node.lines


@pytest.mark.parametrize("model", ["Llama-3-8B", "Mistral-7B-v0.1"])
def test_a_large_tokenizer_is_not_taken_for_a_broken_one_of_mistral(
    tmp_path, tokenizer_dir, model, caplog, monkeypatch
):
    """Without `transformers_version` transformers advises a flag that changes ids."""
    from litgpt import Config

    path = large_tokenizer(tmp_path / "large", tokenizer_dir) / "tokenizer.json"
    config = hf_config(Config.from_name(model), False, "float32", 0, 1)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="transformers")  # another test may have silenced it
    for version, warns in ((config.pop("transformers_version"), False), (None, True)):
        stated = config if version is None else config | {"transformers_version": version}
        (tmp_path / "large" / "config.json").write_text(json.dumps(stated))
        caplog.clear()
        loaded = AutoTokenizer.from_pretrained(tmp_path / "large")
        assert ("fix_mistral_regex" in caplog.text) == warns
        assert loaded(SPLIT_OTHERWISE)["input_ids"] == Tokenizer.from_file(str(path)).encode(SPLIT_OTHERWISE).ids
