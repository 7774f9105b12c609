"""What a tokenizer directory says about itself: identity, size, BOS and EOS."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from utils.errors import UserError

# What litgpt and transformers look for beside the weights.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja"),
)


@dataclasses.dataclass(frozen=True)
class TokenizerInfo:
    """What the steps need to know of a tokenizer directory."""

    directory: Path
    sha256: str
    """Of tokenizer.json: two directories with the same hash give the same token ids."""
    vocab_size: int
    """Highest token id plus one, added tokens included: the embedding needs at least as many rows."""
    bos_id: int | None
    eos_id: int | None
    adds_bos: bool
    """Whether the tokenizer's own configuration puts BOS before a text."""
    adds_eos: bool

    def record(self) -> dict[str, Any]:
        """What a manifest keeps."""
        return {key: getattr(self, key) for key in ("sha256", "vocab_size", "bos_id", "eos_id")}


def stated_in(directory: Path, *names: str) -> dict[str, Any]:
    """Entries of those of these JSON files that exist; the last file decides. Raises UserError for what is no JSON."""
    stated: dict[str, Any] = {}
    for path in (directory / name for name in names if (directory / name).is_file()):
        try:
            value = json.loads(path.read_bytes())
        except ValueError as error:
            raise UserError(f"{path}: not readable as JSON ({error}).") from error
        stated |= value if isinstance(value, dict) else {}
    return stated


def _template_tokens(post_processor: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The special tokens that a post-processor of tokenizer.json puts before and after a single text."""
    before: list[str] = []
    after: list[str] = []
    for processor in post_processor.get("processors", []):  # a Sequence
        inner_before, inner_after = _template_tokens(processor)
        before += inner_before
        after += inner_after
    if post_processor.get("type") in ("RobertaProcessing", "BertProcessing"):  # each names a token and its id
        before, after = post_processor["cls"][:1], post_processor["sep"][:1]
    tokens = before
    for piece in post_processor.get("single", []):  # a TemplateProcessing
        if "Sequence" in piece:
            tokens = after
        elif "SpecialToken" in piece:
            tokens.append(piece["SpecialToken"]["id"])
    return before, after


def read_tokenizer_info(directory: str | Path, flag: str = "--tokenizer_dir") -> TokenizerInfo:
    """Read `directory`/tokenizer.json and its neighbours.

    tokenizer_config.json (or special_tokens_map.json) names BOS and EOS; failing that, generation_config.json or
    config.json has their ids. Whether they are added to a text is for `add_bos_token` and `add_eos_token` of
    tokenizer_config.json to say, failing that for the post-processor of tokenizer.json.

    Raises:
        UserError: the directory is missing, has no tokenizer.json, or names several tokens as BOS or EOS.
    """
    directory = Path(directory)
    path = directory / "tokenizer.json"
    if not directory.is_dir():
        raise UserError(
            f"{flag}={directory}: no such directory. Give one with tokenizer.json, for example made by "
            "`litgpt download meta-llama/Meta-Llama-3-8B --tokenizer_only true`."
        )
    if not path.is_file():
        remedy = "Give a tokenizer directory."
        if (directory / "tokenizer.model").is_file():
            remedy = (
                "It has only tokenizer.model; make the other with transformers: "
                f"AutoTokenizer.from_pretrained('{directory}').save_pretrained('{directory}')."
            )
        raise UserError(f"{flag}={directory}: no tokenizer.json in it. {remedy}")

    raw = path.read_bytes()
    try:
        tokenizer = json.loads(raw)
        vocabulary = tokenizer["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: [[piece, score], ...]
            vocabulary = {piece: i for i, (piece, _) in enumerate(vocabulary)}
        ids = {**vocabulary, **{token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}}
        vocab_size = max(ids.values()) + 1
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a tokenizer.json of Hugging Face tokenizers ({error!r}).") from error

    names = stated_in(directory, "special_tokens_map.json", "tokenizer_config.json")
    numbers = stated_in(directory, "config.json", "generation_config.json")
    before, after = _template_tokens(tokenizer.get("post_processor") or {})

    def special_id(kind: str) -> int | None:
        name = names.get(f"{kind}_token")
        name = name.get("content") if isinstance(name, dict) else name
        if not isinstance(name, str | None):
            raise UserError(
                f"{flag}={directory}: its {kind}_token is {name!r}. Name one token there, in tokenizer_config.json or "
                "special_tokens_map.json."
            )
        number = ids.get(name, numbers.get(f"{kind}_token_id"))
        number = next(iter(number), None) if isinstance(number, list) else number
        return number if isinstance(number, int) and 0 <= number < vocab_size else None

    def adds(kind: str, token_id: int | None, template: list[str]) -> bool:
        if token_id is None:
            return False
        stated = names.get(f"add_{kind}_token")
        return stated if isinstance(stated, bool) else token_id in [ids.get(token) for token in template]

    bos_id, eos_id = special_id("bos"), special_id("eos")
    return TokenizerInfo(
        directory=directory,
        sha256=hashlib.sha256(raw).hexdigest(),
        vocab_size=vocab_size,
        bos_id=bos_id,
        eos_id=eos_id,
        adds_bos=adds("bos", bos_id, before),
        adds_eos=adds("eos", eos_id, after),
    )


def copy_tokenizer_files(source: str | Path, target: str | Path) -> None:
    for name in TOKENIZER_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(target) / name)
