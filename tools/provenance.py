"""What `tools.verify` finds: a tree of directories, and what of each agrees, is changed, missing or cannot be told."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from export.bill_of_materials import size_and_hashes
from utils import console
from utils.errors import UserError
from utils.files import checksum
from utils.manifest import LISTS_OF_FILES, MANIFEST_NAME, differences, safe_member

AGREES, CHANGED, MISSING = "agrees", "CHANGED", "MISSING"
UNKNOWN, ABSENT = "cannot tell", "not here"
"""UNKNOWN: nothing that is here says so. ABSENT: a whole directory of an earlier step, which need not be here."""
_WRONG = (CHANGED, MISSING)
_THREADS = 8  # hashing releases the interpreter's lock


@dataclasses.dataclass
class Node:
    """One directory, and those that it was made from."""

    title: str
    lines: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    """(status, text)."""
    children: list[Node] = dataclasses.field(default_factory=list)

    def add(self, status: str, text: str) -> None:
        self.lines.append((status, text))

    def expect(self, what: str, found: Any, expected: Any, source: str) -> bool:
        """Add a line on a difference between what is here and what `source` says; returns whether they are equal."""
        unlike = list(_unlike(found, expected, what))
        for name, here, wanted in unlike:
            if isinstance(here, list) and isinstance(wanted, list) and any(isinstance(e, dict) for e in here + wanted):
                self.add(CHANGED, f"{next(iter(differences(wanted, here, name).values()))}; compared with {source}")
            else:
                self.add(CHANGED, f"{name}: {_short(here)}, {source} says {_short(wanted)}")
        return not unlike

    def collect(self, check: Callable, *args: Any, **kwargs: Any) -> Any:
        """Call `check`; what it finds wrong becomes lines, and None is returned then.

        Manifests are read as they are, so one that somebody has cut down shows as a missing key.
        """
        try:
            return check(*args, **kwargs)
        except UserError as error:
            for problem in error.problems:
                self.add(CHANGED, problem)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            self.add(CHANGED, f"a manifest here lacks what it should have ({type(error).__name__}: {error})")
        return None

    def is_sound(self) -> bool:
        return not any(status in _WRONG for status, _ in self.lines)

    def walk(self) -> Iterator[Node]:
        yield self
        for child in self.children:
            yield from child.walk()

    def render(self, first: str = "", rest: str = "") -> Iterator[str]:
        """The tree, line by line."""
        yield first + self.title
        bar = "|   " if self.children else "    "
        for status, text in self.lines:
            yield f"{rest}{bar}{status:<13}{text}"
        for i, child in enumerate(self.children):
            last = i + 1 == len(self.children)
            yield from child.render(f"{rest}{'`-- ' if last else '|-- '}", rest + ("    " if last else "|   "))


def _unlike(found: Any, expected: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    """(name, found, expected) of each value that differs, as settings.val_fraction."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in sorted({*found, *expected}):
            yield from _unlike(found.get(key), expected.get(key), f"{name}.{key}")
    elif found != expected:
        yield name, found, expected


def _short(value: Any) -> str:
    """As it is written, but hashes by their beginnings."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:20]}...{text[-1]}"


def count_statuses(nodes: Sequence[Node]) -> dict[str, int]:
    lines = [status for node in nodes for below in node.walk() for status, _ in below.lines]
    return {status: lines.count(status) for status in (AGREES, CHANGED, MISSING, UNKNOWN, ABSENT)}


_checksums: dict[tuple[int, int, int, int], str] = {}


def cached_checksum(path: Path) -> str:
    """XXH3-128 of a file; one that has several names, as merged chunks have, is read once."""
    status = path.stat()
    identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    if identity not in _checksums:
        _checksums[identity] = checksum(path)
    return _checksums[identity]


def in_threads(check: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        return list(pool.map(check, items))


def _check_file(directory: Path, entry: dict[str, Any]) -> tuple[str, str] | None:
    try:
        path = safe_member(directory, entry["name"])
        size = path.stat().st_size
        if size != entry["bytes"]:
            return CHANGED, f"{entry['name']}: {size:,} bytes, the manifest says {entry['bytes']:,}"
        hashes = size_and_hashes(path) if "sha256" in entry else {"xxh3_128": cached_checksum(path)}
        if hashes["xxh3_128"] != entry.get("xxh3_128"):
            return CHANGED, f"{entry['name']}: its content is not the one whose checksum the manifest has"
        if hashes.get("sha256") != entry.get("sha256"):  # an export's files have both
            return CHANGED, f"{entry['name']}: its content is not the one whose SHA-256 the manifest has"
    except UserError as error:
        return CHANGED, str(error)
    except FileNotFoundError:
        return MISSING, f"{entry['name']}: the manifest lists it"
    except OSError as error:
        return MISSING, f"{entry['name']}: cannot be read ({error.strerror})"
    return None


def check_files(node: Node, directory: Path, entries: list[dict[str, Any]], unlisted: Sequence[str] = ()) -> None:
    """Compare every byte of the files that a manifest lists.

    Args:
        unlisted: names of files that may be there beside them.
    """
    found = [line for line in in_threads(functools.partial(_check_file, directory), entries) if line]
    node.lines.extend(found)
    if not found:
        size = console.human_bytes(sum(entry["bytes"] for entry in entries))
        node.add(AGREES, f"{console.counted(len(entries), 'file')}, {size}: sizes and checksums")
    known = {entry["name"] for entry in entries} | {MANIFEST_NAME, *unlisted}
    others = sorted(
        os.path.relpath(os.path.join(root, name), directory) for root, _, names in os.walk(directory) for name in names
    )
    for name in others:
        if name not in known:
            node.add(UNKNOWN, f"{name}: the manifest does not list it, so nothing says what it should be")


def check_embedded(node: Node, recorded: dict[str, Any], directory: Path, manifest: dict[str, Any]) -> None:
    """Compare the manifest of an input with its copy in the manifest of what was made from it."""
    found = hashlib.sha256((directory / MANIFEST_NAME).read_bytes()).hexdigest()
    if found == recorded.get("sha256"):
        node.add(AGREES, f"{MANIFEST_NAME}: SHA-256 {found[:12]}... as recorded by what was made from it")
        return
    now = {key: value for key, value in manifest.items() if key not in LISTS_OF_FILES}
    changed = differences(recorded.get("manifest") or {}, now)
    if not changed:
        changed = {"files": "its list of files differs: another result of the same settings"}
    for text in changed.values():
        node.add(CHANGED, f"{MANIFEST_NAME} is not the one that this was made from: {text}")
