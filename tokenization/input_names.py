"""What the name of an input file says about it."""

from __future__ import annotations

PARQUET_ENDINGS = (".parquet",)
JSONL_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst")
ARROW_ENDINGS = (".arrow",)


def is_arrow(path: str) -> bool:
    return path.lower().endswith(ARROW_ENDINGS)


def is_jsonl(path: str) -> bool:
    return path.lower().endswith(JSONL_ENDINGS)


def compression_of(path: str) -> str | None:
    """Arrow's name of the compression of a JSON lines file; None: it has none."""
    return {"gz": "gzip", "zst": "zstd"}.get(path.lower().rpartition(".")[2])


def is_input(name: str) -> bool:
    return name.lower().endswith(PARQUET_ENDINGS) or is_arrow(name) or is_jsonl(name)
