"""Step 1: tokenize parquet, Arrow or JSON lines text into litdata chunks, on a Ray cluster or on this machine alone.

    python optimize_dataset.py --input_dir=PARQUET --tokenizer_dir=CKPT --output_dir=OUT
    python optimize_dataset.py --input_dir=PARQUET --tokenizer_dir=CKPT --output_dir=OUT --dry_run

Reads every *.parquet, *.arrow, *.jsonl, *.jsonl.gz and *.jsonl.zst file below PARQUET (a local path, or s3://, gs://,
hf://datasets/...; also what `save_to_disk` of Hugging Face datasets wrote), and writes
OUT/{train,val}/NODE/chunk-*.bin, with an index.json and a manifest.json per folder. Then run merge_files.py.

Run the same command again after a crash: finished units are kept, and the result is as if nothing had happened.
Which documents are validation data depends on their text alone, and the chunks do not depend on the cluster.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import gc
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from utils import cli, console  # first: it says how to install the packages if they are missing

# isort: split
from tokenization.job import SPLITS, Job, Plan, Unit, UnitRecord
from tokenization.missing_chunks import LostChunk, missing_of_output, put_back
from tokenization.output import (
    ProgressFile,
    check_all_are_here,
    check_nothing_lost,
    publish,
    remove_unrecorded_files,
    resume_or_begin,
    was_begun_with,
)
from tokenization.progress_bar import Progress
from tokenization.worker_process import end_early, start_early
from tokenization.workers import MAX_RETRIES, WorkerDied, Workers
from utils.errors import UserError
from utils.files import held_lock, remove_temporaries, temporary_sibling
from utils.machine import available_cpus
from utils.manifest import MANIFEST_NAME, some
from utils.ray_cluster import find_cluster, ray_session


@dataclasses.dataclass
class Settings:
    """What step 1 takes: the text, its tokenizer, where the tokens go, and how the work is cut and spread."""

    input_dir: str
    """Directory with the parquet, Arrow or JSON lines files, searched recursively; a local path or a URL."""
    tokenizer_dir: str
    """Directory with tokenizer.json (a litgpt or Hugging Face checkpoint directory)."""
    output_dir: str
    """Directory to write; on a cluster one that all nodes mount."""
    text_column: str = "text"
    """Column with the documents; in JSON lines the key."""
    val_fraction: float = 0.005
    """Share of the documents that becomes validation data, chosen by a hash of the text; between 0 and 1."""
    add_bos: bool | None = None
    """Put the BOS token before every document; null: as the tokenizer's configuration says."""
    add_eos: bool | None = None
    """Put the EOS token after every document; null: as the tokenizer's configuration says."""
    parse_special_tokens: bool = False
    """Turn the literal text of a special token inside a document into the token's id; false: it is ordinary text."""
    shuffle_seed: int | None = None
    """Shuffle the documents inside each unit with this seed; null: keep their order."""
    limit_documents: int | None = None
    """Use only this many rows, the first ones, for a trial run; null: all."""
    on_bad_file: Literal["fail", "quarantine"] = "fail"
    """Whether a file, row group, record batch or line that cannot be read stops the run, or is left out and listed in
    quarantine.jsonl."""
    chunk_tokens: int | None = None
    """Tokens after which a chunk file is cut; null: 2049 * 8012 (64 MB in int32), up to 4 times that from 4 TiB on."""
    unit_bytes: int | None = None
    """Bytes of text that a worker takes at a time; null: from the input's size, 4 MiB to 1 GiB."""
    num_workers: int | None = None
    """Number of units at a time, each on one CPU; null: all CPUs of the cluster, or of this machine."""
    address: str | None = None
    """Ray cluster to use, as HOST:PORT, or 'local' for processes of this machine; null: RAY_ADDRESS or the cluster that
    `ray start` started here, else this machine."""
    dry_run: bool = False
    """Check everything, print the plan with estimates, and stop."""


def describe_plan(plan: Plan, settings: Settings) -> None:
    from tokenization.input_names import describe_inputs

    console.say(
        f"input: {describe_inputs(plan.inputs)}, "
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
    if plan.job.eos_id is None:
        console.warn(
            "documents begin with BOS and do not end with EOS: a model trained on them will not learn to stop. "
            "--add_eos=true puts one after each document."
        )
    unit_bytes = plan.text_bytes / max(len(plan.units), 1)
    console.say(
        f"work: {console.counted(len(plan.units), 'unit')} of about {console.human_bytes(unit_bytes)} of text, "
        f"chunks of {plan.job.chunk_tokens:,} tokens, {100 * settings.val_fraction:g}% of the documents for validation"
    )


def tokenize(plan: Plan, settings: Settings, progress_file: ProgressFile) -> dict[int, UnitRecord]:
    """Resume: keep the units that progress.jsonl records, delete unrecorded chunks, do the others.

    Where no document became validation data, some units are done again.
    """
    from tokenization.plan import check_disk_space

    output_dir = Path(settings.output_dir)
    records = progress_file.finished_units()
    remove_unrecorded_files(output_dir, records)
    if records:
        console.say(f"resume: {len(records)} of {len(plan.units)} units were finished")
    left = [unit for unit in plan.units if unit.index not in records]
    check_disk_space(plan, settings.output_dir, done_bytes=plan.text_bytes - sum(unit.text_bytes for unit in left))
    try:
        with contextlib.ExitStack() as stack:
            workers = None
            if left:
                workers = stack.enter_context(start_workers(plan, settings))
                run_units(plan, plan.job, left, workers, progress_file.append)
                records = progress_file.finished_units()
            check_all_are_here(plan, records)
            again, val_threshold = units_to_redo_for_validation(plan, records)
            if again:
                workers = workers or stack.enter_context(start_workers(plan, settings))
                job = dataclasses.replace(plan.job, val_threshold=val_threshold)
                run_units(plan, job, again, workers, progress_file.append)
                records = progress_file.finished_units()
    except BaseException:
        # What other workers were writing must not fill the disk until the next run.
        with contextlib.suppress(OSError):
            remove_unrecorded_files(output_dir, progress_file.finished_units())
        raise
    remove_unrecorded_files(output_dir, records)
    return records


@contextlib.contextmanager
def start_workers(plan: Plan, settings: Settings) -> Iterator[Workers]:
    """Processes that tokenize: on the Ray cluster or, where there is none, on this machine."""
    from tokenization.local_workers import LocalWorkers
    from tokenization.prepared_tokenizer import load_tokenizer

    cluster = find_cluster(settings.address)
    if cluster is None:
        num_workers = settings.num_workers or min(available_cpus(), len(plan.units))
        console.say(f"this machine: {num_workers} worker process{'es'[: 2 * (num_workers != 1)]}")
        with contextlib.closing(LocalWorkers(num_workers, lambda: load_tokenizer(plan))) as workers:
            yield workers
    else:
        end_early()
        with ray_session(cluster):
            from tokenization.ray_workers import RayWorkers  # imports ray, which must find the session's environment

            ray_workers = RayWorkers(settings.num_workers, plan.job, lambda: load_tokenizer(plan))
            nodes, cpus = len(ray_workers.nodes), ray_workers.num_cpus()
            console.say(f"cluster: {console.counted(nodes, 'node')}, {console.counted(cpus, 'CPU')}")
            yield ray_workers


def run_units(plan: Plan, job: Job, units: list[Unit], workers: Workers, keep: Callable[[UnitRecord], None]) -> None:
    """Tokenize `units`, largest first; `keep` the record of each as it is finished."""
    queue = collections.deque(sorted(units, key=lambda unit: (-unit.text_bytes, unit.index)))
    left = len(queue)
    documents = tokens = 0
    busy_s = 0.0
    done_bytes = plan.text_bytes - sum(unit.text_bytes for unit in units)
    with Progress("tokenize", plan.text_bytes, done_bytes) as progress:
        while left:
            while queue and workers.num_free() > 0:
                workers.submit(job, queue.popleft())
            # Records first: an error must not lose what was finished beside it.
            for unit, outcome in sorted(workers.finished(), key=lambda done: isinstance(done[1], Exception)):
                left -= 1
                record = record_or_user_error(outcome, plan)
                keep(record)
                documents += record.documents
                tokens += record.tokens
                busy_s += sum(record.seconds.values())
                progress.advance(
                    unit.text_bytes,
                    f"{console.human_count(documents)} documents | {console.human_count(tokens)} tokens | "
                    f"{console.human_count(tokens / progress.elapsed_s)} tokens/s | "
                    f"{console.human_count(tokens / max(busy_s, 1e-9))} tokens/s per core",
                )


def record_or_user_error(outcome: UnitRecord | Exception, plan: Plan) -> UnitRecord:
    """A finished unit's record; what went wrong in it becomes a UserError where the user can fix it."""
    from tokenization.encoder import EncodingMismatch
    from tokenization.input_files import DamagedInput

    if isinstance(outcome, UnitRecord):
        return outcome
    go_on = f"the same command goes on:\n  {console.this_command()}"
    output_dir = f"--output_dir={plan.job.output_dir}"
    if isinstance(outcome, DamagedInput):
        message = (
            f"--input_dir: {plan.job.paths[outcome.file_index]}, {outcome.place}: {outcome.reason}. Fix or remove the "
            f"file, or leave such {outcome.parts} out with --on_bad_file=quarantine in a new --output_dir."
        )
    elif isinstance(outcome, EncodingMismatch):
        message = (
            f"--tokenizer_dir={plan.tokenizer_json.parent}: the fast encoder disagrees with Hugging Face "
            f"tokenizers, so nothing can be trusted: {outcome}. Please report this tokenizer."
        )
    elif isinstance(outcome, OSError) and outcome.errno in (errno.ENOSPC, errno.EDQUOT):
        message = (
            f"{output_dir}: the disk is full ({outcome.strerror}). Nothing half-written was kept. Make room; {go_on}"
        )
    elif isinstance(outcome, OSError) and outcome.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        message = f"{output_dir}: cannot be written ({outcome})."
    elif isinstance(outcome, OSError):
        message = f"reading or writing failed on a node ({type(outcome).__name__}: {outcome}). Then {go_on}"
    elif isinstance(outcome, MemoryError):
        message = (
            f"a worker process ran out of memory ({outcome or type(outcome).__name__}). Lower --num_workers or "
            f"--unit_bytes, or raise the limit that `ulimit -v` or the container sets; {go_on}"
        )
    elif isinstance(outcome, WorkerDied):
        message = (
            f"a worker process died {MAX_RETRIES + 1} times on the same unit, most likely because it ran out of memory "
            f"({outcome}). Lower --num_workers or --unit_bytes; {go_on}"
        )
    else:
        raise outcome
    raise UserError(message) from outcome


def units_to_redo_for_validation(plan: Plan, records: dict[int, UnitRecord]) -> tuple[list[Unit], int]:
    """Small inputs can have no hash below the threshold: then the smallest hash of all is validation data.

    Returns:
        The units to do again, and the threshold to do them with.

    Raises:
        UserError: there is no document at all.
    """
    threshold = final_val_threshold(plan, records)
    if threshold == plan.job.val_threshold:
        return [], threshold
    if not any(record.documents for record in records.values()):
        raise UserError(f"--input_dir: no document with text in column {plan.job.text_column!r}. Give files with text.")
    # A run that was interrupted here may have done some of them again already.
    again = [
        unit
        for unit in plan.units
        if records[unit.index].min_hash < threshold and not records[unit.index].val.documents
    ]
    return again, threshold


def final_val_threshold(plan: Plan, records: dict[int, UnitRecord]) -> int:
    """The planned threshold, or the one with which the document with the smallest hash is validation data."""
    smallest = min((record.min_hash for record in records.values()), default=0)
    return max(plan.job.val_threshold, smallest + 1)


def make_lost_again(plan: Plan, settings: Settings, lost: list[LostChunk], records: dict[int, UnitRecord]) -> None:
    """Tokenize the units of lost chunks of a finished output again, beside it, and take from them what is missing."""
    output_dir = Path(settings.output_dir)
    numbers = {chunk.unit for chunk in lost}
    console.say(
        f"missing: {console.counted(len(lost), 'chunk')} of the finished output "
        f"({some([str(chunk.path.relative_to(output_dir)) for chunk in lost])}); tokenizing "
        f"{console.counted(len(numbers), 'unit')} again"
    )
    remove_temporaries(output_dir)
    scratch = temporary_sibling(output_dir.absolute() / "again")
    scratch.mkdir()
    threshold = final_val_threshold(plan, records)
    job = dataclasses.replace(plan.job, output_dir=str(scratch), val_threshold=threshold)
    try:
        with start_workers(plan, settings) as workers:
            units = [unit for unit in plan.units if unit.index in numbers]
            run_units(plan, job, units, workers, lambda record: put_back(record, scratch, lost))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    console.result(
        f"{output_dir}: {console.counted(len(lost), 'missing chunk')} made again, with the checksums of before"
    )


def report(records: dict[int, UnitRecord], manifest: dict[str, Any], elapsed_s: float) -> None:
    content = manifest["content"]
    for split in ("train", "val"):
        part = content[split]
        console.result(
            f"{split}: {console.counted(part['documents'], 'document')}, {console.counted(part['tokens'], 'token')}, "
            f"{console.human_bytes(part['text_bytes'])} of text, {console.counted(part['chunks'], 'chunk')}"
        )
    null, empty = content["skipped_null"], content["skipped_empty"]
    console.say(f"skipped: {null:,} null and {empty:,} empty texts" if null + empty else "skipped: nothing")
    if content["quarantined"]:
        console.warn(
            f"{content['quarantined']} files, row groups, record batches or lines left out, listed in quarantine.jsonl"
        )
    phases: collections.Counter = collections.Counter()
    tokens_of_folder: collections.Counter = collections.Counter()
    for record in records.values():
        phases.update(record.seconds)
        tokens_of_folder[record.folder] += record.tokens
    busy_s = sum(phases.values()) or 1e-9
    tokens = sum(record.tokens for record in records.values())
    slowest = max(records.values(), key=lambda record: sum(record.seconds.values()))
    backends, checked = sorted({record.encoder for record in records.values()}), content["checked_documents"]
    by_reference = sum(record.reference_documents for record in records.values() if record.encoder == "gigatoken")
    documents = console.counted(by_reference, "document")
    console.say(
        f"speed: {console.human_count(tokens / busy_s)} tokens/s per core, {console.human_seconds(elapsed_s)} in all; "
        + ", ".join(f"{phase} {100 * seconds / busy_s:.0f}%" for phase, seconds in phases.most_common())
    )
    console.say(
        f"encoder: {', '.join(backends)}"
        + (f", but tokenizers for what it may encode differently in {documents}" if by_reference else "")
        + (f"; {console.counted(checked, 'document')} encoded by tokenizers too, all equal" if checked else "")
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
    command = "python merge_files.py --source_dir={} --target_dir={}".format
    console.next_command(
        "\n  ".join(command(*(shlex.quote(f"{place}/{split}") for place in (out, data))) for split in SPLITS)
    )


def main(settings: Settings) -> None:
    start = time.monotonic()
    output_dir = Path(settings.output_dir)
    if not settings.dry_run and not (output_dir / MANIFEST_NAME).exists():
        start_early(Path(settings.tokenizer_dir) / "tokenizer.json")

    from tokenization.plan import check_disk_space, make_plan

    plan = make_plan(settings)
    describe_plan(plan, settings)
    if settings.dry_run:
        from tokenization.estimate import print_estimates

        was_begun_with(plan, output_dir)
        check_disk_space(plan, settings.output_dir, done_bytes=0)
        print_estimates(plan, settings.output_dir, settings.num_workers)
        console.say("nothing was written; leave --dry_run out to begin")
        return
    output_dir.mkdir(parents=True, exist_ok=True)
    with held_lock(output_dir) as mine:  # before anything is read there: what another run writes now would be missed
        if not mine:
            raise UserError(
                f"--output_dir={output_dir}: another optimize_dataset.py writes there. Wait for it or end it."
            )
        if resume_or_begin(plan, output_dir) is None or not keep_finished(plan, settings):
            records, manifest = tokenize_and_publish(plan, settings)
            report(records, manifest, time.monotonic() - start)
    say_next(settings)


def keep_finished(plan: Plan, settings: Settings) -> bool:
    """Look for what a finished output has lost since, and make that again.

    Returns:
        False where it takes the whole work: what tells which chunks there were is lost too.
    """
    output_dir = Path(settings.output_dir)
    remove_temporaries(output_dir)
    unread, lost = missing_of_output(output_dir)
    if not unread and not lost:
        console.result(f"{output_dir}: finished already, nothing to do")
        return True
    with ProgressFile(output_dir, len(plan.units)) as progress_file:
        records = progress_file.recorded()
    if unread:
        if len(records) < len(plan.units):
            return False
        publish(plan, records, output_dir)
        console.result(f"{output_dir}: made again: {some([str(path.relative_to(output_dir)) for path in unread])}")
        # A move leaves indexes and manifests: where one was gone, so are the chunks.
        _, lost = missing_of_output(output_dir, {path.relative_to(output_dir).parts[0] for path in unread})
    if lost:
        make_lost_again(plan, settings, lost, records)
    return True


def tokenize_and_publish(plan: Plan, settings: Settings) -> tuple[dict[int, UnitRecord], dict[str, Any]]:
    output_dir = Path(settings.output_dir)
    with ProgressFile(output_dir, len(plan.units)) as progress_file:
        records = tokenize(plan, settings, progress_file)
        check_nothing_lost(plan, records)
        if not any(record.train.documents for record in records.values()):
            raise UserError(
                f"--val_fraction={settings.val_fraction}: every document became validation data. Give more documents, "
                "or a smaller fraction, and a new --output_dir."
            )
        return records, publish(plan, records, output_dir)


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
    gc.freeze()  # a last look for garbage would take 0.07 s
