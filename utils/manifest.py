"""manifest.json: what made a directory, what is in it, and what that was made from.

Every directory that a step publishes has one, written last: without it the directory does not exist
for the next step. Its shape:

    {
      "schema_version": 1,
      "kind": "tokens" | "dataset" | "checkpoint" | "export" | "corpus" | "tokenizer" | "task",
      "made_by": {"script": "merge_files.py", "versions": {"litdata": "0.2.76", ...}},
      "settings": {...},            what was asked for, as far as it shapes the result
      "tokenizer": {"sha256": ..., "vocab_size": ..., "bos_id": ..., "eos_id": ...},
      "content": {...},             counts with units: documents, tokens, text_bytes and so on
      "files": [{"name": ..., "bytes": ..., "xxh3_128": ...}, ...],    of exports "sha256" too
      "inputs": [{...}, ...]        what it was made from: input files, or manifests of directories
    }

An input that is itself a published directory is embedded with its whole manifest except the list of files
(`as_input`). So the manifest of an exported model leads back to the files of text by itself, wherever
it has been copied to. Nothing that changes from run to run (time, host, number of workers) goes in.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from utils.errors import UserError
from utils.files import checksum, is_temporary, write_json

MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION = 1
LISTS_OF_FILES = ("files", "packed_from")


def made_by(script: str, *packages: str) -> dict[str, Any]:
    """The script and the released versions of the packages that shaped its output."""
    return {"script": script, "versions": {name: importlib.metadata.version(name) for name in sorted(packages)}}


def write_manifest(directory: str | os.PathLike, manifest: dict[str, Any]) -> None:
    """Write `directory`/manifest.json atomically; call it after everything else in the directory is on disk."""
    write_json(Path(directory) / MANIFEST_NAME, {"schema_version": SCHEMA_VERSION, **manifest})


def read_manifest(directory: str | os.PathLike, kind: str | None = None) -> dict[str, Any] | None:
    """The manifest of `directory`, or None where it has none.

    Raises:
        UserError: the file is not a manifest that this version reads, or is of another kind.
    """
    path = Path(directory) / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}). Make the directory again.") from error
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path}: schema_version is {version!r}, this toolkit reads {SCHEMA_VERSION}. "
            "Use the version of the toolkit that made the directory, or make it again."
        )
    types = {"kind": str, "settings": dict, "content": dict, "files": list, "inputs": list}
    wrong = [key for key, expected in types.items() if not isinstance(manifest.get(key), expected)]
    wrong = wrong or [
        f"an entry of {key}" for key in ("files", "inputs") if not all(_is_entry(key, entry) for entry in manifest[key])
    ]
    if wrong:
        raise UserError(f"{path}: {', '.join(wrong)} missing or of the wrong type. Make the directory again.")
    if kind is not None and manifest["kind"] != kind:
        raise UserError(f"{path}: this directory holds '{manifest['kind']}', expected '{kind}'.")
    return manifest


def _is_entry(key: str, entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    return key == "inputs" or (isinstance(entry.get("name"), str) and isinstance(entry.get("bytes"), int))


def as_input(directory: str | os.PathLike) -> dict[str, Any]:
    """The entry of a published directory among the inputs of what is made from it."""
    manifest = read_manifest(directory)
    if manifest is None:
        return {"path": str(directory), "manifest": None}
    digest = hashlib.sha256((Path(directory) / MANIFEST_NAME).read_bytes()).hexdigest()
    kept = {key: value for key, value in manifest.items() if key not in LISTS_OF_FILES}
    return {"path": str(directory), "sha256": digest, "manifest": kept}


def file_entry(directory: str | os.PathLike, name: str) -> dict[str, Any]:
    path = Path(directory) / name
    return {"name": name, "bytes": path.stat().st_size, "xxh3_128": checksum(path)}


def safe_member(directory: str | os.PathLike, name: Any) -> Path:
    """The path of the file `name` of `directory`; raises UserError when the name leads out of it."""
    directory = Path(directory)
    if not isinstance(name, str) or not name or "\\" in name or "\0" in name:
        raise UserError(f"{directory}: {name!r} is not a file name.")
    pure = PurePosixPath(name)
    path = directory / pure
    inside = not pure.is_absolute() and ".." not in pure.parts
    if inside and (len(pure.parts) > 1 or path.is_symlink()):
        # Only a link can lead out now. Plain names are not resolved: there can be 100,000, and each costs a call.
        inside = path.resolve().is_relative_to(directory.resolve())
    if not inside:
        raise UserError(f"{directory}: the name {name!r} leads out of the directory; refused.")
    return path


def damaged_files(directory: str | os.PathLike, entries: list[dict[str, Any]], checksums: bool = True) -> list[str]:
    """Compare files with their entries in a manifest; returns one line per difference, naming the file."""
    problems = []
    for entry in entries:
        try:
            path = safe_member(directory, entry.get("name") if isinstance(entry, dict) else entry)
            size = path.stat().st_size
        except UserError as error:
            problems.extend(error.problems)
        except OSError:
            problems.append(f"{Path(directory) / entry['name']}: missing")
        else:
            if size != entry.get("bytes"):
                problems.append(f"{path}: {size} bytes, the manifest says {entry.get('bytes')}")
            elif checksums and entry.get("xxh3_128", "") is not None and checksum(path) != entry.get("xxh3_128"):
                problems.append(f"{path}: checksum differs from the manifest's")
    return problems


def differences(before: Any, now: Any, name: str = "") -> dict[str, str]:
    """What differs between two sets of settings: {"train.min_lr": "train.min_lr: was 0.1, is 0.2"} and so on."""
    if isinstance(before, dict) and isinstance(now, dict):
        prefix = f"{name}." if name else ""
        parts = [differences(before.get(key), now.get(key), prefix + key) for key in sorted({*before, *now})]
        return {changed: text for part in parts for changed, text in part.items()}
    if isinstance(before, list) and isinstance(now, list) and all(isinstance(e, dict) for e in [*before, *now]):
        was, is_now = ({entry.get("path"): entry for entry in entries} for entries in (before, now))
        kinds = {"missing now": was.keys() - is_now.keys(), "new": is_now.keys() - was.keys()}
        kinds["changed"] = {path for path in was.keys() & is_now.keys() if was[path] != is_now[path]}
        changed = [f"{kind}: {some(sorted(map(str, paths)))}" for kind, paths in kinds.items() if paths]
        return {name: f"{name} {'; '.join(changed)}"} if changed else {}
    return {} if before == now else {name: f"{name}: was {before!r}, is {now!r}"}


def some(names: list[str]) -> str:
    """The first five of them."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def claim(
    directory: Path, flag: str, kind: str, identity: dict[str, Any], is_own: Callable[[str], bool] = lambda path: False
) -> dict[str, Any] | None:
    """Make sure that a step may fill `directory`: it is new, empty, or what the same command began or finished.

    Args:
        identity: the parts of the manifest that tell one result from another.
        is_own: whether a file, or an empty directory with a "/" at its end, belongs to an unfinished result of this
            step; named by its path below `directory`.

    Returns:
        The manifest of the finished result, or None while there is work to do.

    Raises:
        UserError: it is a file, holds the result of other settings, or anything else; nothing is touched.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{flag}={directory}: is a file. Give a directory that is new or empty.")
    if directory.is_symlink() and not directory.exists():
        raise UserError(f"{flag}={directory}: is a link to {os.readlink(directory)}, which is missing. Make it first.")
    manifest = read_manifest(directory)
    if manifest is not None and manifest["kind"] == kind:
        if changed := differences({key: manifest.get(key) for key in identity}, identity):
            raise UserError(
                f"{flag}={directory}: was made with something else; nothing was touched. Give another directory, or "
                "the same settings as before:\n  " + "\n  ".join(changed.values())
            )
        return manifest
    foreign = [p for p in _contents(directory) if not (is_own(p) or any(map(is_temporary, Path(p).parts)))]
    if foreign:
        raise UserError(
            f"{flag}={directory}: holds what this command did not write ({some(sorted(foreign))}); nothing was "
            "touched. Give a directory that is new or empty."
        )
    return None


def _contents(directory: Path) -> Iterator[str]:
    for root, folders, names in os.walk(directory):
        below = os.path.relpath(root, directory)
        yield from (os.path.normpath(os.path.join(below, name)) for name in names)
        if not folders and not names and below != ".":
            yield f"{below}/"
