"""Takes the chunk files of a merge from its source to its target: each verified, none believed, nothing overwritten."""

from __future__ import annotations

import dataclasses
import errno
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from tokenization.chunk_reader import verify
from tokenization.gather import COPY_BLOCK_BYTES, checksum_of_gathered, write_gathered
from tokenization.merge_plan import Part, Plan
from tokenization.missing_chunks import moved_chunks, moves_from, optimize_command
from tokenization.progress_bar import Progress
from tokenization.threads import submit_ahead
from utils import console
from utils.chunks import Chunk
from utils.errors import Problems, UserError
from utils.files import atomic_write, checksum, temporary_sibling
from utils.manifest import some

# Below this size, reading everything once to compare checksums takes about a minute.
AUTO_VERIFY_BYTES = 64 << 30
THREADS = 8
NO_LINK_ERRNOS = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK)


class LostSources(Exception):
    """Files of the source are missing or damaged; `lines` names each with what is wrong."""

    def __init__(self, lines: list[str]):
        super().__init__("\n".join(lines))
        self.lines = lines


def collect_chunks(plan: Plan, settings: Any) -> list[Chunk]:
    """Verify every chunk and put it into the target; returns the chunks with the checksums that were computed."""
    in_place, link = settings.mode == "index", try_link(plan, settings)
    # What is copied is compared on the way.
    linked_bytes = sum(part.chunk.bytes for part in plan.parts if not part.is_gathered)
    by_checksum = (link or in_place) and (
        settings.verify == "checksums" or (settings.verify == "auto" and linked_bytes <= AUTO_VERIFY_BYTES)
    )
    reads = by_checksum or not (link or in_place)
    console.say(f"verify: sizes, document offsets{', checksums' if reads else ''}")
    chunks = verify_sources(plan, plan.parts, by_checksum, settings)
    if in_place:
        return chunks
    place = functools.partial(place_part, target=Path(settings.target_dir), link=link, dtype=plan.dtype)
    parts = [dataclasses.replace(part, chunk=chunk) for part, chunk in zip(plan.parts, chunks)]
    return for_each_part(place, plan, parts, "link" if link else "copy", settings)


def try_link(plan: Plan, settings: Any) -> bool:
    """Whether hard links are wanted and work."""
    if settings.mode not in ("link", "move"):
        return False
    here = (path for part in plan.parts for path, _ in part.sources if path.exists())
    source = next(here, None)
    link = source is None or links_work(source, Path(settings.target_dir))  # where none is here, verifying will say so
    if not link:
        console.say("source and target are on different file systems: copying")
    return link


def links_work(source: Path, target: Path) -> bool:
    """Whether a hard link from the file `source` into `target` works; trying it is the only sure test."""
    probe = temporary_sibling(target / "probe")
    try:
        os.link(source, probe)
    except OSError as error:
        if error.errno in NO_LINK_ERRNOS:
            return False
        raise
    probe.unlink()
    return True


def verify_sources(plan: Plan, parts: list[Part], checksums: bool, settings: Any) -> list[Chunk]:
    """Compare every file with its index entry; returns the chunks, with their checksums if the content was read."""

    def check(part: Part) -> Chunk:
        # What is gathered is read while it is copied.
        depth = "checksum" if checksums and not part.is_gathered else "offsets"
        checked, wrong = [], []
        for path, chunk in part.sources:
            try:
                checked.append(verify(path, chunk, plan.dtype, depth))
            except FileNotFoundError:
                wrong.append(f"{path}: missing")
            except (OSError, ValueError) as error:
                wrong.append(str(error))
        if wrong:
            raise LostSources(wrong)
        return part.chunk if part.is_gathered else checked[0]

    return for_each_part(check, plan, parts, "verify", settings)


def place_part(part: Part, target: Path, link: bool, dtype: str) -> Chunk:
    """Put the chunk under its name in `target`, unless an interrupted run has done so. Never overwrites another file.

    Returns:
        Its entry, with the checksum where the content was read.
    """
    chunk, (source, _) = part.chunk, part.sources[0]
    path = target / chunk.name
    try:
        if path.exists():
            if not part.is_gathered and path.samefile(source):
                return chunk
            expected = checksum_of_gathered(part, dtype) if part.is_gathered else chunk.xxh3_128 or checksum(source)
            if path.stat().st_size == chunk.bytes and checksum(path) == expected:
                return dataclasses.replace(chunk, xxh3_128=expected)
            raise UserError(
                f"--target_dir={target}: {chunk.name} is there already and is another file. Give a new directory."
            )
        if part.is_gathered:
            return write_gathered(part, path, dtype)
    except ValueError as error:
        raise LostSources([str(error)]) from error
    if link:
        try:
            os.link(source, path)
            return chunk
        except OSError as error:
            if error.errno not in NO_LINK_ERRNOS:  # this folder may be on another file system than the first
                raise
    return copy_verified(source, chunk, path)


def copy_verified(source: Path, chunk: Chunk, path: Path) -> Chunk:
    """Copy, then compare what was read with the checksum; raises LostSources and leaves nothing if they differ."""
    digest = xxhash.xxh3_128()
    with atomic_write(path) as copy, open(source, "rb", buffering=0) as original:
        while block := original.read(COPY_BLOCK_BYTES):
            digest.update(block)
            copy.write(block)
        found = digest.hexdigest()
        if chunk.xxh3_128 not in (None, found):
            raise LostSources([f"{source}: its content differs from its checksum"])
    return dataclasses.replace(chunk, xxh3_128=found)


def for_each_part(
    work: Callable[[Part], Chunk], plan: Plan, parts: list[Part], label: str, settings: Any
) -> list[Chunk]:
    """Apply `work` to every chunk on a few threads, with a progress bar; all user errors at once."""
    problems, lost, done = Problems(), [], []
    with Progress(label, sum(part.chunk.bytes for part in parts)) as progress:
        for future, part in zip(submit_ahead(work, parts, num_threads=THREADS), parts):
            try:
                done.append(problems.collect(future.result))
            except LostSources as error:
                lost += error.lines
            progress.advance(part.chunk.bytes, f"{len(done):,} of {len(parts):,} chunks")
    if lost:
        problems.add(f"--source_dir={settings.source_dir}: {how_to_get_back(lost, plan.manifest, settings)}")
    problems.raise_if_any()
    return done


def how_to_get_back(lines: list[str], manifest: dict[str, Any] | None, settings: Any) -> str:
    """Names what is missing or damaged, and the command that makes it again."""
    source = Path(settings.source_dir)
    what = f"{console.counted(len(lines), 'chunk')} missing or damaged: {some(lines)}. "
    targets = moves_from(source)
    if targets and targets[-1] != Path(os.path.abspath(settings.target_dir)):
        what += f"--mode=move took chunks from there to {targets[-1]}: use that dataset"
        names = {Path(line.removesuffix(": missing")).name for line in lines if line.endswith(": missing")}
        if len(names) == len(lines) and names <= moved_chunks(targets).keys():
            return f"{what}, which has them."  # step 1 would find nothing to do
        what += " if it has them. "
    if manifest is None:
        return what + "Bring the files back, or make the folder again."
    if not all(line.endswith(": missing") for line in lines):
        what += "Delete the damaged files: step 1 compares sizes alone. "
    return what + (
        f"To make them again, run this, then this command again:\n  {optimize_command(source, manifest['settings'])}"
    )
