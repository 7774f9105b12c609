"""Small datasets and configurations for the tests of pretraining."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import yaml

from tokenization.chunk_index import make_index
from tokenization.chunk_writer import chunk_header
from utils.chunks import Chunk
from utils.files import write_json
from utils.manifest import file_entry, write_manifest

TINY_MODEL = {
    "name": "tiny-llama",
    "block_size": 32,
    "n_layer": 2,
    "n_embd": 32,
    "n_head": 4,
    "n_query_groups": 2,
    "vocab_size": 1024,
    "padded_vocab_size": 1024,
    "rotary_percentage": 1.0,
    "parallel_residual": False,
    "bias": False,
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP",
    "intermediate_size": 64,
}


def write_dataset(
    directory: Path,
    documents: list[np.ndarray],
    text_bytes: int,
    tokenizer: dict | None = None,
    chunk_documents: int = 40,
    separators: dict | None = None,
) -> None:
    """A merged dataset as merge_files.py publishes it, of documents given as arrays of token ids.

    `separators` are the bos_id and eos_id that the documents have around them.
    """
    directory.mkdir(parents=True)
    dtype = "uint16"
    chunks = []
    for number, start in enumerate(range(0, len(documents), chunk_documents)):
        part = documents[start : start + chunk_documents]
        name = f"chunk-{number}.bin"
        header = chunk_header(np.array([len(document) for document in part]), dtype)
        with open(directory / name, "wb") as file:
            file.write(header.tobytes())
            file.write(np.concatenate(part).astype("<u2").tobytes())
        tokens = sum(len(document) for document in part)
        chunks.append(Chunk(name, len(part), tokens, (directory / name).stat().st_size))
    fingerprint = hashlib.sha256(b"".join((directory / chunk.name).read_bytes() for chunk in chunks)).hexdigest()
    write_json(directory / "index.json", make_index(chunks, dtype, None, fingerprint))
    write_manifest(
        directory,
        {
            "kind": "dataset",
            "made_by": {"script": "merge_files.py", "versions": {}},
            "settings": separators or {},
            "tokenizer": tokenizer,
            "content": {
                "documents": len(documents),
                "tokens": sum(chunk.tokens for chunk in chunks),
                "text_bytes": text_bytes,
                "chunks": len(chunks),
                "dtype": dtype,
            },
            "files": [file_entry(directory, chunk.name) for chunk in chunks],
            "inputs": [],
        },
    )


def tokenize_dataset(directory: Path, texts: list[str], tokenizer_dir: Path) -> Path:
    """directory/train and directory/val; every tenth document is for validation."""
    from tokenizers import Tokenizer

    from utils.tokenizer import read_tokenizer_info

    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    info = read_tokenizer_info(tokenizer_dir)
    separators = {"bos_id": info.bos_id if info.adds_bos else None, "eos_id": info.eos_id if info.adds_eos else None}
    encoded = [np.array(encoding.ids) for encoding in tokenizer.encode_batch(texts)]
    for split, wanted in (("train", lambda i: i % 10 != 0), ("val", lambda i: i % 10 == 0)):
        chosen = [i for i in range(len(texts)) if wanted(i)]
        text_bytes = sum(len(texts[i].encode()) for i in chosen)
        write_dataset(directory / split, [encoded[i] for i in chosen], text_bytes, info.record(), separators=separators)
    return directory


def write_config(path: Path, **changes) -> Path:
    """A YAML for a tiny run; `changes` are top-level keys, dictionaries are merged into the defaults' ones."""
    config = {
        "model_config": TINY_MODEL,
        "num_devices": 2,
        "parallel": {"cpu_threads": 1},
        "train": {
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "max_steps": 6,
            "save_interval": 3,
            "lr_warmup_steps": 2,
            "min_lr": 1e-4,
        },
        "eval": {"interval": 3, "max_iters": 2},
        "optimizer": {"lr": 3e-3},
    }
    for key, value in changes.items():
        if isinstance(value, dict) and key != "model_config":
            config[key] = {**config.get(key, {}), **value}
        else:
            config[key] = value
    path.write_text(yaml.safe_dump(config))
    return path
