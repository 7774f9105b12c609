"""Finds the directories that something was made from: where a manifest says, or near what was made from them.

A checkpoint's manifest names its datasets' directories, an export's the checkpoint. Where the tokens of a dataset and
the input files of tokens lie is not recorded, for it does not shape them: they are looked for by content among the
neighbours, up to three directories above.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.manifest import MANIFEST_NAME, read_manifest

_LEVELS = 3


def manifest_or_none(directory: Path) -> dict[str, Any] | None:
    try:
        return read_manifest(directory)
    except (UserError, OSError):
        return None


def _neighbours(directory: Path, levels: int = _LEVELS) -> Iterator[Path]:
    """The directories above, nearest first, each followed by those in it."""
    for above in list(directory.absolute().parents)[:levels]:
        if above == above.parent:  # the root of the file system is nobody's working directory
            return
        yield above
        try:
            yield from sorted(path for path in above.iterdir() if path.is_dir() and not path.name.startswith("."))
        except OSError:
            continue


def find_recorded(recorded: dict[str, Any], near: Path) -> Path | None:
    """Where an input that a manifest names by `path` and `sha256` is now.

    Whoever has the recorded manifest comes first; else what is at that path; else what is at its ending, below a
    directory above `near`, as when a whole working directory was moved.
    """
    path = Path(recorded["path"])
    above = list(near.absolute().parents)[:_LEVELS]
    endings = [Path(*path.parts[-depth:]) for depth in (3, 2, 1) if len(path.parts) >= depth and path.parts[-depth:]]
    endings = [ending for ending in endings if not ending.is_absolute()]
    candidates = [path, *(root / ending for root in above for ending in endings)]
    there = [candidate for candidate in candidates if candidate.is_dir()]
    with_manifest = [candidate for candidate in there if (candidate / MANIFEST_NAME).is_file()]
    for candidate in with_manifest:
        if hashlib.sha256((candidate / MANIFEST_NAME).read_bytes()).hexdigest() == recorded.get("sha256"):
            return candidate
    return next(iter([*with_manifest, *there]), None)


def find_tokens(dataset: dict[str, Any], near: Path) -> Path | None:
    """The output of optimize_dataset.py with a dataset's inputs that is most like it in settings and tokenizer.

    Where a folder was merged by itself, its manifest names no inputs, and both must be equal.
    """
    best, most = None, 0
    for directory in _neighbours(near):
        if not (directory / MANIFEST_NAME).is_file():
            continue
        manifest = manifest_or_none(directory)
        if manifest is None or manifest["kind"] != "tokens" or "split" in manifest:
            continue
        same_inputs = manifest["inputs"] == dataset["inputs"]
        alike = same_inputs + sum(manifest.get(key) == dataset.get(key) for key in ("settings", "tokenizer"))
        if alike > most and (same_inputs or (not dataset["inputs"] and alike == 2)):
            best, most = directory, alike
    return best


def find_inputs(inputs: list[dict[str, Any]], near: Path) -> Path | None:
    """The directory that holds most of the first input files that a manifest names, in the right size; where none
    does, the only one close by that holds files of all these names."""
    best, most = None, 0
    for directory in _neighbours(near):
        right = sum(_size(directory / entry["path"]) == entry["bytes"] for entry in inputs[:100])
        if right > most:
            best, most = directory, right
    # 000_00000.parquet is a usual name: further away it is another corpus's.
    by_name = [path for path in _neighbours(near, levels=2) if all((path / e["path"]).is_file() for e in inputs[:100])]
    return best or (by_name[0] if len(by_name) == 1 else None)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def find_tokenizer(recorded: dict[str, Any], near: Path) -> Path | None:
    """A directory whose tokenizer.json is the recorded one; failing that, the only one that is published as a
    tokenizer; failing that, the copy in a checkpoint or an export."""
    published, copies = [], []
    for directory in _neighbours(near):
        path = directory / "tokenizer.json"
        if not path.is_file():
            continue
        kind = (manifest_or_none(directory) or {"kind": None})["kind"]
        is_right = hashlib.sha256(path.read_bytes()).hexdigest() == recorded.get("sha256")
        if is_right and kind in (None, "tokenizer"):
            return directory
        if is_right:
            copies.append(directory)
        elif kind == "tokenizer":
            published.append(directory)
    return next(iter([*(published if len(published) == 1 else []), *copies]), None)
