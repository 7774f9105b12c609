"""gigatoken on Arrow buffers. Apart from `encoder`: its imports take 0.4 s, which the driver does without wherever it
remembers what the comparison of the encoders found."""

from __future__ import annotations

import awkward as ak
import gigatoken
import numpy as np


class FastEncoder:
    """Raises Exceptions of any kind for a tokenizer.json that gigatoken was not made for."""

    def __init__(self, tokenizer_json: bytes):
        self._tokenizer = gigatoken.Tokenizer.from_json(tokenizer_json)

    def encode(self, offsets: np.ndarray, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and ends as `Encoder.encode` returns them, of texts as `arrow_text_buffers` gives them."""
        strings = ak.contents.ListOffsetArray(
            ak.index.Index64(offsets.astype(np.int64, copy=False)),  # gigatoken takes no narrower index
            ak.contents.NumpyArray(data, parameters={"__array__": "char"}),
            parameters={"__array__": "string"},
        )
        encoded = self._tokenizer.encode_batch(ak.Array(strings), parallel=False).layout.to_ListOffsetArray64(True)
        return np.asarray(encoded.content.data), np.asarray(encoded.offsets)
