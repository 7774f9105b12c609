"""A merged dataset of pseudo-random tokens, for measurements in which the text does not matter."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tokenization.chunk_writer import chunk_header, make_index
from utils.chunks import Chunk, dtype_for_vocabulary
from utils.files import write_json
from utils.manifest import file_entry, write_manifest


def write_synthetic_dataset(directory: Path, num_tokens: int, vocab_size: int, document_tokens: int = 1000) -> None:
    """directory/train and directory/val (a tenth of the size); small ids are frequent, as in text."""
    random = np.random.Generator(np.random.PCG64(0))
    dtype = dtype_for_vocabulary(vocab_size)
    for split, tokens in (("train", num_tokens), ("val", max(num_tokens // 10, 20 * document_tokens))):
        target = directory / split
        target.mkdir(parents=True)
        num_documents = tokens // document_tokens
        ids = (vocab_size * random.random(num_documents * document_tokens) ** 4).astype(dtype)
        path = target / "chunk-0.bin"
        with open(path, "wb") as file:
            file.write(chunk_header(np.full(num_documents, document_tokens), dtype).tobytes())
            file.write(ids.tobytes())
        chunk = Chunk(path.name, num_documents, len(ids), path.stat().st_size)
        write_json(target / "index.json", make_index([chunk], dtype, None, "0" * 12))
        write_manifest(
            target,
            {
                "kind": "dataset",
                "made_by": {"script": "synthetic_tokens.py", "versions": {}},
                "settings": {},
                "tokenizer": None,
                "content": {
                    "documents": num_documents, "tokens": len(ids), "text_bytes": 4 * len(ids), "chunks": 1, "dtype": dtype,
                },
                "files": [file_entry(target, path.name)],
                "inputs": [],
            },
        )  # fmt: skip
