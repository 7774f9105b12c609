"""What the name of an input file says about it."""

from __future__ import annotations

from typing import Any

from utils import console

PARQUET_ENDINGS = (".parquet",)
JSONL_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst")
ARROW_ENDINGS = (".arrow",)


def is_parquet(path: str) -> bool:
    return path.lower().endswith(PARQUET_ENDINGS)


def is_arrow(path: str) -> bool:
    return path.lower().endswith(ARROW_ENDINGS)


def is_jsonl(path: str) -> bool:
    return path.lower().endswith(JSONL_ENDINGS)


def compression_of(path: str) -> str | None:
    """Arrow's name of the compression of a JSON lines file; None: it has none."""
    return {"gz": "gzip", "zst": "zstd"}.get(path.lower().rpartition(".")[2])


def is_input(name: str) -> bool:
    return is_parquet(name) or is_arrow(name) or is_jsonl(name)


def describe_inputs(inputs: list[dict[str, Any]]) -> str:
    """How many files of each kind, and of how many rows where that is known.

    Args:
        inputs: a dict per file with its `path` and, but for JSON lines, its number of `rows`.
    """
    of_kind = {"parquet file": [], "Arrow file": [], "JSON lines file": []}
    for entry in inputs:
        kind = "JSON lines" if is_jsonl(entry["path"]) else "Arrow" if is_arrow(entry["path"]) else "parquet"
        of_kind[f"{kind} file"].append(entry.get("rows"))
    kinds = []
    for kind, rows in of_kind.items():
        if rows:
            known = "" if None in rows else f", {sum(rows):,} rows"
            kinds.append(f"{console.counted(len(rows), kind)}{known}")
    return ", and ".join(kinds) or "no file"
