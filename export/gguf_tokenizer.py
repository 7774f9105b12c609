"""The tokenizer in model.gguf: byte-level BPE, whose way to split text llama.cpp knows by a name.

llama.cpp's own converter finds that name by a hash of what a published tokenizer makes of a text, and so refuses every
tokenizer that someone trained. Here it is decided from what tokenizer.json says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.tokenizer import TokenizerInfo

_LETTERS_AND_MORE = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_LLAMA_3 = _CONTRACTIONS + _LETTERS_AND_MORE % r"\p{N}{1,3}"
_QWEN_2 = _CONTRACTIONS + _LETTERS_AND_MORE % r"\p{N}"
_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# By (regular expression, whether a whole word of the vocabulary is taken without merging): llama.cpp's name. Its names
# stand for both; "smaug-bpe" is Llama 3's expression with merging.
_NAMES = {
    (_LLAMA_3, True): "llama-bpe",
    (_LLAMA_3, False): "smaug-bpe",
    (_QWEN_2, False): "qwen2",
    (_GPT_2, False): "gpt-2",
}


def pre_tokenizer_name(content: dict[str, Any]) -> str:
    """llama.cpp's name for the way in which a tokenizer.json splits text before it merges.

    Raises:
        ValueError: llama.cpp has none; the message says what it has none for.
    """
    model = content["model"]
    if model["type"] != "BPE":
        raise ValueError(f"its model is {model['type']}, not BPE")
    if model.get("byte_fallback") or model.get("dropout") or model.get("continuing_subword_prefix"):
        raise ValueError("its BPE has byte_fallback, dropout or a prefix of subwords")
    normalizers = _parts(content.get("normalizer"), "normalizers")
    if any(part["type"] != "NFC" for part in normalizers):
        raise ValueError(f"it normalizes text by {', '.join(part['type'] for part in normalizers)}")
    expression = None
    byte_level = False
    for part in _parts(content.get("pre_tokenizer"), "pretokenizers"):
        if part["type"] == "ByteLevel" and not part.get("add_prefix_space") and not byte_level:
            byte_level = True
            if part.get("use_regex", True) and expression is None:
                expression = _GPT_2
            elif part.get("use_regex", True):
                raise ValueError("it splits text twice")
        elif part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"] and expression is None:
            expression = part["pattern"].get("Regex")
        else:
            raise ValueError(f"its pre-tokenizer holds {json.dumps(part, ensure_ascii=False)}")
    name = _NAMES.get((expression, bool(model.get("ignore_merges"))))
    if not byte_level or name is None:
        raise ValueError(f"its pre-tokenizer splits at {expression!r}, which has no name there")
    return name


def add_tokenizer(
    writer: Any, gguf: Any, directory: Path, tokenizer: TokenizerInfo, pad_id: int | None, num_rows: int
) -> None:
    """Put vocabulary, merges and special tokens of `directory`/tokenizer.json into a GGUFWriter.

    Args:
        num_rows: of the embedding; ids beyond the tokenizer's are filled up with names that no text holds.

    Raises:
        UserError: llama.cpp would split text in another way.
    """
    content = json.loads((directory / "tokenizer.json").read_bytes())
    try:
        name = pre_tokenizer_name(content)
    except ValueError as error:
        raise UserError(
            f"{tokenizer.directory}/tokenizer.json: llama.cpp does not split text as this tokenizer does: {error}. "
            "For the other programs: --formats=all"
        ) from None
    tokens = [f"[PAD{number}]" for number in range(num_rows)]
    types = [gguf.TokenType.UNUSED] * num_rows
    for token, number in content["model"]["vocab"].items():
        tokens[number], types[number] = token, gguf.TokenType.NORMAL
    for added in content["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    for kind, number in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id), ("pad", pad_id)):
        if number is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    writer.add_add_bos_token(tokenizer.adds_bos)
    writer.add_add_eos_token(False)  # a prompt is to be continued


def _parts(node: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if node is None:
        return []
    return [inner for part in node[key] for inner in _parts(part, key)] if node["type"] == "Sequence" else [node]
