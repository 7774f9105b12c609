"""Step 2: merge the folders that the nodes wrote into one dataset, without moving bytes where that is possible.

    python merge_files.py --source_dir=OUT/train --target_dir=DATA/train
    python merge_files.py --source_dir=OUT/val   --target_dir=DATA/val

DATA/train then holds the chunk files, one index.json that litdata and litgpt read, and a manifest.json. The chunks are
in the order of the input text, so the dataset is the same whichever nodes tokenized it. Small ones that follow one
another are copied into one. Run the same command again after a crash to finish, or when the dataset has lost a file.

--mode=link   makes hard links; copies and verifies where source and target are on different file systems
--mode=copy   copies and verifies
--mode=move   links, and removes the files from the source when the dataset is published
--mode=index  makes no files: --target_dir must be --source_dir, which gets one index.json that names the sub-folders

--pack_tokens=8193 writes new chunks instead, of blocks for a context of 8,192 in which few documents are cut.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import os
from pathlib import Path
from shlex import quote
from typing import Any, Literal

from utils import cli, console  # first: it says how to install the packages if they are missing

# isort: split
from tokenization.chunk_index import make_index
from tokenization.gather import gather_small
from tokenization.merge_chunks import collect_chunks
from tokenization.merge_packed import PACKED_PATTERN, Counts, Packing, count_packing, pack_chunks, packing_of
from tokenization.merge_plan import Plan, check_places, fingerprint_of, make_plan
from tokenization.merge_restore import restore_missing
from tokenization.missing_chunks import moved_to, recorded_chunks, write_moved
from utils.chunks import INDEX_NAME, Chunk
from utils.errors import Problems, UserError
from utils.files import checksum, fsync_directory, held_lock, remove_temporaries, write_json
from utils.manifest import claim, made_by, read_manifest, write_manifest

CONTEXTS = (2048, 8192, 32768)


@dataclasses.dataclass
class Settings:
    """What step 2 takes: the folders of one split, where the dataset goes, and how the files get there."""

    source_dir: str
    """Directory whose sub-folders hold chunks and an index.json each, for example OUT/train."""
    target_dir: str
    """Directory to write the merged dataset to."""
    mode: Literal["link", "copy", "move", "index"] = "link"
    """How the chunk files get there; see above."""
    gather: bool = True
    """Copy small chunks (less than half full and below 2 M tokens) that follow one another into one: training does
    not read the end of a chunk that fills no block; false: keep every chunk as it is, and copy nothing for this."""
    verify: Literal["auto", "checksums", "headers"] = "auto"
    """Compare the content of every chunk with its checksum, or only sizes and document offsets; auto: checksums up to
    64 GiB, and always where bytes are copied."""
    pack_tokens: int | None = None
    """Pack the documents into blocks of this many tokens, the context of training plus one, with few of them cut; null:
    keep their order, and let training cut wherever a block ends."""
    pack_window_tokens: int = 1 << 24
    """With --pack_tokens: tokens of the documents that are packed together, and of a chunk file. More leave fewer
    documents cut, and take more memory."""
    dry_run: bool = False
    """Check everything, print the plan, and stop."""


# ---------------------------------------------------------------------------------------------------------------------
# Plan


def plan_layout(settings: Settings) -> Plan:
    """The plan, with small chunks gathered unless --gather=false, or a merge that was begun otherwise, forbids it."""
    plan, target = make_plan(settings), Path(settings.target_dir)
    if "packing" in (plan.manifest or {}):
        raise UserError(
            f"--source_dir={settings.source_dir}: is a packed dataset, whose blocks stay together only as they are. "
            "Give the output of step 1, or copy the directory."
        )
    if settings.pack_tokens is not None:  # the layout with which its cuts are compared
        parts = gather_small(plan.parts, plan.chunk_tokens or 0) if settings.gather else plan.parts
        return dataclasses.replace(plan, parts=parts)
    if plan.manifest is None or plan.chunk_tokens is None or settings.mode == "index":
        return plan
    published = read_manifest(target)
    if published is not None:
        begun = {entry["name"] for entry in published["files"]}
    else:
        begun = set(os.listdir(target)) if target.is_dir() else set()
    gathered = dataclasses.replace(plan, parts=gather_small(plan.parts, plan.chunk_tokens))
    single, joined = ({part.chunk.name for part in layout.parts} for layout in (plan, gathered))
    if begun & (single - joined):  # by an earlier version, or with --gather=false
        return plan
    if not settings.gather and begun & (joined - single):
        raise UserError(
            f"--gather=false: the merge into --target_dir={settings.target_dir} was begun with small chunks gathered. "
            "Leave the flag out, or give another directory."
        )
    return gathered if settings.gather else plan


def names_of(plan: Plan, target: Path, settings: Settings) -> set[str]:
    """What an interrupted merge of this plan can have left in the target."""
    if settings.pack_tokens is not None:
        names = set(filter(PACKED_PATTERN.fullmatch, os.listdir(target))) if target.is_dir() else set()
        return names | {INDEX_NAME} if names else names
    names = {part.chunk.name for part in plan.parts}
    # The index is the last file before the manifest; beside fewer chunks it is another dataset's.
    return names | {INDEX_NAME} if names <= set(os.listdir(target)) else names


def check_index_is_ours(source: Path) -> None:
    """--mode=index writes index.json and manifest.json into the source: refuse to replace somebody else's index."""
    if (source / INDEX_NAME).exists() and read_manifest(source) is None:
        raise UserError(
            f"--source_dir={source}: has an {INDEX_NAME} already, which --mode=index would replace. Move it away."
        )


def identity_of(settings: Settings) -> dict[str, Any]:
    """What a dataset must have been made with to be that of this source, as far as the source is there to say."""
    target, source = Path(settings.target_dir), Path(settings.source_dir)
    above = read_manifest(source) if source.is_dir() and source.resolve() != target.resolve() else None
    identity = {key: above.get(key) for key in ("split", "tokenizer", "settings", "inputs")} if above else {}
    identity["pack_tokens"] = settings.pack_tokens
    if settings.pack_tokens is not None:
        identity["pack_window_tokens"] = settings.pack_window_tokens
    return identity


# ---------------------------------------------------------------------------------------------------------------------
# Publish


def merged_manifest(
    plan: Plan, chunks: list[Chunk], settings: Settings, packed: tuple[Packing, Counts] | None
) -> dict[str, Any]:
    inherited = plan.manifest or {}
    content = {
        "documents": sum(chunk.documents for chunk in chunks),
        "tokens": sum(chunk.tokens for chunk in chunks),
        "text_bytes": inherited.get("content", {}).get("text_bytes"),
        "chunks": len(chunks),
        "dtype": plan.dtype,
    }
    files = [dataclasses.asdict(chunk) for chunk in chunks]
    for entry, part in zip(files, plan.parts) if packed is None else ():
        # A dataset that is merged again names the chunks of step 1, which gathered ones consist of.
        if part.is_gathered or any(path in plan.gathered for path, _ in part.sources):
            entry["gathered"] = plan.made_of([part])
    packing = {}
    if packed is not None:
        about, counts = packed
        content |= {"documents": counts.documents, "pieces": counts.pieces}
        packing = {
            "pack_tokens": about.pack_tokens,
            "pack_window_tokens": settings.pack_window_tokens,
            "packing": dataclasses.asdict(about) | dataclasses.asdict(counts),
            "packed_from": plan.made_of(plan.parts),
        }
    return {
        **packing,
        "kind": "dataset",
        "made_by": made_by("merge_files.py", "litdata"),
        "tokenized_by": inherited.get("tokenized_by", inherited.get("made_by")),
        "split": inherited.get("split"),
        "settings": inherited.get("settings", {}),
        "tokenizer": inherited.get("tokenizer"),
        "fingerprint": fingerprint_of(chunks),
        "content": content,
        "files": files,
        "inputs": inherited.get("inputs", []),
    }


def publish(
    plan: Plan, chunks: list[Chunk], settings: Settings, packed: tuple[Packing, Counts] | None
) -> dict[str, Any]:
    """Write index.json, then manifest.json, which completes the dataset."""
    target = Path(settings.target_dir)
    fsync_directory(target)
    manifest = merged_manifest(plan, chunks, settings, packed)
    write_json(target / INDEX_NAME, make_index(chunks, plan.dtype, plan.chunk_tokens, manifest["fingerprint"]))
    write_manifest(target, manifest)
    return manifest


def remove_sources(source: Path, target: Path, manifest: dict[str, Any]) -> None:
    """After a published move: remove the names below `source` of files that `target` has, as they are or gathered.

    Where bytes were copied to another file system the sources stay: deleting them is up to their owner.
    """
    here = {(status.st_dev, status.st_ino) for status in (entry.stat() for entry in os.scandir(target))}
    device, recorded = target.stat().st_dev, recorded_chunks(manifest)

    def is_in_target(path: Path) -> bool:
        status = path.stat()
        if (status.st_dev, status.st_ino) in here:
            return True
        chunk = recorded.get(path.name)
        return (
            status.st_dev == device
            and chunk is not None
            and chunk.bytes == status.st_size
            and chunk.xxh3_128 == checksum(path)
        )

    found = [path for path in (*source.glob("*.bin"), *source.glob("*/*.bin")) if not path.is_symlink()]
    found = [path for path in found if not path.parent.samefile(target)]  # these are the dataset
    if moved := list(filter(is_in_target, found)):
        write_moved(source, target)
        for path in moved:
            path.unlink()


def say_result(manifest: dict[str, Any], target: Path) -> None:
    content = manifest["content"]
    chunks = console.counted(content["chunks"], "chunk")
    documents, tokens = console.counted(content["documents"], "document"), console.counted(content["tokens"], "token")
    console.result(f"{target}: {documents}, {tokens} in {chunks}")
    say_unread(manifest)


def say_next(settings: Settings, manifest: dict[str, Any]) -> None:
    source, target = Path(settings.source_dir), Path(settings.target_dir)
    if manifest["split"] == "val":
        if glob.glob("/dev/nvidia[0-9]*"):
            model = "config_hub/llama3-8b.yaml"
        else:
            model, vocab_size = "config_hub/demo-cpu.yaml", (manifest["tokenizer"] or {}).get("vocab_size")
            if vocab_size:  # the demo's model is only as large as the demo's own tokenizer
                model += "".join(f" --model_config.{key}={vocab_size}" for key in ("vocab_size", "padded_vocab_size"))
        console.next_command(
            f"python distributed_pretrain.py --config {model} "
            f"--dataset_path={quote(str(target.parent))} --tokenizer_dir=CKPT --out_dir=OUT_DIR",
            "next, with this or a config of your own, and the tokenizer of step 1 as CKPT",
        )
    elif manifest["split"] == "train" and settings.mode != "index":
        others = dataclasses.fields(Settings)[2:]  # all but the directories
        changed = {f.name: getattr(settings, f.name) for f in others if getattr(settings, f.name) != f.default}
        flags = "".join(f" --{name}={str(value).lower()}" for name, value in changed.items())
        console.next_command(
            f"python merge_files.py --source_dir={quote(str(source.parent / 'val'))} "
            f"--target_dir={quote(str(target.parent / 'val'))}{flags}"
        )


def say_unread(manifest: dict[str, Any]) -> None:
    """Training reads blocks of context + 1 tokens; the rest of each chunk, which fills none, is not read."""
    if "packing" in manifest:
        Counts.of_manifest(manifest).say(manifest["packing"]["pack_tokens"])
        return
    tokens = [entry.get("tokens", 0) for entry in manifest["files"]]
    shares = [
        f"{sum(count % (context + 1) for count in tokens) / max(1, sum(tokens)):.2%} at a context of {context:,}"
        for context in CONTEXTS
    ]
    console.say(f"tokens that fill no block at their chunk's end, which training does not read: {', '.join(shares)}")


def main(settings: Settings) -> None:
    target = Path(settings.target_dir)
    is_new = not os.path.lexists(target)
    if settings.dry_run or (is_new and not Path(settings.source_dir).is_dir()) or not (is_new or target.is_dir()):
        merge(settings)
        return
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
    plan_of = functools.cache(lambda: plan_layout(settings))  # a finished dataset needs no plan, and no source
    names = functools.cache(lambda: names_of(plan_of(), target, settings))
    in_place = settings.mode == "index"
    problems = Problems()
    if source.is_dir():  # here, since a finished dataset gets no plan
        check_places(source, target, in_place, problems)
    problems.raise_if_any()
    published = claim(
        target, "--target_dir", "dataset", identity_of(settings), is_own=lambda name: in_place or name in names()
    )
    if published is not None:
        restored = restore_missing(published, plan_of, settings)
        if settings.mode == "move" and source.is_dir() and not settings.dry_run:
            remove_sources(source, target, published)
        say_result(published, target)
        if not restored:
            console.result("merged already, nothing to do")
        say_next(settings, published)
        return
    plan = plan_of()
    packing = packing_of(settings, plan)
    if in_place:
        check_index_is_ours(source)
    gathered = [part for part in plan.parts if part.is_gathered]
    num_chunks = sum(len(part.sources) for part in plan.parts)
    console.say(
        f"source: {console.counted(num_chunks, 'chunk')}, {console.human_bytes(plan.bytes)}, "
        f"{sum(part.chunk.tokens for part in plan.parts):,} tokens of {plan.dtype} in {source}"
    )
    if packing is not None:
        console.say(
            f"pack: into blocks of {packing.pack_tokens:,} tokens, the documents of "
            f"{console.human_count(packing.window_tokens)} tokens at a time"
        )
    elif gathered:
        console.say(
            f"gather: {sum(len(part.sources) for part in gathered):,} small chunks become {len(gathered):,}; "
            f"{console.human_bytes(sum(part.chunk.bytes for part in gathered))} are copied for that"
        )
    if settings.dry_run and packing is not None:
        count_packing(plan, packing, settings).say(packing.pack_tokens)
        console.result(f"would pack them into {target}")
        return
    if settings.dry_run:
        console.result(f"would {settings.mode} them to {target}")
        return

    if target.is_dir() and not in_place:
        remove_temporaries(target)
    packed = None
    try:
        if packing is not None:
            chunks, counts = pack_chunks(plan, packing, settings)
            packed = packing, counts
        else:
            chunks = collect_chunks(plan, settings)
    except UserError:
        if moved_to(source) in (None, target.absolute()) and not any(source.rglob("*.bin")):
            write_moved(source, None)  # step 1 must not take them for moved
        raise
    manifest = publish(plan, chunks, settings, packed)
    if settings.mode == "move":
        remove_sources(source, target, manifest)
    say_result(manifest, target)
    say_next(settings, manifest)


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
