"""Files that are either whole or absent: temporary name in the same directory, fsync, rename."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

# What has such a name was left by a process that died; the same step may delete it.
TEMPORARY_PREFIX = ".tmp-"
_TEMPORARY_NAME = re.compile(re.escape(TEMPORARY_PREFIX) + r".+-[0-9a-f]{12}")

_NO_ROOM_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # noticed by a write, which knows no name


def temporary_sibling(path: str | os.PathLike) -> Path:
    """A fresh name in the directory of `path`, so that renaming to `path` is atomic."""
    path = Path(path)
    return path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{uuid.uuid4().hex[:12]}")


def is_temporary(name: str) -> bool:
    """Whether `temporary_sibling` makes such names; similar ones belong to somebody else."""
    return _TEMPORARY_NAME.fullmatch(name) is not None


def fsync_directory(directory: str | os.PathLike) -> None:
    """Make renames inside `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def held_lock(directory: Path) -> Iterator[bool]:
    """Hold the lock of a directory; yields False where another process holds it.

    The kernel frees it when its process dies. File systems without locks on directories (some NFS) count as free.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        is_free = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            is_free = not isinstance(error, BlockingIOError)
        yield is_free
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a binary file that appears under `path` when the block ends without an error."""
    path = Path(path)
    temporary = temporary_sibling(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if getattr(error, "errno", None) in _NO_ROOM_ERRNOS and error.filename is None:
            error.filename = str(path)
        raise
    fsync_directory(path.parent)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write atomically, with sorted keys, so that equal values give equal bytes.

    It is encoded piece by piece, since a manifest can list a million files.
    """
    with atomic_write(path) as file:
        for piece in json.JSONEncoder(indent=1, sort_keys=True, ensure_ascii=False).iterencode(value):
            file.write(piece.encode())
        file.write(b"\n")


def remove_temporaries(directory: str | os.PathLike) -> list[str]:
    """Delete what an interrupted process left in `directory` (not below); returns the names."""
    removed = []
    for entry in os.scandir(directory):
        if is_temporary(entry.name):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                Path(entry.path).unlink(missing_ok=True)
            removed.append(entry.name)
    return removed


def checksum(path: str | os.PathLike) -> str:
    """XXH3-128 of the file, as 32 hexadecimal digits."""
    import xxhash

    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def free_bytes(path: str | os.PathLike) -> int:
    """Free space of the file system that `path` lies on, or will lie on once it is made."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
