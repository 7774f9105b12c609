"""Step 2: merge the folders that the nodes wrote into one dataset, without moving bytes where that is possible.

    python merge_files.py --source_dir=OUT/train --target_dir=DATA/train
    python merge_files.py --source_dir=OUT/val   --target_dir=DATA/val

DATA/train then holds the chunk files, one index.json that litdata and litgpt read, and a manifest.json. The chunks are
in the order of the input text, so the dataset is the same whichever nodes tokenized it. Run the same command again
after a crash to finish.

--mode=link   makes hard links; copies and verifies where source and target are on different file systems
--mode=copy   copies and verifies
--mode=move   links, and removes the linked files' names from the source when the dataset is published
--mode=index  makes no files: --target_dir must be --source_dir, which gets one index.json that names the sub-folders
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import glob
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from utils import cli, console  # first: it says how to install the packages if they are missing

# isort: split
import xxhash

from tokenization.chunk_reader import verify
from tokenization.chunk_writer import make_index
from tokenization.merge_plan import Plan, fingerprint_of, make_plan
from tokenization.progress import Progress
from tokenization.threads import submit_ahead
from utils.chunks import INDEX_NAME, Chunk, read_index
from utils.errors import Problems, UserError
from utils.files import (
    atomic_write,
    checksum,
    fsync_directory,
    held_lock,
    remove_temporaries,
    temporary_sibling,
    write_json,
)
from utils.manifest import claim, made_by, read_manifest, write_manifest

# Below this size, reading everything once to compare checksums takes about a minute.
AUTO_VERIFY_BYTES = 64 << 30
THREADS = 8
COPY_BLOCK_BYTES = 8 << 20
NO_LINK_ERRNOS = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK)


@dataclasses.dataclass
class Settings:
    """What step 2 takes: the folders of one split, where the dataset goes, and how the files get there."""

    source_dir: str
    """Directory whose sub-folders hold chunks and an index.json each, for example OUT/train."""
    target_dir: str
    """Directory to write the merged dataset to."""
    mode: Literal["link", "copy", "move", "index"] = "link"
    """How the chunk files get there; see above."""
    verify: Literal["auto", "checksums", "headers"] = "auto"
    """Compare the content of every chunk with its checksum, or only sizes and document offsets; auto: checksums up to
    64 GiB, and always where bytes are copied."""
    dry_run: bool = False
    """Check everything, print the plan, and stop."""


# ---------------------------------------------------------------------------------------------------------------------
# Work


def collect_chunks(plan: Plan, settings: Settings) -> list[Chunk]:
    """Verify every chunk and put it into the target; returns the chunks with the checksums that were computed."""
    in_place, target, link = settings.mode == "index", Path(settings.target_dir), False
    if settings.mode in ("link", "move"):
        target.mkdir(parents=True, exist_ok=True)
        link = links_work(plan.paths[0], target)
        if not link:
            console.say("source and target are on different file systems: copying")
    copies = not link and not in_place
    # What is copied is compared on the way.
    by_checksum = not copies and (
        settings.verify == "checksums" or (settings.verify == "auto" and plan.bytes <= AUTO_VERIFY_BYTES)
    )
    console.say(f"verify: sizes, document offsets{', checksums' if by_checksum or copies else ''}")
    chunks = verify_chunks(plan, by_checksum)
    if in_place:
        return chunks
    target.mkdir(parents=True, exist_ok=True)
    place = functools.partial(place_chunk, target=target, link=link)
    return for_each_chunk(place, plan.paths, chunks, "link" if link else "copy")


def verify_chunks(plan: Plan, checksums: bool) -> list[Chunk]:
    """Compare every file with its index entry; returns the chunks, with their checksums if the content was read."""

    def check(path: Path, chunk: Chunk) -> Chunk:
        try:
            return verify(path, chunk, plan.dtype, "checksum" if checksums else "offsets")
        except (OSError, ValueError) as error:
            raise UserError(f"--source_dir: {error}. Tokenize again, or bring the file back.") from error

    return for_each_chunk(check, plan.paths, plan.chunks, "verify")


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


def place_chunk(source: Path, chunk: Chunk, target: Path, link: bool) -> Chunk:
    """Put the file under its name in `target`, unless an interrupted run has done so. Never overwrites another file."""
    path = target / chunk.name
    if path.exists():
        if path.samefile(source):
            return chunk
        if path.stat().st_size == chunk.bytes and checksum(path) == (chunk.xxh3_128 or checksum(source)):
            return chunk
        raise UserError(
            f"--target_dir={target}: {chunk.name} is there already and is another file. Give a new directory."
        )
    if link:
        try:
            os.link(source, path)
            return chunk
        except OSError as error:
            if error.errno not in NO_LINK_ERRNOS:  # this folder may be on another file system than the first
                raise
    return copy_verified(source, chunk, path)


def copy_verified(source: Path, chunk: Chunk, path: Path) -> Chunk:
    """Copy, then compare what was read with the checksum; raises UserError and leaves nothing if they differ."""
    digest = xxhash.xxh3_128()
    with atomic_write(path) as copy, open(source, "rb", buffering=0) as original:
        while block := original.read(COPY_BLOCK_BYTES):
            digest.update(block)
            copy.write(block)
        found = digest.hexdigest()
        if chunk.xxh3_128 not in (None, found):
            raise UserError(f"--source_dir: {source}: its content differs from its checksum. Tokenize again.")
    return dataclasses.replace(chunk, xxh3_128=found)


def for_each_chunk(
    work: Callable[[Path, Chunk], Chunk], paths: list[Path], chunks: list[Chunk], label: str
) -> list[Chunk]:
    """Apply `work` to every chunk on a few threads, with a progress bar; all user errors at once."""
    problems, done = Problems(), []
    with Progress(label, sum(chunk.bytes for chunk in chunks)) as progress:
        for chunk, future in zip(chunks, submit_ahead(work, paths, chunks, num_threads=THREADS)):
            done.append(problems.collect(future.result))
            progress.advance(chunk.bytes, f"{len(done):,} of {len(chunks):,} chunks")
    problems.raise_if_any()
    return done


# ---------------------------------------------------------------------------------------------------------------------
# Publish


def merged_manifest(plan: Plan, chunks: list[Chunk]) -> dict[str, Any]:
    inherited = plan.manifest or {}
    content = {
        "documents": sum(chunk.documents for chunk in chunks),
        "tokens": sum(chunk.tokens for chunk in chunks),
        "text_bytes": inherited.get("content", {}).get("text_bytes"),
        "chunks": len(chunks),
        "dtype": plan.dtype,
    }
    return {
        "kind": "dataset",
        "made_by": made_by("merge_files.py", "litdata"),
        "tokenized_by": inherited.get("made_by"),
        "split": inherited.get("split"),
        "settings": inherited.get("settings", {}),
        "tokenizer": inherited.get("tokenizer"),
        "fingerprint": fingerprint_of(chunks),
        "content": content,
        "files": [dataclasses.asdict(chunk) for chunk in chunks],
        "inputs": inherited.get("inputs", []),
    }


def publish(plan: Plan, chunks: list[Chunk], target: Path) -> dict[str, Any]:
    """Write index.json, then manifest.json, which completes the dataset."""
    fsync_directory(target)
    manifest = merged_manifest(plan, chunks)
    write_json(target / INDEX_NAME, make_index(chunks, plan.dtype, plan.chunk_tokens, manifest["fingerprint"]))
    write_manifest(target, manifest)
    return manifest


def check_target(target: Path, chunks: list[Chunk]) -> None:
    """Refuse a directory with anything in it but an interrupted merge of the same chunks."""
    names = {chunk.name for chunk in chunks}
    if target.is_dir() and names <= set(os.listdir(target)):
        names.add(INDEX_NAME)  # the last file before the manifest; beside fewer chunks it is another dataset's
    claim(target, "--target_dir", "dataset", {}, names.__contains__)
    if target.is_dir():
        remove_temporaries(target)


def check_index_is_ours(source: Path) -> None:
    """--mode=index writes index.json and manifest.json into the source: refuse to replace somebody else's index."""
    if (source / INDEX_NAME).exists() and read_manifest(source) is None:
        raise UserError(
            f"--source_dir={source}: has an {INDEX_NAME} already, which --mode=index would replace. Move it away."
        )


def finished_manifest(settings: Settings) -> dict[str, Any] | None:
    """The manifest of a target that an earlier run published, whatever has become of the source since.

    Raises:
        UserError: the target is another dataset than the source makes.
    """
    target, source = Path(settings.target_dir), Path(settings.source_dir)
    above = read_manifest(source) if source.is_dir() and source.resolve() != target.resolve() else None
    identity = {key: above.get(key) for key in ("split", "tokenizer", "settings", "inputs")} if above else {}
    published = claim(target, "--target_dir", "dataset", identity, is_own=lambda path: True)
    if published is not None:
        read_index(target, "--target_dir")
    return published


def remove_sources(source: Path, target: Path) -> None:
    """After a published move: remove the names below `source` of files that now have a name in `target`.

    Where bytes were copied the sources stay: they are other files, and deleting them is up to their owner.
    """
    moved = {(status.st_dev, status.st_ino) for status in (entry.stat() for entry in os.scandir(target))}
    for path in [*source.glob("*.bin"), *source.glob("*/*.bin")]:
        status = path.stat()
        if not path.is_symlink() and (status.st_dev, status.st_ino) in moved:
            path.unlink()


def say_result(manifest: dict[str, Any], target: Path) -> None:
    content = manifest["content"]
    chunks = console.counted(content["chunks"], "chunk")
    console.result(f"{target}: {content['documents']:,} documents, {content['tokens']:,} tokens in {chunks}")


def say_next(settings: Settings, manifest: dict[str, Any]) -> None:
    source, target = Path(settings.source_dir), Path(settings.target_dir)
    if manifest["split"] == "val":
        config = "llama3-8b" if glob.glob("/dev/nvidia[0-9]*") else "demo-cpu"
        console.next_command(
            f"python distributed_pretrain.py --config config_hub/{config}.yaml --dataset_path={target.parent} "
            "--tokenizer_dir=CKPT --out_dir=OUT_DIR",
            "next, with this or a config of your own, and the tokenizer of step 1 as CKPT",
        )
    elif manifest["split"] == "train" and settings.mode != "index":
        console.next_command(
            f"python merge_files.py --source_dir={source.parent / 'val'} --target_dir={target.parent / 'val'}"
        )


def main(settings: Settings) -> None:
    target = Path(settings.target_dir)
    if settings.dry_run or not Path(settings.source_dir).is_dir():
        merge(settings)
        return
    is_new = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    try:
        with held_lock(target) as mine:  # before anything is read there: what another run writes now would be missed
            if not mine:
                raise UserError(f"--target_dir={target}: another merge_files.py writes there. Wait for it or end it.")
            merge(settings)
    finally:
        if is_new and not any(target.iterdir()):  # refused
            target.rmdir()


def merge(settings: Settings) -> None:
    source, target = Path(settings.source_dir), Path(settings.target_dir)
    published = finished_manifest(settings)
    if published is not None:
        if settings.mode == "move" and source.is_dir():
            remove_sources(source, target)
        say_result(published, target)
        console.result("merged already, nothing to do")
        say_next(settings, published)
        return
    plan = make_plan(settings)
    if settings.mode == "index":
        check_index_is_ours(source)
    else:
        check_target(target, plan.chunks)
    console.say(
        f"source: {console.counted(len(plan.chunks), 'chunk')}, {console.human_bytes(plan.bytes)}, "
        f"{sum(chunk.tokens for chunk in plan.chunks):,} tokens of {plan.dtype} in {source}"
    )
    if settings.dry_run:
        console.result(f"would {settings.mode} them to {target}")
        return

    chunks = collect_chunks(plan, settings)
    manifest = publish(plan, chunks, target)
    if settings.mode == "move":
        remove_sources(source, target)
    say_result(manifest, target)
    say_next(settings, manifest)


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
