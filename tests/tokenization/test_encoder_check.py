"""The encoders' meeting before the work: kinds of tokenizer on which they differ, and what is decided of each."""

from __future__ import annotations

import functools
import json
import random
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tokenizer_kinds as kinds
from conftest import write_parquet
from test_optimize_dataset_exactness import odd_documents, split_tokens
from tokenizers import Tokenizer, normalizers

from tokenization.encoder import Encoder
from tokenization.encoder_choice import EncoderChoice
from tokenization.prepared_tokenizer import check_ids, prepare_tokenizer
from utils.errors import UserError
from utils.manifest import read_manifest

# Kinds that gigatoken loads, and gets wrong for any text or for a normalized token: `tokenizers` does all of the work.
ALL_BY_REFERENCE = {"no pattern", "token with an accent", "Llama 2 with tokens"}
NOT_LOADED_BY_GIGATOKEN = {
    *("DeepSeek 3", "StarCoder", "digits in groups", "Falcon", "punctuation", "pattern of its own", "split at spaces"),
    *("NFKC", "NFD", "NFKD", "lowercase", "NFC, lowercase", "strip", "strip accents", "replace", "replace by pattern"),
    *("NMT", "unk, no bytes", "Llama 2, NFKC", "Unigram", "Unigram, NFKC", "Unigram, T5", "WordPiece", "WordLevel"),
    *("token in lower case",),
}


@functools.cache
def tokenizer_json(kind: str) -> bytes:
    return json.dumps(kinds.KINDS[kind]()).encode()


@functools.cache
def prepared(kind: str, parse_special_tokens: bool = False):
    return prepare_tokenizer(tokenizer_json(kind), parse_special_tokens, "--tokenizer_dir=TOK")


@functools.cache
def trying_documents() -> list[str]:
    """Real text; and by chance, other than the battery's: what tokens, classes and normal forms are made of."""
    rng = random.Random(7)
    pieces = [
        *(
            "aZé ̈́1２٣'.,-_ \n\t\r<>|",
            "the",
            "The",
            "is",
            "<x>",
            "word",
            "sword",
            "  ",
            "\n\n",
            "\t\t",
            "中文",
            "한국",
            "각",
        ),
        *(
            "🙂",
            "\u200b",
            "\xa0",
            "ກ຺ຸ",
            "<a>",
            "<a><a>",
            "<mask>",
            "<far>",
            "<farther>",
            "café",
            "cafe\u0301",
            "e\u0301",
        ),
        *(
            "Å",
            "ﬁ",
            "①",
            "<|unused_7|>",
            "<|begin_of_text|>",
            "<tool>",
            *(f"<{i}>" for i in range(16)),
            "if",
            "not",
            "assert",
            "▁▁▁",
            "x\u0301\u0c3c",
            "\u0899\u0316\u0301",
        ),
        *(
            "\U0001fae8",
            "a\ua7ce!a",
            "\U00016d67\U00016d67",
            "\U00011935\U00011930",
            "naïve",
            "NAÏVE",
            "don't",
            "DON'T",
            "3.14",
            "x=y;",
        ),
    ]
    pieces += list("abcdeABC0123456789 \n.,;:!?()[]{}'\"é中の한ا🙂")
    scripts = [
        range(0x20, 0x250),
        range(0x300, 0x370),
        range(0x400, 0x600),
        range(0x600, 0x1000),
        range(0x1000, 0x3100),
    ]
    scripts += [range(0x3100, 0xD000), range(0xE000, 0x10000), range(0x10000, 0x1F000), range(0x1F000, 0x20000)]
    made = ["".join(rng.choices(pieces, k=rng.randrange(1, 25))) for _ in range(2000)]
    made += ["".join(chr(rng.choice(rng.choice(scripts))) for _ in range(rng.randrange(1, 12))) for _ in range(1000)]
    mixed = [a + b for a, b in zip(made[:500], reversed(made))]
    return [*odd_documents(kinds.real_documents())[::3], *made, *mixed]


def encoded(kind: str, documents: list[str], choice=None, parse_special_tokens: bool = False) -> list[list[int]]:
    ready = prepared(kind, parse_special_tokens)
    encoder = Encoder(ready.tokenizer_json, parse_special_tokens, ready.fast_json, choice or ready.choice)
    ids, ends = encoder.encode(pa.array(documents))
    return [ids[ends[i] : ends[i + 1]].tolist() for i in range(len(documents))]


def expected(kind: str, documents: list[str], parse_special_tokens: bool = False) -> list[list[int]]:
    made = json.loads(tokenizer_json(kind))
    made["model"].pop("dropout", None)
    reference = Tokenizer.from_str(json.dumps(made))
    reference.encode_special_tokens = not parse_special_tokens
    return [encoding.ids for encoding in reference.encode_batch_fast(documents, add_special_tokens=False)]


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_ids_are_those_of_tokenizers_for_every_document_and_kind(kind):
    documents = trying_documents()
    assert encoded(kind, documents) == expected(kind, documents)
    choice = prepared(kind).choice
    by_reference = kind in NOT_LOADED_BY_GIGATOKEN | ALL_BY_REFERENCE
    assert choice.backend == ("tokenizers" if by_reference else "gigatoken")
    assert ("cannot load" in choice.reason) == (kind in NOT_LOADED_BY_GIGATOKEN)


@pytest.mark.parametrize("kind", ["Llama 3", "whitespace tokens, lstrip", "tokens that overlap", "id gap, special"])
def test_ids_with_special_tokens_parsed(kind):
    documents = trying_documents()
    assert encoded(kind, documents, parse_special_tokens=True) == expected(kind, documents, parse_special_tokens=True)


@pytest.mark.parametrize(
    "kind, document, trigger",
    [
        ("a word as token", "this is the thesis", "is"),  # single_word is ignored: "is" is found in "this"
        ("whitespace tokens, lstrip", "a <mask>\n\nb", "<mask>"),  # the token swallows what is a token itself
        ("id gap", "so <far> away", "<far>"),  # 1570 is stored, and tokenizers gives 1500
        ("tokens that overlap", "<|begin_of_text|><", "<|begin_of_text|>"),  # hides the "><" that begins in it
        (
            "Qwen 2",
            "\u0e81\u0eb8\u0eba",
            "\u0eba",
        ),  # a canonical class that was assigned after the reference's tables were made
        ("Qwen 2", "x\U00011935\U00011930", "\U00011935"),  # composes, since Unicode 13
        ("Qwen 2", "x\U00016d67\U00016d67", "\U00016d67"),  # composes, since Unicode 16
        ("Llama 3", "a\ua7ce_st", "\ua7ce"),  # a letter, since Unicode 17
    ],
)
def test_gigatoken_differs_and_the_document_goes_to_the_reference(kind, document, trigger):
    """The first assertion is what gigatoken 0.10.0 does; when it fails, the entry can go."""
    unchecked = EncoderChoice("gigatoken")
    assert encoded(kind, [document], unchecked) != expected(kind, [document])
    choice = prepared(kind).choice
    documents = ["plain text", document, "more of it", trigger]
    assert choice.needs_reference(pa.array(documents)).tolist() == [False, True, False, True]
    assert encoded(kind, documents) == expected(kind, documents)


NEWER_THAN_THIS_PYTHON = ["\U0001fae8", "\U0001fa77", "\ua7cd", "\u1c8a", "\U00010d70", "\U00031350", "\U000113ce"]


def test_characters_that_are_new_to_python_alone_stay_with_gigatoken():
    """Of Unicode 15 to 16, letters, marks, symbols and emoji; those of a normal form go to the reference."""
    rng = random.Random(5)
    pieces = [*NEWER_THAN_THIS_PYTHON, *"aZ1 .'\n\u0301", "the ", "'s"]
    documents = ["".join(rng.choices(pieces, k=rng.randrange(1, 12))) for _ in range(5000)]
    assert not prepared("Llama 3").choice.needs_reference(pa.array(documents)).any()
    assert encoded("Llama 3", documents) == expected("Llama 3", documents)
    touched = prepared("Qwen 2").choice.needs_reference(pa.array(NEWER_THAN_THIS_PYTHON))
    assert touched.tolist() == [unicodedata.category(c) == "Cn" for c in NEWER_THAN_THIS_PYTHON]


def test_a_tokenizer_without_pattern_is_left_to_the_reference_with_the_reason():
    """gigatoken splits at GPT-2's pattern although `use_regex` is off."""
    assert "differ on ordinary text" in prepared("no pattern").choice.describe(0.0, 2e6)


def test_dropout_is_left_out_and_said():
    (warning,) = prepared("dropout").choice.warnings
    assert "dropout of 0.5" in warning
    assert not prepared("dropout 0").choice.warnings
    assert encoded("dropout", ["hello there"]) == encoded("dropout 0", ["hello there"])


@pytest.mark.parametrize("key", ["special", "normalized", "single_word", "lstrip", "rstrip"])
def test_a_flag_that_an_added_token_lacks_is_off(key):
    made = kinds.with_tokens(kinds.byte_level(), "<x>")
    del made["added_tokens"][-1][key]
    ready = prepare_tokenizer(json.dumps(made).encode(), False, "--tokenizer_dir=TOK")
    encoder = Encoder(ready.tokenizer_json, False, ready.fast_json, ready.choice)
    assert encoder.encode(pa.array(["<x>"]))[0].tolist() == [made["added_tokens"][-1]["id"]]


@pytest.mark.parametrize("token", [{"id": 9}, {"content": "<x>"}, "<x>", {"content": "<x>", "id": "9"}])
def test_an_added_token_that_makes_no_sense_is_one_message(token):
    made = kinds.byte_level()
    made["added_tokens"].append(token)
    with pytest.raises(UserError, match="added token 2 of its"):
        prepare_tokenizer(json.dumps(made).encode(), False, "--tokenizer_dir=TOK")


def test_what_tokenizers_cannot_load_is_one_message():
    made = kinds.byte_level()
    made["pre_tokenizer"] = {"type": "Unheard"}
    with pytest.raises(UserError, match="--tokenizer_dir=TOK: Hugging Face tokenizers cannot load"):
        prepare_tokenizer(json.dumps(made).encode(), False, "--tokenizer_dir=TOK")


def test_a_separator_that_is_renumbered_is_refused():
    ready = prepared("id gap, special")
    stored = ready.renumbered[0][0]
    check_ids(ready, {"BOS": 0, "EOS": None}, kinds.VOCABULARY + 100, "--tokenizer_dir=TOK")
    with pytest.raises(UserError, match=f"stores id {stored} for the EOS token"):
        check_ids(ready, {"BOS": 0, "EOS": stored}, kinds.VOCABULARY + 100, "--tokenizer_dir=TOK")


def test_the_reason_and_the_rate_are_said_and_documents_keep_their_order(tmp_path, run_script):
    made = kinds.KINDS["a word as token"]()
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text(json.dumps(made))
    (tmp_path / "tok" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end_of_text|>"}))
    documents = [document for document in kinds.real_documents() if "\n" in document][:60]
    write_parquet(tmp_path / "in" / "a.parquet", documents)
    arguments = [f"--input_dir={tmp_path / 'in'}", f"--tokenizer_dir={tmp_path / 'tok'}", "--add_eos=true"]
    arguments += [f"--output_dir={tmp_path / 'out'}", "--val_fraction=0.2", "--address=local"]
    for dry_run in (["--dry_run"], []):
        process = run_script("optimize_dataset.py", *arguments, *dry_run)
        said = next(line for line in process.stdout.splitlines() if line.startswith("encoder: gigatoken, equal"))
        assert "the text 'the', 'is'" in said and "MB/s" in said
    found = [split_tokens(tmp_path / "out", split) for split in ("train", "val")]
    ids = [[*encoding, 1] for encoding in expected("a word as token", documents)]
    assert sorted(found[0] + found[1]) == sorted(ids)
    assert found[0] == [document for document in ids if document in found[0]]  # in the input's order
    assert read_manifest(Path(tmp_path / "out"))["content"]["train"]["documents"] == len(found[0])


def test_normal_forms_agree_on_what_stays_with_gigatoken():
    """Every character with a canonical class or composition, beside the others: the hard part of NFC."""
    made = json.dumps(kinds.byte_level(kinds.split(kinds.QWEN2), normalizers.NFC())).encode()
    ready = prepare_tokenizer(made, False, "--tokenizer_dir=TOK")
    rng = random.Random(3)
    marks = [point for point in range(0x300, 0x20000) if not 0xD800 <= point < 0xE000 and _is_mark(point)]
    documents = ["x" + "".join(map(chr, rng.choices(marks, k=rng.randrange(2, 6)))) for _ in range(20000)]
    rows = np.flatnonzero(~ready.choice.needs_reference(pa.array(documents)))
    kept = [documents[row] for row in rows]
    assert 1000 < len(kept) < len(documents)
    encoder = Encoder(ready.tokenizer_json, False, ready.fast_json, ready.choice)
    for got, wanted in zip(encoder.encode(pa.array(kept)), encoder.encode_reference(kept), strict=True):
        assert np.array_equal(got, wanted)


def _is_mark(point: int) -> bool:
    return unicodedata.category(chr(point)).startswith("M")
