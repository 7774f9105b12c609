"""Which encoder takes which document: a small value, decided once before the work and carried to every worker.

gigatoken is some 50 times faster than Hugging Face `tokenizers`, whose ids are promised. Where the two were seen to
differ (tokenization/encoder_check.py looks), the documents that could be touched, or those of their lines, go to
`tokenizers`, and the rest stay fast.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import unicodedata
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenization.text_arrays import arrow_text_buffers, as_mask

MAX_NAMED = 4
STRETCH_BYTES = 1024
LOWEST_FIRST_BYTE = 0xC2  # of a character beyond ASCII in UTF-8
MAX_SHARE_BEYOND_ASCII = 0.2


@dataclasses.dataclass(frozen=True)
class EncoderChoice:
    """What gigatoken may do for one tokenizer."""

    backend: Literal["gigatoken", "tokenizers"]
    """What takes a document without any of the triggers below."""
    reason: str = ""
    """Why `tokenizers` takes all of them; empty with gigatoken."""
    code_points: tuple[tuple[int, int], ...] = ()
    """Ranges, first and last, all beyond ASCII: a text with one of them is encoded by `tokenizers`."""
    literals: tuple[str, ...] = ()
    """A text with one of these is encoded by `tokenizers`."""
    line_end: str = ""
    """Pattern of bytes at whose ends a document may be cut, so that `tokenizers` gets the lines with a trigger only;
    one of `line_cuts.LINE_ENDS`. Empty: it gets whole documents."""
    num_compared: int = 0
    """Texts that both encoders were given before the decision."""
    warnings: tuple[str, ...] = ()
    """What the user should know about this tokenizer."""

    @property
    def has_triggers(self) -> bool:
        return bool(self.code_points or self.literals)

    def needs_reference(self, texts: pa.Array) -> np.ndarray:
        """Which documents are to be encoded by `tokenizers`.

        Args:
            texts: string array without nulls, n documents.

        Returns:
            shape (n,), bool.
        """
        if self.backend == "tokenizers":
            return np.ones(len(texts), bool)
        touched = np.zeros(len(texts), bool)
        if self.literals:
            pattern = "|".join(map(re.escape, self.literals))
            touched |= as_mask(pc.match_substring_regex(texts, pattern))
        if self.code_points:
            touched[documents_with(texts, self.code_points)] = True
        return touched

    def triggers(self) -> str:
        """In words, which documents go to `tokenizers`; a few examples stand for many."""
        parts = []
        if self.code_points:
            known, num_points = [], 0
            for first, last in self.code_points:
                num_points += last + 1 - first
                # Most are not assigned: not one by one in Python, and planes without a character not at all.
                for start, end in ((first, min(last, 0x3FFFF)), (max(first, 0xE0000), last)):
                    categories = list(map(unicodedata.category, map(chr, range(start, end + 1))))
                    if categories.count("Cn") < len(categories):
                        known += [start + i for i, category in enumerate(categories) if category != "Cn"]
            if known:
                named = ", ".join(f"U+{point:04X}" for point in known[:MAX_NAMED]) + ", ..." * (len(known) > MAX_NAMED)
                parts.append(f"one of {len(known):,} characters ({named})")
            if len(known) < num_points:
                parts.append("a character too new to be compared")
        if self.literals:
            named = ", ".join(map(repr, self.literals[:MAX_NAMED]))
            parts.append(f"the text {named}" + ", ..." * (len(self.literals) > MAX_NAMED))
        return " or ".join(parts)

    def describe(self, fast_bytes_per_s: float, reference_bytes_per_s: float, remembered: bool = False) -> str:
        """The sentence that a run begins with: which encoder works, why, and how fast.

        Args:
            fast_bytes_per_s: measured rate of gigatoken on one core; not used where it does nothing.
            reference_bytes_per_s: the same of `tokenizers`.
            remembered: whether an earlier run found this.
        """
        compared = f"{self.num_compared:,} test texts" + ", remembered" * remembered
        reference = f"{_megabytes(reference_bytes_per_s)} MB/s"
        if self.backend == "tokenizers":
            return (
                f"encoder: Hugging Face tokenizers for every document, because {self.reason}; about {reference} of "
                "English text per core, tens of times slower than gigatoken with a tokenizer that it supports"
            )
        what = "line" if self.line_end else "document"
        slow = f"; a {what} with {self.triggers()} is encoded by tokenizers itself" if self.has_triggers else ""
        return (
            f"encoder: gigatoken, equal to Hugging Face tokenizers on {compared}{slow}; about "
            f"{_megabytes(fast_bytes_per_s)} MB/s of English text per core"
            + (f", {reference} for such {what}s" if slow else "")
        )


def _megabytes(rate: float) -> str:
    return f"{rate / 1e6:.0f}" if rate >= 1e7 else f"{rate / 1e6:.1f}"


@functools.lru_cache(maxsize=4)
def _lookup(code_points: tuple[tuple[int, int], ...]) -> tuple[np.ndarray, np.ndarray]:
    """Whether a code point is among them, shape (0x110000,), and whether a byte begins one in UTF-8, shape (256,)."""
    table, leads = np.zeros(0x110000, bool), np.zeros(256, bool)
    for first, last in code_points:
        table[first : last + 1] = True
        leads[chr(first).encode()[0] : chr(last).encode()[0] + 1] = True
    return table, leads


@functools.lru_cache(maxsize=4)
def _character_class(code_points: tuple[tuple[int, int], ...]) -> str:
    return "[" + "".join(f"\\x{{{first:x}}}-\\x{{{last:x}}}" for first, last in code_points) + "]"


def documents_with(texts: pa.Array, code_points: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Rows of `texts` with one of `code_points` (sorted ranges beyond ASCII); a row may be named more than once.

    Stretches of ASCII are passed over at memory's speed, since this comes before all of gigatoken's work. Where little
    of the text is ASCII a regular expression is quicker.
    """
    table, leads = _lookup(code_points)
    offsets, data = arrow_text_buffers(texts)
    data = data[offsets[0] : offsets[-1]]
    whole = len(data) // STRETCH_BYTES * STRETCH_BYTES
    words = data[:whole].view(np.uint64).reshape(-1, STRETCH_BYTES // 8)
    beyond_ascii = np.flatnonzero(np.bitwise_or.reduce(words, axis=1) & np.uint64(0x8080808080808080))
    found = np.flatnonzero(data[:whole].reshape(-1, STRETCH_BYTES)[beyond_ascii] >= LOWEST_FIRST_BYTE)
    if len(found) > MAX_SHARE_BEYOND_ASCII * whole:
        return np.flatnonzero(pc.match_substring_regex(texts, _character_class(code_points)))
    in_stretches = beyond_ascii[found // STRETCH_BYTES] * STRETCH_BYTES + found % STRETCH_BYTES
    at = np.concatenate((in_stretches, whole + np.flatnonzero(data[whole:] >= LOWEST_FIRST_BYTE)))
    at = at[leads[data[at]]]
    if not len(at):
        return at
    at = at[table[_code_points_at(data, at)]]
    return np.searchsorted(offsets, at + int(offsets[0]), side="right") - 1


def _code_points_at(data: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The characters beyond ASCII whose UTF-8 begins at these places, shape of `at`, uint32."""
    lead = data[at].astype(np.uint32)
    second, third, fourth = (data.take(at + i, mode="clip").astype(np.uint32) & 0x3F for i in (1, 2, 3))
    two = (lead & 0x1F) << 6 | second
    three = (lead & 0x0F) << 12 | second << 6 | third
    four = (lead & 0x07) << 18 | second << 12 | third << 6 | fourth
    return np.where(lead < 0xE0, two, np.where(lead < 0xF0, three, four))


def as_ranges(code_points: Sequence[int] | np.ndarray) -> tuple[tuple[int, int], ...]:
    """The same as sorted ranges, first and last."""
    points = np.sort(code_points)
    gaps = np.flatnonzero(np.diff(points) > 1)
    firsts, lasts = (
        points[np.append(0, gaps + 1)[: len(points)]],
        points[np.append(gaps, len(points) - 1)[: len(points)]],
    )
    return tuple(zip(firsts.tolist(), lasts.tolist()))
