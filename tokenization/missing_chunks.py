"""What is missing of a published directory of chunks, and what makes it again.

OUT/train/moved.json      where merge_files.py --mode=move took the chunks, so that nobody takes them for lost; null
                          where they are lost there too
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tokenization.job import SPLITS, UnitRecord
from utils import console
from utils.chunks import INDEX_NAME, Chunk
from utils.errors import UserError
from utils.files import write_json
from utils.manifest import MANIFEST_NAME, damaged_files, read_manifest, some

PLAN_NAME = "plan.json"
MADE_FROM = "made_from"  # key of plan.json: the directories that the command named
MOVED_NAME = "moved.json"


@dataclasses.dataclass(frozen=True)
class LostChunk:
    """A chunk that a finished output should have and has not, or has with another size."""

    path: Path
    chunk: Chunk
    split: str

    @property
    def unit(self) -> int:
        return int(re.match(r"chunk-(\d+)-", self.path.name)[1])


def missing_of_output(output_dir: Path, not_moved: Collection[str] = ()) -> tuple[list[Path], list[LostChunk]]:
    """Compare a finished OUT with its manifests, by sizes.

    Args:
        not_moved: the splits that no earlier version moved, which left no note; others without any chunk are taken for
            moved.

    Returns:
        indexes and manifests that are missing or not readable, and chunks that are lost.
    """
    unread: list[Path] = []
    lost: list[LostChunk] = []
    for split in SPLITS:
        found: list[LostChunk] = []
        num_chunks = 0
        for folder in _folders_of(output_dir / split, unread):
            manifest = manifest_or_none(folder)
            if manifest is None or not (folder / INDEX_NAME).is_file():
                unread.append(folder / (MANIFEST_NAME if manifest is None else INDEX_NAME))
                continue
            num_chunks += len(manifest["files"])
            found += [
                LostChunk(folder / entry["name"], chunk_of(entry), split)
                for entry in manifest["files"]
                if damaged_files(folder, [entry], checksums=False)
            ]
        lost += _without_moved(output_dir / split, found, num_chunks, split not in not_moved)
    return unread, lost


def chunk_of(entry: dict[str, Any]) -> Chunk:
    """The chunk that an entry of a manifest's list of files stands for."""
    return Chunk(**{field.name: entry.get(field.name) for field in dataclasses.fields(Chunk)})


def _folders_of(split_dir: Path, unread: list[Path]) -> list[Path]:
    above = manifest_or_none(split_dir)
    if above is None:
        unread.append(split_dir / MANIFEST_NAME)
        return []
    named = above.get("folders")
    if named is None:  # merged in place, by --mode=index: its own manifest names the chunks as FOLDER/NAME
        named = sorted({os.path.dirname(entry["name"]) for entry in above["files"]})
    return [split_dir / name for name in named]


def manifest_or_none(directory: Path) -> dict[str, Any] | None:
    """Its manifest, if it has one that can be read."""
    try:
        return read_manifest(directory)
    except UserError:  # not readable: it is made again
        return None


def _without_moved(split_dir: Path, found: list[LostChunk], num_chunks: int, may_be_moved: bool) -> list[LostChunk]:
    """Those that merge_files.py --mode=move did not take to a dataset that still has them."""
    if not found:
        return []
    targets = moves_from(split_dir)
    gone = [target for target in targets if manifest_or_none(target) is None]
    is_noted = (split_dir / MOVED_NAME).exists()
    if may_be_moved and not is_noted and len(found) == num_chunks > 1:
        why = "if merge_files.py --mode=move took them, all is well"
    elif gone:
        why = f"merge_files.py --mode=move took them to {gone[0]}, where they are not now"
    else:
        there = moved_chunks(targets)
        return [lost for lost in found if there.get(lost.chunk.name) != lost.chunk]
    console.warn(
        f"{split_dir}: {console.counted(len(found), 'chunk')} of {num_chunks:,} are not here; {why}. If they are lost, "
        f"delete {split_dir.parent / MANIFEST_NAME}, and this command makes them again."
    )
    return []


def recorded_chunks(dataset: dict[str, Any], target: Path | None = None) -> dict[str, Chunk]:
    """The source's chunks that a merged dataset has, as files, gathered in larger ones, or packed into blocks.

    Args:
        dataset: its manifest.
        target: where it is, to leave out what is not there any more.
    """
    if "packing" in dataset:  # their documents are spread over its files: if one is missing, nothing is whole
        is_whole = target is None or not damaged_files(target, dataset["files"], checksums=False)
        return {entry["name"]: chunk_of(entry) for entry in dataset["packed_from"]} if is_whole else {}
    here = [e for e in dataset["files"] if target is None or not damaged_files(target, [e], checksums=False)]
    return {part["name"]: chunk_of(part) for entry in here for part in entry.get("gathered", [entry])}


def moved_to(split_dir: Path) -> Path | None:
    """The dataset that --mode=move took the chunks of OUT/train or OUT/val to."""
    try:
        target = json.loads((split_dir / MOVED_NAME).read_bytes())["target_dir"]
        return None if target is None else Path(target)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def moves_from(split_dir: Path) -> list[Path]:
    """The datasets that --mode=move took its chunks to, one after another: each is the next one's source."""
    targets: list[Path] = []
    while (target := moved_to(targets[-1] if targets else split_dir)) is not None and target not in targets:
        targets.append(target)
    return targets


def moved_chunks(targets: list[Path]) -> dict[str, Chunk]:
    """The source's chunks that these datasets still have, by sizes."""
    found: dict[str, Chunk] = {}
    for target in targets:
        if (dataset := manifest_or_none(target)) is not None:
            found |= recorded_chunks(dataset, target)
    return found


def write_moved(split_dir: Path, target: Path | None) -> None:
    write_json(split_dir / MOVED_NAME, {"target_dir": None if target is None else os.path.abspath(target)})


def put_back(record: UnitRecord, scratch: Path, lost: list[LostChunk]) -> None:
    """Move the lost chunks of a unit that was tokenized again from `scratch` to where they belong.

    Raises:
        UserError: they are not what they were; nothing is moved then.
    """
    mine = [chunk for chunk in lost if chunk.unit == record.unit]
    made = {(split, chunk.name): chunk for split in SPLITS for chunk in getattr(record, split).chunks}
    other = [lost.path for lost in mine if made.get((lost.split, lost.chunk.name)) != lost.chunk]
    if other:
        raise UserError(
            f"--input_dir: the text of {some(list(map(str, other)))} now gives other tokens than when it was made. "
            "The input files have changed, or the packages that encode them; nothing was replaced. Bring back what it "
            "was made from, or give a new --output_dir."
        )
    for chunk in mine:
        chunk.path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(scratch / chunk.split / record.folder / chunk.chunk.name, chunk.path)


def optimize_command(source: Path, settings: dict[str, Any]) -> str:
    """The command that makes the chunks below OUT/train or OUT/val, or again those that are missing.

    Args:
        settings: those of a manifest; they are complete, so the command gives the same chunks.
    """
    output_dir = next((path for path in list(source.absolute().parents)[:2] if (path / PLAN_NAME).exists()), None)
    try:
        made_from = json.loads((output_dir / PLAN_NAME).read_bytes())[MADE_FROM]
    except (OSError, ValueError, KeyError, TypeError):  # none there, or of an earlier version
        made_from = {}
    flags = {
        "input_dir": made_from.get("input_dir", "PARQUET"),
        "tokenizer_dir": made_from.get("tokenizer_dir", "CKPT"),
        "output_dir": output_dir or source.absolute().parent,
    }
    for name in ("bos", "eos"):
        if f"{name}_id" in settings:
            flags[f"add_{name}"] = settings[f"{name}_id"] is not None
    for name in ("text_column", "val_fraction", "parse_special_tokens", "shuffle_seed", "limit_documents",
                 "on_bad_file", "chunk_tokens", "unit_bytes"):  # fmt: skip
        value = settings.get(name)
        if not (value is None or value is False or value in ("text", "fail")):  # defaults; 0 is none
            flags[name] = value
    words = [f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in flags.items()]
    return shlex.join(["python", "optimize_dataset.py", *words])
