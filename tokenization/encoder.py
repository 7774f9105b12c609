"""Text to token ids, straight from Arrow buffers, checked against Hugging Face `tokenizers`.

gigatoken does the work; `tokenizers` is the reference and takes over for tokenizers that gigatoken cannot load.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

# gigatoken 0.10 remembers every pretoken that it has seen, without bound: about 30 MB per million tokens of random
# words. A fresh encoder forgets; natural text fills this in about a GB of new words.
MAX_CACHE_BYTES = 256 << 20


class EncodingMismatch(Exception):
    """The fast encoder and the reference disagree: nothing encoded with it may be kept."""


def fast_tokenizer_json(tokenizer_json: bytes, parse_special_tokens: bool) -> bytes:
    """tokenizer.json as gigatoken is to load it.

    Without `parse_special_tokens` a literal "<|end_of_text|>" inside a text is to be ordinary text, as `tokenizers` has it
    with `encode_special_tokens = True`: special tokens are no longer searched for, the other added tokens are.
    """
    if parse_special_tokens:
        return tokenizer_json
    tokenizer = json.loads(tokenizer_json)
    tokenizer["added_tokens"] = [token for token in tokenizer.get("added_tokens", []) if not token["special"]]
    tokenizer["post_processor"] = None  # may name a special token that is gone; BOS and EOS are put in by us
    return json.dumps(tokenizer, ensure_ascii=False).encode()


def arrow_text_buffers(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Views of the buffers of a string array without nulls.

    Returns:
        offsets, shape (n + 1,), int32 or int64, into the bytes, shape (size,), uint8. No copy is made.
    """
    import pyarrow as pa

    offset_type = np.int64 if pa.types.is_large_string(texts.type) else np.int32
    _, offsets, data = texts.buffers()
    offsets = np.frombuffer(offsets, offset_type)[texts.offset : texts.offset + len(texts) + 1]
    return offsets, np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)


class Encoder:
    """Token ids of a batch of texts, without BOS and EOS.

    Args:
        tokenizer_json: content of tokenizer.json.
        parse_special_tokens: whether a special token's literal text becomes its id. Off: it is ordinary text.
        fast_json: what `fast_tokenizer_json` gives for the two, where that was worked out before: it takes a second for
            a large vocabulary.
    """

    def __init__(self, tokenizer_json: bytes, parse_special_tokens: bool = False, fast_json: bytes | None = None):
        from tokenizers import Tokenizer

        self._json = fast_json or fast_tokenizer_json(tokenizer_json, parse_special_tokens)
        self._reference = Tokenizer.from_str(tokenizer_json.decode())
        self._reference.encode_special_tokens = not parse_special_tokens
        self._reference.no_padding()
        self._reference.no_truncation()
        self._fast = self._load_fast()
        self._bytes_at_load = _resident_bytes()

    @property
    def backend(self) -> str:
        return "tokenizers" if self._fast is None else "gigatoken"

    def _load_fast(self) -> Any | None:
        import gigatoken

        try:
            return gigatoken.Tokenizer.from_json(self._json)
        except Exception:  # of whatever kind: a tokenizer.json that it was not made for
            return None

    def encode(self, texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        """Encode a string array without nulls.

        Returns:
            token ids, shape (tokens,), and offsets of the documents into them, shape (n + 1,), int64.
        """
        if self._fast is None:
            return self.encode_reference(texts.to_pylist())
        import awkward as ak

        offsets, data = arrow_text_buffers(texts)
        strings = ak.contents.ListOffsetArray(
            ak.index.Index64(offsets.astype(np.int64, copy=False)),  # gigatoken takes no narrower index
            ak.contents.NumpyArray(data, parameters={"__array__": "char"}),
            parameters={"__array__": "string"},
        )
        encoded = self._fast.encode_batch(ak.Array(strings), parallel=False).layout.to_ListOffsetArray64(True)
        ids, ends = np.asarray(encoded.content.data), np.asarray(encoded.offsets)
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
        ends = np.zeros(len(texts) + 1, np.int64)
        np.cumsum([len(encoding.ids) for encoding in encodings], out=ends[1:])
        ids = np.fromiter((i for encoding in encodings for i in encoding.ids), np.uint32, ends[-1])
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
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
