"""The files of the standard library and of the installed packages, the same on every machine that has the same ones."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
import sysconfig
from pathlib import Path

MAX_FILE_BYTES = 2_000_000


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file of the environment that text is taken from."""

    path: str
    """Where it is on this machine; never written anywhere."""
    name: str
    """stdlib/... or site-packages/..., the same wherever the environment is."""
    package: str
    """NAME@VERSION"""
    bytes: int


def list_source_files(suffixes: set[str]) -> list[SourceFile]:
    """All files of the standard library and of the installed distributions with one of `suffixes`.

    Files count as installed when the distribution's RECORD names them, so that caches and what a user has put beside
    them stay out. The order is by a hash of the name: it mixes the packages and does not depend on the file system.
    """
    stdlib = sysconfig.get_path("stdlib")
    python = f"python@{'.'.join(map(str, sys.version_info[:3]))}"
    found = []
    for root, directories, names in os.walk(stdlib):
        directories[:] = [name for name in directories if name not in ("site-packages", "__pycache__", "config")]
        for name in names:
            relative = os.path.relpath(os.path.join(root, name), stdlib).replace(os.sep, "/")
            found.append((os.path.join(root, name), f"stdlib/{relative}", python))
    for site in sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}):
        for distribution in sorted(entry for entry in os.listdir(site) if entry.endswith(".dist-info")):
            package = distribution.removesuffix(".dist-info").replace("-", "@")
            try:
                record = Path(site, distribution, "RECORD").read_text(encoding="utf-8")
            except OSError:
                continue  # installed by something other than pip
            for line in record.splitlines():
                relative = line.rsplit(",", 2)[0].strip('"')
                if not relative.startswith(("..", "/")):
                    found.append((os.path.join(site, relative), f"site-packages/{relative}", package))

    files = []
    for path, name, package in found:
        suffix = "METADATA" if name.endswith("/METADATA") else os.path.splitext(name)[1]
        if suffix not in suffixes or _is_machine_made(name):
            continue
        try:
            size = os.path.getsize(path)
        except OSError:
            continue
        if 0 < size <= MAX_FILE_BYTES:
            files.append(SourceFile(path, name, package, size))
    files.sort(key=lambda file: hashlib.blake2b(file.name.encode(), digest_size=8).digest())
    return files


def _is_machine_made(name: str) -> bool:
    """Files that describe the machine, not the package."""
    base = name.rsplit("/", 1)[-1]
    return base.startswith("_sysconfigdata") or base in ("RECORD", "direct_url.json") or "/__pycache__/" in name


def read_source_file(file: SourceFile) -> str | None:
    """Its text; None where it cannot be read or is no UTF-8."""
    try:
        return Path(file.path).read_bytes().decode("utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError):
        return None


def machine_paths() -> list[str]:
    """Text with one of these paths describes this machine and stays out; packages that were built here may hold some.

    Whole paths only: documentation rightly mentions /usr/local, which is the prefix of many Pythons.
    """
    candidates = {*(sysconfig.get_path(kind) for kind in ("stdlib", "purelib", "platlib")), str(Path.home())}
    return sorted(path for path in candidates if path.count("/") >= 2)
