"""What litdata's index.json of TokensLoader chunks says; utils/chunks.py reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from utils.chunks import CODE_OF_DTYPE, Chunk

# torch's pytree of a single leaf, as litdata stores it.
_SINGLE_LEAF = '[1, {"type": null, "context": null, "children_spec": []}]'


def make_index(chunks: Sequence[Chunk], dtype: str, chunk_tokens: int | None, fingerprint: str) -> dict[str, Any]:
    """The content of index.json.

    Args:
        chunks: in the order in which the dataset is read.
        dtype: of the tokens.
        chunk_tokens: the size at which chunks were cut.
        fingerprint: hexadecimal, changes with the content. litdata uses `updated_at` to tell whether its cache of
            a remote directory is stale; a clock there would make equal datasets differ.
    """
    return {
        "chunks": [
            {"chunk_bytes": chunk.bytes, "chunk_size": chunk.documents, "dim": chunk.tokens, "filename": chunk.name}
            for chunk in chunks
        ],
        "config": {
            "chunk_bytes": None,
            "chunk_size": chunk_tokens,
            "compression": None,
            "compression_batch_size": None,
            "compression_level": None,
            "data_format": [f"no_header_tensor:{CODE_OF_DTYPE[dtype]}"],
            "data_spec": _SINGLE_LEAF,
            "encryption": None,
            "ipc_compression": None,
            "item_loader": "TokensLoader",
            "types": "tensor",
        },
        "updated_at": str(int(fingerprint[:12], 16)),
    }
