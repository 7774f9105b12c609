"""Finds the files of a dataset, each once, and tells whether one is still what it was.

They are at a local path, or at a URL that pyarrow (`s3://`, `gs://`, `abfs://`, `hdfs://`, `hf://datasets/...`) or
fsspec reads.
"""

from __future__ import annotations

import functools
import heapq
import os
import stat
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import xxhash

from tokenization.input_names import is_arrow, is_input
from tokenization.job import FileEntry, InputStamp
from tokenization.saved_datasets import only_datasets_own
from utils import console
from utils.errors import UserError

END_BYTES = 64 << 10  # of each end of a file, for its fingerprint
MAX_LINKS_NAMED = 5


class DamagedInput(Exception):
    """A part of an input file that cannot be read, though the file could be opened.

    Each subclass says which part: `place` names it in a message, `parts` is what such parts are called, and `entry` is
    its line in quarantine.jsonl. `key` tells it from other parts of the dataset.
    """

    file_index: int
    reason: str
    place: str
    parts: str
    key: tuple[int, int | None]

    def entry(self, path: str) -> dict[str, Any]:
        raise NotImplementedError


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


def open_member(url: str, path: str) -> tuple[Any, str]:
    """The file system of `url`, and the path in it of the input file `path`."""
    filesystem, base = open_input(url)
    base = base.rstrip("/")
    return filesystem, base if base.endswith("/" + path) or base == path else f"{base}/{path}"


def list_input_files(url: str) -> list[FileEntry]:
    """All parquet, Arrow and JSON lines files at and below `url`, by their endings, each once, sorted by path; hidden
    ones (., _) are left out.

    Raises:
        UserError: nothing there, or no such file in it.
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
        what = "no *.parquet, *.arrow, *.jsonl, *.jsonl.gz or *.jsonl.zst file in it" if exists else "no such directory"
        raise UserError(
            f"--input_dir={url}: {what}. Give the directory of the text's files, for example made by "
            "`python examples/make_demo_corpus.py` or `hf download HuggingFaceFW/fineweb --repo-type dataset`."
        )
    others = [entry for entry in entries if not is_arrow(entry.path)]
    own = only_datasets_own(filesystem, base, [entry for entry in entries if is_arrow(entry.path)])
    return sorted([*others, *own], key=lambda entry: entry.path)


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_"))


def _list_remote(filesystem: Any, base: str) -> tuple[list[FileEntry], bool]:
    info = filesystem.get_file_info(base)
    if info.type == pafs.FileType.File:
        return [FileEntry(info.base_name, info.size)], True
    found = filesystem.get_file_info(pafs.FileSelector(base, recursive=True, allow_not_found=True))
    entries = []
    for file in found:
        path = file.path[len(base) :].lstrip("/")
        if file.type == pafs.FileType.File and is_input(path) and not any(map(_is_hidden, path.split("/"))):
            entries.append(FileEntry(path, file.size))
    return entries, info.type != pafs.FileType.NotFound or bool(found)


def ends_of(source: pa.NativeFile) -> tuple[int, bytes, bytes]:
    """Size, first bytes, and last bytes as far as they are not among the first."""
    size = source.size()
    tail_at = min(size, max(END_BYTES, size - END_BYTES))
    return size, source.read_at(min(size, END_BYTES), 0), source.read_at(size - tail_at, tail_at)


def fingerprint_of_ends(size: int, head: bytes, tail: bytes) -> str:
    """Of what `ends_of` returns: changes when the size or one of the two ends of the file changes; 16 hexadecimal
    digits."""
    return xxhash.xxh3_64_hexdigest(b"%d %d " % (size, len(head)) + head + tail)


def is_input_failure(error: Exception) -> bool:
    """Whether reading failed, and not whether what was read is wrong: another try may succeed, so nothing may be
    quarantined. pyarrow sets errno for errors of the operating system, and only describes those of object stores."""
    remote = ("AWS Error", "HTTP", "Connection", "timed out", "Timeout")
    failed = isinstance(error, OSError) and (error.errno is not None or any(word in str(error) for word in remote))
    return failed or isinstance(error, MemoryError)  # as Arrow's own is


def reading_failed(url: str, path: str, error: Exception) -> UserError:
    """What planning raises where `is_input_failure`."""
    return UserError(f"--input_dir={url}: {path}: reading failed ({error}). Try again.")


def check_stamp(
    url: str, path: str, stamp: InputStamp | None, fingerprint: Callable[[], str | None] | None = None
) -> None:
    """Compare a file with what was planned: size, time (not a remote one's) and, where it is open, its fingerprint.

    Raises:
        UserError: it is another one.
    """
    if stamp is None:
        return
    filesystem, full_path = open_member(url, path)
    if isinstance(filesystem, pafs.LocalFileSystem):
        status = os.stat(full_path)
        same = (status.st_size, status.st_mtime_ns) == (stamp.bytes, stamp.mtime_ns)
    else:
        same = filesystem.get_file_info(full_path).size == stamp.bytes
    if not same or (fingerprint and fingerprint() != stamp.fingerprint):
        raise UserError(
            f"--input_dir={url}: {path} was replaced or changed while this command ran, so what was made of it belongs "
            "to no file. Nothing of it was kept. Leave the input alone while it is read: put the file back as it was "
            "and run the same command again, or begin again with another --output_dir."
        )


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
                if not _is_hidden(item.name) and (is_directory or is_input(item.name)):
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
