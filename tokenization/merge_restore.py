"""A finished dataset that lost chunks or its index is made whole again from its source, with the bytes of before."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenization.chunk_index import make_index
from tokenization.merge_chunks import THREADS, for_each_part, how_to_get_back, place_part, try_link, verify_sources
from tokenization.merge_packed import restore_packed
from tokenization.merge_plan import Plan
from tokenization.missing_chunks import chunk_of, moved_to, write_moved
from tokenization.threads import submit_ahead
from utils import console
from utils.chunks import INDEX_NAME, Chunk, read_index
from utils.errors import UserError
from utils.files import fsync_directory, remove_temporaries, write_json
from utils.manifest import damaged_files, some


def restore_missing(published: dict[str, Any], plan_of: Callable[[], Plan], settings: Any) -> bool:
    """Make again what a finished dataset has lost: chunks, the index.

    Sizes are compared, and every byte with --verify=checksums.

    Args:
        published: its manifest.
        plan_of: makes the plan; the source may be gone as long as nothing is missing.

    Returns:
        Whether anything was missing.

    Raises:
        UserError: the source lacks it too, or is not what the dataset was made from.
    """
    target, by_checksum = Path(settings.target_dir), settings.verify == "checksums"
    entries = published["files"]
    found = submit_ahead(lambda entry: damaged_files(target, [entry], by_checksum), entries, num_threads=THREADS)
    damaged = {entry["name"]: line for future, entry in zip(found, entries) for line in future.result()}
    index_is_whole = _has_index(target, entries)
    missing = [*damaged, *([] if index_is_whole else [INDEX_NAME])]
    if not missing:
        return False
    if settings.dry_run:
        console.result(f"would make again: {some(missing)}")
        return True
    remove_temporaries(target)
    if damaged:
        console.say(f"missing or damaged: {some(list(damaged.values()))}")
        _restore_chunks(damaged, published, plan_of, settings)
    if not index_is_whole:
        chunk_tokens = published["settings"].get("chunk_tokens") or plan_of().chunk_tokens
        chunks = list(map(chunk_of, entries))
        index = make_index(chunks, published["content"]["dtype"], chunk_tokens, published["fingerprint"])
        write_json(target / INDEX_NAME, index)
    console.result(f"{target}: made again, with the content of before: {some(missing)}")
    return True


def _has_index(target: Path, entries: list[dict[str, Any]]) -> bool:
    try:
        found = read_index(target, "--target_dir").chunks
    except UserError:
        return False
    recorded = [dataclasses.replace(chunk_of(entry), xxh3_128=None) for entry in entries]
    return recorded == list(found)


def _restore_chunks(
    damaged: dict[str, str], published: dict[str, Any], plan_of: Callable[[], Plan], settings: Any
) -> None:
    """Take the chunks with these names from the source again, each with its recorded checksum."""
    source, target = Path(settings.source_dir), Path(settings.target_dir)
    if settings.mode == "index" or not source.is_dir():
        raise UserError(f"--target_dir={target}: {how_to_get_back(list(damaged.values()), published, settings)}")
    recorded = {entry["name"]: chunk_of(entry) for entry in published["files"]}
    plan = plan_of()
    if "packing" in published:
        restore_packed(damaged, published, plan, settings)
        return
    parts = [part for part in plan.parts if part.chunk.name in damaged]
    if len(parts) < len(damaged) or not all(_agree(part.chunk, recorded[part.chunk.name]) for part in parts):
        raise UserError(
            f"--source_dir={source}: is not what --target_dir={target} was merged from, which lacks "
            f"{some(list(damaged))}. Give that source, or a new --target_dir."
        )
    try:
        chunks = verify_sources(plan, parts, checksums=True, settings=settings)
    except UserError as error:
        if moved_to(source) is None and not any(source.rglob("*.bin")):
            write_moved(source, target)  # an earlier version did not: step 1 must not take what is here for lost
        rotten = [target / name for name in damaged if _size(target / name) == recorded[name].bytes]
        if rotten and moved_to(source) is not None:
            first = f"--target_dir={target}: delete {some(list(map(str, rotten)))} first: step 1 compares sizes alone."
            raise UserError([first, *error.problems]) from error
        raise
    parts = [dataclasses.replace(part, chunk=chunk) for part, chunk in zip(parts, chunks)]
    link = try_link(plan, settings)
    for part in parts:
        (target / part.chunk.name).unlink(missing_ok=True)
    place = functools.partial(place_part, target=target, link=link, dtype=plan.dtype)
    made = for_each_part(place, plan, parts, "link" if link else "copy", settings)
    other = [chunk.name for chunk in made if not _agree(chunk, recorded[chunk.name])]
    for name in other:
        (target / name).unlink()
    if other:
        raise UserError(
            f"--source_dir={source}: gives {some(other)} with other content than --target_dir={target} had. Give the "
            "source that it was merged from, or a new --target_dir."
        )
    fsync_directory(target)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _agree(chunk: Chunk, recorded: Chunk) -> bool:
    """Whether they are the same as far as checksums are known."""
    known = chunk.xxh3_128 or recorded.xxh3_128
    return dataclasses.replace(chunk, xxh3_128=known) == dataclasses.replace(
        recorded, xxh3_128=recorded.xxh3_128 or known
    )
