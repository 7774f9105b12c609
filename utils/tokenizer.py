"""What a tokenizer directory says of itself: identity, size, BOS and EOS."""

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
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


@dataclasses.dataclass(frozen=True)
class TokenizerInfo:
    """A tokenizer directory in figures."""

    directory: Path
    sha256: str
    """Of tokenizer.json: two directories with the same hash give the same token ids."""
    vocab_size: int
    """Highest token id plus one, added tokens included: the embedding needs at least so many rows."""
    bos_id: int | None
    eos_id: int | None
    adds_bos: bool
    """Whether the tokenizer's own configuration puts BOS before a text."""
    adds_eos: bool

    def record(self) -> dict[str, Any]:
        """What a manifest keeps."""
        return {
            "sha256": self.sha256,
            "vocab_size": self.vocab_size,
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
        }


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error}).") from error
    return value if isinstance(value, dict) else {}


def _template_tokens(post_processor: dict[str, Any] | None) -> tuple[list[str], list[str]]:
    """The special tokens that a post-processor of tokenizer.json puts before and after a single text."""
    before: list[str] = []
    after: list[str] = []
    if not post_processor:
        return before, after
    if post_processor.get("type") == "Sequence":
        for processor in post_processor.get("processors", []):
            for into, found in zip((before, after), _template_tokens(processor)):
                into.extend(found)
    elif post_processor.get("type") == "TemplateProcessing":
        seen_text = False
        for piece in post_processor.get("single", []):
            if "Sequence" in piece:
                seen_text = True
            elif "SpecialToken" in piece:
                (after if seen_text else before).append(piece["SpecialToken"]["id"])
    return before, after


def read_tokenizer_info(directory: str | Path, flag: str = "--tokenizer_dir") -> TokenizerInfo:
    """Read `directory`/tokenizer.json and its neighbours.

    BOS and EOS are named by tokenizer_config.json (or special_tokens_map.json), else given as ids by
    generation_config.json or config.json. Whether they are added to a text is said by `add_bos_token` and
    `add_eos_token` of tokenizer_config.json, else by the post-processor of tokenizer.json.

    Raises:
        UserError: the directory is missing, or has no tokenizer.json.
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
                "It has tokenizer.model only; make the other with transformers: "
                f"AutoTokenizer.from_pretrained('{directory}').save_pretrained('{directory}')."
            )
        raise UserError(f"{flag}={directory}: no tokenizer.json in it. {remedy}")

    raw = path.read_bytes()
    try:
        tokenizer = json.loads(raw)
        vocabulary = tokenizer["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: [[piece, score], ..]
            vocabulary = {piece: i for i, (piece, _) in enumerate(vocabulary)}
        added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
        ids = {**vocabulary, **added}
        vocab_size = max(ids.values()) + 1
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a tokenizer.json of Hugging Face tokenizers ({error!r}).") from error

    names = {**_read_json(directory / "special_tokens_map.json"), **_read_json(directory / "tokenizer_config.json")}
    numbers = {**_read_json(directory / "config.json"), **_read_json(directory / "generation_config.json")}
    before, after = _template_tokens(tokenizer.get("post_processor"))

    def special_id(kind: str) -> int | None:
        name = names.get(f"{kind}_token")
        if isinstance(name, dict):
            name = name.get("content")
        if name in ids:
            return ids[name]
        number = numbers.get(f"{kind}_token_id")
        if isinstance(number, list):
            number = number[0] if number else None
        return number if isinstance(number, int) and 0 <= number < vocab_size else None

    bos_id, eos_id = special_id("bos"), special_id("eos")

    def adds(kind: str, token_id: int | None, template: list[str]) -> bool:
        if token_id is None:
            return False
        stated = names.get(f"add_{kind}_token")
        return stated if isinstance(stated, bool) else token_id in [ids.get(token) for token in template]

    return TokenizerInfo(
        directory=directory,
        sha256=hashlib.sha256(raw).hexdigest(),
        vocab_size=vocab_size,
        bos_id=bos_id,
        eos_id=eos_id,
        adds_bos=adds("bos", bos_id, before),
        adds_eos=adds("eos", eos_id, after),
    )


def copy_tokenizer_files(source: str | Path, target: str | Path) -> list[str]:
    """Copy the tokenizer's files; returns their names."""
    names = [name for name in TOKENIZER_FILES if (Path(source) / name).is_file()]
    for name in names:
        shutil.copyfile(Path(source) / name, Path(target) / name)
    return names
