"""One unit of text to finished chunk files, each document to train or val by its hash: what a worker process does.

Per batch of a few MB, and never per document or token in Python where numpy can do it:

    read (Arrow) -> drop null and empty -> hash, which decides train or val -> encode (gigatoken)
                 -> put BOS and EOS between the documents -> cut into chunks -> write, fsync, rename

The text hash is the one thing that costs a call per document; xxhash takes 0.3 us for it.
"""

from __future__ import annotations

import itertools
import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from tokenization.check_sample import CheckSample
from tokenization.chunk_writer import ChunkWriter
from tokenization.encoder import DocumentTooLarge, Encoder, PreparedTokenizer
from tokenization.input_files import DamagedInput, check_stamp
from tokenization.input_formats import stream_range
from tokenization.job import HASH_RANGE, SPLITS, Job, SplitRecord, Unit, UnitRecord, chunk_name
from tokenization.text_arrays import arrow_text_buffers, rows_of
from utils.errors import UserError


def text_hashes(texts: pa.Array) -> np.ndarray:
    """XXH3-64 of each text's UTF-8 bytes, shape (n,), uint64."""
    offsets, data = arrow_text_buffers(texts)
    view, bounds = memoryview(data), offsets.tolist()
    digest = xxhash.xxh3_64_intdigest
    return np.fromiter((digest(view[a:b]) for a, b in itertools.pairwise(bounds)), np.uint64, len(texts))


def is_validation(hashes: np.ndarray, val_threshold: int) -> np.ndarray:
    """A document is validation data if its text's hash is below the threshold: val_fraction of all hashes.

    Args:
        hashes: as `text_hashes` gives them, shape (n,).

    Returns:
        shape (n,), bool.
    """
    return hashes < np.uint64(val_threshold) if val_threshold < HASH_RANGE else np.ones(len(hashes), bool)


def shuffled(seed: int, unit_index: int, num_documents: int) -> np.ndarray:
    """The order in which --shuffle_seed writes the documents that a unit has for one split; int64 indices."""
    return np.random.default_rng([seed, unit_index]).permutation(num_documents)


def assemble(
    ids: np.ndarray, ends: np.ndarray, bos_id: int | None, eos_id: int | None, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """Put BOS before and EOS after every document; one of them at least.

    Args:
        ids: token ids of n documents, back to back, shape (tokens,).
        ends: offsets of the documents into them, shape (n + 1,).

    Returns:
        tokens, shape (tokens + n * specials,), and the length of each document in them, shape (n,).
    """
    specials = (bos_id is not None) + (eos_id is not None)
    lengths = np.diff(ends) + specials
    stops = np.cumsum(lengths)
    tokens = np.empty(len(ids) + specials * len(lengths), dtype)
    is_text = np.ones(len(tokens), bool)
    for token, at in ((bos_id, stops - lengths), (eos_id, stops - 1)):
        if token is not None:
            tokens[at], is_text[at] = token, False
    tokens[is_text] = ids  # narrowed on the way, without a copy of its own
    return tokens, lengths


def consecutive_splits(is_val: np.ndarray) -> Iterator[tuple[str, int, int]]:
    """Stretches of consecutive documents that go to the same split: (split, first, last + 1)."""
    bounds = [0, *(np.flatnonzero(np.diff(is_val)) + 1).tolist(), len(is_val)]
    for first, last in itertools.pairwise(bounds):
        if first < last:
            yield SPLITS[int(is_val[first])], first, last


def tokenize_unit(job: Job, unit: Unit, folder: str, encoder: Encoder) -> UnitRecord:
    """Tokenize `unit` into chunk files below `job.output_dir`/{train,val}/`folder`.

    Doing it again, anywhere, writes the same bytes under the same names.

    Raises:
        DamagedInput: a page, line or compressed file cannot be decoded, and `job.quarantine` is off.
        EncodingMismatch: the encoder does not agree with `tokenizers`.
        OSError: from writing, for example when the disk is full.
        UserError: an input file was replaced meanwhile, or a document is too large to encode.
    """
    excluded: dict[tuple[int, int | None], DamagedInput] = {}
    while True:
        try:
            record = _tokenize_once(job, unit, folder, encoder, excluded)
        except DamagedInput as error:
            if not job.quarantine:
                raise
            # Start over without it: what a row group gave before its bad page must not depend on batch sizes.
            excluded[error.key] = error
        else:
            # A file has damaged row groups, or is damaged as a whole; damaged lines are listed already.
            for (file_index, _), error in sorted(excluded.items(), key=lambda item: item[0]):
                record.quarantined.append(error.entry(job.paths[file_index]))
            return record


class _Stopwatch:
    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


def _tokenize_once(
    job: Job, unit: Unit, folder: str, encoder: Encoder, excluded: dict[tuple[int, int | None], DamagedInput]
) -> UnitRecord:
    record = UnitRecord(unit.index, folder, SplitRecord(), SplitRecord())
    writers = {
        split: ChunkWriter(
            Path(job.output_dir) / split / folder,
            lambda i: chunk_name(unit.index, i),
            job.dtype,
            job.chunk_tokens,
        )
        for split in SPLITS
    }
    held: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    sample = CheckSample(unit.text_bytes, encoder.choice, encoder.added_tokens)
    watch, cpu_begin, reference_begin = _Stopwatch(), time.process_time(), encoder.reference_documents

    for path, texts in _texts_of(job, unit, excluded, record):
        watch.lap("read")
        hashes = text_hashes(texts)
        is_val = is_validation(hashes, job.val_threshold)
        record.min_hash = min(record.min_hash, int(hashes.min()))
        watch.lap("hash")
        try:
            ids, ends = encoder.encode(texts)
        except DocumentTooLarge as error:
            raise UserError(
                f"--input_dir={job.input_dir}: {path}: {error}. Split the document into several rows or remove it, or "
                "give a --tokenizer_dir that gigatoken supports."
            ) from error
        watch.lap("encode")
        if encoder.backend == "gigatoken":
            record.checked_documents += encoder.check(texts, ids, ends, sample.rows(texts))
            watch.lap("check")
        tokens, lengths = assemble(ids, ends, job.bos_id, job.eos_id, job.dtype)
        del ids  # before the next batch, which gets its memory while the processor's caches still have it
        stops = np.concatenate(([0], np.cumsum(lengths)))
        text_offsets = arrow_text_buffers(texts)[0]
        watch.lap("assemble")
        for split, first, last in consecutive_splits(is_val):
            counts: SplitRecord = getattr(record, split)
            counts.documents += last - first
            counts.tokens += int(stops[last] - stops[first])
            counts.text_bytes += int(text_offsets[last] - text_offsets[first])
            if job.shuffle_seed is None:
                writers[split].add(tokens[stops[first] : stops[last]], lengths[first:last])
            else:
                held[split].extend(np.split(tokens[stops[first] : stops[last]], stops[first + 1 : last] - stops[first]))
        watch.lap("write")

    for split, writer in writers.items():
        if job.shuffle_seed is not None:
            for i in shuffled(job.shuffle_seed, unit.index, len(held[split])).tolist():
                writer.add(held[split][i], np.array([len(held[split][i])]))
        writer.flush()
        getattr(record, split).chunks = writer.chunks
    watch.lap("write")
    record.encoder, record.peak_bytes = encoder.backend, peak_resident_bytes()
    record.reference_documents = encoder.reference_documents - reference_begin
    record.cpu_seconds = round(time.process_time() - cpu_begin, 4)
    record.seconds = {phase: round(seconds, 4) for phase, seconds in watch.seconds.items()}
    return record


def _texts_of(
    job: Job, unit: Unit, excluded: dict[tuple[int, int | None], DamagedInput], record: UnitRecord
) -> Iterator[tuple[str, pa.Array]]:
    """The unit's non-empty texts, batch by batch, each with the path of its file; counts what is skipped."""
    # What is left out does not count against the limit: good rows of the same unit take their place.
    rows_left = unit.most_rows
    for piece in unit.ranges:
        path = job.paths[piece.file_index]
        for texts in stream_range(job, piece, record, excluded.keys()):
            texts = texts[:rows_left]
            rows_left -= len(texts)
            record.skipped_null += texts.null_count
            if texts.null_count:
                texts = texts.drop_null()
            is_text = np.diff(arrow_text_buffers(texts)[0]) > 0
            record.skipped_empty += len(texts) - int(is_text.sum())
            if not is_text.all():
                texts = rows_of(texts, is_text)
            if len(texts):
                yield path, texts
            if not rows_left:
                check_stamp(job.input_dir, path, job.stamps[piece.file_index] if job.stamps else None)
                return


# One encoder per worker process: its cache of pretokens is what makes the next unit fast.
_encoders: dict[tuple[str, bool], Encoder] = {}


def process_encoder(job: Job, load_tokenizer: Callable[[], PreparedTokenizer]) -> Encoder:
    """This process's encoder for `job`, loaded when it is first needed."""
    key = (job.tokenizer_sha256, job.parse_special_tokens)
    if key not in _encoders:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        _encoders.clear()
        prepared = load_tokenizer()
        _encoders[key] = Encoder(prepared.tokenizer_json, job.parse_special_tokens, prepared.fast_json, prepared.choice)
        _warm_up(_encoders[key])
    return _encoders[key]


def _warm_up(encoder: Encoder) -> None:
    """First calls take longer, which belongs to a process's start and not to its first unit."""
    texts = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 4, 6], np.int32)), pa.py_buffer(b"warmup"))
    text_hashes(texts)
    encoder.encode(texts)


def peak_resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
