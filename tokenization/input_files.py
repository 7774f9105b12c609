"""Finds the parquet files of a dataset, each once.

They are at a local path, or at a URL that pyarrow (`s3://`, `gs://`, `abfs://`, `hdfs://`, `hf://datasets/...`) or
fsspec reads.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import os
import stat
from typing import Any

import pyarrow.fs as pafs

from utils import console
from utils.errors import UserError

MAX_LINKS_NAMED = 5


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """A file of the input directory."""

    path: str
    """Relative to the input directory, with '/'."""
    bytes: int
    mtime_ns: int | None = None
    """When it was last written; None: not known, as for remote files."""
    fault: str = ""
    """Why it cannot be used, where its kind or name says so already."""


@functools.cache
def open_input(url: str) -> tuple[Any, str]:
    """The pyarrow file system of `url`, and the path in it.

    Raises:
        UserError: no file system for such a URL, or it does not answer.
    """
    if "://" not in url:
        return pafs.LocalFileSystem(), url
    try:
        return pafs.FileSystem.from_uri(url)
    except Exception as pyarrow_error:
        try:
            return pafs.FileSystem.from_uri(f"fsspec+{url}")
        except Exception as error:
            raise UserError(
                f"--input_dir={url}: neither pyarrow ({pyarrow_error}) nor fsspec ({error}) opens this URL. "
                "Give a local path, or a URL of a file system that one of them knows."
            ) from error


def list_parquet_files(url: str) -> list[FileEntry]:
    """All *.parquet files at and below `url`, each once, sorted by path; hidden ones (., _) are left out.

    Raises:
        UserError: nothing there, or no parquet file in it.
    """
    filesystem, base = open_input(url)
    base = base.rstrip("/") or "/"
    try:
        if isinstance(filesystem, pafs.LocalFileSystem):
            entries, exists = _list_local(base), os.path.lexists(base)
        else:
            entries, exists = _list_remote(filesystem, base)
    except OSError as error:
        raise UserError(
            f"--input_dir={url}: cannot be listed ({error}). Check the path and the credentials."
        ) from error
    if not entries:
        what = "no *.parquet file in it" if exists else "no such directory"
        raise UserError(
            f"--input_dir={url}: {what}. Give the directory of the parquet files, for example made by "
            "`python examples/make_demo_corpus.py` or `hf download HuggingFaceFW/fineweb --repo-type dataset`."
        )
    return sorted(entries, key=lambda entry: entry.path)


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_"))


def _is_parquet(name: str) -> bool:
    return name.lower().endswith(".parquet")


def _list_remote(filesystem: Any, base: str) -> tuple[list[FileEntry], bool]:
    info = filesystem.get_file_info(base)
    if info.type == pafs.FileType.File:
        return [FileEntry(info.base_name, info.size)], True
    found = filesystem.get_file_info(pafs.FileSelector(base, recursive=True, allow_not_found=True))
    entries = []
    for file in found:
        path = file.path[len(base) :].lstrip("/")
        if file.type == pafs.FileType.File and _is_parquet(path) and not any(map(_is_hidden, path.split("/"))):
            entries.append(FileEntry(path, file.size))
    return entries, info.type != pafs.FileType.NotFound or bool(found)


def local_stamp(filesystem: Any, path: str) -> tuple[int, int] | None:
    """Size and time of the last change in ns of a local file; None for a remote one."""
    if not isinstance(filesystem, pafs.LocalFileSystem):
        return None
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _list_local(base: str) -> list[FileEntry]:
    """Walks directories and links to directories. A file or directory that has several names, because of links, is
    taken by the name that passes the fewest links, and of these by the smallest."""
    if not os.path.isdir(base):
        return [_local_entry(base, os.path.basename(base))] if os.path.lexists(base) else []
    entries: list[FileEntry] = []
    seen: set[tuple[int, int]] = set()
    again: list[str] = []
    queue = [(0, "")]  # links passed, path below base
    while queue:
        num_links, path = heapq.heappop(queue)
        full_path = os.path.join(base, path) if path else base
        try:
            status = os.stat(full_path)
        except OSError:
            entries.append(_local_entry(full_path, path))
            continue
        is_directory = stat.S_ISDIR(status.st_mode)
        identity = (status.st_dev, status.st_ino)
        if identity in seen:
            again.append(path)
            continue
        seen.add(identity)
        if not is_directory:
            entries.append(_local_entry(full_path, path))
            continue
        with os.scandir(full_path) as found:
            for item in found:
                is_directory = item.is_dir()
                if not _is_hidden(item.name) and (is_directory or _is_parquet(item.name)):
                    heapq.heappush(queue, (num_links + item.is_symlink(), f"{path}/{item.name}".lstrip("/")))
    if again:
        named = ", ".join(map(console.printable, again[:MAX_LINKS_NAMED])) + ", ..." * (len(again) > MAX_LINKS_NAMED)
        console.warn(
            f"{base}: {console.counted(len(again), 'further name')} of files or directories that are read already, "
            f"left out: {named}"
        )
    return entries


def _local_entry(full_path: str, path: str) -> FileEntry:
    if console.printable(path) != path:
        return FileEntry(console.printable(path), 0, fault="its name is not UTF-8; rename it")
    try:
        status = os.stat(full_path)
    except OSError as error:
        what = (
            f"a broken link to {console.printable(os.readlink(full_path))}"
            if os.path.islink(full_path)
            else "not readable"
        )
        return FileEntry(path, 0, fault=f"{what} ({error.strerror})")
    if not stat.S_ISREG(status.st_mode):
        return FileEntry(path, 0, fault="not an ordinary file, but a pipe, socket or device")
    return FileEntry(path, status.st_size, status.st_mtime_ns)
