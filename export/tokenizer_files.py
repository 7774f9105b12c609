"""The tokenizer of an export: the training tokenizer's files, made to give every client the ids of training.

BOS and EOS come from what step 1 put around each document, which the manifests know (`tokenizer_of_training`). Clients
look for them in two places: transformers, lm_eval and vLLM in the post-processor of tokenizer.json, litgpt and some
classes of transformers 4 in `add_bos_token` of tokenizer_config.json. So both say the same.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from utils import console
from utils.errors import UserError
from utils.files import write_json
from utils.tokenizer import TokenizerInfo, copy_tokenizer_files, stated_in

# The class that takes tokenizer.json as it is. Others build a tokenizer of their family from its vocabulary.
_GENERIC_CLASS = "PreTrainedTokenizerFast"
_SAMPLE = "Hello world!  A naïve café,\n\tdéjà vu: 3.14159 \U0001f642 def f(x): return x\r\n\r\n 你好 "


def tokenizer_of_training(tokenizer: TokenizerInfo, checkpoint: dict[str, Any] | None) -> TokenizerInfo:
    """`tokenizer` with the BOS and EOS of the documents that the model was trained on, as their manifests say.

    Where no dataset has a manifest, the tokenizer's own configuration stays, by which litgpt prepares data.

    Args:
        checkpoint: the manifest of the checkpoint; its inputs are the datasets.
    """
    manifests = [record.get("manifest") or {} for record in (checkpoint or {}).get("inputs", [])]
    recorded = [manifest.get("settings", {}) for manifest in manifests]
    put = [settings for settings in recorded if {"bos_id", "eos_id"} <= settings.keys()]
    if not put:
        return tokenizer
    bos_id, eos_id = (_common_id(kind, [settings[f"{kind}_id"] for settings in put]) for kind in ("bos", "eos"))
    for number in (bos_id, eos_id):
        if number is not None and number >= tokenizer.vocab_size:
            raise UserError(
                f"{tokenizer.directory}: the training data has the token {number}, tokenizer.json ends at "
                f"{tokenizer.vocab_size - 1}: it is not the one that the data was made with. Copy that one there."
            )
    return dataclasses.replace(
        tokenizer,
        bos_id=tokenizer.bos_id if bos_id is None else bos_id,
        eos_id=tokenizer.eos_id if eos_id is None else eos_id,
        adds_bos=bos_id is not None,
        adds_eos=eos_id is not None,
    )


def _common_id(kind: str, ids: list[int | None]) -> int | None:
    """The first id of `ids` that is not None; a warning says so where not all are equal."""
    first = next((number for number in ids if number is not None), None)
    if len(set(ids)) > 1:
        console.warn(
            f"the datasets were tokenized with different {kind.upper()} tokens (ids: {', '.join(map(str, ids))}). "
            f"The export takes {first}."
        )
    return first


def id_of_token(directory: Path, token: str, flag: str) -> int:
    """The id of a token of `directory`/tokenizer.json.

    Raises:
        UserError: there is no such token; the special ones are named.
    """
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    token_id = tokenizer.token_to_id(token)
    if token_id is None:
        special = [added.content for added in tokenizer.get_added_tokens_decoder().values() if added.special]
        raise UserError(
            f"{flag}={token}: not a token of {directory}/tokenizer.json. Its special tokens are: "
            f"{', '.join(special[:10])}{', ...' if len(special) > 10 else ''}."
        )
    return token_id


def stated_pad_token(directory: Path) -> tuple[str, int] | None:
    """Name and id of the pad token that the tokenizer's files name.

    None where they name none; one that tokenizer.json does not have is warned of and counts as none, since clients
    would add it with an id beyond the embedding.
    """
    pad_token = _name(stated_in(directory, "special_tokens_map.json", "tokenizer_config.json").get("pad_token"))
    if pad_token is None:
        return None
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    pad_id = tokenizer.token_to_id(pad_token) if isinstance(pad_token, str) else None
    if pad_id is None:
        console.warn(
            f"{directory}: the tokenizer's pad token is {pad_token!r}, which tokenizer.json does not have. The export "
            "names none; to choose one: --pad_token."
        )
        return None
    return pad_token, pad_id


def _name(entry: Any) -> Any:
    """The token that an entry of tokenizer_config.json names, as text or as a dictionary of its properties."""
    return entry.get("content") if isinstance(entry, dict) else entry


def write_tokenizer(
    tokenizer: TokenizerInfo, directory: Path, context_tokens: int, pad_token: str | None, check: bool
) -> None:
    """Copy the files, make them put BOS as training did, complete tokenizer_config.json, and compare the ids.

    EOS is never put after a text, even if training had it after every document: what clients encode is a prompt to
    continue, and after EOS the model would begin another document.

    Args:
        tokenizer: as `tokenizer_of_training` returns it.
        context_tokens: the longest text that the model reads.
        pad_token: the token that fills up the shorter texts of a batch; None: none is named, whatever the files say.
        check: whether transformers loads it and must give the ids that training used; needs config.json in place.

    Raises:
        UserError: transformers splits text differently.
    """
    copy_tokenizer_files(tokenizer.directory, directory)
    _drop_truncation_and_padding(directory / "tokenizer.json")
    bos_id = tokenizer.bos_id if tokenizer.adds_bos else None
    _put_bos(directory / "tokenizer.json", bos_id)
    tokens = Tokenizer.from_file(str(directory / "tokenizer.json"))
    path = directory / "tokenizer_config.json"
    completed = json.loads(path.read_bytes()) if path.is_file() else {}
    for kind, token_id in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)):
        content = _name(completed.get(f"{kind}_token"))
        if token_id is not None and (content is None or tokens.token_to_id(content) != token_id):
            completed[f"{kind}_token"] = tokens.id_to_token(token_id)
    completed |= {"add_bos_token": tokenizer.adds_bos, "add_eos_token": False, "model_max_length": context_tokens}
    if _name(completed.get("pad_token")) != pad_token:
        completed["pad_token"] = pad_token
    completed.setdefault("tokenizer_class", _GENERIC_CLASS)
    # transformers.js takes its absence for true, and then drops spaces before punctuation where it decodes.
    completed.setdefault("clean_up_tokenization_spaces", False)
    write_json(path, completed)
    _repeat_names(completed, directory / "special_tokens_map.json")
    if check and not _same_ids(directory, bos_id):
        write_json(path, {**completed, "tokenizer_class": _GENERIC_CLASS})
        if not _same_ids(directory, bos_id):
            raise UserError(
                f"{tokenizer.directory}: transformers and tokenizers split the same text into different tokens. "
                "Make the directory again with transformers' save_pretrained."
            )


def _repeat_names(names: dict[str, Any], path: Path) -> None:
    """Make special_tokens_map.json, where there is one, name the same tokens: transformers 4 prefers it."""
    if path.is_file():
        stated = json.loads(path.read_bytes())
        kinds = [f"{kind}_token" for kind in ("bos", "eos", "pad") if f"{kind}_token" in names]
        repeated = {**stated, **{kind: names[kind] for kind in kinds}}
        if "pad_token" in stated:
            repeated["pad_token"] = names.get("pad_token")
        if repeated != stated:
            write_json(path, repeated)


def _same_ids(directory: Path, bos_id: int | None) -> bool:
    expected = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(_SAMPLE, add_special_tokens=False).ids
    before = [] if bos_id is None else [bos_id]
    try:
        loaded = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        without = loaded.encode(_SAMPLE, add_special_tokens=False)
        return without == expected and loaded.encode(_SAMPLE) == before + expected
    except Exception:  # the class named there does not fit the files
        return False


def _drop_truncation_and_padding(path: Path) -> None:
    """Step 1 does neither, and clients choose them per call; transformers drops them as well."""
    tokenizer = Tokenizer.from_file(str(path))
    if tokenizer.truncation is not None or tokenizer.padding is not None:
        content = json.loads(path.read_bytes()) | {"truncation": None, "padding": None}
        path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")


def _put_bos(path: Path, bos_id: int | None) -> None:
    """Make tokenizer.json put BOS, or nothing, before a text and nothing after it; one that does stays as it is."""
    tokenizer = Tokenizer.from_file(str(path))
    without = tokenizer.encode(_SAMPLE, add_special_tokens=False).ids
    if tokenizer.encode(_SAMPLE).ids == ([] if bos_id is None else [bos_id]) + without:
        return
    # Other post-processors put special tokens of their own; this one only says where in the text a token came from.
    content = json.loads(path.read_bytes())
    processors = [part for part in _parts(content.get("post_processor")) if part["type"] == "ByteLevel"]
    if bos_id is not None:
        processors.append(_template(tokenizer.id_to_token(bos_id), bos_id))
    content["post_processor"] = (
        {"type": "Sequence", "processors": processors} if len(processors) > 1 else next(iter(processors), None)
    )
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")


def _parts(post_processor: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if post_processor is None:
        return
    if post_processor["type"] != "Sequence":
        yield post_processor
    for processor in post_processor.get("processors", []):
        yield from _parts(processor)


def _template(bos_token: str, bos_id: int) -> dict[str, Any]:
    """The post-processor that puts BOS before a text, and before each text of a pair, as that of Llama 3."""

    def piece(text: str, number: int) -> list[dict[str, Any]]:
        return [
            {"SpecialToken": {"id": bos_token, "type_id": number}},
            {"Sequence": {"id": text, "type_id": number}},
        ]

    return {
        "type": "TemplateProcessing",
        "single": piece("A", 0),
        "pair": [*piece("A", 0), *piece("B", 1)],
        "special_tokens": {bos_token: {"id": bos_token, "ids": [bos_id], "tokens": [bos_token]}},
    }
