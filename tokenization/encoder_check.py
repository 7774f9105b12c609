"""Before the work: gigatoken and Hugging Face `tokenizers` meet on texts made from the tokenizer itself.

What differs decides what gigatoken may do. Nothing: it takes all. Certain code points or added tokens: documents
with these go to `tokenizers`. Anything else: all of them do. See tokenization/encoder_choice.py for the decision, and
tokenization/encoder_battery.py for the texts.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable, Iterator
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pyarrow as pa

from tokenization import encoder_battery as battery
from tokenization.encoder import Encoder, PreparedTokenizer, fast_tokenizer_json
from tokenization.encoder_choice import EncoderChoice, as_ranges
from tokenization.job import Plan
from utils import console
from utils.errors import UserError

TEXTS_AT_A_TIME = 4096
# Above these, gigatoken works by other rules, and what it was not asked would differ too.
MAX_CODE_POINTS = 5000
MAX_LITERALS = 64
CANONICAL_FORMS = {"NFC", "NFD", "NFKC", "NFKD"}
SAMPLE_BYTES, REFERENCE_SAMPLE_BYTES = 1 << 20, 100 << 10


class _NotAttributable(Exception):
    """A difference on a text without anything peculiar; names the text."""


def prepare_tokenizer(tokenizer_json: bytes, parse_special_tokens: bool, flag: str) -> PreparedTokenizer:
    """tokenizer.json for both encoders, and the decision which of them takes what; a few seconds for a large one.

    Args:
        flag: how the user named the tokenizer, for messages.

    Raises:
        UserError: Hugging Face tokenizers cannot load it.
    """
    tokenizer_json, warnings = completed(tokenizer_json, flag)
    fast_json = fast_tokenizer_json(tokenizer_json, parse_special_tokens)
    try:
        encoder = Encoder(tokenizer_json, parse_special_tokens, fast_json)
    except Exception as error:  # tokenizers raises plain Exceptions
        raise UserError(f"{flag}: Hugging Face tokenizers cannot load its tokenizer.json ({error}).") from error
    choice = decide(encoder, json.loads(fast_json), tuple(warnings))
    return PreparedTokenizer(
        tokenizer_json,
        fast_json,
        choice,
        measured_rates(encoder, choice),
        _renumbered_ids(encoder, json.loads(tokenizer_json)),
    )


def completed(tokenizer_json: bytes, flag: str) -> tuple[bytes, list[str]]:
    """tokenizer.json as both encoders can use it: flags of added tokens that are left out are off, and there is no
    dropout.

    Returns:
        the bytes as they were given where nothing had to change, and what the user should know.

    Raises:
        UserError: an added token has no content or id.
    """
    tokenizer, warnings, changed = json.loads(tokenizer_json), [], False
    for i, token in enumerate(tokenizer.get("added_tokens") or []):
        if (
            not isinstance(token, dict)
            or not isinstance(token.get("content"), str)
            or not isinstance(token.get("id"), int)
        ):
            raise UserError(
                f"{flag}: added token {i} of its tokenizer.json is {token!r}. It needs a content and an id."
            )
        for name in ("single_word", "lstrip", "rstrip", "normalized", "special"):
            if not isinstance(token.get(name), bool):
                token[name], changed = False, True
    if tokenizer.get("added_tokens", ()) is None:
        tokenizer["added_tokens"], changed = [], True
    if dropout := tokenizer["model"].get("dropout"):
        warnings.append(
            f"{flag}: its tokenizer.json has a dropout of {dropout}, which would make token ids a matter of chance; "
            "it is left out"
        )
        tokenizer["model"]["dropout"], changed = None, True
    return json.dumps(tokenizer, ensure_ascii=False).encode() if changed else tokenizer_json, warnings


def decide(encoder: Encoder, tokenizer: dict[str, Any], warnings: tuple[str, ...] = ()) -> EncoderChoice:
    """Compare the two, and say which may take what.

    Args:
        encoder: as it is without a decision.
        tokenizer: the parsed `fast_tokenizer_json`.
    """
    if encoder.backend == "tokenizers":
        return EncoderChoice("tokenizers", f"gigatoken cannot load this one ({encoder.load_error})", warnings=warnings)
    comparison = _Comparison(encoder)
    try:
        code_points = _differing_code_points(comparison, _has_canonical_form(tokenizer.get("normalizer")))
        literals = _differing_literals(comparison, tokenizer, EncoderChoice("gigatoken", code_points=code_points))
        choice = EncoderChoice("gigatoken", "", code_points, literals)
        _expect_equal_but_for(choice, comparison, tokenizer)
    except _NotAttributable as error:
        reason = f"the two differ on ordinary text, such as {error}"
        return EncoderChoice("tokenizers", reason, num_compared=comparison.num_texts, warnings=warnings)
    return EncoderChoice("gigatoken", "", code_points, literals, comparison.num_texts, warnings)


class _Comparison:
    def __init__(self, encoder: Encoder):
        self.encoder = encoder
        self.num_texts = 0

    def differing(self, texts: Iterable[str]) -> Iterator[str]:
        """Those whose ids differ."""
        texts = iter(texts)
        while some := list(itertools.islice(texts, TEXTS_AT_A_TIME)):
            self.num_texts += len(some)
            ids, ends = self.encoder.encode(pa.array(some))
            expected, expected_ends = self.encoder.encode_reference(some)
            if np.array_equal(ends, expected_ends) and np.array_equal(ids, expected):
                continue
            for i, text in enumerate(some):
                got = ids[ends[i] : ends[i + 1]]
                if not np.array_equal(got, expected[expected_ends[i] : expected_ends[i + 1]]):
                    yield text


def _has_canonical_form(normalizer: dict[str, Any] | None) -> bool:
    if not normalizer:
        return False
    steps = normalizer.get("normalizers") or []
    return normalizer.get("type") in CANONICAL_FORMS or any(_has_canonical_form(step) for step in steps)


def _differing_code_points(comparison: _Comparison, canonical: bool) -> tuple[tuple[int, int], ...]:
    """Code points beyond ASCII on which the two differ, or may, as sorted ranges."""
    singular_points, uniform_points, unknown_points = battery.code_points()
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
    return as_ranges(found | unknown_points)


def _touched(choice: EncoderChoice, texts: list[str]) -> np.ndarray:
    return choice.needs_reference(pa.array(texts, pa.string()))


def _untouched(choice: EncoderChoice, texts: Iterable[str]) -> Iterator[str]:
    """The texts that gigatoken would be given."""
    texts = iter(texts)
    while some := list(itertools.islice(texts, TEXTS_AT_A_TIME)):
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


def _renumbered_ids(encoder: Encoder, tokenizer: dict[str, Any]) -> tuple[tuple[int, int], ...]:
    tokens = tokenizer.get("added_tokens") or []
    real = {token["id"]: encoder.reference.token_to_id(token["content"]) for token in tokens}
    return tuple((stored, given) for stored, given in real.items() if stored != given)


def check_ids(prepared: PreparedTokenizer, separators: dict[str, int | None], vocab_size: int, flag: str) -> None:
    """See that ids which were read from tokenizer.json are those that Hugging Face tokenizers gives.

    Args:
        separators: BOS and EOS, by name.
        vocab_size: the highest id that the output has room for, plus one.

    Raises:
        UserError: naming the token whose id is another.
    """
    for stored, given in prepared.renumbered:
        for name, token_id in separators.items():
            if token_id == stored:
                raise UserError(
                    f"{flag}: its tokenizer.json stores id {stored} for the {name} token, and Hugging Face tokenizers "
                    f"gives it {given}. Number the added tokens without a gap, as tokenizers does when it saves them."
                )
        if given >= vocab_size:
            raise UserError(
                f"{flag}: Hugging Face tokenizers gives an added token the id {given} where its tokenizer.json stores "
                f"{stored}, beyond all stored ids. Number the added tokens without a gap."
            )


def load_tokenizer(plan: Plan) -> PreparedTokenizer:
    """Prepare the tokenizer once, and not once per worker; says which encoder works, why, and how fast."""
    flag = f"--tokenizer_dir={plan.tokenizer_json.parent}"
    prepared = prepare_tokenizer(plan.tokenizer_json.read_bytes(), plan.job.parse_special_tokens, flag)
    check_ids(prepared, {"BOS": plan.job.bos_id, "EOS": plan.job.eos_id}, plan.tokenizer["vocab_size"], flag)
    for warning in prepared.choice.warnings:
        console.warn(warning)
    console.say(prepared.choice.describe(*prepared.rates))
    return prepared
