"""Writes texts as every kind of file that step 1 reads; the name says which."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from conftest import write_parquet

FORMATS = {"file": pa.ipc.new_file, "stream": pa.ipc.new_stream}
TYPES = {
    "string": pa.string(), "large_string": pa.large_string(), "string_view": pa.string_view(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
}  # fmt: skip


def compressed(data: bytes, ending: str) -> bytes:
    return gzip.compress(data) if ending == "gz" else pa.compress(data, codec="zstd", asbytes=True)


def write_jsonl(path: Path, texts: Sequence[str | None], column: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"id": i, column: text}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(texts))
    content = "".join(lines).encode()
    path.write_bytes(content if path.suffix == ".jsonl" else compressed(content, path.suffix[1:]))


def write_arrow(
    path: Path, texts: Sequence[str | None], form: str = "stream", kind: str = "string", rows: int = 20, codec=None
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = pa.array(texts, pa.string())
    column = values.dictionary_encode() if kind == "dictionary" else values.cast(TYPES[kind])
    ids = pa.array(range(len(texts)))
    table = pa.table({"meta": pa.StructArray.from_arrays([ids, ids], ["a", "b"]), "text": column, "id": ids})
    with FORMATS[form](path, table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
        writer.write_table(table, max_chunksize=rows)


def write_texts(path: Path, texts: Sequence[str | None]) -> None:
    """As the ending says: `.parquet`, `.jsonl`, `.jsonl.gz`, `.jsonl.zst`, `.arrow` (a stream), `.file.arrow`."""
    if path.suffix == ".parquet":
        write_parquet(path, texts, row_group_size=25)
    elif path.suffix == ".arrow":
        write_arrow(path, texts, "file" if path.suffixes[-2:] == [".file", ".arrow"] else "stream")
    else:
        write_jsonl(path, texts)


def write_several(directory: Path, name: str, ending: str, texts: Sequence[str | None]) -> None:
    """One file, and of a compressed kind some, for a unit takes such a file as a whole."""
    share = 75 if ending.endswith((".gz", ".zst")) else len(texts)
    for first in range(0, len(texts), share):
        write_texts(directory / f"{name}-{first:03}{ending}", texts[first : first + share])
