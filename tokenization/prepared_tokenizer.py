"""Before the work: tokenizer.json is made fit for both encoders, they are compared, and the outcome is said."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

from tokenization import encoder_cache
from tokenization.encoder import Encoder, PreparedTokenizer, without_special_tokens
from tokenization.encoder_cache import Findings
from tokenization.encoder_check import decide, measured_rates
from tokenization.job import Plan
from utils import console
from utils.errors import UserError

_BETWEEN = re.compile(r"[\s,:]*")


def prepare_tokenizer(tokenizer_json: bytes, parse_special_tokens: bool, flag: str) -> PreparedTokenizer:
    """tokenizer.json for both encoders, and the decision which of them takes what.

    For a large one it takes a few seconds, and half a second where an earlier run's decision is remembered.

    Args:
        flag: how the user named the tokenizer, for messages.

    Raises:
        UserError: Hugging Face tokenizers cannot load it.
    """
    tokenizer_json, fast_json, parts, warnings = _for_both(tokenizer_json, parse_special_tokens, flag)
    key = encoder_cache.key_of(tokenizer_json, parse_special_tokens)
    findings = encoder_cache.recall(key)
    remembered = findings is not None
    if findings is None:
        try:
            encoder = Encoder(tokenizer_json, parse_special_tokens, fast_json)
        except Exception as error:  # tokenizers raises plain Exceptions
            raise UserError(f"{flag}: Hugging Face tokenizers cannot load its tokenizer.json ({error}).") from error
        choice = decide(encoder, parts)
        findings = Findings(choice, measured_rates(encoder, choice), _renumbered_ids(encoder, parts["stored_ids"]))
        if not encoder.load_error:  # it may be this run's trouble alone, as a lack of memory
            encoder_cache.remember(key, findings)
    choice = dataclasses.replace(findings.choice, warnings=tuple(warnings))
    return PreparedTokenizer(tokenizer_json, fast_json, choice, findings.rates, findings.renumbered, remembered)


def _for_both(
    tokenizer_json: bytes, parse_special_tokens: bool, flag: str
) -> tuple[bytes, bytes, dict[str, Any], list[str]]:
    """What either of them loads; the parts of it that the comparison needs; and what the user should know.

    The file is parsed once. The model's part keeps its text, because a large vocabulary takes 0.1 s to serialize, and
    its parsed form is not kept.
    """
    text = tokenizer_json.decode()
    tokenizer, texts = members_of(text)
    tokenizer, warnings, changed = completed(tokenizer, flag)
    if changed:
        tokenizer_json = json.dumps(tokenizer, ensure_ascii=False).encode()
        texts["model"] = json.dumps(tokenizer["model"], ensure_ascii=False)
    stored_ids = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    fast_json = tokenizer_json
    if not parse_special_tokens:
        tokenizer = without_special_tokens(tokenizer)
        others = json.dumps({name: value for name, value in tokenizer.items() if name != "model"}, ensure_ascii=False)
        fast_json = f'{{"model": {texts["model"]}, {others[1:]}'.encode()
    parts = {"stored_ids": stored_ids, **{name: tokenizer.get(name) for name in ("added_tokens", "normalizer")}}
    return tokenizer_json, fast_json, parts, warnings


def members_of(text: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The members of a JSON object, which `json.loads` takes: their values and their texts."""
    decoder, values, texts = json.JSONDecoder(), {}, {}
    at, end = text.index("{") + 1, text.rindex("}")
    while (at := _BETWEEN.match(text, at).end()) < end:
        name, at = decoder.raw_decode(text, at)
        begin = _BETWEEN.match(text, at).end()
        values[name], at = decoder.raw_decode(text, begin)
        texts[name] = text[begin:at]
    return values, texts


def completed(tokenizer: dict[str, Any], flag: str) -> tuple[dict[str, Any], list[str], bool]:
    """A parsed tokenizer.json as both encoders can use it: flags of added tokens that are left out are off, and there
    is no dropout.

    Returns:
        the same, changed in place; what the user should know; and whether anything was changed.

    Raises:
        UserError: an added token has no content or id.
    """
    warnings, changed = [], False
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
    return tokenizer, warnings, changed


def _renumbered_ids(encoder: Encoder, stored_ids: dict[str, int]) -> tuple[tuple[int, int], ...]:
    real = {stored: encoder.reference.token_to_id(content) for content, stored in stored_ids.items()}
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
    console.say(prepared.choice.describe(*prepared.rates, prepared.remembered))
    return prepared
