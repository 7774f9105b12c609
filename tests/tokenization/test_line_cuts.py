"""Documents cut at ends of lines, so that tokenizers gets only the lines that gigatoken may not take."""

from __future__ import annotations

import functools
import itertools
import json
import random

import numpy as np
import pyarrow as pa
import pytest
import tokenizer_kinds as kinds
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tokenization.check_sample import CheckSample
from tokenization.encoder import MAX_REFERENCE_BYTES, DocumentTooLarge, Encoder
from tokenization.encoder_choice import EncoderChoice
from tokenization.line_cuts import LINE_ENDS, cut_at, parts_by_encoder
from tokenization.prepared_tokenizer import prepare_tokenizer

BEFORE_TEXT, BETWEEN_WORDS = (line_end for line_end, _ in LINE_ENDS)
NEW = "\ua7ce"  # a letter since Unicode 17, which is newer than the tables of tokenizers
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def cut(line_end: str, documents: list[str], rows: list[bool] | None = None, arrow_type=None) -> list[list[str]]:
    texts = pa.array(["<before>", *documents, "<after>"], arrow_type or pa.string())[1:-1]
    parts, first = cut_at(line_end, texts, np.array(rows if rows is not None else [True] * len(documents)))
    parts.validate(full=True)
    return [parts[first[i] : first[i + 1]].to_pylist() for i in range(len(documents))]


@pytest.mark.parametrize("arrow_type", [pa.string(), pa.large_string()])
@pytest.mark.parametrize(
    "line_end, parts",
    [
        # A line that is empty, or begins with "/" or with something beyond ASCII, stays with the one before.
        (BEFORE_TEXT, ["a\n", "b\r\n", "  c\n", "\t{\n\n\n\né\n/x\n \n", " y\n\u2003z\n\U0001f642\n"]),
        (BETWEEN_WORDS, ["a\n", "b\r\n  c\n\t{\n\n\n\né\n/x\n", "9 \ny\n", "z\n(\n \n"]),
    ],
)
def test_a_text_is_cut_where_the_next_line_has_text(line_end, parts, arrow_type):
    text = "".join(parts)
    assert cut(line_end, [text], arrow_type=arrow_type) == [parts]
    # No text at all, one without a line end, and one that is not asked for.
    documents, rows = ["", text, "x", text, "\n", ""], [True, True, True, False, True, False]
    assert cut(line_end, documents, rows, arrow_type) == [[""], parts, ["x"], [text], ["\n"], [""]]


def test_what_tokenizers_gets_is_the_lines_that_need_it():
    choice = EncoderChoice("gigatoken", code_points=((0xA7CE, 0xA7CE),), line_end=BEFORE_TEXT)
    documents = ["plain\ntext\n", f"{NEW}", f"a\nb\nc {NEW}\n{NEW}\n  d\n  e\n{NEW}\n", "", f"a {NEW}\nb"]
    texts = pa.array(documents)
    by_reference = choice.needs_reference(texts)
    parts, is_slow, first = parts_by_encoder(choice, texts, by_reference)
    found = [[*zip(parts[a:b].to_pylist(), is_slow[a:b].tolist())] for a, b in itertools.pairwise(first)]
    assert found == [
        [("plain\ntext\n", False)],
        [(NEW, True)],
        # A line that begins with the character is not cut off the one before: not every encoder may end there.
        [("a\nb\n", False), (f"c {NEW}\n{NEW}\n", True), ("  d\n", False), (f"  e\n{NEW}\n", True)],
        [("", False)],
        [(f"a {NEW}\n", True), ("b", False)],
    ]


def with_own_vocabulary(pattern: str | None, pre_tokenizer=None) -> dict:
    """A byte-level BPE learned from whole documents, in which line ends stand beside everything."""
    tokenizer = Tokenizer(models.BPE())
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = [pre_tokenizers.Split(Regex(pattern), behavior="isolated")] if pattern else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, bytes_alone])
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(kinds.real_documents(), trainer)
    tokenizer.pre_tokenizer = pre_tokenizer or tokenizer.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    return json.loads(tokenizer.to_str())


def with_merges(made: dict, *pairs: tuple[str, str]) -> dict:
    """With more merges, and the entries of the vocabulary that they make."""
    for pair in pairs:
        made["model"]["vocab"].setdefault("".join(pair), max(made["model"]["vocab"].values()) + 1)
        made["model"]["merges"].append([*pair])
    return made


OWN = {
    "Llama 3": lambda: with_own_vocabulary(kinds.LLAMA3),
    "o200k": lambda: with_own_vocabulary(kinds.O200K),
    "GPT-2": lambda: with_own_vocabulary(GPT2, pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "Llama 3, lines of blanks": lambda: with_merges(
        with_own_vocabulary(kinds.LLAMA3), ("ĠĠ", "Ċ"), ("Ċ", "ĠĠĊ"), ("ĉ", "Ċ"), ("ĊĊ", "ĉĊ")
    ),
    # Its vocabulary has "\nthe" and the like: made for another pre-tokenizer.
    "merges across lines": lambda: with_own_vocabulary(None, kinds.split(kinds.LLAMA3)),
    "a space before every text": lambda: with_own_vocabulary(GPT2, pre_tokenizers.ByteLevel(add_prefix_space=True)),
}
FOUND = {
    "Llama 3": BEFORE_TEXT,
    "o200k": BEFORE_TEXT,
    "Llama 3, lines of blanks": BEFORE_TEXT,  # "\n  \n" has a line end inside, but nobody cuts there
    "GPT-2": BETWEEN_WORDS,  # "\n\n    " may be one token there
    "merges across lines": "",
    "a space before every text": "",
}


@functools.cache
def prepared(kind: str):
    made = (OWN.get(kind) or kinds.KINDS[kind])()
    return prepare_tokenizer(json.dumps(made).encode(), False, "--tokenizer_dir=TOK")


def encoder_of(kind: str, choice: EncoderChoice | None = None) -> Encoder:
    ready = prepared(kind)
    return Encoder(ready.tokenizer_json, False, ready.fast_json, choice or ready.choice)


@pytest.mark.parametrize("kind", FOUND)
def test_where_a_text_may_be_cut_is_found_out(kind):
    choice = prepared(kind).choice
    assert choice.backend == "gigatoken" and choice.line_end == FOUND[kind]
    assert ("a line with" in choice.describe(1e6, 1e6)) == bool(choice.line_end)


def test_a_rule_that_does_not_hold_is_not_taken():
    """What the comparison is for: the wide rule gives GPT-2 other ids, and the narrow one does not."""
    text = f"def f():\n\n    x\n{NEW}\n\ny {NEW}"
    (expected,) = encoder_of("GPT-2").reference.encode_batch_fast([text], add_special_tokens=False)
    choice = prepared("GPT-2").choice
    for line_end, is_right in ((BEFORE_TEXT, False), (BETWEEN_WORDS, True), ("", True)):
        fields = {"code_points": choice.code_points, "line_end": line_end}
        ids, _ = encoder_of("GPT-2", EncoderChoice("gigatoken", **fields)).encode(pa.array([text]))
        assert (ids.tolist() == expected.ids) == is_right


@pytest.mark.parametrize(
    "kind", [*OWN, "Qwen 2", "Qwen 3.5", "GPT-OSS", "Tekken", "Gemma", "whitespace tokens", "many tokens", "Llama 2"]
)
def test_ids_are_those_of_tokenizers_wherever_the_character_stands(kind):
    encoder = encoder_of(kind)
    rng = random.Random(11)
    pieces = [
        "a",
        "The ",
        "the",
        "x=1;",
        "  ",
        " ",
        "\t",
        "\r\n",
        "\n\n",
        "/",
        "//",
        "'s",
        "'",
        "é",
        "中",
        "1234",
        "...",
    ]
    pieces += ["\n"] * 12 + [NEW, f" {NEW}", f"{NEW}\u0301", "<x>", "</s>", "_", "\u2028", "\x0b", "\x85", "{", "\xa0"]
    words = [word for document in kinds.real_documents()[:20] for word in document.split(" ")]
    documents = [
        "".join(rng.choices([*pieces, *rng.choices(words, k=20)], k=rng.randrange(1, 80))) for _ in range(1500)
    ]
    documents += [document.replace("e", NEW, 2) for document in kinds.real_documents()[:60]]
    by_reference = encoder.choice.needs_reference(pa.array(documents))
    assert 500 < by_reference.sum() < len(documents)
    ids, ends = encoder.encode(pa.array(documents))
    expected, expected_ends = encoder.encode_reference(documents)
    assert np.array_equal(ends, expected_ends) and np.array_equal(ids, expected)
    assert encoder.reference_documents == by_reference.sum()


def many_tokens_and_one(**flags: bool) -> dict:
    """The last of them as "<mask>" of RoBERTa or ModernBERT, which takes the white space before it, line ends too."""
    made = kinds.KINDS["Llama 3"]()
    return kinds.with_tokens(kinds.with_tokens(made, *(f"<|unused_{i}|>" for i in range(40))), "<mask>", **flags)


def gemma(*replaced: tuple[str, str], without: str = "", byte_fallback_without: str = "") -> dict:
    """Without entries that contain some characters, and without one token for a byte."""
    normalizer = normalizers.Sequence([normalizers.Replace(*pair) for pair in (*replaced, (" ", "▁"))])
    made = kinds.sentencepiece(normalizer, pre_tokenizers.Split(" ", "merged_with_previous"))
    vocabulary = {
        entry: token_id
        for entry, token_id in made["model"]["vocab"].items()
        if entry != byte_fallback_without and not set(entry) & set(without)
    }
    made["model"]["merges"] = [pair for pair in made["model"]["merges"] if not set("".join(pair)) & set(without)]
    return made | {"model": made["model"] | {"vocab": vocabulary}}


def with_word(made: dict, word: str) -> dict:
    """With an entry that no merge makes: one token where the word stands alone, if merges are ignored."""
    made["model"]["vocab"][word] = max(made["model"]["vocab"].values()) + 1
    return made


ACROSS_LINES = {
    "a token takes what is before it": (lambda: many_tokens_and_one(lstrip=True), ""),
    "a token takes what is after it": (lambda: many_tokens_and_one(rstrip=True), ""),
    "a special token takes what is before it": (lambda: many_tokens_and_one(lstrip=True, special=True), ""),
    "a special token takes what is after it": (lambda: many_tokens_and_one(rstrip=True, special=True), ""),
    # "\n" and "~" are bytes there, and the character before them has no token: it comes after them, with the next one.
    "unknown characters together": (lambda: gemma(without="\n~", byte_fallback_without="<0xEA>"), ""),
    "ASCII becomes a letter": (lambda: with_merges(with_word(gemma(("~", "é")), "é"), ("\n", "é")), ""),
    "three tabs alone are a token": (
        lambda: with_word(kinds.byte_level(ignore_merges=True), "ĉĉĉ"),
        BETWEEN_WORDS,
    ),
}


@pytest.mark.parametrize("kind", ACROSS_LINES)
def test_what_reaches_across_a_line_end_is_found_without_meeting_it(kind):
    """Each with a document that the texts of the comparison have nothing of."""
    make, line_end = ACROSS_LINES[kind]
    parse = kind.startswith("a special token")
    ready = prepare_tokenizer(json.dumps(make()).encode(), parse, "--tokenizer_dir=TOK")
    assert ready.choice.backend == "gigatoken" and ready.choice.line_end == line_end
    documents = [f"{NEW}\n~b", f"a\n~ {NEW}", f"{NEW} a\n  <mask>\n  b\n", f"{NEW}<mask>\n  b", f"{NEW}\n\t\t\t b\n"]
    encoder = Encoder(ready.tokenizer_json, parse, ready.fast_json, ready.choice)
    ids, ends = encoder.encode(pa.array(documents))
    expected, expected_ends = encoder.encode_reference(documents)
    assert np.array_equal(ends, expected_ends) and np.array_equal(ids, expected)
    # A cut would change one of them.
    parts, _ = cut_at(BEFORE_TEXT, pa.array(documents), np.ones(len(documents), bool))
    assert not np.array_equal(encoder.encode_reference(parts.to_pylist())[0], expected)


@pytest.mark.parametrize("arrow_type", [pa.string(), pa.large_string()])
def test_a_slice_of_documents_is_encoded_in_parts(arrow_type):
    documents = ["", f"é\n{NEW}\nb\n", "", "", f"c\nd {NEW}\ne", "f\n", ""]
    encoder = encoder_of("Llama 3")
    texts = pa.array([f"{NEW}\nx", *documents, f"\ny{NEW}"], arrow_type)[1:-1]
    ids, ends = encoder.encode(texts)
    expected, expected_ends = encoder.encode_reference(documents)
    assert np.array_equal(ends, expected_ends) and np.array_equal(ids, expected)
    assert encoder.reference_documents == 2
    no_ids, no_ends = encoder.encode(texts[:0])
    assert len(no_ids) == 0 and no_ends.tolist() == [0]


def test_a_document_too_large_for_the_reference_goes_through_line_by_line():
    lines = "some words on a line\n" * (MAX_REFERENCE_BYTES // 21 + 1)
    encoder = encoder_of("Llama 3")
    _, ends = encoder.encode(pa.array([f"{lines}{NEW}\n", lines]))
    assert ends[1] - ends[0] == len(encoder.reference.encode(f"{NEW}\n").ids) + ends[2] - ends[1]
    with pytest.raises(DocumentTooLarge):
        encoder.encode(pa.array([lines.replace("\n", " ") + NEW]))


def test_documents_in_parts_are_checked_like_others():
    """The reference takes them whole there, so that a cut which was not safe would show."""
    texts = pa.array(["some words"] * 100 + [f"a line\nwith {NEW}\nin it"])
    for line_end, is_checked in ((BEFORE_TEXT, True), ("", False)):
        choice = EncoderChoice("gigatoken", code_points=((0xA7CE, 0xA7CE),), line_end=line_end)
        assert (100 in CheckSample(2000, choice, []).rows(texts)) == is_checked
