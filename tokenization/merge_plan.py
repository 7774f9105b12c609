"""What merge_files.py is going to do: every index and manifest is read and compared before anything is written."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from utils import console
from utils.chunks import INDEX_NAME, Chunk, Index, read_index
from utils.errors import Problems, UserError
from utils.manifest import read_manifest


@dataclasses.dataclass(frozen=True)
class Part:
    """A chunk of the merged dataset, and the chunk files of the source that it consists of."""

    chunk: Chunk
    """Under its name in the merged dataset; with a checksum where the source has manifests and it is one file."""
    sources: tuple[tuple[Path, Chunk], ...]
    """One file, which becomes the chunk as it is; or several, whose documents are gathered in it."""

    @property
    def is_gathered(self) -> bool:
        return len(self.sources) > 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """The merged dataset, before it exists."""

    parts: list[Part]
    """In the order of the merged dataset."""
    dtype: str
    chunk_tokens: int | None
    manifest: dict[str, Any] | None
    """Of the source directory; None for folders that litdata itself wrote."""
    gathered: dict[Path, list[dict[str, Any]]]
    """For the files of the source that were gathered themselves: the entries of the chunks of step 1 in them."""

    @property
    def bytes(self) -> int:
        return sum(part.chunk.bytes for part in self.parts)

    def made_of(self, parts: Iterable[Part]) -> list[dict[str, Any]]:
        """The entries of the chunks of step 1 in these parts: what was gathered is named by what it consists of."""
        sources = [source for part in parts for source in part.sources]
        return [e for path, chunk in sources for e in self.gathered.get(path, [dataclasses.asdict(chunk)])]


def make_plan(settings: Any) -> Plan:
    """Read and check every index and manifest; raises UserError with all problems that were found."""
    source, in_place = Path(settings.source_dir), settings.mode == "index"
    problems = Problems()
    if not source.is_dir():
        raise UserError(
            f"--source_dir={source}: no such directory. Give the output of optimize_dataset.py, for example OUT/train."
        )
    check_places(source, Path(settings.target_dir), in_place, problems)
    folders = find_folders(source, in_place)
    indexes = [problems.collect(read_index, folder, "--source_dir") for folder in folders]
    manifests = [problems.collect(read_manifest, folder) for folder in folders]
    above = problems.collect(read_manifest, source) if folders != [source] else None
    problems.raise_if_any()

    check_same(folders, [index.dtype for index in indexes], "dtype of the tokens", problems)
    if any(manifests) or above:
        try:
            check_manifests(source, folders, indexes, manifests, above, problems)
        except (KeyError, TypeError) as error:
            problems.add(f"--source_dir={source}: a manifest.json of its folders lacks {error}. Tokenize again.")
    else:
        console.warn(
            f"{source}: no manifest.json, so the folders were not made by optimize_dataset.py. Tokenizers and "
            "checksums cannot be compared, and the dataset cannot be traced back to its text."
        )
    problems.raise_if_any()

    found = named_chunks(folders, indexes, manifests, in_place)
    if not found:
        raise UserError(f"--source_dir={source}: its {len(folders)} folders hold no chunks. Tokenize again.")
    return Plan(
        parts=[Part(chunk, ((path, chunk),)) for path, chunk in found],
        dtype=indexes[0].dtype,
        chunk_tokens=max((index.chunk_tokens for index in indexes if index.chunk_tokens), default=None),
        manifest=above or manifests[0],
        gathered={
            folder / entry["name"]: entry["gathered"]
            for folder, manifest in zip(folders, manifests)
            for entry in (manifest["files"] if manifest else [])
            if "gathered" in entry
        },
    )


def check_places(source: Path, target: Path, in_place: bool, problems: Problems) -> None:
    is_source = source.resolve() == target.resolve()
    if in_place and not is_source:
        problems.add(
            f"--target_dir={target}: --mode=index writes its index.json into --source_dir={source}, so give that "
            "directory."
        )
    elif is_source and not in_place:
        problems.add(f"--target_dir={target}: is --source_dir itself. Give another directory, or --mode=index.")
    elif source.resolve() in target.resolve().parents:
        problems.add(f"--target_dir={target}: lies inside --source_dir={source}. Give a directory outside of it.")


def find_folders(source: Path, in_place: bool) -> list[Path]:
    """The folders of the nodes, 10 after 9; or `source` itself, if it is one."""
    folders = [path for path in source.iterdir() if path.is_dir() and (path / INDEX_NAME).exists()]
    if folders:
        return sorted(folders, key=lambda path: natural_key(path.name))
    if (source / INDEX_NAME).exists() and not in_place:
        return [source]
    raise UserError(
        f"--source_dir={source}: no sub-folder with an {INDEX_NAME} in it. Give the directory above the nodes' "
        "folders, for example OUT/train; if optimize_dataset.py has not finished, run it again."
    )


def check_same(folders: list[Path], values: list[Any], what: str, problems: Problems) -> None:
    for folder, value in zip(folders[1:], values[1:]):
        if value != values[0]:
            problems.add(
                f"{folders[0]} and {folder} differ in the {what}: {values[0]!r} and {value!r}. "
                "Merge only folders of one run."
            )


def check_manifests(
    source: Path,
    folders: list[Path],
    indexes: list[Index],
    manifests: list[dict[str, Any] | None],
    above: dict[str, Any] | None,
    problems: Problems,
) -> None:
    """Counts must agree between indexes and manifests, and the folders must come from one run, and be all of it."""
    for folder, index, manifest in zip(folders, indexes, manifests):
        if manifest is None:
            problems.add(f"{folder}: no manifest.json, unlike its neighbours. Remove the folder or make it again.")
        elif not lists_the_same(index, manifest):
            problems.add(f"{folder}: index.json and manifest.json do not name the same chunks. Make the folder again.")
    if problems.found:
        return
    check_same(folders, [manifest["tokenizer"]["sha256"] for manifest in manifests], "tokenizer", problems)
    if problems.found:
        return
    check_same(folders, [manifest.get("fingerprint") for manifest in manifests], "settings or input files", problems)
    if above is None and folders != [source]:
        problems.add(f"{source}: no manifest.json beside its folders. Run optimize_dataset.py to its end.")
    if problems.found or above is None:
        return
    # Once merged in place, by --mode=index, it has the manifest of a dataset, with the fingerprint of its chunks.
    if above["kind"] == "tokens" and above.get("fingerprint") != manifests[0].get("fingerprint"):
        problems.add(f"{source} and {folders[0]} differ in the settings or input files. Tokenize into a new directory.")
    missing = sorted(set(above.get("folders", [])) - {folder.name for folder in folders})
    for key in ("documents", "tokens", "chunks", "text_bytes"):
        found = sum(manifest["content"][key] for manifest in manifests)
        expected = above["content"][key]
        if found != expected:
            problems.add(
                f"--source_dir={source}: its folders hold {found:,} {key}, its manifest says {expected:,}"
                + (f"; missing: {', '.join(missing)}" if missing else "")
                + ". Bring all folders back, or tokenize again."
            )


def lists_the_same(index: Index, manifest: dict[str, Any]) -> bool:
    try:
        recorded = {Chunk(file["name"], file["documents"], file["tokens"], file["bytes"]) for file in manifest["files"]}
    except (KeyError, TypeError):
        return False
    return recorded == set(index.chunks)


def named_chunks(
    folders: list[Path], indexes: list[Index], manifests: list[dict[str, Any] | None], in_place: bool
) -> list[tuple[Path, Chunk]]:
    """All chunks, by unit and not by node: where each one is, and its entry under a unique name."""
    found = []
    for folder, index, manifest in zip(folders, indexes, manifests):
        checksums = {file["name"]: file["xxh3_128"] for file in manifest["files"]} if manifest else {}
        for chunk in index.chunks:
            name = f"{folder.name}/{chunk.name}" if in_place else chunk.name
            entry = dataclasses.replace(chunk, name=name, xxh3_128=checksums.get(chunk.name))
            found.append((folder / chunk.name, entry))
    if all(manifests):
        return sorted(found, key=lambda item: natural_key(item[0].name))
    if in_place:
        return found
    # litdata calls the first chunk of every node chunk-0-0.bin: keep the folders' order, and number the chunks again.
    return [(path, dataclasses.replace(chunk, name=f"chunk-{i:07d}-0.bin")) for i, (path, chunk) in enumerate(found)]


def natural_key(name: str) -> list[Any]:
    """Sorts '10' after '9'."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def fingerprint_of(chunks: list[Chunk]) -> str:
    """Changes when the merged dataset changes; from checksums where they are known, else from names and counts."""
    parts = [f"{chunk.name} {chunk.xxh3_128 or (chunk.documents, chunk.tokens, chunk.bytes)}" for chunk in chunks]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
