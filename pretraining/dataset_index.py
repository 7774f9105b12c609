"""Whether the index of a dataset is the one that was published with its manifest."""

from __future__ import annotations

from typing import Any

from utils.chunks import Index
from utils.errors import UserError


def check_index_agrees(index: Index, manifest: dict[str, Any]) -> None:
    """Raises UserError where index.json and the manifest beside it do not list the same chunks in the same order."""
    listed = [entry for entry in manifest.get("files", []) if isinstance(entry, dict)]
    names = [entry.get("name") for entry in listed]
    problem = None
    dtype = manifest["content"].get("dtype", index.dtype)
    if dtype != index.dtype:
        problem = f"index.json says that tokens are {index.dtype}, manifest.json {dtype}"
    elif len(listed) != len(index.chunks):
        problem = f"index.json lists {len(index.chunks)} chunks, manifest.json {len(listed)}"
    elif names != [chunk.name for chunk in index.chunks]:
        place = next(i for i, chunk in enumerate(index.chunks) if chunk.name != names[i])
        problem = f"chunk {place} is {index.chunks[place].name} in index.json and {names[place]} in manifest.json"
    for chunk, entry in zip(index.chunks, listed):
        for field in ("bytes", "tokens", "documents"):
            if problem is None and entry.get(field, getattr(chunk, field)) != getattr(chunk, field):
                problem = (
                    f"{chunk.name} has {getattr(chunk, field)} {field} in index.json, {entry[field]} in manifest.json"
                )
    if problem is not None:
        raise UserError(
            f"--dataset_path={index.directory}: {problem}. One of them was changed: merge the dataset again."
        )
