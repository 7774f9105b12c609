"""Text to token ids, straight from Arrow buffers, checked against Hugging Face `tokenizers`.

gigatoken does the work where it gives the ids of `tokenizers`, the reference; an `EncoderChoice` says where it does
not.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from tokenization.encoder_choice import EncoderChoice
from tokenization.line_cuts import parts_by_encoder
from tokenization.text_arrays import arrow_text_buffers, rows_of

# gigatoken 0.10 remembers every pretoken that it has seen, without bound: about 30 MB per million tokens of random
# words. A fresh encoder forgets; natural text fills this in about a GB of new words.
MAX_CACHE_BYTES = 256 << 20


# `tokenizers` takes some 46 times a document's size in memory, and cutting a document can change its ids.
MAX_REFERENCE_BYTES = 64 << 20


class DocumentTooLarge(Exception):
    """A document that only `tokenizers` may encode, and that would take gigabytes there."""


class EncodingMismatch(Exception):
    """The fast encoder and the reference disagree: nothing encoded with it may be kept."""


class PreparedTokenizer(NamedTuple):
    """What a worker needs to encode, worked out once in the driver."""

    tokenizer_json: bytes
    """What `tokenizers` loads."""
    fast_json: bytes
    """What gigatoken loads."""
    choice: EncoderChoice = EncoderChoice("gigatoken")
    rates: tuple[float, float] = (0.0, 0.0)
    """Bytes of English text per second on one core, as measured: gigatoken's, 0 where it does nothing, and
    tokenizers'."""
    renumbered: tuple[tuple[int, int], ...] = ()
    """Stored ids of added tokens to those that `tokenizers` gives them: it renumbers those that leave a gap."""
    remembered: bool = False
    """Whether the choice is an earlier run's (tokenization/encoder_cache.py)."""


def fast_tokenizer_json(tokenizer_json: bytes, parse_special_tokens: bool) -> bytes:
    """tokenizer.json as gigatoken is to load it."""
    if parse_special_tokens:
        return tokenizer_json
    return json.dumps(without_special_tokens(json.loads(tokenizer_json)), ensure_ascii=False).encode()


def without_special_tokens(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """A parsed tokenizer.json for gigatoken where `parse_special_tokens` is off.

    A literal "<|end_of_text|>" inside a text is to be ordinary text, as `tokenizers` has it with
    `encode_special_tokens = True`: special tokens are no longer searched for, the other added tokens are.
    """
    tokens = [token for token in tokenizer.get("added_tokens") or [] if not token.get("special", False)]
    # The post-processor may name a special token that is gone; BOS and EOS are put in by us.
    return {**tokenizer, "added_tokens": tokens, "post_processor": None}


def import_gigatoken() -> type:
    """`fast_encoder.FastEncoder`, imported when it is first asked for."""
    from tokenization.fast_encoder import FastEncoder

    return FastEncoder


_references: dict[bytes, Tokenizer] = {}


def load_reference(tokenizer_json: bytes) -> None:
    """Load what `tokenizers` needs for the next `Encoder` of this tokenizer.json: a third of its start."""
    _references[tokenizer_json] = Tokenizer.from_str(tokenizer_json.decode())


class Encoder:
    """Token ids of a batch of texts, without BOS and EOS.

    Args:
        tokenizer_json: content of tokenizer.json.
        parse_special_tokens: whether a special token's literal text becomes its id. Off: it is ordinary text.
        fast_json: what `fast_tokenizer_json` gives for the two, where that was worked out before: it takes a second for
            a large vocabulary.
        choice: what gigatoken may do, as `prepared_tokenizer.prepare_tokenizer` found; None: whatever it can load,
        unchecked.
    """

    def __init__(
        self,
        tokenizer_json: bytes,
        parse_special_tokens: bool = False,
        fast_json: bytes | None = None,
        choice: EncoderChoice | None = None,
    ):
        self._json = fast_json or fast_tokenizer_json(tokenizer_json, parse_special_tokens)
        self._reference = _references.get(tokenizer_json) or Tokenizer.from_str(tokenizer_json.decode())
        _references.clear()
        self._reference.encode_special_tokens = not parse_special_tokens
        self._reference.no_padding()
        self._reference.no_truncation()
        self._choice = choice or EncoderChoice("gigatoken")
        self.reference_documents = 0
        """How many `encode` has given to `tokenizers` so far, whole or in part."""
        self.load_error = ""
        """Why gigatoken cannot load this tokenizer, where it cannot."""
        self._fast = self._load_fast() if self._choice.backend == "gigatoken" else None
        self._bytes_at_load = _resident_bytes()

    @property
    def backend(self) -> str:
        return "tokenizers" if self._fast is None else "gigatoken"

    @property
    def choice(self) -> EncoderChoice:
        return self._choice

    @property
    def added_tokens(self) -> list[str]:
        """Texts of the tokenizer's added tokens."""
        return [token.content for token in self._reference.get_added_tokens_decoder().values()]

    @property
    def reference(self) -> Tokenizer:
        """Hugging Face's, as `encode_reference` uses it."""
        return self._reference

    def _load_fast(self) -> Any | None:
        fast_encoder = import_gigatoken()  # that it is not installed is no property of the tokenizer
        try:
            return fast_encoder(self._json)
        except Exception as error:  # of whatever kind: a tokenizer.json that it was not made for
            self.load_error = (str(error).splitlines() or [type(error).__name__])[0]
            return None

    def encode(self, texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        """Encode a string array without nulls.

        Returns:
            token ids, shape (tokens,), and offsets of the documents into them, shape (n + 1,), int64.

        Raises:
            DocumentTooLarge: one is too long for `tokenizers`, and gigatoken may not encode it.
        """
        if self._fast is None:
            self.reference_documents += len(texts)
            return self._encode_by_reference(texts)
        if not self._choice.has_triggers:
            return self._encode_fast(texts)
        by_reference = self._choice.needs_reference(texts)
        if not by_reference.any():
            return self._encode_fast(texts)
        self.reference_documents += int(by_reference.sum())
        if not self._choice.line_end:
            return self._encode_by_both(texts, by_reference)
        parts, by_reference, first_part = parts_by_encoder(self._choice, texts, by_reference)
        ids, ends = self._encode_by_both(parts, by_reference)
        return ids, ends[first_part]

    def _encode_by_both(self, texts: pa.Array, by_reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        slow_ids, slow_ends = self._encode_by_reference(rows_of(texts, by_reference))
        if by_reference.all():
            return slow_ids, slow_ends
        fast_ids, fast_ends = self._encode_fast(rows_of(texts, ~by_reference))
        lengths = np.empty(len(texts), np.int64)
        lengths[by_reference], lengths[~by_reference] = np.diff(slow_ends), np.diff(fast_ends)
        ends = np.concatenate(([0], np.cumsum(lengths)))
        ids = np.empty(ends[-1], np.uint32)
        is_slow = np.repeat(by_reference, lengths)
        ids[is_slow], ids[~is_slow] = slow_ids, fast_ids[: fast_ends[-1]]
        return ids, ends

    def _encode_by_reference(self, texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        document_bytes = np.diff(arrow_text_buffers(texts)[0])
        row = int(document_bytes.argmax()) if len(texts) else 0
        if len(texts) and document_bytes[row] > MAX_REFERENCE_BYTES:
            size = int(document_bytes[row])
            raise DocumentTooLarge(
                f"a document of {size / 1e6:,.0f} MB, which only Hugging Face tokenizers may encode, would take it "
                f"about {46 * size / 1e9:,.0f} GB of memory; at most {MAX_REFERENCE_BYTES / 1e6:,.0f} MB are allowed. "
                f"It begins with {texts[row].as_py()[:80]!r}"
            )
        return self.encode_reference(texts.to_pylist())

    def _encode_fast(self, texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        ids, ends = self._fast.encode(*arrow_text_buffers(texts))
        if _resident_bytes() - self._bytes_at_load > MAX_CACHE_BYTES:
            ids = ids.copy()
            self.forget()
        return ids, ends

    def forget(self) -> None:
        """Start over with an empty cache."""
        self._fast = None  # freed before the new one is made
        self._fast = self._load_fast()
        self._bytes_at_load = _resident_bytes()

    def encode_reference(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The same by `tokenizers`: what `encode` is checked against."""
        encodings = self._reference.encode_batch_fast(texts, add_special_tokens=False)
        pieces = [encoding.ids for encoding in encodings]
        ends = np.zeros(len(texts) + 1, np.int64)
        np.cumsum([len(piece) for piece in pieces], out=ends[1:])
        ids = np.fromiter(itertools.chain.from_iterable(pieces), np.uint32, ends[-1])
        return ids, ends

    def check(self, texts: pa.Array, ids: np.ndarray, ends: np.ndarray, rows: list[int]) -> int:
        """Compare some documents of an encoded batch with the reference.

        Args:
            rows: which documents; the reference is slow, so few and short ones.

        Returns:
            number of documents compared.

        Raises:
            EncodingMismatch: naming the first document that differs.
        """
        if self._fast is None:
            return 0
        for row in rows:
            text = texts[row].as_py()
            expected = self._reference.encode(text, add_special_tokens=False).ids
            got = ids[ends[row] : ends[row + 1]]
            if len(expected) != len(got) or (np.asarray(expected, np.uint32) != got).any():
                raise EncodingMismatch(
                    f"gigatoken gives {len(got)} ids, tokenizers {len(expected)}, for the text {text[:200]!r}"
                )
        return len(rows)


def _resident_bytes() -> int:
    """Anonymous memory of this process that is resident: what it allocated, without mapped files."""
    try:
        with open("/proc/self/statm", "rb") as file:
            _, resident, shared, *_ = file.read().split()
            return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux: the peak serves, it only grows too
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
