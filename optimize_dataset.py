"""Step 1: tokenize parquet text into litdata chunks, on a Ray cluster or on this machine alone.

    python optimize_dataset.py --input_dir=PARQUET --tokenizer_dir=CKPT --output_dir=OUT
    python optimize_dataset.py --input_dir=PARQUET --tokenizer_dir=CKPT --output_dir=OUT --dry_run

Reads every *.parquet below PARQUET (a local path, or s3://, gs://, hf://datasets/..), writes
OUT/{train,val}/NODE/chunk-*.bin with an index.json and a manifest.json a folder. Then run merge_files.py.

Run the same command again after a crash: finished units are kept, and the result is the same as without it.
Which documents are validation data depends on their text alone, and the chunks do not depend on the cluster.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from tokenization.output import (
    ProgressFile,
    check_all_are_here,
    check_nothing_lost,
    check_same_plan,
    open_output,
    publish,
    remove_unrecorded_files,
)
from tokenization.plan import Plan, check_disk_space, free_bytes, make_plan
from utils import cli, console
from utils.errors import UserError, WorkerDied
from utils.machine import available_cpus

TASK_RETRIES = 3


@dataclasses.dataclass
class Settings:
    """Settings."""

    input_dir: str
    """Directory with the parquet files, searched recursively; a local path or a URL."""
    tokenizer_dir: str
    """Directory with tokenizer.json (a litgpt or Hugging Face checkpoint directory)."""
    output_dir: str
    """Directory to write; on a cluster one that all nodes mount."""
    text_column: str = "text"
    """Column that holds the documents."""
    val_fraction: float = 0.005
    """Share of the documents that becomes validation data, chosen by a hash of the text; between 0 and 1."""
    add_bos: bool | None = None
    """Put the BOS token before every document; null: as the tokenizer's configuration says."""
    add_eos: bool | None = None
    """Put the EOS token after every document; null: as the tokenizer's configuration says."""
    parse_special_tokens: bool = False
    """Turn a special token's literal text inside a document into its id; false: it is ordinary text."""
    shuffle_seed: int | None = None
    """Shuffle the documents inside each unit with this seed; null: keep their order."""
    limit_documents: int | None = None
    """Use only the first so many rows, for a trial run; null: all."""
    on_bad_file: Literal["fail", "quarantine"] = "fail"
    """A file or row group that cannot be read stops the run, or is left out and listed in quarantine.jsonl."""
    chunk_tokens: int | None = None
    """Tokens after which a chunk file is cut; null: 2049 * 8012 (64 MB in int32), up to 4 times that from 4 TiB on."""
    unit_bytes: int | None = None
    """Bytes of text that one task takes at a time; null: from the input's size, 4 MiB to 1 GiB."""
    num_workers: int | None = None
    """Units at a time, each on one CPU; null: all CPUs of the cluster, or of this machine."""
    address: str | None = None
    """Ray cluster to use, as HOST:PORT, or 'local' for processes of this machine; null: RAY_ADDRESS or the cluster that
    `ray start` started here, else this machine."""
    dry_run: bool = False
    """Check everything, print the plan with estimates, and stop."""


def describe_plan(plan: Plan, settings: Settings) -> None:
    rows = sum(entry["rows"] for entry in plan.inputs)
    console.say(
        f"input: {console.counted(len(plan.inputs), 'parquet file')}, {rows:,} rows, "
        f"{console.human_bytes(sum(entry['bytes'] for entry in plan.inputs))} "
        f"({console.human_bytes(plan.text_bytes)} of text planned) in {settings.input_dir}"
    )
    if plan.quarantined:
        console.warn(f"left out, to be listed in quarantine.jsonl: {console.counted(len(plan.quarantined), 'file')}")
        for bad in plan.quarantined[:10]:
            console.warn(f"  {bad['path']}: {bad['reason']}")
    around = [name for name, token in (("BOS", plan.job.bos_id), ("EOS", plan.job.eos_id)) if token is not None]
    console.say(
        f"tokens: {' and '.join(around)} added to each document, stored as {plan.job.dtype}, vocabulary of "
        f"{plan.tokenizer['vocab_size']:,}"
    )
    console.say(
        f"work: {console.counted(len(plan.units), 'unit')} of about {console.human_bytes(plan.text_bytes / max(len(plan.units), 1))} of text, "
        f"chunks of {plan.job.chunk_tokens:,} tokens, {100 * settings.val_fraction:g}% of the documents for validation"
    )


def print_estimates(plan: Plan, settings: Settings) -> None:
    """For --dry_run: tokens from a sample of the text, disk, cores, time."""
    import numpy as np

    from tokenization.encoder import Encoder
    from tokenization.parquet import CorruptRowGroup, stream_texts

    prepared = load_tokenizer(plan)
    encoder = Encoder(prepared.tokenizer_json, settings.parse_special_tokens, prepared.fast_json, prepared.choice)
    sampled_bytes = sampled_tokens = sampled_documents = 0
    seconds = 0.0
    for unit in plan.units[:: max(1, len(plan.units) // 8)][:8]:
        piece = unit.ranges[0]
        path = plan.job.paths[piece.file_index]
        groups = range(piece.first, piece.first + 1)
        try:
            for texts in stream_texts(settings.input_dir, path, piece.file_index, groups, settings.text_column):
                texts = texts.drop_null()
                if not texts.nbytes:
                    continue
                start = time.perf_counter()
                ids, _ = encoder.encode(texts)
                seconds += time.perf_counter() - start
                sampled_bytes += texts.nbytes
                sampled_tokens += len(ids) + len(texts)
                sampled_documents += len(texts)
                break
        except CorruptRowGroup as error:
            console.warn(f"{path}, row group {error.row_group}: {error.reason}; the run would stop there")
    tokens = plan.text_bytes * sampled_tokens / max(sampled_bytes, 1)
    disk_bytes = tokens * np.dtype(plan.job.dtype).itemsize
    cores = settings.num_workers or available_cpus()
    # The sample is encoded with a cold cache and encoding is about half of the work: the two about cancel.
    estimated_s = plan.text_bytes * seconds / max(sampled_bytes, 1) / cores
    console.result(
        f"estimate from {sampled_documents:,} documents: {console.human_count(tokens)} tokens, "
        f"{console.human_bytes(disk_bytes)} on disk ({console.human_bytes(free_bytes(settings.output_dir))} free), "
        f"about {console.human_seconds(estimated_s)} on {cores} cores of this kind"
    )


def load_tokenizer(plan: Plan) -> tuple:
    """The PreparedTokenizer: made and tried once here, not once in every worker; says which encoder works, and how fast."""
    from tokenization.encoder_check import check_ids, prepare_tokenizer

    flag = f"--tokenizer_dir={plan.tokenizer_json.parent}"
    prepared = prepare_tokenizer(plan.tokenizer_json.read_bytes(), plan.job.parse_special_tokens, flag)
    check_ids(prepared, {"BOS": plan.job.bos_id, "EOS": plan.job.eos_id}, plan.tokenizer["vocab_size"], flag)
    for warning in prepared.choice.warnings:
        console.warn(warning)
    console.say(prepared.choice.describe(*prepared.rates))
    return prepared


@contextlib.contextmanager
def start_workers(plan: Plan, settings: Settings) -> Iterator[Any]:
    """Processes that tokenize: on the Ray cluster, or without one on this machine (RayWorkers or LocalWorkers)."""
    from utils.ray_cluster import find_cluster, ray_session

    def load() -> tuple:
        return load_tokenizer(plan)

    cluster = find_cluster(settings.address)
    if cluster is None:
        from tokenization.local_workers import LocalWorkers

        num_workers = settings.num_workers or min(available_cpus(), len(plan.units))
        console.say(f"this machine: {num_workers} worker process{'es'[: 2 * (num_workers != 1)]}")
        with LocalWorkers(num_workers, load, TASK_RETRIES) as workers:
            yield workers
    else:
        from tokenization.ray_workers import RayWorkers

        with ray_session(cluster):
            ray_workers = RayWorkers(settings.num_workers, plan.job, load, TASK_RETRIES)
            nodes, cpus = len(ray_workers.nodes), ray_workers.num_cpus()
            console.say(f"cluster: {console.counted(nodes, 'node')}, {console.counted(cpus, 'CPU')}")
            yield ray_workers


def run_units(plan: Plan, units: list, workers: Any, progress_file: ProgressFile, done_bytes: int) -> None:
    """Tokenize `units`, largest first; append a record for each as it is finished.

    Args:
        workers: what `start_workers` gives.
        done_bytes: of text that an earlier run finished.
    """
    from utils.console import Progress

    queue = collections.deque(sorted(units, key=lambda unit: (-unit.text_bytes, unit.index)))
    left = len(queue)
    documents = tokens = 0
    busy_s = 0.0
    with Progress("tokenize", plan.text_bytes, done_bytes) as progress:
        while left:
            while queue and workers.num_free() > 0:
                workers.submit(plan.job, queue.popleft())
            # Records first: an error must not lose what was finished beside it.
            for unit, outcome in sorted(workers.finished(), key=lambda done: not isinstance(done[1], dict)):
                left -= 1
                record = record_of(outcome, plan)
                progress_file.append(record)
                documents += record["train"]["documents"] + record["val"]["documents"]
                tokens += record["train"]["tokens"] + record["val"]["tokens"]
                busy_s += sum(record["seconds"].values())
                progress.advance(
                    unit.text_bytes,
                    f"{console.human_count(documents)} documents | {console.human_count(tokens)} tokens | "
                    f"{console.human_count(tokens / progress.elapsed_s)} tokens/s | "
                    f"{console.human_count(tokens / busy_s)} tokens/s per core",
                )


def record_of(outcome: dict[str, Any] | BaseException, plan: Plan) -> dict[str, Any]:
    """A finished unit's record; what went wrong in it becomes a UserError where the user can mend it."""
    from tokenization.encoder import EncodingMismatch
    from tokenization.parquet import CorruptRowGroup

    if isinstance(outcome, dict):
        return outcome
    go_on = f"the same command goes on:\n  {console.this_command()}"
    if isinstance(outcome, CorruptRowGroup):
        raise UserError(
            f"--input_dir: {plan.job.paths[outcome.file_index]}, row group {outcome.row_group}: {outcome.reason}. Mend or "
            "remove the file, or leave such row groups out with --on_bad_file=quarantine in a new --output_dir."
        ) from outcome
    if isinstance(outcome, EncodingMismatch):
        raise UserError(
            f"--tokenizer_dir={plan.tokenizer_json.parent}: the fast encoder disagrees with Hugging Face "
            f"tokenizers, so nothing can be trusted: {outcome}. Please report this tokenizer."
        ) from outcome
    if isinstance(outcome, OSError) and outcome.errno in (errno.ENOSPC, errno.EDQUOT):
        raise UserError(
            f"--output_dir={plan.job.output_dir}: the disk is full ({outcome.strerror}). Nothing half-written "
            f"was kept; make room, and {go_on}"
        ) from outcome
    if isinstance(outcome, OSError) and outcome.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        raise UserError(f"--output_dir={plan.job.output_dir}: cannot be written ({outcome}).") from outcome
    if isinstance(outcome, OSError):
        raise UserError(
            f"reading or writing failed on a node ({type(outcome).__name__}: {outcome}). Then {go_on}"
        ) from outcome
    if isinstance(outcome, WorkerDied):
        raise UserError(
            f"a worker process died {TASK_RETRIES + 1} times on the same unit, most likely for want of memory ({outcome}). "
            f"Lower --num_workers or --unit_bytes; {go_on}"
        ) from outcome
    raise outcome


def raise_threshold_if_val_is_empty(plan: Plan, records: dict[int, Any]) -> list:
    """Small inputs can have no hash below the threshold: then the smallest hash of all is validation data.

    Returns:
        The units to do again with the raised threshold, which becomes the plan's.
    """
    if any(record.min_hash < plan.job.val_threshold for record in records.values()):
        return []
    smallest = min((record.min_hash for record in records.values()), default=None)
    if smallest is None or sum(record.documents for record in records.values()) == 0:
        raise UserError(f"--input_dir: no document with text in column {plan.job.text_column!r}. Give files with text.")
    plan.job = dataclasses.replace(plan.job, val_threshold=smallest + 1)
    # A run that was interrupted here may have done some of them again already.
    return [
        unit
        for unit in plan.units
        if records[unit.index].min_hash == smallest and not records[unit.index].val.documents
    ]


def report(plan: Plan, records: dict[int, Any], manifest: dict[str, Any], elapsed_s: float) -> None:
    content = manifest["content"]
    for split in ("train", "val"):
        part = content[split]
        console.result(
            f"{split}: {part['documents']:,} documents, {part['tokens']:,} tokens, "
            f"{console.human_bytes(part['text_bytes'])} of text, {console.counted(part['chunks'], 'chunk')}"
        )
    skipped = content["skipped_null"] + content["skipped_empty"]
    console.say(
        f"skipped: {content['skipped_null']:,} null and {content['skipped_empty']:,} empty texts"
        if skipped
        else "skipped: nothing"
    )
    if content["quarantined"]:
        console.warn(f"{content['quarantined']} files or row groups left out, listed in quarantine.jsonl")
    phases: collections.Counter = collections.Counter()
    tokens_of_folder: collections.Counter = collections.Counter()
    for record in records.values():
        phases.update(record.seconds)
        tokens_of_folder[record.folder] += record.tokens
    busy_s = sum(phases.values()) or 1e-9
    tokens = sum(record.tokens for record in records.values())
    slowest = max(records.values(), key=lambda record: sum(record.seconds.values()))
    backends = sorted({record.encoder for record in records.values()})
    console.say(
        f"speed: {console.human_count(tokens / busy_s)} tokens/s per core, {console.human_seconds(elapsed_s)} in all; "
        + ", ".join(f"{phase} {100 * seconds / busy_s:.0f}%" for phase, seconds in phases.most_common())
    )
    console.say(
        f"encoder: {', '.join(backends)}"
        + (
            f"; {content['checked_documents']:,} documents encoded by tokenizers too, all equal"
            if content["checked_documents"]
            else ""
        )
    )
    shares = ", ".join(
        f"{folder}: {100 * count / max(tokens, 1):.0f}%" for folder, count in sorted(tokens_of_folder.items())
    )
    console.say(
        f"share of each node: {shares}; slowest unit: {slowest.unit} with "
        f"{console.human_seconds(sum(slowest.seconds.values()))}; largest worker: "
        f"{console.human_bytes(max(record.peak_bytes for record in records.values()))}"
    )


def say_next(settings: Settings) -> None:
    out = settings.output_dir.rstrip("/")
    data = os.path.join(os.path.dirname(out), "merged" if os.path.basename(out) == "dataset" else "dataset")
    console.next_command(
        f"python merge_files.py --source_dir={out}/train --target_dir={data}/train\n"
        f"  python merge_files.py --source_dir={out}/val --target_dir={data}/val"
    )


def main(settings: Settings) -> None:
    start = time.monotonic()
    output_dir = Path(settings.output_dir)
    plan = make_plan(settings)
    describe_plan(plan, settings)
    if settings.dry_run:
        check_same_plan(plan, output_dir)
        check_disk_space(plan, settings.output_dir, 0)
        print_estimates(plan, settings)
        console.say("nothing was written; leave --dry_run out to begin")
        return
    manifest = open_output(plan, output_dir)
    if manifest is not None:
        console.result(f"{output_dir}: finished already, nothing to do")
        say_next(settings)
        return

    with ProgressFile(output_dir) as progress_file:
        records = progress_file.finished(output_dir)
        remove_unrecorded_files(output_dir, records)
        if records:
            console.say(f"resume: {len(records)} of {len(plan.units)} units were finished")
        left = [unit for unit in plan.units if unit.index not in records]
        done_bytes = plan.text_bytes - sum(unit.text_bytes for unit in left)
        check_disk_space(plan, settings.output_dir, done_bytes)
        if "://" not in settings.input_dir:  # workers run in other directories
            plan.job = dataclasses.replace(plan.job, input_dir=os.path.abspath(settings.input_dir))
        try:
            with contextlib.ExitStack() as stack:
                workers = stack.enter_context(start_workers(plan, settings)) if left else None
                if left:
                    run_units(plan, left, workers, progress_file, done_bytes)
                    records = progress_file.finished(output_dir)
                check_all_are_here(plan, records)
                again = raise_threshold_if_val_is_empty(plan, records)
                if again:
                    workers = workers or stack.enter_context(start_workers(plan, settings))
                    run_units(plan, again, workers, progress_file, plan.text_bytes)
                    records = progress_file.finished(output_dir)
        except BaseException:
            # What other workers were writing must not fill the disk until the next run.
            with contextlib.suppress(OSError):
                remove_unrecorded_files(output_dir, progress_file.finished(output_dir))
            raise
        check_nothing_lost(plan, records)
        if not sum(record.train.documents for record in records.values()):
            raise UserError(
                f"--val_fraction={settings.val_fraction}: every document became validation data. Give more documents, "
                "or a smaller fraction, and a new --output_dir."
            )
        remove_unrecorded_files(output_dir, records)
        manifest = publish(plan, records, output_dir)
    report(plan, records, manifest, time.monotonic() - start)
    say_next(settings)


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
