"""Small tokenizers of every kind that a checkpoint may bring, made in a second each; nothing is downloaded.

The byte-level ones share a vocabulary whose merges were learned without any pre-tokenizer: they cross every border
that a pre-tokenizer can draw, so that an encoder that draws one elsewhere gives other ids.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable
from typing import Any

from conftest import real_documents
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

VOCABULARY = 1200

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
OWN = r"\w+|[^\w\s]+|\s+"  # of no known model


def training_lines() -> list[str]:
    lines = [line for document in real_documents() for line in document.splitlines(keepends=True)][::4]
    return [
        *lines,
        *("日本語の文章。中文文本，没有空格。한국어 텍스트 " * 3, "Ελληνικά, русский! naïve café's Straße\n" * 3),
        *("e\u0301a\u0300 ö 123 456 12,345.67\r\n" * 5, "สวัสดี ກຸ అ हिन्दी العربية\n" * 5, "🙂👍🏽 👩‍👩‍👧  \t x\n" * 5),
    ]


@functools.cache
def byte_level_model() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=8,
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_lines(), trainer)
    return tokenizer.to_str()


def byte_level(pre_tokenizer: Any = None, normalizer: Any = None, **model: Any) -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE; `model` overrides entries of its model."""
    tokenizer = Tokenizer.from_str(byte_level_model())
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    made = json.loads(tokenizer.to_str())
    made["model"] |= model
    return made


def split(*patterns: str) -> pre_tokenizers.PreTokenizer:
    """The patterns one after the other, then bytes: how Llama 3, Qwen, GPT-OSS and DeepSeek do it."""
    return pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def then_bytes(*steps: Any, use_regex: bool = True) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)])


@functools.cache
def sentencepiece_model(byte_fallback: bool = True) -> str:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=byte_fallback))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256) if byte_fallback)],
        max_token_length=8,
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_lines(), trainer)
    return tokenizer.to_str()


def sentencepiece(normalizer: Any = None, pre_tokenizer: Any = None, byte_fallback: bool = True) -> dict[str, Any]:
    """tokenizer.json of a BPE over characters with bytes for the rest, as Llama 2's and Gemma's."""
    tokenizer = Tokenizer.from_str(sentencepiece_model(byte_fallback))
    if normalizer is not None or pre_tokenizer is not None:
        tokenizer.normalizer = normalizer or normalizers.Sequence([])
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    made = json.loads(tokenizer.to_str())
    made["added_tokens"] = made["added_tokens"][:3]
    return made


def trained(model: Any, trainer: Any, pre_tokenizer: Any, normalizer: Any = None) -> dict[str, Any]:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(training_lines(), trainer)
    return json.loads(tokenizer.to_str())


def unigram(*steps: Any, prepend_scheme: str = "always") -> dict[str, Any]:
    trainer = trainers.UnigramTrainer(
        vocab_size=500, unk_token="<unk>", special_tokens=["<unk>", "</s>"], show_progress=False
    )
    metaspace = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    return trained(models.Unigram(), trainer, metaspace, normalizers.Sequence(list(steps)) if steps else None)


def word_piece() -> dict[str, Any]:
    trainer = trainers.WordPieceTrainer(vocab_size=800, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False)
    model = models.WordPiece(unk_token="[UNK]")
    return trained(model, trainer, pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer())


def word_level() -> dict[str, Any]:
    trainer = trainers.WordLevelTrainer(vocab_size=800, special_tokens=["<unk>", "</s>"], show_progress=False)
    return trained(models.WordLevel(unk_token="<unk>"), trainer, pre_tokenizers.WhitespaceSplit())


def with_tokens(made: dict[str, Any], *contents: str, first_id: int | None = None, **flags: bool) -> dict[str, Any]:
    """With more added tokens, numbered from `first_id`, or from the end of the vocabulary."""
    next_id = max([*made["model"]["vocab"].values(), *(token["id"] for token in made["added_tokens"])]) + 1
    off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokens = [
        {"id": (next_id if first_id is None else first_id) + i, "content": content, **off, **flags}
        for i, content in enumerate(contents)
    ]
    return {**made, "added_tokens": [*made["added_tokens"], *tokens]}


def with_all_flags(made: dict[str, Any], **fixed: bool) -> dict[str, Any]:
    """With an added token for each combination of the flags that are not fixed: <0>, <1>, ..., and a word for each."""
    free = [name for name in ("single_word", "lstrip", "rstrip", "normalized", "special") if name not in fixed]
    words = ("if", "an", "on", "to", "ass", "in", "for", "with", "of", "or", "it", "as", "by", "at", "not", "def")
    for i, chosen in enumerate(itertools.product((False, True), repeat=len(free))):
        made = with_tokens(made, f"<{i}>", words[i], **fixed, **dict(zip(free, chosen)))
    return made


KINDS: dict[str, Callable[[], dict[str, Any]]] = {
    "GPT-2": byte_level,
    "GPT-2, prefix space": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "no pattern": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
    "Llama 3": lambda: byte_level(split(LLAMA3), ignore_merges=True),
    "Qwen 2 without NFC": lambda: byte_level(split(QWEN2)),
    "Qwen 2": lambda: byte_level(split(QWEN2), normalizers.NFC()),
    "Qwen 3.5": lambda: byte_level(split(QWEN35), normalizers.NFC()),
    "GPT-OSS": lambda: byte_level(split(O200K), ignore_merges=True),
    "Tekken": lambda: byte_level(split(TEKKEN), ignore_merges=True),
    "DeepSeek 3": lambda: byte_level(split(r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK3)),
    "StarCoder": lambda: byte_level(then_bytes(pre_tokenizers.Digits(individual_digits=True))),
    "digits in groups": lambda: byte_level(then_bytes(pre_tokenizers.Digits(individual_digits=False))),
    "Falcon": lambda: byte_level(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Punctuation("contiguous"),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
                pre_tokenizers.Digits(individual_digits=False),
                pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), behavior="isolated"),
            ]
        )
    ),
    "punctuation": lambda: byte_level(then_bytes(pre_tokenizers.Punctuation())),
    "pattern of its own": lambda: byte_level(split(OWN)),
    "split at spaces": lambda: byte_level(then_bytes(pre_tokenizers.Split(" ", "merged_with_next"), use_regex=False)),
    "NFKC": lambda: byte_level(normalizer=normalizers.NFKC()),
    "NFD": lambda: byte_level(normalizer=normalizers.NFD()),
    "NFKD": lambda: byte_level(normalizer=normalizers.NFKD()),
    "lowercase": lambda: byte_level(normalizer=normalizers.Lowercase()),
    "NFC, lowercase": lambda: byte_level(normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])),
    "strip": lambda: byte_level(normalizer=normalizers.Strip()),
    "strip accents": lambda: byte_level(
        normalizer=normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    ),
    "replace": lambda: byte_level(normalizer=normalizers.Replace("e", "a")),
    "replace by pattern": lambda: byte_level(normalizer=normalizers.Replace(Regex(r"\s+"), " ")),
    "NMT": lambda: byte_level(normalizer=normalizers.Nmt()),
    "unk, no bytes": lambda: sentencepiece(byte_fallback=False),
    "dropout 0": lambda: byte_level(dropout=0.0),
    "dropout": lambda: byte_level(dropout=0.5),
    "prefix and suffix": lambda: byte_level(continuing_subword_prefix="", end_of_word_suffix=""),
    "Llama 2": sentencepiece,
    "Mistral": lambda: sentencepiece(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "Metaspace, split": lambda: sentencepiece(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="always")),
    "Gemma": lambda: sentencepiece(normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous")),
    "Llama 2, NFKC": lambda: sentencepiece(
        normalizers.Sequence([normalizers.NFKC(), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    ),
    "Unigram": unigram,
    "Unigram, NFKC": lambda: unigram(normalizers.NFKC(), normalizers.Lowercase()),
    "Unigram, T5": lambda: unigram(
        normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " "), prepend_scheme="first"
    ),
    "WordPiece": word_piece,
    "WordLevel": word_level,
    "id gap": lambda: with_tokens(byte_level(), "<far>", "<farther>", first_id=VOCABULARY + 70),
    "id gap, special": lambda: with_tokens(byte_level(), "<far>", "<farther>", first_id=VOCABULARY + 7, special=True),
    "a word as token": lambda: with_tokens(byte_level(split(LLAMA3)), "the", "is", single_word=True),
    "whitespace tokens": lambda: with_tokens(byte_level(), *(" " * n for n in range(2, 9)), "\n\n", "\t\t"),
    "whitespace tokens, lstrip": lambda: with_tokens(
        with_tokens(byte_level(), "  ", "\n\n", "   "), "<mask>", lstrip=True, rstrip=True
    ),
    "tokens that overlap": lambda: with_tokens(byte_level(), "<a>", "<a><a>", "a>", "<aa>", "><"),
    "many tokens": lambda: with_tokens(byte_level(split(LLAMA3)), *(f"<|unused_{i}|>" for i in range(300))),
    "token in lower case": lambda: with_tokens(
        byte_level(normalizer=normalizers.Lowercase()), "The", "naïve", normalized=True
    ),
    "token with an accent": lambda: with_tokens(
        byte_level(normalizer=normalizers.NFC()), "café", "e\u0301", normalized=True
    ),
    "Llama 2 with tokens": lambda: with_tokens(sentencepiece(), "<tool>", "  ", "▁▁▁", "\n\n", normalized=True),
    "tokens of all flags": lambda: with_all_flags(byte_level(split(LLAMA3)), single_word=False),
    "tokens of all flags, words": lambda: with_all_flags(byte_level(split(LLAMA3)), single_word=True),
    "tokens of all flags, Llama 2": lambda: with_all_flags(sentencepiece(), single_word=False, normalized=False),
    "tokens of all flags, Qwen": lambda: with_all_flags(
        byte_level(split(QWEN2), normalizers.NFC()), single_word=False, normalized=False
    ),
}
