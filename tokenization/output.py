"""The output directory of optimize_dataset.py: what a killed run leaves, how it is found again, what is published.

OUT/plan.json           settings, tokenizer and inputs: what the directory was begun with
OUT/progress.jsonl      a line for each finished unit
OUT/train/0/            chunk-*.bin as the units are finished; at the end index.json and manifest.json
OUT/train/manifest.json, OUT/manifest.json      written last: now the directory is complete
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from tokenization.chunk_index import make_index
from tokenization.input_names import compression_of, is_jsonl
from tokenization.job import CHUNK_PATTERN, SPLITS, Plan, UnitRecord
from tokenization.missing_chunks import MADE_FROM, MOVED_NAME, PLAN_NAME, manifest_or_none
from utils import console
from utils.chunks import INDEX_NAME
from utils.errors import UserError
from utils.files import atomic_write, remove_temporaries, write_json
from utils.manifest import MANIFEST_NAME, claim, differences, made_by, read_manifest, some, write_manifest

PROGRESS_NAME = "progress.jsonl"
QUARANTINE_NAME = "quarantine.jsonl"


def check_output_dir(output_dir: Path) -> None:
    """Refuse a directory with anything in it that this script did not write."""
    begun = (output_dir / PLAN_NAME).exists()
    claim(output_dir, "--output_dir", "tokens", {}, lambda path: begun and _is_ours(path))


def _is_ours(path: str) -> bool:
    folder, name = os.path.split(path)
    if folder:
        return folder.split(os.sep)[0] in SPLITS and bool(
            CHUNK_PATTERN.fullmatch(name) or name in (INDEX_NAME, MANIFEST_NAME, MOVED_NAME, "")
        )
    return name in (PLAN_NAME, PROGRESS_NAME, QUARANTINE_NAME, MANIFEST_NAME)


def _identity(plan: Plan) -> dict[str, Any]:
    return {"settings": plan.settings, "tokenizer": plan.tokenizer, "inputs": plan.inputs}


def was_begun_with(plan: Plan, output_dir: Path) -> bool:
    """Whether `output_dir` was begun with this plan; False where it was not begun.

    Raises:
        UserError: it was begun with other settings, another tokenizer or other inputs; lists the differences.
    """
    path = output_dir / PLAN_NAME
    if not path.exists():
        return False
    try:
        begun = json.loads(path.read_bytes())
        changed = differences({group: begun[group] for group in _identity(plan)}, _identity(plan))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not readable ({error}). Remove {output_dir} and start over.") from error
    if changed:
        raise UserError(
            f"--output_dir={output_dir}: was begun with something else; nothing was touched. Give another "
            "directory, or the same settings as before:\n  " + "\n  ".join(changed.values())
        )
    return True


def resume_or_begin(plan: Plan, output_dir: Path) -> dict[str, Any] | None:
    """Make `output_dir` this plan's, or find that it is.

    Returns:
        The manifest of the finished run, or None while there is work to do.
    """
    if was_begun_with(plan, output_dir):
        return read_manifest(output_dir, "tokens")
    output_dir.mkdir(parents=True, exist_ok=True)
    # For the command that makes lost chunks again; no part of the identity. A URL may hold a key, a path does not.
    made_from = {"tokenizer_dir": os.path.abspath(plan.tokenizer_json.parent)}
    if "://" not in plan.job.input_dir:
        made_from["input_dir"] = plan.job.input_dir
    write_json(output_dir / PLAN_NAME, {**_identity(plan), MADE_FROM: made_from})
    return None


class ProgressFile:
    """progress.jsonl: a line for each finished unit, written when its chunks are on disk. Locked while in use."""

    def __init__(self, output_dir: Path, num_units: int):
        self._output_dir, self._units = output_dir, range(num_units)
        self._file = open(output_dir / PROGRESS_NAME, "a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise UserError(
                f"--output_dir={output_dir}: another optimize_dataset.py writes there. Wait for it or end it."
            ) from error
        except OSError as error:
            console.warn(
                f"{output_dir}: this file system has no locks ({error.strerror}), so make sure yourself that no other "
                "optimize_dataset.py writes there"
            )

    def __enter__(self) -> ProgressFile:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def recorded(self) -> dict[int, UnitRecord]:
        """Records of all units, wherever their chunks are now; cuts off a line that a crash left incomplete."""
        self._file.seek(0)
        records, good_bytes = {}, 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            good_bytes += len(line)
            try:
                record = UnitRecord.from_json(json.loads(line, object_pairs_hook=_with_shared_keys))
            except (ValueError, KeyError, TypeError):
                continue
            if record.unit in self._units:  # another one is no unit of this plan
                records[record.unit] = record
        if self._file.seek(0, os.SEEK_END) > good_bytes:
            self._file.truncate(good_bytes)
        return records

    def finished_units(self) -> dict[int, UnitRecord]:
        """Records of units whose chunks are all there."""
        return {
            unit: record
            for unit, record in self.recorded().items()
            if all(
                _size(self._output_dir / split / record.folder / chunk.name) == chunk.bytes
                for split in SPLITS
                for chunk in getattr(record, split).chunks
            )
        }

    def append(self, record: UnitRecord) -> None:
        self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps(dataclasses.asdict(record), sort_keys=True).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _with_shared_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A hundred thousand records have the same keys: hold each key once."""
    return {sys.intern(key): value for key, value in pairs}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def remove_unrecorded_files(output_dir: Path, records: dict[int, UnitRecord]) -> None:
    """Delete temporaries, and chunks of units that have no record because a worker or node died."""
    remove_temporaries(output_dir)
    for split in SPLITS:
        kept = {(record.folder, chunk.name) for record in records.values() for chunk in getattr(record, split).chunks}
        for folder in _sub_folders(output_dir / split):
            remove_temporaries(folder)
            for name in os.listdir(folder):
                if CHUNK_PATTERN.fullmatch(name) and (folder.name, name) not in kept:
                    os.unlink(folder / name)


def _sub_folders(directory: Path) -> list[Path]:
    """Those of the nodes are directories, not links to somewhere else."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if path.is_dir() and not path.is_symlink())


def check_all_are_here(plan: Plan, records: dict[int, UnitRecord]) -> None:
    """After the work, every unit's chunks must be visible from this machine; raises UserError if they are not."""
    missing = [unit.index for unit in plan.units if unit.index not in records]
    if missing:
        raise UserError(
            f"--output_dir={plan.job.output_dir}: the chunks of {len(missing)} units were written, but cannot be seen "
            f"from this machine (units {some(list(map(str, missing)))}). Give a directory that all nodes mount; the "
            "same command does these units again."
        )


def check_nothing_lost(plan: Plan, records: dict[int, UnitRecord]) -> None:
    """Compare rows, or bytes, that were planned with those that are accounted for; raises RuntimeError: it is a bug."""
    for unit in plan.units:
        record = records[unit.index]
        planned = unit.rows if unit.max_rows is None else unit.max_rows
        if planned is None or any(entry["rows"] is None for entry in record.quarantined):
            continue
        quarantined = sum(entry["rows"] for entry in record.quarantined)
        found = record.documents + record.skipped_null + record.skipped_empty + quarantined
        if found != planned and not (unit.max_rows is not None and found > planned and quarantined):
            raise RuntimeError(f"unit {unit.index}: {planned} rows planned, {found} accounted for")
    if plan.settings["limit_documents"] is None:
        # Of JSON lines the rows are not known before they are read, but each byte belongs to one line of one unit.
        planned_bytes = sum(
            piece.last - piece.first
            for unit in plan.units
            for piece in unit.ranges
            if is_jsonl(plan.job.paths[piece.file_index]) and not compression_of(plan.job.paths[piece.file_index])
        )
        found_bytes = sum(record.line_bytes for record in records.values())
        if found_bytes != planned_bytes:
            raise RuntimeError(f"{planned_bytes} bytes of JSON lines planned, {found_bytes} accounted for")


def publish(plan: Plan, records: dict[int, UnitRecord], output_dir: Path) -> dict[str, Any]:
    """Write an index and a manifest per folder, then one manifest per split, then the run's own, which completes it."""
    common = {
        "kind": "tokens",
        "made_by": made_by("optimize_dataset.py", "gigatoken", "tokenizers", "pyarrow", "litdata"),
        "tokenizer": plan.tokenizer,
        "settings": plan.settings,
        "fingerprint": plan.fingerprint,
    }
    ordered = [records[unit] for unit in sorted(records)]
    totals = {split: _publish_split(plan, ordered, output_dir, split, common) for split in SPLITS}
    quarantined = plan.quarantined + [entry for record in ordered for entry in record.quarantined]
    if quarantined:
        with atomic_write(output_dir / QUARANTINE_NAME) as file:
            for entry in quarantined:
                file.write(json.dumps(entry, sort_keys=True).encode() + b"\n")
    manifest = {
        **common,
        "content": {
            **totals,
            "skipped_null": sum(record.skipped_null for record in ordered),
            "skipped_empty": sum(record.skipped_empty for record in ordered),
            "quarantined": len(quarantined),
            "checked_documents": sum(record.checked_documents for record in ordered),
        },
        "files": [],
        "inputs": plan.inputs,
    }
    write_manifest(output_dir, manifest)
    return manifest


def _publish_split(
    plan: Plan, records: list[UnitRecord], output_dir: Path, split: str, common: dict[str, Any]
) -> dict[str, Any]:
    """Returns the content of the whole split."""
    per_folder: dict[str, list[UnitRecord]] = collections.defaultdict(list)
    for record in records:
        if getattr(record, split).chunks:
            per_folder[record.folder].append(record)
    for folder, folder_records in per_folder.items():
        path = output_dir / split / folder
        path.mkdir(parents=True, exist_ok=True)  # it is there, unless it was deleted from a finished output
        chunks = [chunk for record in folder_records for chunk in getattr(record, split).chunks]
        fingerprint = hashlib.sha256("".join(chunk.xxh3_128 for chunk in chunks).encode()).hexdigest()
        write_json(path / INDEX_NAME, make_index(chunks, plan.job.dtype, plan.job.chunk_tokens, fingerprint))
        content = _content(folder_records, split, plan.job.dtype)
        files = [dataclasses.asdict(chunk) for chunk in chunks]
        write_manifest(path, {**common, "split": split, "content": content, "files": files, "inputs": []})
    for folder in _sub_folders(output_dir / split):
        if folder.name not in per_folder:  # an interrupted run used it, and its units were then done elsewhere
            for name in (INDEX_NAME, MANIFEST_NAME):
                (folder / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.rmdir()
    content = _content(records, split, plan.job.dtype)
    whole = {"content": content, "files": [], "inputs": plan.inputs, "folders": sorted(per_folder)}
    names = {f"{record.folder}/{chunk.name}" for record in records for chunk in getattr(record, split).chunks}
    if not _is_merged_in_place(output_dir / split, names):
        write_manifest(output_dir / split, {**common, "split": split, **whole})
    return content


def _is_merged_in_place(split_dir: Path, names: set[str]) -> bool:
    """Whether merge_files.py --mode=index made a dataset of these chunks of it, whose manifest says more."""
    manifest = manifest_or_none(split_dir)
    return manifest is not None and manifest["kind"] == "dataset" and {e["name"] for e in manifest["files"]} == names


def _content(records: list[UnitRecord], split: str, dtype: str) -> dict[str, Any]:
    parts = [getattr(record, split) for record in records]
    sums = {key: sum(getattr(part, key) for part in parts) for key in ("documents", "tokens", "text_bytes")}
    return {**sums, "chunks": sum(len(part.chunks) for part in parts), "dtype": dtype}
