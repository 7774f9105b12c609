"""The merge that packs: blocks of `--pack_tokens` tokens, written to new chunk files, one for each window of documents.

Which tokens stand in which block follows from the lengths of the documents, which the chunks' headers have, in the
order of the units: the same whichever nodes made the chunks, and the same when a killed merge is run again. Memory is
bounded by what is in three windows, however large the dataset is.

A file's name, packed-0000012.bin, says its window. Its header counts pieces of documents.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import xxhash

from tokenization.chunk_reader import read_document_offsets, verify
from tokenization.chunk_writer import chunk_header
from tokenization.merge_chunks import LostSources, how_to_get_back, verify_sources
from tokenization.merge_plan import Part, Plan
from tokenization.packing import Window, pack, tokens_of
from tokenization.progress_bar import Progress
from tokenization.threads import submit_ahead
from utils import console
from utils.chunks import Chunk
from utils.errors import UserError
from utils.files import atomic_write, checksum
from utils.manifest import some

PACKED_PATTERN = re.compile(r"packed-\d{7,}\.bin")
MIN_BLOCKS_PER_WINDOW = 16  # with fewer, many rooms are left that only a cut document fills
# Each holds the tokens of a window; one is filled while the other is written.
WRITERS = 2
COPIED_PIECES = 1 << 14


class _InManifest:
    """A dataclass whose fields are among those of `packing` in a packed dataset's manifest."""

    @classmethod
    def of_manifest(cls, manifest: dict[str, Any]) -> Self:
        recorded = manifest["packing"]
        return cls(**{field.name: recorded.get(field.name) for field in dataclasses.fields(cls)})


@dataclasses.dataclass(frozen=True)
class Packing(_InManifest):
    """How a dataset is packed."""

    pack_tokens: int
    """Of a block."""
    window_tokens: int
    """Of the documents that are packed together."""
    cut_at_end: bool
    """See packing.pack: True where documents begin with BOS."""


@dataclasses.dataclass
class Counts(_InManifest):
    """What packing does to the documents, and what the plain cut into blocks would do."""

    documents: int = 0
    blocks: int = 0
    pieces: int = 0
    rest_tokens: int = 0
    """At the end of the dataset, in no block."""
    documents_cut: int = 0
    documents_too_long: int = 0
    """Of these, those that are longer than a block."""
    plain_documents_cut: int = 0
    plain_pieces: int = 0
    plain_unread_tokens: int | None = 0
    """At the ends of the chunks, in no block; None: not recorded, by a version before December 2026."""

    def say(self, block_tokens: int) -> None:
        total = max(self.documents, 1)
        tokens = max(self.blocks * block_tokens + self.rest_tokens, 1)
        longer = f", {self.documents_too_long:,} of them longer than a block" if self.documents_too_long else ""
        plain_unread = ""
        if (unread := self.plain_unread_tokens) is not None:
            plain_unread = f"; without packing 0.00% padding, {unread / tokens:.2%} at the ends of chunks ({unread:,})"
        console.say(
            f"packing: {console.counted(self.blocks, 'block')} of {block_tokens:,} tokens\n"
            f"documents cut: {self.documents_cut / total:.2%} ({self.documents_cut:,} of {self.documents:,}{longer}), "
            f"in {self.pieces - self.documents:,} places; without packing "
            f"{self.plain_documents_cut / total:.2%} ({self.plain_documents_cut:,}), "
            f"in {self.plain_pieces - self.documents:,} places\n"
            "tokens that training does not read: 0.00% padding, "
            f"{self.rest_tokens / tokens:.2%} at the dataset's end ({self.rest_tokens:,}){plain_unread}"
        )


def packing_of(settings: Any, plan: Plan) -> Packing | None:
    """What --pack_tokens asks for; None without it.

    Raises:
        UserError: the source cannot be packed.
    """
    if (block_tokens := settings.pack_tokens) is None:
        return None
    flag, made_with = f"--pack_tokens={block_tokens}", (plan.manifest or {}).get("settings", {})
    if block_tokens < 2:
        raise UserError(f"{flag}: give the context in tokens plus one, for example 8193.")
    if settings.mode == "index":
        raise UserError(f"{flag}: packing writes new chunks, and --mode=index none. Leave one of the two out.")
    if made_with.get("bos_id") is None and made_with.get("eos_id") is None:
        raise UserError(
            f"{flag}: --source_dir={settings.source_dir} has no manifest.json that names the BOS or EOS token between "
            "documents, so pieces could not be told apart. Tokenize with optimize_dataset.py."
        )
    window_tokens = max(settings.pack_window_tokens, MIN_BLOCKS_PER_WINDOW * block_tokens)
    return Packing(block_tokens, window_tokens, made_with.get("bos_id") is not None)


def pack_chunks(plan: Plan, packing: Packing, settings: Any) -> tuple[list[Chunk], Counts]:
    """Verify the source and write the packed chunks, apart from those that an interrupted run has written."""
    console.say("verify: sizes, document offsets, checksums")
    verify_sources(plan, plan.parts, checksums=False, settings=settings)
    counts = Counts()
    with _lost_sources_named(plan, settings), Progress("pack", plan.bytes) as progress:
        chunks = []
        place = functools.partial(_place, Path(settings.target_dir))
        for chunk in stream_packed(plan.parts, plan.dtype, packing, counts, place):
            chunks.append(chunk)
            progress.advance(chunk.bytes, f"{len(chunks):,} chunks")
    return chunks, counts


def count_packing(plan: Plan, packing: Packing, settings: Any) -> Counts:
    """What packing would do, from the chunks' headers alone."""
    counts = Counts()
    with _lost_sources_named(plan, settings):
        for _ in _windows(plan.parts, plan.dtype, packing, counts, "offsets"):
            pass
    return counts


def restore_packed(damaged: dict[str, str], published: dict[str, Any], plan: Plan, settings: Any) -> None:
    """Pack again what a finished dataset has lost; each file must have its recorded checksum.

    Args:
        damaged: names of the files, each with what is wrong.
    """
    target = Path(settings.target_dir)
    recorded = {entry["name"]: entry for entry in published["files"]}

    def place(name: str, blocks: list[np.ndarray], chunk: Chunk) -> Chunk:
        if name in damaged:
            if chunk.xxh3_128 != recorded[name]["xxh3_128"]:
                raise UserError(
                    f"--source_dir={settings.source_dir}: gives {name} with other content than --target_dir={target} "
                    "had. Give the source that it was merged from, or a new --target_dir."
                )
            (target / name).unlink(missing_ok=True)
            _place(target, name, blocks, chunk)
        return chunk

    with _lost_sources_named(plan, settings):
        packing = Packing.of_manifest(published)
        made = {chunk.name for chunk in stream_packed(plan.parts, plan.dtype, packing, Counts(), place)}
    if other := sorted(damaged.keys() - made):
        raise UserError(
            f"--source_dir={settings.source_dir}: is not what --target_dir={target} was merged from, which lacks "
            f"{some(other)}. Give that source, or a new --target_dir."
        )


@contextlib.contextmanager
def _lost_sources_named(plan: Plan, settings: Any) -> Iterator[None]:
    try:
        yield
    except LostSources as error:
        raise UserError(
            f"--source_dir={settings.source_dir}: {how_to_get_back(error.lines, plan.manifest, settings)}"
        ) from error


def _place(target: Path, name: str, blocks: list[np.ndarray], chunk: Chunk) -> Chunk:
    """Write the file, unless an interrupted run has done so. Never overwrites another one."""
    path = target / name
    if not path.exists():
        with atomic_write(path) as file:
            for block in blocks:
                file.write(block)
    elif path.stat().st_size != chunk.bytes or checksum(path) != chunk.xxh3_128:
        raise UserError(f"--target_dir={target}: {name} is there already and is another file. Give a new directory.")
    return chunk


Place = Callable[[str, list[np.ndarray], Chunk], Chunk]
"""Takes a file's name, its content in parts, and its entry."""


def stream_packed(parts: list[Part], dtype: str, packing: Packing, counts: Counts, place: Place) -> Iterator[Chunk]:
    """The packed chunks of these parts, each handed to `place` on a thread.

    Args:
        parts: in their order; the content of every source file is compared with its checksum.
        counts: what is counted on the way is added to it.

    Raises:
        LostSources: a file is missing or damaged.
    """
    sources = _Sources([source for part in parts for source in part.sources], dtype)

    def work(number: int, window: Window) -> Chunk:
        lengths = tokens_of(window.pieces)
        content = [chunk_header(lengths, dtype), sources.tokens(window.pieces)]
        digest = xxhash.xxh3_128()
        for block in content:
            digest.update(block)
        size = sum(block.nbytes for block in content)
        name = f"packed-{number:07d}.bin"
        return place(name, content, Chunk(name, len(lengths), int(lengths.sum()), size, digest.hexdigest()))

    windows = _windows(parts, dtype, packing, counts, "checksum")
    filled = (window for window in windows if len(window.pieces))
    for future in submit_ahead(work, itertools.count(), filled, num_threads=WRITERS, num_ahead=WRITERS):
        yield future.result()


def _windows(parts: list[Part], dtype: str, packing: Packing, counts: Counts, depth: Any) -> Iterator[Window]:
    """The documents of these parts, packed; what is in a window has been added to `counts` when it comes."""
    lengths = _lengths(parts, dtype, packing, counts, depth)
    for window in pack(lengths, packing.pack_tokens, packing.window_tokens, packing.cut_at_end):
        counts.blocks += window.num_blocks
        counts.pieces += len(window.pieces)
        counts.rest_tokens += window.rest_tokens
        counts.documents_cut += window.documents_cut
        counts.documents_too_long += window.documents_too_long
        yield window


def _lengths(parts: list[Part], dtype: str, packing: Packing, counts: Counts, depth: Any) -> Iterator[np.ndarray]:
    """Tokens of the documents of each source file, which is compared with its entry first."""
    for part in parts:
        at = 0  # in the chunk that a merge without packing would have
        for path, chunk in part.sources:
            try:
                verify(path, chunk, dtype, depth)
                lengths = np.diff(read_document_offsets(path)) // np.dtype(dtype).itemsize
            except FileNotFoundError as error:
                raise LostSources([f"{path}: missing"]) from error
            except (OSError, ValueError) as error:
                raise LostSources([str(error)]) from error
            counts.documents += len(lengths)
            ends = at + np.cumsum(lengths)
            pieces = np.maximum(0, ends - 1) // packing.pack_tokens - (ends - lengths) // packing.pack_tokens + 1
            pieces[lengths == 0] = 1
            counts.pieces += int((lengths == 0).sum())  # packing passes them over
            counts.plain_pieces += int(pieces.sum())
            counts.plain_documents_cut += int((pieces > 1).sum())
            at = int(ends[-1]) if len(ends) else at
            yield lengths
        counts.plain_unread_tokens += at % packing.pack_tokens


class _Sources:
    """The tokens of the source's documents by number, read from memory-mapped files."""

    def __init__(self, sources: list[tuple[Path, Chunk]], dtype: str):
        self._sources, self._dtype = sources, np.dtype(dtype).newbyteorder("<")
        self._begins = np.cumsum([0, *(chunk.documents for _, chunk in sources)])

    def tokens(self, pieces: np.ndarray) -> np.ndarray:
        """Those of the pieces, an array of PIECE, back to back."""
        lengths = tokens_of(pieces)
        ends = np.cumsum(lengths, dtype=np.int64)
        found = np.empty(int(lengths.sum()), self._dtype)
        files = np.searchsorted(self._begins, pieces["document"], side="right") - 1
        for file in np.unique(files).tolist():
            begins, tokens = self._open(file)
            mine = np.flatnonzero(files == file)
            # Slice by slice, since as Python integers the numbers take several times the memory.
            for chosen in np.array_split(mine, len(mine) // COPIED_PIECES + 1):
                firsts = begins[pieces["document"][chosen] - self._begins[file]] + pieces["first"][chosen]
                for first, length, end in zip(firsts.tolist(), lengths[chosen].tolist(), ends[chosen].tolist()):
                    found[end - length : end] = tokens[first : first + length]
        return found

    def _open(self, file: int) -> tuple[np.ndarray, np.ndarray]:
        """Where its documents begin, and its tokens."""
        path = self._sources[file][0]
        offsets = read_document_offsets(path)
        begins = (offsets - offsets[0]) // self._dtype.itemsize
        return begins, np.memmap(path, mode="r", offset=0)[offsets[0] :].view(self._dtype)
