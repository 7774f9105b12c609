"""Tokenizers that Meta and DeepSeek published: which encoder is chosen for them, and its ids beside the originals'."""

from __future__ import annotations

import functools
import random
from pathlib import Path

import pyarrow as pa
import pytest
import tokenizer_kinds as kinds
from published_tokenizers import META, ids_by_meta, install_packages, write_tokenizer
from test_encoder_check import trying_documents
from tokenizers import Tokenizer

from tokenization.encoder import Encoder
from tokenization.line_cuts import LINE_ENDS
from tokenization.prepared_tokenizer import prepare_tokenizer

pytestmark = pytest.mark.slow

NAMES = (*META, "DeepSeek")
NEW = "\ua7ce"  # a letter since Unicode 17, which is newer than the tables of tokenizers


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    return install_packages(tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="module")
def prepared_of(packages, tmp_path_factory):
    @functools.cache
    def prepared(name: str):
        directory = write_tokenizer(packages, name, tmp_path_factory.mktemp("tokenizer") / "TOK")
        return prepare_tokenizer((directory / "tokenizer.json").read_bytes(), False, "--tokenizer_dir=TOK")

    return prepared


@functools.cache
def documents() -> tuple[list[str], list[str]]:
    """Real, odd and made-up documents, and of some real ones a copy with a new character in one or two lines."""
    rng = random.Random(13)
    special = ["<|begin_of_text|>", "<|eot_id|>", "<|eot|>", "<|end_of_text|>", "<think>", "</think>"]
    mixed = ["".join(rng.choices([*special, " ", "\n", "x", "the ", "  "], k=12)) for _ in range(300)]
    real = kinds.real_documents()
    return [*trying_documents(), *mixed], [document.replace("e", NEW, 2) for document in real[:200]]


@pytest.mark.parametrize("name", NAMES)
def test_gigatoken_takes_all_but_lines_with_the_newest_characters(prepared_of, name):
    choice = prepared_of(name).choice
    print(f"\n{name}: {choice.num_compared:,} texts, {choice.line_end!r}: {choice.describe(1e6, 1e6)}")
    assert (choice.backend, choice.literals) == ("gigatoken", ())
    assert choice.line_end == LINE_ENDS[0][0]  # before any line with text
    assert choice.needs_reference(pa.array(["<|begin_of_text|> a\r\né", NEW])).tolist() == [False, True]


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_those_of_tokenizers_for_every_document(prepared_of, name):
    prepared = prepared_of(name)
    encoder = Encoder(prepared.tokenizer_json, False, prepared.fast_json, prepared.choice)
    plain, cut_apart = documents()
    together = [*plain, *cut_apart]
    ids, ends = encoder.encode(pa.array(together))
    reference = Tokenizer.from_str(prepared.tokenizer_json.decode())
    reference.encode_special_tokens = True
    expected = [encoding.ids for encoding in reference.encode_batch_fast(together, add_special_tokens=False)]
    assert [ids[ends[i] : ends[i + 1]].tolist() for i in range(len(together))] == expected
    assert len(cut_apart) <= encoder.reference_documents < len(together) / 2


@pytest.mark.parametrize("name", META)
def test_ids_are_those_of_the_code_that_meta_published(packages, prepared_of, name):
    """tiktoken's, in other words: what Meta's models were trained on."""
    prepared = prepared_of(name)
    encoder = Encoder(prepared.tokenizer_json, False, prepared.fast_json, prepared.choice)
    together = [document for some in documents() for document in some]
    ids, ends = encoder.encode(pa.array(together))
    original = ids_by_meta(packages, name, together)
    differing = [text for i, text in enumerate(together) if ids[ends[i] : ends[i + 1]].tolist() != original[i]]
    print(f"\n{name}: {len(together):,} documents, {len(ids):,} ids; differing: {differing}")
    assert not differing
