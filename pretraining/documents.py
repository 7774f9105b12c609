"""Documents in packed sequences: the token that tells them apart, and where each begins. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError

# Room for documents of this length on average, before the list of offsets grows and a compiled model is compiled again.
_MEAN_DOCUMENT_TOKENS = 128


@dataclasses.dataclass(frozen=True)
class Separator:
    """The token that a dataset has between its documents."""

    token: int
    begins: bool
    """True: BOS, the first token of a document; False: EOS, the last."""


def separator_of(directory: str | Path, manifest: dict[str, Any] | None) -> Separator:
    """What optimize_dataset.py put around the documents of a dataset, as its manifest says; BOS where it put both.

    Raises:
        UserError: the manifest names neither, or there is none.
    """
    settings = manifest["settings"] if manifest else {}
    for key in ("bos_id", "eos_id"):
        if settings.get(key) is not None:
            return Separator(settings[key], begins=key == "bos_id")
    why = (
        "its manifest names neither a BOS nor an EOS token between documents" if manifest else "it has no manifest.json"
    )
    raise UserError(
        f"--train.document_masking=true: {directory}: {why}, so where documents begin is unknown. Tokenize it with "
        "--add_eos=true or --add_bos=true and merge it again, or leave --train.document_masking out."
    )


def document_offsets(inputs: np.ndarray, separators: Sequence[Separator]) -> np.ndarray:
    """Where the documents of a micro-batch start. Each row starts one, whole or not.

    Args:
        inputs: integers, shape (B, T).
        separators: of the dataset of each row.

    Returns:
        int32: the starts in the flattened inputs, ascending, then B * T until the end. The length depends on B and T
        alone unless documents are shorter than 128 tokens on average; then it doubles, as often as needed.
    """
    starts = np.zeros(inputs.shape, dtype=bool)
    starts[:, 0] = True
    for row, tokens, separator in zip(starts, inputs, separators, strict=True):
        found = tokens == separator.token
        if separator.begins:
            row |= found
        else:
            row[1:] |= found[:-1]
    first_tokens = np.flatnonzero(starts)
    room = max(inputs.size // _MEAN_DOCUMENT_TOKENS, len(inputs))
    while room < len(first_tokens):
        room *= 2
    offsets = np.full(room + 1, inputs.size, dtype=np.int32)
    offsets[: len(first_tokens)] = first_tokens
    return offsets
