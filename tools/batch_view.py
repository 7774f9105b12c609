"""What `tools.show_batch` prints of a sequence: its documents, where they came from, and their text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tokenizers import Tokenizer

from tools.provenance_places import find_inputs
from tools.read_documents import Blocks, Part, occurrences
from tools.run_data import Run, RunData
from tools.source_rows import DatasetRows, NotTold, Row, Source
from utils import console
from utils.errors import UserError
from utils.manifest import read_manifest

_POSITIONS_AT_A_TIME = 1 << 20


class View:
    """A run's sequences as text.

    Args:
        directories: of the training datasets.
        settings: of tools.show_batch.
    """

    def __init__(self, run: Run, data: RunData, directories: list[Path], settings: Any):
        self.run, self.data, self.directories, self._settings = run, data, directories, settings
        self._blocks = [Blocks(i, index, data.block_tokens) for i, index in enumerate(data.indexes)]
        self._manifests = [read_manifest(directory) for directory in directories]
        self._tokenizer = self._load_tokenizer()
        self._rows: dict[int, DatasetRows | str] = {}  # a text says why there are none
        self._sources: dict[int, Source] = {}

    def _load_tokenizer(self) -> Tokenizer | None:
        given = self._settings.tokenizer_dir
        path = Path(given or self.run.checkpoint_dir) / "tokenizer.json"
        if not path.is_file():
            if given is not None:
                raise UserError(f"--tokenizer_dir={given}: no tokenizer.json in it.")
            console.warn(f"{path.parent}: no tokenizer.json, so documents are shown as token ids (--tokenizer_dir)")
            return None
        recorded = self.run.manifest.get("tokenizer") or {}
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if recorded and found != recorded["sha256"]:
            raise UserError(f"{path}: not the tokenizer of this run. Give that one as --tokenizer_dir.")
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def num_processes(self) -> int:
        """Processes of the invocation that wrote the checkpoint."""
        path = self.run.checkpoint_dir / "hyperparameters.yaml"
        settings = yaml.safe_load(path.read_text()) if path.is_file() else {}
        return (settings.get("num_nodes") or 1) * (settings.get("num_devices") or 1)

    # --- sequences ----------------------------------------------------------------------------------------------------

    def describe(self, positions: list[int], notes: list[str]) -> Iterator[list[str]]:
        """The lines of each sequence; `notes` stand behind the positions."""
        located = self.data.sequences.order.locate(np.array(positions))
        places = list(zip(positions, located.source.tolist(), located.block.tolist(), located.epoch.tolist()))
        parts = {position: self._blocks[source].parts(block) for position, source, block, _ in places}
        origins = self._origins([part for found in parts.values() for part in found])
        for (position, source, block, epoch), note in zip(places, notes):
            chunk, token = self._blocks[source].place(block)
            name = self._blocks[source].index.chunks[chunk].name
            title = f"position {position:,} ({note}): "
            title += f"{self.directories[source]}, epoch {epoch}, block {block:,}: "
            yield [title + f"{name}, tokens {token:,} to {token + self.data.block_tokens - 1:,}"] + [
                line for part in parts[position] for line in self._describe_part(part, origins[part])
            ]

    def _describe_part(self, part: Part, origin: str) -> list[str]:
        tokens = f"tokens {part.first:,} to {part.end - 1:,} of {part.document_tokens:,}"
        what = "piece" if "packing" in (self._manifests[part.dataset] or {}) else "document"
        number = f"{what} {part.document:,} ({part.document_of_dataset:,} of the dataset)"
        ids = self._blocks[part.dataset].tokens(part)[part.first : part.end].tolist()
        return [f"  {number}, {tokens}; {origin}", f"    {self._text(ids)}"]

    def _text(self, ids: list[int]) -> str:
        text = " ".join(map(str, ids)) if self._tokenizer is None else repr(self._decode(ids))
        limit = self._settings.text_chars
        return text if not limit or len(text) <= limit else text[:limit] + "..."

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    # --- rows ---------------------------------------------------------------------------------------------------------

    def _origins(self, parts: list[Part]) -> dict[Part, str]:
        """Where each part's document came from; in the order of the dataset, so that each unit is read once."""
        ordered = sorted(parts, key=lambda part: (part.dataset, part.document_of_dataset))
        return {part: self._origin(part) for part in ordered}

    def _origin(self, part: Part) -> str:
        if not self._settings.rows:
            return "row not looked for"
        rows = self._rows_of(part.dataset)
        if isinstance(rows, str):
            return f"row not known: {rows}"
        try:
            row = rows.row(part.chunk, part.document)
            return f"{row}{'' if self._gives(part, row) else ', WHOSE TEXT NOW GIVES OTHER TOKENS'}"
        except NotTold as error:
            return f"row not certain: {error}"

    def _rows_of(self, dataset: int) -> DatasetRows | str:
        if dataset not in self._rows:
            self._rows[dataset] = self._open_rows(dataset)
        return self._rows[dataset]

    def _open_rows(self, dataset: int) -> DatasetRows | str:
        manifest = self._manifests[dataset]
        if manifest is None or not manifest["inputs"] or not manifest.get("split"):
            return "the dataset's manifest names no input files"
        if "packing" in manifest:
            return "the dataset is packed, and which document a piece was follows from the tokens of step 1 alone"
        near = self._settings.parquet_dir or find_inputs(manifest["inputs"], self.directories[dataset])
        if near is None:
            return "the input files of step 1 are not near the dataset (--parquet_dir)"
        source = self._sources[dataset] = Source(str(near), manifest)
        if not source.is_whole:
            first = [*source.changed, *(f"{path}: missing" for path in source.missing)][0]
            return f"{near} is not what was tokenized ({first})"
        return DatasetRows(source, manifest)

    def _gives(self, part: Part, row: Row) -> bool:
        """Whether the row's text, encoded as the reference encoder does it, gives the document's tokens."""
        if self._tokenizer is None:
            return True
        job = self._sources[part.dataset].job
        self._tokenizer.encode_special_tokens = not job.parse_special_tokens
        text = self._sources[part.dataset].text_of(row)
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        around = [[] if token is None else [token] for token in (job.bos_id, job.eos_id)]
        return [*around[0], *ids, *around[1]] == self._blocks[part.dataset].tokens(part).tolist()

    # --- search -------------------------------------------------------------------------------------------------------

    def search(self, text: str) -> Iterator[list[str]]:
        """The lines of each place in the datasets that decodes to something with `text` in it.

        Raises:
            UserError: there is no tokenizer to decode with.
        """
        if self._tokenizer is None:
            raise UserError("--search: needs the run's tokenizer to decode with. Give --tokenizer_dir.")
        found = [part for blocks in self._blocks for part in self._find(blocks, text)]
        wanted = {(part.dataset, block) for part in found for block in self._blocks[part.dataset].blocks_of(part)}
        steps = self._steps_of_blocks(wanted)
        origins = self._origins(found)
        for part in found:
            blocks = self._blocks[part.dataset].blocks_of(part)
            lines = [f"{self.directories[part.dataset]}, {part.chunk}", *self._describe_part(part, origins[part])]
            if not blocks:
                lines.append("    never read: at the end of a chunk, in what fills no block")
            for block in blocks:
                read = [
                    f"step {step} (position {position:,}, epoch {epoch})"
                    for step, position, epoch in steps[part.dataset, block]
                ]
                lines.append(f"    block {block:,}: " + ("read at " + ", ".join(read) if read else "not read so far"))
            yield lines

    def _find(self, blocks: Blocks, text: str) -> Iterator[Part]:
        for chunk, documents in blocks.documents():
            ids = [document.tolist() for document in documents]
            for number, decoded in enumerate(self._tokenizer.decode_batch(ids, skip_special_tokens=False)):
                if text in decoded:
                    for first, end in occurrences(self._decode, ids[number], text):
                        yield blocks.whole_document(chunk, number, first, end)

    def _steps_of_blocks(self, wanted: set[tuple[int, int]]) -> dict[tuple[int, int], list[tuple[int, int, int]]]:
        """(step, position, epoch) of each time that a block was read, by (dataset, block)."""
        found: dict[tuple[int, int], list[tuple[int, int, int]]] = {place: [] for place in wanted}
        at_once = max(1, _POSITIONS_AT_A_TIME // self.data.global_batch_size)
        blocks = np.array(sorted({block for _, block in wanted}), np.int64)
        for first in range(1, self.run.last_step + 1, at_once):
            steps = range(first, min(first + at_once, self.run.last_step + 1))
            batches = list(self.data.batches(steps))
            positions = np.concatenate(batches)
            step_of = np.repeat(np.array(steps), [len(batch) for batch in batches])
            located = self.data.sequences.order.locate(positions)
            for i in np.flatnonzero(np.isin(located.block, blocks)).tolist():
                place = int(located.source[i]), int(located.block[i])
                if place in found:
                    found[place].append((int(step_of[i]), int(positions[i]), int(located.epoch[i])))
        return found
