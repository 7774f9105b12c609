"""Texts on which two encoders of one tokenizer are compared, made from the tokenizer itself.

Three parts: code points, each in surroundings that show its class and its normal form; added tokens, each in every
neighborhood; and plain text, from the vocabulary and from the characters that pre-tokenizers tell apart.
"""

from __future__ import annotations

import functools
import itertools
import random
import unicodedata
from collections.abc import Iterator
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, pre_tokenizers

# Letters without a case or any peculiarity, thousands alike: each is tested in fewer surroundings.
UNIFORM_BLOCKS = (
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3),
    (0x12000, 0x1467F),
    (0x16800, 0x18D8F),
    (0x20000, 0x3FFFF),
)
# Of private code points one in so many stands for all.
PRIVATE_STEP = 61

PLACE = "@"
# Marks of two classes around it, on a letter that they do not combine with: any class of its own shows.
SINGULAR_SURROUNDINGS = "a@b @ 1@2345  @'s !@!a@!a @\n\n@A@@x\u0301@\u0316  @\n"
UNIFORM_SURROUNDINGS = "1@a "

# What stands before and after an added token: nothing, word characters of several kinds, spaces, punctuation.
NEIGHBORS = (
    "",
    "a",
    "Z",
    "é",
    "中",
    "1",
    "_",
    " ",
    "  ",
    "\t",
    "\n",
    "\n\n",
    "\r\n",
    ".",
    "-",
    "\xa0",
    "\u0301",
    "\u200b",
)
NEAREST_NEIGHBORS = ("", "a", "1", " ", "\n", ".")
MAX_OF_A_CLASS = 4

# One or two of everything that a pre-tokenizer's pattern may name, and of what breaks encoders.
ALPHABET = (
    *("a", "e", "t", "Z", "I", "ſ", "K", "é", "ß", "ǅ", "ʰ", "я", "中", "の", "カ", "한", "ก", "ا", "ह", "ि", "ກ"),
    *("e\u0301", "\u0301", "\u20dd", "1", "23", "4567", "٣", "²", "Ⅷ", "½", "'", "'s", "'LL", "'ſ", "’t", "'re", "'d"),
    *(" ", " ", "  ", "    ", "\t", "\n", "\n\n", "\r\n", "\r", "\x0b", "\x0c", "\x85", "\xa0", "\u2003", "\u3000"),
    *("\u2028", ".", ",", "...", "!", "-", "--", "_", "/", "//", "<", ">", "{", "(", "€", "+", "=", "^", "…", "。"),
    *(
        "🙂",
        "👩\u200d👧",
        "🇩🇪",
        "👍🏽",
        "\u200b",
        "\u200d",
        "\ufeff",
        "\0",
        "\x7f",
        "\xad",
        "\ufffd",
        "\ue000",
        "▁",
        "Ġ",
    ),
    *("the", "The", "HTTP", "camelCase", "http://", "1.5e-3", "<0x0A>", "<s>", "</s>", "[UNK]"),
)
NUM_SOUPS = 4000
BLANKS_AT_LINE_ENDS = ("\n", "\n\n", "\n ", "\n    ", "\n\t", " \n", "\r\n", "  \n\n  ", "\n \n")


@functools.cache
def code_points(newest: bool) -> tuple[list[int], list[int], np.ndarray]:
    """Those beyond ASCII, in three parts: singular ones, those that have thousands alike, and those that are not known
    to be a character.

    The last are not in the Unicode tables of this Python or, with `newest`, not in those of `tokenizers` either. The
    encoders' tables are not of one version: a letter to one of them is nothing to the other, with consequences for the
    text around it. They are not worth testing.

    Args:
        newest: test the characters that only the tables of `tokenizers` know; they cannot be asked what a character
            is composed of, so this is not for tokenizers with a canonical normal form.
    """
    points = np.r_[0x80:0x40000, 0xE0000:0x110000]  # no other plane has a character
    categories = np.array(list(map(unicodedata.category, map(chr, points.tolist()))))
    is_unknown = np.zeros(0x110000, bool)
    is_unknown[0x40000:0xE0000] = True
    is_unknown[points[categories == "Cn"]] = True
    if newest:
        is_unknown[known_to_tokenizers(points[categories == "Cn"])] = False
    is_private, is_alike = categories == "Co", np.zeros(0x110000, bool)
    for first, last in UNIFORM_BLOCKS:
        is_alike[first : last + 1] = True
    is_alike = np.where(is_private, points % PRIVATE_STEP == 0, is_alike[points])
    is_tested = ~is_unknown[points] & (categories != "Cs") & (is_alike | ~is_private)
    singular, uniform = points[is_tested & ~is_alike], points[is_tested & is_alike]
    return singular.tolist(), uniform.tolist(), np.flatnonzero(is_unknown)


def known_to_tokenizers(points: np.ndarray) -> np.ndarray:
    """Those that are characters in the Unicode tables by which `tokenizers` matches patterns."""
    split = pre_tokenizers.Split(Regex(r"\p{Cn}+"), "removed")
    pieces = split.pre_tokenize_str("".join(map(chr, points.tolist())))
    return np.array([ord(c) for piece, _ in pieces for c in piece], np.int64)


def surroundings(point: int, singular: bool) -> str:
    """The code point beside letters, digits, spaces, punctuation and marks, on a line or two of its own."""
    return (SINGULAR_SURROUNDINGS if singular else UNIFORM_SURROUNDINGS).replace(PLACE, chr(point))


@functools.cache
def marks_of_all_classes() -> tuple[str, ...]:
    """One combining mark of each canonical class; old ones, that every implementation knows."""
    old = unicodedata.ucd_3_2_0
    classes: dict[int, str] = {}
    for point in range(0x300, 0x3100):
        classes.setdefault(old.combining(chr(point)), chr(point))
    return tuple(mark for number, mark in sorted(classes.items()) if number)


@functools.cache
def canonical_cases() -> list[tuple[str, frozenset[int]]]:
    """Texts that canonical ordering and composition change, each with the code points that a difference is put down
    to."""
    cases = []
    for point in itertools.chain(*code_points(newest=False)[:2]):
        c = chr(point)
        if unicodedata.combining(c):
            text = "".join(f"x{mark}{c}x{c}{mark}" for mark in marks_of_all_classes())
            cases.append((text, frozenset({point})))
        decomposition = unicodedata.decomposition(c)
        if decomposition and not decomposition.startswith("<") and not 0xAC00 <= point <= 0xD7A3:
            parts = "".join(chr(int(part, 16)) for part in decomposition.split())
            text = f"x{parts}x{c}\u0316\u0301x{parts[0]}\u0316{parts[1:]}"
            cases.append((text, frozenset({point, *(ord(part) for part in parts if ord(part) >= 0x300)})))
    for lead, vowel, trail in itertools.product("ᄀᄁᄒ", "ᅡᅢᅵ", ("", "ᆨ", "ᆩ", "ᇂ")):
        cases.append((f"x{lead}{vowel}{trail}", frozenset(map(ord, lead + vowel + trail))))
    return cases


def shape(token: dict[str, Any]) -> tuple:
    """What added tokens of one class have in common: flags, and the kinds of their first and last characters."""
    content = token["content"]
    kinds = tuple(unicodedata.category(c)[0] + str(c in "\n\r") for c in (content[0], content[-1]))
    flags = tuple(bool(token.get(flag)) for flag in ("single_word", "lstrip", "rstrip", "normalized", "special"))
    return (*flags, *kinds, content.isspace(), content.isascii())


def added_token_texts(tokens: list[dict[str, Any]]) -> Iterator[str]:
    """Each added token in its neighborhoods: all of them for some tokens of each class, the nearest ones for the
    others."""
    classes: dict[tuple, list[str]] = {}
    for token in tokens:
        classes.setdefault(shape(token), []).append(token["content"])
    models = [content for contents in classes.values() for content in contents[:MAX_OF_A_CLASS]]
    models += [content for content in (token["content"] for token in tokens) if content.isspace()][:16]
    models = list(dict.fromkeys(models))
    for content in models:
        for before, after in itertools.product(NEIGHBORS, repeat=2):
            yield before + content + after
        for variant in (content.upper(), content.lower(), content.title(), content.swapcase()):
            yield f"a {variant} {variant}b"
        for form in ("NFC", "NFD", "NFKC", "NFKD"):
            yield f"a {unicodedata.normalize(form, content)} b"
        yield from (content[1:], content[:-1], content + content[1:], content[:-1] + content, f"a{content[:-1]} b")
    for one, other in itertools.product(models[:48], repeat=2):
        for between in ("", " ", "\n", "a"):
            yield one + between + other
            yield f"  {one}{between}{other}\n\n."
    for token in tokens:
        content = token["content"]
        for near in NEAREST_NEIGHBORS:
            yield near + content + near
        yield f"a {content}{content} {content}  b{content}"


def vocabulary_texts(reference: Tokenizer, per_text: int = 12) -> Iterator[str]:
    """The vocabulary's entries as text, a dozen together: every merge is called for, on every side of a border."""
    ids = np.random.default_rng(0).permutation(reference.get_vocab_size(with_added_tokens=False))
    pieces = reference.decode_batch(ids[:, None].tolist(), skip_special_tokens=False)
    pieces = [piece for piece in pieces if piece and "\ufffd" not in piece]
    for i, start in enumerate(range(0, len(pieces), per_text)):
        yield ("", " ", "\n", "")[i % 4].join(pieces[start : start + per_text])


def plain_texts() -> Iterator[str]:
    """Mixtures of `ALPHABET`, short and long runs: made by chance, the same every time."""
    rng = random.Random(0)
    yield from ALPHABET
    for one, other in itertools.product(ALPHABET, repeat=2):
        yield one + other
    for _ in range(NUM_SOUPS):
        yield "".join(rng.choices(ALPHABET, k=rng.randrange(3, 20)))
    for piece in ("a", " ", "\n", "1", ".", "中", "\u0301", "🙂", "ab ", "\r\n", "=-", " \n"):
        for count in (2, 3, 7, 16, 100, 1000):
            yield "x" + piece * count + "y"
            yield piece * count


def texts_of_lines(added_tokens: list[str]) -> Iterator[str]:
    """Every two entries of `ALPHABET`, and some of the added tokens, on either side of a line end, once without and
    once with one of `BLANKS_AT_LINE_ENDS`."""
    entries = (*ALPHABET, "=\u0338", *added_tokens[:16])  # the former is one character in NFC
    for i, one in enumerate(entries):
        for blanks in ("\n", BLANKS_AT_LINE_ENDS[i % len(BLANKS_AT_LINE_ENDS)]):
            yield "".join(f"{one}{blanks}{other} x" for other in entries)
