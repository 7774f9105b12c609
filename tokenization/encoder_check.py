"""Before the work: gigatoken and Hugging Face `tokenizers` meet on texts made from the tokenizer itself.

What differs decides what gigatoken may do. Nothing: it takes all. Certain code points or added tokens: documents
with these, or no more than their lines, go to `tokenizers`. Anything else: all of them do. See
tokenization/encoder_choice.py for the decision, and tokenization/encoder_battery.py for the texts.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterable, Iterator
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers.models import BPE

from tokenization import encoder_battery as battery
from tokenization.encoder import Encoder
from tokenization.encoder_choice import EncoderChoice, as_ranges
from tokenization.line_cuts import LINE_ENDS, cut_at

# The reference takes some hundred bytes for each token.
CHARACTERS_AT_A_TIME = 100_000
# Above these, gigatoken works by other rules, and what it was not asked would differ too.
MAX_CODE_POINTS = 5000
MAX_LITERALS = 64
CANONICAL_FORMS = {"NFC", "NFD", "NFKC", "NFKD"}
PARAGRAPHS_TO_CUT, WORDS_STEP = 200, 5
BYTE_TOKENS = {f"<0x{byte:02X}>" for byte in range(256)}
BLANKS_REPLACED = ({"String": " "}, {"Regex": " {2,}"})
SAMPLE_BYTES, REFERENCE_SAMPLE_BYTES = 1 << 20, 100 << 10


class _NotAttributable(Exception):
    """A difference on a text without anything peculiar; names the text."""


def decide(encoder: Encoder, tokenizer: dict[str, Any]) -> EncoderChoice:
    """Compare the two, and say which may take what.

    Args:
        encoder: as it is without a decision.
        tokenizer: the parsed `fast_tokenizer_json`, as far as added_tokens and normalizer.
    """
    if encoder.backend == "tokenizers":
        return EncoderChoice("tokenizers", f"gigatoken cannot load this one ({encoder.load_error})")
    comparison = _Comparison(encoder)
    try:
        code_points = _differing_code_points(comparison, _has_canonical_form(tokenizer.get("normalizer")))
        literals = _differing_literals(comparison, tokenizer, EncoderChoice("gigatoken", code_points=code_points))
        choice = EncoderChoice("gigatoken", "", code_points, literals)
        _expect_equal_but_for(choice, comparison, tokenizer)
    except _NotAttributable as error:
        reason = f"the two differ on ordinary text, such as {error}"
        return EncoderChoice("tokenizers", reason, num_compared=comparison.num_texts)
    line_end = "" if literals else _safe_line_end(comparison, tokenizer)
    return EncoderChoice("gigatoken", "", code_points, literals, line_end, comparison.num_texts)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, num_characters = [], 0
    for text in texts:
        batch.append(text)
        num_characters += len(text)
        if num_characters >= CHARACTERS_AT_A_TIME:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


class _Comparison:
    def __init__(self, encoder: Encoder):
        self.encoder = encoder
        self.num_texts = 0

    def differing(self, texts: Iterable[str]) -> Iterator[str]:
        """Those whose ids differ."""
        for some in _batches(texts):
            self.num_texts += len(some)
            ids, ends = self.encoder.encode(pa.array(some))
            expected, expected_ends = self.encoder.encode_reference(some)
            if np.array_equal(ends, expected_ends) and np.array_equal(ids, expected):
                continue
            for i, text in enumerate(some):
                got = ids[ends[i] : ends[i + 1]]
                if not np.array_equal(got, expected[expected_ends[i] : expected_ends[i + 1]]):
                    yield text

    def can_cut_at(self, line_end: str, texts: list[str], between_words: bool) -> bool:
        """Whether the ids of the parts are those of the whole texts, for each of the two encoders.

        Args:
            between_words: whether the pre-tokenizer's words must be those of the whole texts, too: some of the texts
                are asked for theirs, which takes longer than their ids.
        """
        self.num_texts += len(texts)
        whole = pa.array(texts)
        parts, first_part = cut_at(line_end, whole, np.ones(len(texts), bool))
        for encode in (self.encoder.encode, lambda some: self.encoder.encode_reference(some.to_pylist())):
            (ids, ends), (expected, expected_ends) = encode(parts), encode(whole)
            if not (np.array_equal(ends[first_part], expected_ends) and np.array_equal(ids, expected)):
                return False
        return not between_words or all(
            self._words([texts[i]]) == self._words(parts[first_part[i] : first_part[i + 1]].to_pylist())
            for i in range(0, len(texts), WORDS_STEP)
        )

    def _words(self, texts: list[str]) -> list[str]:
        normalizer, pre_tokenizer = self.encoder.reference.normalizer, self.encoder.reference.pre_tokenizer
        if normalizer:
            texts = [*map(normalizer.normalize_str, texts)]
        return [word for text in texts for word, _ in pre_tokenizer.pre_tokenize_str(text)] if pre_tokenizer else texts


def _has_canonical_form(normalizer: dict[str, Any] | None) -> bool:
    if not normalizer:
        return False
    steps = normalizer.get("normalizers") or []
    return normalizer.get("type") in CANONICAL_FORMS or any(_has_canonical_form(step) for step in steps)


def _differing_code_points(comparison: _Comparison, canonical: bool) -> tuple[tuple[int, int], ...]:
    """Code points beyond ASCII on which the two differ, or may, as sorted ranges."""
    singular_points, uniform_points, unknown_points = battery.code_points(newest=not canonical)
    found: set[int] = set()
    for points, singular, at_a_time in ((singular_points, True, 16), (uniform_points, False, 64)):
        together = {}
        for start in range(0, len(points), at_a_time):
            some = points[start : start + at_a_time]
            together["".join(battery.surroundings(point, singular) for point in some)] = some
        for text in comparison.differing(together):
            alone = {battery.surroundings(point, singular): point for point in together[text]}
            blamed = {alone[one] for one in comparison.differing(alone)}
            if not blamed or len(found) > MAX_CODE_POINTS:
                shortest = _shortest_differing(comparison, EncoderChoice("gigatoken"), text)
                raise _NotAttributable(repr(shortest[:60]))
            found |= blamed
    if canonical:
        cases = dict(battery.canonical_cases())
        for text in comparison.differing(cases):
            if not cases[text] & found:
                found |= cases[text]
    return as_ranges(np.append(unknown_points, np.fromiter(found, np.int64)))


def _touched(choice: EncoderChoice, texts: list[str]) -> np.ndarray:
    return choice.needs_reference(pa.array(texts, pa.string()))


def _untouched(choice: EncoderChoice, texts: Iterable[str]) -> Iterator[str]:
    """The texts that gigatoken would be given."""
    for some in _batches(texts):
        yield from itertools.compress(some, (~_touched(choice, some)).tolist())


def _differing_literals(comparison: _Comparison, tokenizer: dict[str, Any], choice: EncoderChoice) -> tuple[str, ...]:
    """Texts of added tokens beside or inside which the two differ."""
    tokens = tokenizer.get("added_tokens") or []
    fast = {token["content"] for token in tokens}
    # Special tokens whose text is ordinary text here still hide others from tokenizers: "<s>" hides ">a" in "<s>a".
    hidden = comparison.encoder.reference.get_added_tokens_decoder().values()
    tokens = tokens + [{"content": token.content, "special": True} for token in hidden if token.content not in fast]
    contents = sorted({token["content"] for token in tokens}, key=lambda text: (text.isspace(), -len(text)))
    different = list(comparison.differing(_untouched(choice, dict.fromkeys(battery.added_token_texts(tokens)))))
    inside = [[content for content in contents if content in text] for text in different]
    found: list[str] = []
    # Those with one token alone first: where two stand together, the one that is known to differ is blamed.
    for text, candidates in sorted(zip(different, inside), key=lambda pair: len(pair[1])):
        if any(literal in text for literal in found):
            continue
        if not candidates or len(found) >= MAX_LITERALS:
            raise _NotAttributable(repr(text))
        found.append(candidates[0])
    normalized = {token["content"] for token in tokens if token.get("normalized")}
    if tokenizer.get("normalizer") and (common := normalized.intersection(found)):
        # The token is looked for in normalized text, which other texts may become.
        raise _NotAttributable(f"what becomes {min(common)!r} when it is normalized")
    return tuple(literal for literal in found if not any(o != literal and o in literal for o in found))


def _expect_equal_but_for(choice: EncoderChoice, comparison: _Comparison, tokenizer: dict[str, Any]) -> None:
    """All other texts, and again those with tokens in them, as far as gigatoken would be given them."""
    tokens = [token["content"] for token in tokenizer.get("added_tokens") or []]
    texts = itertools.chain(
        battery.plain_texts(),
        (text + token for text, token in zip(_paragraphs(), itertools.cycle([*tokens, ""]))),
        battery.vocabulary_texts(comparison.encoder.reference),
    )
    for text in comparison.differing(_untouched(choice, texts)):
        raise _NotAttributable(repr(_shortest_differing(comparison, choice, text)[:60]))


def _safe_line_end(comparison: _Comparison, tokenizer: dict[str, Any]) -> str:
    """At which a text can be cut without changing an id of either encoder; empty: at none.

    Merges stay on their side of a line end if no entry of the vocabulary reaches across it. What the comparison might
    not meet is refused: normalizers and added tokens that reach across, and unknown characters, which become one token
    together.
    """
    reference, model = comparison.encoder.reference, comparison.encoder.reference.model
    added, normalizer = tokenizer.get("added_tokens") or [], tokenizer.get("normalizer")
    vocabulary = reference.get_vocab()
    if (
        not isinstance(model, BPE)
        or any(token.get(flag) for token in added for flag in ("lstrip", "rstrip", "single_word"))
        or not _keeps_lines_apart(normalizer)
        or (model.byte_fallback and not vocabulary.keys() >= BYTE_TOKENS)
    ):
        return ""
    # A word that is in the vocabulary is then one token, even if no merge makes it; and "\ne\u0301" in normal form may
    # be an entry that the pattern does not find.
    between_words = model.ignore_merges or _has_canonical_form(normalizer)
    entries = "\0".join([*vocabulary, ""])
    texts = [*battery.texts_of_lines([token["content"] for token in added]), *_paragraphs()[:PARAGRAPHS_TO_CUT]]
    for line_end, across in LINE_ENDS:
        if re.search(across, entries):
            continue
        if all(comparison.can_cut_at(line_end, some, between_words) for some in _batches(texts)):
            return line_end
    return ""


def _keeps_lines_apart(normalizer: dict[str, Any] | None) -> bool:
    """Whether it is known to normalize each line by itself, and to leave a line end, and ASCII other than blanks,
    as it is where no mark follows."""
    if not normalizer or normalizer.get("type") in CANONICAL_FORMS:
        return True
    if normalizer.get("type") == "Replace":
        return normalizer["pattern"] in BLANKS_REPLACED and normalizer["content"] in (" ", "▁")
    return normalizer.get("type") == "Sequence" and all(map(_keeps_lines_apart, normalizer["normalizers"]))


def _shortest_differing(comparison: _Comparison, choice: EncoderChoice, text: str) -> str:
    """A part of the text that still differs: what to show of it."""
    size = len(text) // 2
    while size:
        parts = (text[:start] + text[start + size :] for start in range(0, len(text), size))
        shorter = next(comparison.differing(_untouched(choice, [part for part in parts if part])), None)
        text, size = (shorter, min(size, len(shorter) // 2)) if shorter else (text, size // 2)
    return text


def _paragraphs() -> list[str]:
    """English text that every Python has: its language reference."""
    return [part for name in sorted(topics) for part in topics[name].split("\n\n") if part]


def measured_rates(encoder: Encoder, choice: EncoderChoice) -> tuple[float, float]:
    """Bytes of English text per second on one core: gigatoken's, 0 where it does nothing, and that of `tokenizers`."""
    sample = "\n\n".join(_paragraphs())[:SAMPLE_BYTES]
    documents = [sample[start : start + 4000] for start in range(0, len(sample), 4000)]
    fast = 0.0
    if choice.backend == "gigatoken":
        texts = pa.array(documents)
        encoder.encode(texts)  # words are remembered: in a long run most of them are known
        begin = time.perf_counter()
        encoder.encode(texts)
        fast = len(sample) / (time.perf_counter() - begin)
    few = documents[: REFERENCE_SAMPLE_BYTES // 4000]
    begin = time.perf_counter()
    for document in few:  # one by one, on one core
        encoder.encode_reference([document])
    return fast, sum(map(len, few)) / (time.perf_counter() - begin)
