"""Which of a unit's documents the reference encodes too: from the whole unit, the risky ones first, a bounded share.

At risk are documents with the text of an added token, with characters of rare scripts, and long ones. What the check
costs is bounded by bytes: the reference is about a hundred times slower than gigatoken.
"""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenization.encoder_choice import EncoderChoice
from tokenization.text_arrays import arrow_text_buffers, as_mask, rows_of

# About 1% of a unit's time; up to 3% for a unit of a few MB.
CHECKED_SHARE, MIN_CHECKED_BYTES, MAX_CHECKED_BYTES = 1 / 16384, 1 << 10, 256 << 10
FIRST_SHARE = 0.25
"""Of the unit's bytes to check, what its first batch may use however small it is."""
LONGEST_CHECKED_BYTES = 1 << 20
SPREAD_CANDIDATES, RARE_CANDIDATES = 12, 12
MAX_LITERALS = 64
# One byte in so many is looked at for its script: a prime, so that no layout of the text keeps in step with it.
SCRIPT_STRIDE = 251


class CheckSample:
    """The documents of one unit to check, chosen as its batches come by. The same text gives the same choice.

    Args:
        unit_bytes: bytes of text in the whole unit.
        choice: documents that go to the reference as a whole need no check.
        added_tokens: texts of the tokenizer's added tokens.
    """

    def __init__(self, unit_bytes: int, choice: EncoderChoice, added_tokens: list[str]):
        self._unit_bytes = max(unit_bytes, 1)
        self._budget = min(max(unit_bytes * CHECKED_SHARE, MIN_CHECKED_BYTES), MAX_CHECKED_BYTES)
        self._choice = choice
        words = sorted(text for text in added_tokens if text.strip())[:MAX_LITERALS]
        self._added_tokens = "|".join(map(re.escape, words))
        self._seen_bytes = self._checked_bytes = 0
        self._took_long_one = False
        self._lead_bytes = np.zeros(256, np.int64)  # how often each was met at the start of a character

    def rows(self, texts: pa.Array) -> list[int]:
        """Rows of the next batch to check, often none.

        Args:
            texts: string array without nulls, of at least one document.
        """
        offsets, data = arrow_text_buffers(texts)
        document_bytes = np.diff(offsets)
        before = self._seen_bytes
        self._seen_bytes += int(document_bytes.sum())
        # The allowance grows with the text, so that the end of the unit is looked at as its beginning is.
        share_seen = min(1.0, self._seen_bytes / self._unit_bytes)
        allowance = self._budget * max(FIRST_SHARE, share_seen) - self._checked_bytes
        if allowance < MIN_CHECKED_BYTES * FIRST_SHARE and before:
            return []
        chosen = []
        if not self._took_long_one and 2 * self._seen_bytes >= self._unit_bytes:
            self._took_long_one = True
            left = min(self._budget / 2, self._budget - self._checked_bytes)
            longest = int(np.where(document_bytes <= left, document_bytes, 0).argmax())
            if document_bytes[longest] <= left:
                chosen.append(longest)
        candidates = np.concatenate([self._rare(offsets, data), _spread(len(texts))])
        for row in self._by_risk(texts, candidates[document_bytes[candidates] <= allowance]):
            if row not in chosen and document_bytes[row] <= allowance:
                allowance -= document_bytes[row]
                chosen.append(row)
        if not before and not chosen:
            shortest = int(document_bytes.argmin())
            chosen = [shortest] if document_bytes[shortest] <= LONGEST_CHECKED_BYTES else []
        chosen = self._not_by_reference(texts, chosen)
        self._checked_bytes += int(document_bytes[chosen].sum())
        return chosen

    def _rare(self, offsets: np.ndarray, data: np.ndarray) -> np.ndarray:
        """Documents with characters beyond ASCII, those first whose scripts were met least so far."""
        first = int(offsets[0])
        sampled = data[first : int(offsets[-1]) : SCRIPT_STRIDE]
        at = np.flatnonzero(sampled >= 0xC2)
        leads = sampled[at]
        self._lead_bytes += np.bincount(leads, minlength=256)
        documents = np.searchsorted(offsets, first + at * SCRIPT_STRIDE, side="right") - 1
        order = np.argsort(self._lead_bytes[leads], kind="stable")[: 8 * RARE_CANDIDATES]
        return np.array(list(dict.fromkeys(documents[order].tolist()))[:RARE_CANDIDATES], np.int64)

    def _by_risk(self, texts: pa.Array, candidates: np.ndarray) -> list[int]:
        if not self._added_tokens:
            return candidates.tolist()
        found = as_mask(pc.match_substring_regex(rows_of(texts, candidates), self._added_tokens))
        return [*candidates[found].tolist(), *candidates[~found].tolist()]

    def _not_by_reference(self, texts: pa.Array, rows: list[int]) -> list[int]:
        if not rows or not self._choice.has_triggers or self._choice.line_end:
            return rows
        by_reference = self._choice.needs_reference(rows_of(texts, rows))
        return [row for row, slow in zip(rows, by_reference.tolist()) if not slow]


def _spread(num_documents: int) -> np.ndarray:
    return np.unique(np.linspace(0, num_documents - 1, SPREAD_CANDIDATES).astype(np.int64))
