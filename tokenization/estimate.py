"""For --dry_run: what a run of step 1 will make and take, from a sample of the text."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from tokenization.encoder import DocumentTooLarge, Encoder
from tokenization.input_files import DamagedInput
from tokenization.input_formats import stream_range
from tokenization.input_names import is_jsonl
from tokenization.job import Plan, SplitRecord, Unit, UnitRecord
from tokenization.prepared_tokenizer import load_tokenizer
from tokenization.text_arrays import arrow_text_buffers
from utils import console
from utils.files import free_bytes
from utils.machine import available_cpus

SAMPLED_UNITS = 8


def print_estimates(plan: Plan, output_dir: str, num_workers: int | None) -> None:
    """Tokens, disk, cores and time."""
    prepared = load_tokenizer(plan)
    encoder = Encoder(prepared.tokenizer_json, plan.job.parse_special_tokens, prepared.fast_json, prepared.choice)
    by_rows = all(unit.rows is not None for unit in plan.units)

    def work_of(unit: Unit) -> int:
        return unit.rows if by_rows else unit.text_bytes

    sampled_documents = sampled_work = 0
    unit_tokens = unit_seconds = 0.0
    for unit, texts, rows in sample_texts(plan):
        start = time.perf_counter()
        try:
            ids, _ = encoder.encode(texts)
        except DocumentTooLarge as error:
            console.warn(f"{plan.job.paths[unit.ranges[0].file_index]}: {error}; the run would stop there")
            continue
        # By rows, and not by the footer's bytes: these are encoded, and a repeated text takes a few bits there. JSON
        # lines have no footer that knows the rows, and what a sample says of their bytes holds.
        share = unit.text_bytes / text_size(texts) if unit.rows is None else unit.rows / rows
        unit_seconds += share * (time.perf_counter() - start)
        unit_tokens += share * (len(ids) + len(texts))
        sampled_work += work_of(unit)
        sampled_documents += len(texts)
    work = sum(work_of(unit) if unit.max_rows is None else unit.max_rows for unit in plan.units)
    scale = work / max(sampled_work, 1)
    tokens = scale * unit_tokens
    disk_bytes = tokens * np.dtype(plan.job.dtype).itemsize
    cores = num_workers or available_cpus()
    # The sample is encoded with a cold cache, and encoding is about half of the work: the two about cancel.
    estimated_s = scale * unit_seconds / cores
    took = "less than a second" if estimated_s < 1 else f"about {console.human_seconds(estimated_s)}"
    console.result(
        f"estimate from {console.counted(sampled_documents, 'document')}: {console.human_count(tokens)} tokens, "
        f"{console.human_bytes(disk_bytes)} on disk ({console.human_bytes(free_bytes(output_dir))} free), "
        f"{took} on {cores} cores of this kind, without the start"
    )


def sample_texts(plan: Plan) -> Iterator[tuple[Unit, pa.Array, int]]:
    """A batch of text from the beginning of each of a few units, spread over the input, and the rows read for it."""
    for unit in plan.units[:: max(1, len(plan.units) // SAMPLED_UNITS)][:SAMPLED_UNITS]:
        try:
            texts, rows = first_texts(plan, unit)
        except DamagedInput as error:
            path = plan.job.paths[error.file_index]
            console.warn(f"{path}, {error.place}: {error.reason}; the run would stop there")
            continue
        if texts is not None:
            yield unit, texts, rows


def first_texts(plan: Plan, unit: Unit) -> tuple[pa.Array | None, int]:
    """The first batch with text of the unit's first row group, or of its first lines, without nulls, and the number of
    rows up to its end."""
    piece, rows = unit.ranges[0], 0
    if not is_jsonl(plan.job.paths[piece.file_index]):
        piece = dataclasses.replace(piece, last=piece.first + 1)
    for texts in stream_range(plan.job, piece, UnitRecord(unit.index, "", SplitRecord(), SplitRecord())):
        rows += len(texts)
        texts = texts.drop_null()
        if text_size(texts):
            return texts, rows
    return None, rows


def text_size(texts: pa.Array) -> int:
    """UTF-8 bytes of a string array without nulls."""
    offsets = arrow_text_buffers(texts)[0]
    return int(offsets[-1] - offsets[0])
