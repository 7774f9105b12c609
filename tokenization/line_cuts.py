"""Documents in which only some lines need the slow encoder, cut so that it gets no more than these.

A text may be cut between two tokens that every encoder ends and begins there, whatever stands on either side. With most
pre-tokenizers that is so at the end of a line; tokenization/encoder_check.py finds out which of `LINE_ENDS` holds.
"""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa

from tokenization.encoder_choice import EncoderChoice
from tokenization.text_arrays import arrow_text_buffers

# Byte-level vocabularies write "Ċ", "Ġ" and "ĉ" for a line end, a space and a tab; those of SentencePiece "▁" for a
# space, and some "<0x0A>" for a line end.
_LINE_END, _BLANK = "(?:[\nĊ]|<0x0A>)", "[ \tĠĉ▁]"

# Patterns of bytes, each with what a vocabulary's entry across it, and "\0" after that, would have in it. Both leave
# lines that are empty, or that begin with something beyond ASCII, with the line before.
LINE_ENDS = (
    # Before any line with text. Llama 3 and its like take all line ends together, and blanks with the word after; a
    # "/" after a line end belongs to the punctuation before it in o200k.
    (r"\n(?=[ \t]*[!-.0-~])", rf"{_LINE_END}{_BLANK}*(?:{_BLANK}\0|[!-.0-~])"),
    # Between lines without a blank at either end: GPT-2 takes white space together, but for the last of it.
    (r"(?<=[!-~])\n(?=[0-9A-Za-z])", rf"{_LINE_END}[0-9A-Za-z]"),
)


def cut_at(line_end: str, texts: pa.Array, rows: np.ndarray) -> tuple[pa.Array, np.ndarray]:
    """Some of the texts cut at every line end.

    Args:
        line_end: one of `LINE_ENDS`, the first of its patterns.
        texts: string array without nulls, n texts.
        rows: which of them, shape (n,), bool.

    Returns:
        the parts, a string array over the same bytes, and the first part of each text, shape (n + 1,).
    """
    pattern = re.compile(line_end.encode())
    offsets, data = arrow_text_buffers(texts)
    num_parts, cuts = np.ones(len(texts), np.int64), [offsets]
    for row in np.flatnonzero(rows).tolist():
        first, last = offsets[row : row + 2].tolist()
        places = (first + found.end() for found in pattern.finditer(memoryview(data)[first:last]))
        cuts.append(np.fromiter(places, offsets.dtype))
        num_parts[row] += len(cuts[-1])
    return _with_offsets(texts, np.sort(np.concatenate(cuts))), np.append(0, np.cumsum(num_parts))


def parts_by_encoder(
    choice: EncoderChoice, texts: pa.Array, by_reference: np.ndarray
) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """Texts that need the reference, cut into stretches of lines that do and that do not.

    Args:
        choice: one with a `line_end`.
        texts: string array without nulls, n texts.
        by_reference: which of them need the reference, shape (n,), bool.

    Returns:
        the m parts, a string array over the same bytes; which of them need the reference, shape (m,), bool; and the
        first part of each text, shape (n + 1,).
    """
    lines, first_line = cut_at(choice.line_end, texts, by_reference)
    is_slow = choice.needs_reference(lines)
    begins = np.append(True, is_slow[1:] != is_slow[:-1])
    begins[first_line[:-1]] = True
    offsets = arrow_text_buffers(lines)[0]
    parts = _with_offsets(texts, np.append(offsets[:-1][begins], offsets[-1]))
    return parts, is_slow[begins], np.append(0, np.cumsum(begins))[first_line]


def _with_offsets(texts: pa.Array, offsets: np.ndarray) -> pa.Array:
    buffers = [None, pa.py_buffer(offsets), texts.buffers()[2]]
    return pa.Array.from_buffers(texts.type, len(offsets) - 1, buffers)
