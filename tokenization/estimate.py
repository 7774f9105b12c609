"""For --dry_run: what a run of step 1 will make and take, from a sample of the text."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from tokenization.encoder import DocumentTooLarge, Encoder
from tokenization.job import Plan, Unit
from tokenization.parquet import CorruptRowGroup, stream_texts
from tokenization.prepared_tokenizer import load_tokenizer
from utils import console
from utils.files import free_bytes
from utils.machine import available_cpus

SAMPLED_UNITS = 8


def print_estimates(plan: Plan, output_dir: str, num_workers: int | None) -> None:
    """Tokens, disk, cores and time."""
    prepared = load_tokenizer(plan)
    encoder = Encoder(prepared.tokenizer_json, plan.job.parse_special_tokens, prepared.fast_json, prepared.choice)
    sampled_documents = sampled_unit_rows = 0
    unit_tokens = unit_seconds = 0.0
    for unit, texts, rows in sample_texts(plan):
        start = time.perf_counter()
        try:
            ids, _ = encoder.encode(texts)
        except DocumentTooLarge as error:
            console.warn(f"{plan.job.paths[unit.ranges[0].file_index]}: {error}; the run would stop there")
            continue
        # By rows, and not by the footer's bytes: these are encoded, and a repeated text takes a few bits there.
        share = unit.rows / rows
        unit_seconds += share * (time.perf_counter() - start)
        unit_tokens += share * (len(ids) + len(texts))
        sampled_unit_rows += unit.rows
        sampled_documents += len(texts)
    rows = sum(unit.rows if unit.max_rows is None else unit.max_rows for unit in plan.units)
    scale = rows / max(sampled_unit_rows, 1)
    tokens = scale * unit_tokens
    disk_bytes = tokens * np.dtype(plan.job.dtype).itemsize
    cores = num_workers or available_cpus()
    # The sample is encoded with a cold cache, and encoding is about half of the work: the two about cancel.
    estimated_s = scale * unit_seconds / cores
    console.result(
        f"estimate from {console.counted(sampled_documents, 'document')}: {console.human_count(tokens)} tokens, "
        f"{console.human_bytes(disk_bytes)} on disk ({console.human_bytes(free_bytes(output_dir))} free), "
        f"about {console.human_seconds(estimated_s)} on {cores} cores of this kind"
    )


def sample_texts(plan: Plan) -> Iterator[tuple[Unit, pa.Array, int]]:
    """A batch of text from the beginning of each of a few units, spread over the input, and the rows read for it."""
    for unit in plan.units[:: max(1, len(plan.units) // SAMPLED_UNITS)][:SAMPLED_UNITS]:
        try:
            texts, rows = first_texts(plan, unit)
        except CorruptRowGroup as error:
            path = plan.job.paths[error.file_index]
            console.warn(f"{path}, row group {error.row_group}: {error.reason}; the run would stop there")
            continue
        if texts is not None:
            yield unit, texts, rows


def first_texts(plan: Plan, unit: Unit) -> tuple[pa.Array | None, int]:
    """The first batch with text in the unit's first row group, without nulls, and the number of rows up to its end."""
    job, piece, rows = plan.job, unit.ranges[0], 0
    for texts in stream_texts(
        job.input_dir, job.paths[piece.file_index], piece.file_index, [piece.first], job.text_column
    ):
        rows += len(texts)
        texts = texts.drop_null()
        if texts.nbytes:
            return texts, rows
    return None, rows
