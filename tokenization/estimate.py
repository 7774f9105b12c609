"""For --dry_run: what a run of step 1 will make and take, from a sample of the text."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from tokenization.encoder import Encoder
from tokenization.encoder_check import load_tokenizer
from tokenization.job import Plan, Unit
from tokenization.parquet import CorruptRowGroup, stream_texts
from tokenization.plan import free_bytes
from utils import console
from utils.machine import available_cpus

SAMPLED_UNITS = 8


def print_estimates(plan: Plan, output_dir: str, num_workers: int | None) -> None:
    """Tokens, disk, cores and time."""
    prepared = load_tokenizer(plan)
    encoder = Encoder(prepared.tokenizer_json, plan.job.parse_special_tokens, prepared.fast_json, prepared.choice)
    sampled_bytes = sampled_tokens = sampled_documents = 0
    seconds = 0.0
    for texts in sample_texts(plan):
        start = time.perf_counter()
        ids, _ = encoder.encode(texts)
        seconds += time.perf_counter() - start
        sampled_bytes += texts.nbytes
        sampled_tokens += len(ids) + len(texts)
        sampled_documents += len(texts)
    tokens = plan.text_bytes * sampled_tokens / max(sampled_bytes, 1)
    disk_bytes = tokens * np.dtype(plan.job.dtype).itemsize
    cores = num_workers or available_cpus()
    # The sample is encoded with a cold cache, and encoding is about half of the work: the two about cancel.
    estimated_s = plan.text_bytes * seconds / max(sampled_bytes, 1) / cores
    console.result(
        f"estimate from {sampled_documents:,} documents: {console.human_count(tokens)} tokens, "
        f"{console.human_bytes(disk_bytes)} on disk ({console.human_bytes(free_bytes(output_dir))} free), "
        f"about {console.human_seconds(estimated_s)} on {cores} cores of this kind"
    )


def sample_texts(plan: Plan) -> Iterator[pa.Array]:
    """A batch of text from the beginning of each of a few units, spread over the input."""
    for unit in plan.units[:: max(1, len(plan.units) // SAMPLED_UNITS)][:SAMPLED_UNITS]:
        try:
            texts = first_texts(plan, unit)
        except CorruptRowGroup as error:
            path = plan.job.paths[error.file_index]
            console.warn(f"{path}, row group {error.row_group}: {error.reason}; the run would stop there")
            continue
        if texts is not None:
            yield texts


def first_texts(plan: Plan, unit: Unit) -> pa.Array | None:
    """The first batch with text in the unit's first row group, without nulls."""
    job, piece = plan.job, unit.ranges[0]
    for texts in stream_texts(
        job.input_dir, job.paths[piece.file_index], piece.file_index, [piece.first], job.text_column
    ):
        texts = texts.drop_null()
        if texts.nbytes:
            return texts
    return None
