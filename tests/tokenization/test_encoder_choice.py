"""The decision by itself: which documents it sends to the reference; and which documents of a unit are checked."""

from __future__ import annotations

import json
import pickle
import random

import numpy as np
import pyarrow as pa
import pytest

from tokenization.check_sample import MAX_CHECKED_BYTES, CheckSample
from tokenization.encoder_choice import EncoderChoice, as_ranges, documents_with
from tokenization.prepared_tokenizer import members_of

POINTS = {0x80, 0xE9, 0x3A2, 0x7FF, 0x800, 0xEBA, 0x3042, 0xFFFD, 0x10000, 0x1FAE8, 0x10FFFF}


def some_documents(alphabet: str, seed: int, count: int = 400) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(alphabet, k=rng.randrange(0, 40))) for _ in range(count)]


def test_ranges_are_sorted_and_joined():
    assert as_ranges([7, 1, 2, 3, 9, 8]) == ((1, 3), (7, 9))
    assert as_ranges([]) == ()


@pytest.mark.parametrize("make", [pa.array, lambda texts: pa.array(texts, pa.large_string())])
@pytest.mark.parametrize("ascii_letters", [0, 30, 3000])
def test_exactly_the_documents_with_a_code_point_are_found(make, ascii_letters):
    """Beside their neighbors by one; in text of much and of little ASCII, which are searched in two ways."""
    near = {point + step for point in POINTS for step in (-1, 0, 1)} - {0x110000}
    alphabet = "".join(map(chr, sorted(near))) + "é中я🙂" * 12 + "a" * ascii_letters
    documents = some_documents(alphabet, ascii_letters, 2000 if ascii_letters > 100 else 400)
    wanted = [any(ord(c) in POINTS for c in document) for document in documents]
    assert 5 < sum(wanted) < len(wanted)
    ranges = as_ranges(sorted(POINTS))
    texts = make(documents)
    found = np.zeros(len(documents), bool)
    found[documents_with(texts, ranges)] = True
    assert found.tolist() == wanted
    sliced = np.zeros(len(documents) - 10, bool)
    sliced[documents_with(texts[7:-3], ranges)] = True
    assert sliced.tolist() == wanted[7:-3]


def test_no_text_at_all():
    choice = EncoderChoice("gigatoken", code_points=as_ranges(sorted(POINTS)), literals=("x",))
    assert choice.needs_reference(pa.array([], pa.string())).tolist() == []
    assert choice.needs_reference(pa.array(["", "\U0010ffff"])).tolist() == [False, True]


def test_literals_are_taken_literally():
    literals = ("<x>", "a.b", "\n\n", "(", "\\d", "[é]", "^")
    choice = EncoderChoice("gigatoken", literals=literals)
    documents = [*literals, "axb", "x", "\n \n", "7", "é", "plain", "the <x", *some_documents("<x>a.b(\n\\d[é]^", 1)]
    wanted = [any(literal in document for literal in literals) for document in documents]
    assert choice.needs_reference(pa.array(documents)).tolist() == wanted


def test_the_decision_is_a_small_frozen_value():
    choice = EncoderChoice("gigatoken", code_points=as_ranges(sorted(POINTS)), literals=("<x>",), num_compared=3)
    choice.needs_reference(pa.array(["a", "é"] * 9))
    assert pickle.loads(pickle.dumps(choice)) == choice
    assert len(pickle.dumps(choice)) < 1000
    with pytest.raises(AttributeError):
        choice.backend = "tokenizers"
    assert EncoderChoice("tokenizers", "it does").needs_reference(pa.array(["a", "b"])).all()


def test_what_is_said_names_encoder_reason_triggers_and_rate():
    alone = EncoderChoice("tokenizers", "gigatoken cannot load this one").describe(0.0, 2.4e6)
    assert "tokenizers for every document, because gigatoken cannot load this one; about 2.4 MB/s" in alone
    points = ((0xEBA, 0xEBA), (0x1FAE8, 0x1FAE8))
    mixed = EncoderChoice("gigatoken", "", points, ("<x>",), num_compared=12345).describe(90e6, 2e6)
    for part in ("on 12,345 test texts", "U+0EBA", "too new to be", "'<x>'", "about 90 MB/s", "2.0 MB/s for such"):
        assert part in mixed
    assert "such documents" not in EncoderChoice("gigatoken").describe(90e6, 2e6)


def checked(batches: list[list[str]], choice: EncoderChoice | None = None) -> list[list[int]]:
    unit_bytes = sum(len(text) for texts in batches for text in texts)
    sample = CheckSample(unit_bytes, choice or EncoderChoice("gigatoken"), ["<|x|>", "  "])
    return [sample.rows(pa.array(texts)) for texts in batches]


def test_documents_of_the_whole_unit_are_checked_within_the_budget():
    batches = [[f"{i} {j} " + "some words " * 40 for j in range(500)] for i in range(400)]
    rows = checked(batches)
    num_bytes = sum(len(batches[i][row]) for i, chosen in enumerate(rows) for row in chosen)
    text_bytes = sum(len(text) for texts in batches for text in texts)
    assert num_bytes <= min(MAX_CHECKED_BYTES, text_bytes / 1000)
    first, second = (sum(map(len, half)) for half in (rows[:200], rows[200:]))
    assert first + second > 10 and second / 2 <= first <= 2 * second
    assert rows == checked(batches)


RARE = ("ກຂຄງ" * 83, "\U00010330" * 255)


@pytest.mark.parametrize(
    "row, text", [(2999, "a <|x|> b"), *((row, text) for text in RARE for row in (1, 700, 1234, 2223, 2998))]
)
def test_documents_at_risk_come_first(row, text):
    """With an added token, among those that lie evenly apart; in a script that is rare in this unit, wherever it is."""
    texts = ["some ordinary words, naïve ones " * 10 for _ in range(3000)]
    texts[1500] = "the longest, which is taken for that. "[:31] * 33  # of 1,023 bytes
    texts[row] = text
    assert row in checked([texts])[0][:2]


def test_a_long_document_is_checked():
    texts = ["some ordinary words " * 10 for _ in range(3000)]
    texts[2500] = "a long story " * 36
    assert checked([texts[:1000], texts[1000:]])[1][0] == 1500


def test_what_the_reference_encodes_needs_no_check_and_huge_documents_get_none():
    choice = EncoderChoice("gigatoken", literals=("words",))
    assert checked([["some words"] * 100 + ["other"]], choice)[0] == [100]
    assert checked([["a " * (1 << 20)]]) == [[]]  # of 2 MiB
    assert checked([["a " * 10_000]]) == [[0]]


@pytest.mark.parametrize("space", ["", " ", "\n  "])
def test_the_members_of_a_json_object_are_those_that_json_reads(space):
    value = {"a, b": [1, {"}": ":"}], "model": {"vocab": {'"model"': 1, "é\n": 2}}, "": None, "last": "}"}
    text = space + json.dumps(value, indent=1 if space else None, separators=(f"{space},{space}", f"{space}:{space}"))
    values, texts = members_of(text + space)
    assert values == value and list(texts) == list(value)
    assert {name: json.loads(part) for name, part in texts.items()} == value
    assert members_of(f"{space}{{{space}}}") == ({}, {})
