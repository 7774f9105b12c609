"""The tokenizer of an export: the training tokenizer's files, made to load in transformers with the same ids."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from utils.errors import UserError
from utils.files import write_json
from utils.tokenizer import TokenizerInfo, copy_tokenizer_files

# The class that takes tokenizer.json as it is. Others build a tokenizer of their family from its vocabulary.
_GENERIC_CLASS = "PreTrainedTokenizerFast"
_SAMPLE = "Hello world!  A naïve café,\n\tdéjà vu: 3.14159 \U0001f642 def f(x): return x\r\n\r\n 你好 "


def write_tokenizer(tokenizer: TokenizerInfo, directory: Path, check: bool) -> None:
    """Copy the files, complete tokenizer_config.json, and compare with the `tokenizers` library.

    litgpt and transformers find BOS and EOS by name in tokenizer_config.json; a tokenizer that gives them as numbers
    elsewhere gets the names there.

    Args:
        check: whether transformers loads it and must give the ids that training used; needs config.json in place.

    Raises:
        UserError: transformers splits text differently.
    """
    copy_tokenizer_files(tokenizer.directory, directory)
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_bytes()) if path.is_file() else {}
    completed = dict(settings)
    tokens = Tokenizer.from_file(str(directory / "tokenizer.json"))
    for kind, token_id in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)):
        if token_id is not None:
            completed[f"{kind}_token"] = completed.get(f"{kind}_token") or tokens.id_to_token(token_id)
    completed.setdefault("tokenizer_class", _GENERIC_CLASS)
    if completed != settings:
        write_json(path, completed)
    if check and not _same_ids(directory):
        write_json(path, {**completed, "tokenizer_class": _GENERIC_CLASS})
        if not _same_ids(directory):
            raise UserError(
                f"{tokenizer.directory}: transformers and tokenizers split the same text into different tokens. "
                "Make the directory again with transformers' save_pretrained."
            )


def _same_ids(directory: Path) -> bool:
    expected = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(_SAMPLE, add_special_tokens=False).ids
    try:
        loaded = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        return loaded.encode(_SAMPLE, add_special_tokens=False) == expected
    except Exception:  # the class named there does not fit the files
        return False
