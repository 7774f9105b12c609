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
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from utils import cli, console
from utils.errors import Problems, UserError

PLAN_NAME = "plan.json"
PROGRESS_NAME = "progress.jsonl"
QUARANTINE_NAME = "quarantine.jsonl"
CHECKED_PACKAGES = ("ray", "pyarrow", "gigatoken", "tokenizers", "awkward", "numpy", "xxhash")
TASK_RETRIES = 3
CHUNK_PATTERN = re.compile(r"chunk-\d{7,}-\d+\.bin")


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
    """Tasks at a time, each on one CPU; null: all CPUs of the cluster."""
    address: str | None = None
    """Ray cluster to use, as HOST:PORT; null: RAY_ADDRESS or the one `ray start` started here, else this machine."""
    dry_run: bool = False
    """Check everything, print the plan with estimates, and stop."""


# ---------------------------------------------------------------------------------------------------------------------
# Plan


@dataclasses.dataclass
class Plan:
    """What the settings and the input amount to."""

    job: Any  # utils.tokenize_unit.Job
    units: list  # of utils.units.Unit
    inputs: list[dict[str, Any]]
    """path, bytes, rows, fingerprint of each usable parquet file, sorted by path."""
    quarantined: list[dict[str, Any]]
    """Files left out, with the reason."""
    settings: dict[str, Any]
    """Those that shape the result; for the manifest."""
    tokenizer: dict[str, Any]
    tokenizer_json: Path
    fingerprint: str
    """SHA-256 of settings, tokenizer and inputs: the identity of the result."""

    @property
    def text_bytes(self) -> int:
        return sum(unit.text_bytes for unit in self.units)


def make_plan(settings: Settings) -> Plan:
    """Check everything that can be checked without a cluster; raises UserError with all that was found."""
    from utils.chunks import dtype_for_vocabulary
    from utils.parquet_input import list_parquet_files, read_footers
    from utils.tokenize_unit import HASH_RANGE, Job, largest_chunk_tokens
    from utils.tokenizer import read_tokenizer_info
    from utils.units import default_chunk_tokens, default_unit_bytes, plan_units

    problems = Problems()
    check_ranges(settings, problems)
    tokenizer = problems.collect(read_tokenizer_info, settings.tokenizer_dir)
    bos_id, eos_id = separators(settings, tokenizer, problems) if tokenizer else (None, None)
    entries = problems.collect(list_parquet_files, settings.input_dir) or []
    problems.collect(check_output_dir, Path(settings.output_dir))

    input_bytes = sum(entry.bytes for entry in entries)
    inputs, quarantined = [], []

    def usable() -> Iterator[tuple[int, Any]]:
        for entry, footer, reason in read_footers(settings.input_dir, entries, settings.text_column):
            if reason is not None:
                quarantined.append({"path": entry.path, "row_group": None, "reason": reason})
                continue
            rows = sum(footer.rows)
            inputs.append({"path": entry.path, "bytes": entry.bytes, "rows": rows, "fingerprint": footer.fingerprint})
            yield len(inputs) - 1, footer

    unit_bytes = settings.unit_bytes or default_unit_bytes(input_bytes)
    units = plan_units(usable(), unit_bytes, settings.limit_documents)
    if settings.on_bad_file == "fail":
        for bad in quarantined:
            problems.add(
                f"--input_dir={settings.input_dir}: {bad['path']}: {bad['reason']}. Mend or remove it, or leave such "
                "files out with --on_bad_file=quarantine."
            )
    if entries and not units and not problems.found:
        problems.add(f"--input_dir={settings.input_dir}: no rows in its {len(entries)} files. Give files with text.")

    dtype = dtype_for_vocabulary(tokenizer.vocab_size) if tokenizer else "int32"
    chunk_tokens = settings.chunk_tokens or default_chunk_tokens(input_bytes)
    if chunk_tokens > largest_chunk_tokens(dtype):
        problems.add(
            f"--chunk_tokens={chunk_tokens}: a chunk file must stay below 4 GiB. "
            f"Give at most {largest_chunk_tokens(dtype)}."
        )
    problems.raise_if_any()

    shaping = {
        "text_column": settings.text_column,
        "val_fraction": settings.val_fraction,
        "bos_id": bos_id,
        "eos_id": eos_id,
        "parse_special_tokens": settings.parse_special_tokens,
        "shuffle_seed": settings.shuffle_seed,
        "limit_documents": settings.limit_documents,
        "on_bad_file": settings.on_bad_file,
        "dtype": dtype,
        "chunk_tokens": chunk_tokens,
        "unit_bytes": unit_bytes,
    }
    job = Job(
        input_dir=settings.input_dir,
        paths=tuple(entry["path"] for entry in inputs),
        output_dir=os.path.abspath(settings.output_dir),
        text_column=settings.text_column,
        tokenizer_sha256=tokenizer.sha256,
        dtype=dtype,
        chunk_tokens=chunk_tokens,
        bos_id=bos_id,
        eos_id=eos_id,
        val_threshold=round(settings.val_fraction * HASH_RANGE),
        parse_special_tokens=settings.parse_special_tokens,
        shuffle_seed=settings.shuffle_seed,
        quarantine=settings.on_bad_file == "quarantine",
    )
    identity = {"settings": shaping, "tokenizer": tokenizer.record(), "inputs": inputs}
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return Plan(
        job=job,
        units=units,
        quarantined=quarantined,
        tokenizer_json=tokenizer.directory / "tokenizer.json",
        fingerprint=fingerprint,
        **identity,
    )


def check_ranges(settings: Settings, problems: Problems) -> None:
    if not 0 < settings.val_fraction < 1:
        problems.add(
            f"--val_fraction={settings.val_fraction}: must lie between 0 and 1, both excluded: training needs "
            "validation data. Give 0.005, for example."
        )
    for name in ("chunk_tokens", "unit_bytes", "num_workers", "limit_documents"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            problems.add(f"--{name}={value}: must be at least 1, or null for the default.")


def separators(settings: Settings, tokenizer: Any, problems: Problems) -> tuple[int | None, int | None]:
    """The ids of BOS and EOS to put around each document, None for one that is not put."""
    chosen = {}
    for kind in ("bos", "eos"):
        asked = getattr(settings, f"add_{kind}")
        token_id = getattr(tokenizer, f"{kind}_id")
        wanted = getattr(tokenizer, f"adds_{kind}") if asked is None else asked
        if wanted and token_id is None:
            problems.add(
                f"--add_{kind}=true: {tokenizer.directory} names no {kind.upper()} token. Name it as {kind}_token in "
                "tokenizer_config.json."
            )
        chosen[kind] = token_id if wanted else None
    if chosen["bos"] is None and chosen["eos"] is None and not problems.found:
        remedy = " or ".join(
            f"--add_{kind}=true" for kind in ("eos", "bos") if getattr(tokenizer, f"{kind}_id") is not None
        )
        problems.add(
            f"--tokenizer_dir={tokenizer.directory}: it adds neither BOS nor EOS, so documents would run into each "
            f"other. Give {remedy or 'a tokenizer that names a bos_token or eos_token in tokenizer_config.json'}."
        )
    return chosen["bos"], chosen["eos"]


def check_output_dir(output_dir: Path) -> None:
    """Refuse a directory with anything in it that this script did not write."""
    from utils.files import TEMPORARY_PREFIX
    from utils.manifest import MANIFEST_NAME
    from utils.tokenize_unit import SPLITS

    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir={output_dir}: is a file. Give a directory that is new or empty.")
    if not output_dir.exists():
        return
    ours = {PLAN_NAME, PROGRESS_NAME, QUARANTINE_NAME, MANIFEST_NAME, *SPLITS}
    names = {name for name in os.listdir(output_dir) if not name.startswith(TEMPORARY_PREFIX)}
    foreign = sorted(names - ours)
    if names and PLAN_NAME not in names:
        foreign = sorted(names)
    if PLAN_NAME in names:
        for split in SPLITS:
            for root, _, files in os.walk(output_dir / split):
                foreign += sorted(
                    os.path.relpath(os.path.join(root, name), output_dir)
                    for name in files
                    if not CHUNK_PATTERN.fullmatch(name)
                    and name not in ("index.json", MANIFEST_NAME)
                    and not name.startswith(TEMPORARY_PREFIX)
                )
    if foreign:
        shown = ", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
        raise UserError(
            f"--output_dir={output_dir}: holds what this script did not write ({shown}); nothing was touched. "
            "Give a directory that is new or empty."
        )


def describe_plan(plan: Plan, settings: Settings) -> None:
    rows = sum(entry["rows"] for entry in plan.inputs)
    console.say(
        f"input: {len(plan.inputs)} parquet files, {rows:,} rows, "
        f"{console.human_bytes(sum(entry['bytes'] for entry in plan.inputs))} "
        f"({console.human_bytes(plan.text_bytes)} of text planned) in {settings.input_dir}"
    )
    if plan.quarantined:
        console.warn(f"{len(plan.quarantined)} files are left out; see {QUARANTINE_NAME}")
    around = [name for name, token in (("BOS", plan.job.bos_id), ("EOS", plan.job.eos_id)) if token is not None]
    console.say(
        f"tokens: {' and '.join(around)} around each document, stored as {plan.job.dtype}, vocabulary of "
        f"{plan.tokenizer['vocab_size']:,}"
    )
    console.say(
        f"work: {len(plan.units)} units of about {console.human_bytes(plan.settings['unit_bytes'])} of text, "
        f"chunks of {plan.job.chunk_tokens:,} tokens, {100 * settings.val_fraction:g}% of the documents for validation"
    )


def print_estimates(plan: Plan, settings: Settings) -> None:
    """For --dry_run: tokens from a sample of the text, disk, cores, time."""
    import numpy as np

    from utils.encoding import Encoder
    from utils.parquet_input import stream_texts

    encoder = Encoder(plan.tokenizer_json.read_bytes(), settings.parse_special_tokens)
    sampled_bytes = sampled_tokens = sampled_documents = 0
    seconds = 0.0
    for unit in plan.units[:: max(1, len(plan.units) // 8)][:8]:
        piece = unit.ranges[0]
        path = plan.job.paths[piece.file_index]
        groups = range(piece.first, piece.first + 1)
        for _, texts in stream_texts(settings.input_dir, path, piece.file_index, groups, settings.text_column):
            texts = texts.drop_null()
            start = time.perf_counter()
            ids, _ = encoder.encode(texts)
            seconds += time.perf_counter() - start
            sampled_bytes += texts.nbytes
            sampled_tokens += len(ids) + len(texts)
            sampled_documents += len(texts)
            break
    tokens = plan.text_bytes * sampled_tokens / max(sampled_bytes, 1)
    disk_bytes = tokens * np.dtype(plan.job.dtype).itemsize
    cores = settings.num_workers or os.cpu_count() or 1
    # The sample is encoded with a cold cache and encoding is about half of the work: the two about cancel.
    estimated_s = plan.text_bytes / (sampled_bytes / max(seconds, 1e-9)) / cores
    console.result(
        f"estimate from {sampled_documents:,} documents: {console.human_count(tokens)} tokens, "
        f"{console.human_bytes(disk_bytes)} on disk ({console.human_bytes(free_bytes(settings.output_dir))} free), "
        f"about {console.human_seconds(estimated_s)} on {cores} cores of this kind"
    )


def free_bytes(directory: str) -> int:
    path = Path(directory).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def check_disk_space(plan: Plan, settings: Settings, done_bytes: int) -> None:
    import numpy as np

    # No tokenizer in use makes fewer than one token of eight bytes of text.
    needed = (plan.text_bytes - done_bytes) / 8 * np.dtype(plan.job.dtype).itemsize
    free = free_bytes(settings.output_dir)
    if needed > free:
        raise UserError(
            f"--output_dir={settings.output_dir}: needs more than {console.human_bytes(needed)}, "
            f"{console.human_bytes(free)} are free. Make room or give another directory."
        )


# ---------------------------------------------------------------------------------------------------------------------
# Progress that survives a crash


def open_output(plan: Plan, output_dir: Path) -> dict[str, Any] | None:
    """Make `output_dir` this plan's, or find that it is.

    Returns:
        The manifest of the finished run, or None while there is work to do.

    Raises:
        UserError: it was begun with other settings, another tokenizer or other inputs; names each difference.
    """
    from utils.files import write_json
    from utils.manifest import read_manifest

    identity = {"settings": plan.settings, "tokenizer": plan.tokenizer, "inputs": plan.inputs}
    path = output_dir / PLAN_NAME
    if path.exists():
        try:
            begun = json.loads(path.read_bytes())
            differences = [*_differences(begun, identity)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not readable ({error}). Remove {output_dir} and start over.") from error
        if differences:
            raise UserError(
                f"--output_dir={output_dir}: was begun with something else; nothing was touched. Give another "
                "directory, or the former settings:\n  " + "\n  ".join(differences)
            )
        return read_manifest(output_dir, "tokens")
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(path, identity)
    return None


def _differences(begun: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for group in ("settings", "tokenizer"):
        for key in sorted({*begun[group], *now[group]}):
            before, after = begun[group].get(key), now[group].get(key)
            if before != after:
                yield f"{group}.{key}: was {before!r}, is {after!r}"
    before = {entry["path"]: entry for entry in begun["inputs"]}
    after = {entry["path"]: entry for entry in now["inputs"]}
    for kind, paths in (
        ("missing now", before.keys() - after.keys()),
        ("new", after.keys() - before.keys()),
        ("changed", {path for path in before.keys() & after.keys() if before[path] != after[path]}),
    ):
        if paths:
            shown = ", ".join(sorted(paths)[:5]) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")
            yield f"input files {kind}: {shown}"


class ProgressFile:
    """progress.jsonl: a line for each finished unit, written when its chunks are on disk. Locked while in use."""

    def __init__(self, output_dir: Path):
        self._path = output_dir / PROGRESS_NAME
        self._file = open(self._path, "a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise UserError(
                f"--output_dir={output_dir}: another optimize_dataset.py writes there. Wait for it or end it."
            ) from error

    def __enter__(self) -> ProgressFile:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def finished(self, output_dir: Path) -> dict[int, Any]:
        """Records of units whose chunks are all there; cuts off a line that a crash left incomplete."""
        from utils.tokenize_unit import SPLITS, UnitRecord

        self._file.seek(0)
        records, good_bytes = {}, 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            good_bytes += len(line)
            try:
                record = UnitRecord.from_json(json.loads(line))
            except (ValueError, KeyError, TypeError):
                continue
            records[record.unit] = record
        self._file.truncate(good_bytes)
        return {
            unit: record
            for unit, record in records.items()
            if all(
                _size(output_dir / split / record.folder / chunk["name"]) == chunk["bytes"]
                for split in SPLITS
                for chunk in getattr(record, split).chunks
            )
        }

    def append(self, record: dict[str, Any]) -> None:
        self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps(record, sort_keys=True).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def remove_unrecorded_files(output_dir: Path, records: dict[int, Any]) -> None:
    """Delete temporaries, and chunks of units that did not get as far as a record (a worker or node died)."""
    from utils.files import remove_temporaries
    from utils.tokenize_unit import SPLITS

    remove_temporaries(output_dir)
    for split in SPLITS:
        kept = {
            (record.folder, chunk["name"]) for record in records.values() for chunk in getattr(record, split).chunks
        }
        for folder in _sub_folders(output_dir / split):
            remove_temporaries(folder)
            for name in os.listdir(folder):
                if CHUNK_PATTERN.fullmatch(name) and (folder.name, name) not in kept:
                    os.unlink(folder / name)


def _sub_folders(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_dir()) if directory.is_dir() else []


# ---------------------------------------------------------------------------------------------------------------------
# Work


def tokenize_on_node(job: Any, unit: Any, folders: dict[str, str], tokenizer_json: list) -> dict[str, Any]:
    """The Ray task. `tokenizer_json` holds a reference, so that only a process that needs it fetches it."""
    import ray

    from utils.tokenize_unit import process_encoder, tokenize_unit

    node_id = ray.get_runtime_context().get_node_id()
    folder = folders.get(node_id, f"node-{node_id[:12]}")  # a node that joined after the start
    encoder = process_encoder(job, lambda: ray.get(tokenizer_json[0]))
    return dataclasses.asdict(tokenize_unit(job, unit, folder, encoder))


def run_units(plan: Plan, units: list, settings: Settings, progress_file: ProgressFile, done_bytes: int) -> None:
    """Tokenize `units` on the cluster, largest first; append a record for each as it is finished."""
    import ray

    from utils.preflight import check_nodes
    from utils.progress import Progress

    seen_by_all = {"--output_dir": plan.job.output_dir}
    if "://" not in settings.input_dir:
        seen_by_all["--input_dir"] = os.path.abspath(settings.input_dir)
        plan.job = dataclasses.replace(plan.job, input_dir=os.path.abspath(settings.input_dir))
    nodes = check_nodes(seen_by_all, CHECKED_PACKAGES)
    folders = {node["id"]: str(i) for i, node in enumerate(nodes)}
    num_cpus = int(ray.cluster_resources().get("CPU", 1))
    console.say(f"cluster: {len(nodes)} node{'s'[: len(nodes) != 1]}, {num_cpus} CPUs")

    task = ray.remote(num_cpus=1, max_retries=TASK_RETRIES, scheduling_strategy="SPREAD")(tokenize_on_node)
    job, tokenizer_json = ray.put(plan.job), ray.put(plan.tokenizer_json.read_bytes())
    queue = collections.deque(sorted(units, key=lambda unit: (-unit.text_bytes, unit.index)))
    running: dict[Any, Any] = {}
    documents = tokens = 0
    busy_s = 0.0
    with Progress("tokenize", plan.text_bytes, done_bytes) as progress:
        while queue or running:
            # Twice the CPUs: the next unit lies ready on the node when one ends.
            at_once = settings.num_workers or 2 * int(ray.cluster_resources().get("CPU", 1)) or 1
            while queue and len(running) < at_once:
                unit = queue.popleft()
                running[task.remote(job, unit, folders, [tokenizer_json])] = unit
            for ref in ray.wait(list(running), num_returns=1, timeout=10)[0]:
                unit = running.pop(ref)
                record = result_of(ref, plan)
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


def result_of(ref: Any, plan: Plan) -> dict[str, Any]:
    """A finished task's record; what went wrong in it becomes a UserError where the user can mend it."""
    import ray

    from utils.encoding import EncodingMismatch
    from utils.parquet_input import CorruptRowGroup

    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, CorruptRowGroup):
            raise UserError(
                f"--input_dir: {plan.job.paths[cause.file_index]}, row group {cause.row_group}: {cause.reason}. Mend or "
                "remove the file, or leave such row groups out with --on_bad_file=quarantine in a new --output_dir."
            ) from error
        if isinstance(cause, EncodingMismatch):
            raise UserError(
                f"--tokenizer_dir={plan.tokenizer_json.parent}: the fast encoder disagrees with Hugging Face "
                f"tokenizers, so nothing can be trusted: {cause}. Please report this tokenizer."
            ) from error
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"--output_dir={plan.job.output_dir}: the disk is full ({cause.strerror}). Nothing half-written "
                f"was kept; make room, and the same command goes on:\n  {console.this_command()}"
            ) from error
        if isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise UserError(f"--output_dir={plan.job.output_dir}: cannot be written ({cause}).") from error
        raise
    except ray.exceptions.WorkerCrashedError as error:
        raise UserError(
            f"a worker process died {TASK_RETRIES + 1} times on the same unit, most likely for want of memory. "
            f"Lower --num_workers or --unit_bytes; the same command goes on:\n  {console.this_command()}"
        ) from error


def raise_threshold_if_val_is_empty(plan: Plan, records: dict[int, Any]) -> list:
    """Small inputs can have no hash below the threshold: then the smallest hash of all is validation data.

    Returns:
        The units to do again with the raised threshold, which becomes the plan's.
    """
    if any(record.val.documents for record in records.values()):
        return []
    smallest = min((record.min_hash for record in records.values()), default=None)
    if smallest is None or sum(record.documents for record in records.values()) == 0:
        raise UserError(f"--input_dir: no document with text in column {plan.job.text_column!r}. Give files with text.")
    plan.job = dataclasses.replace(plan.job, val_threshold=smallest + 1)
    return [unit for unit in plan.units if records[unit.index].min_hash == smallest]


# ---------------------------------------------------------------------------------------------------------------------
# Publish


def publish(plan: Plan, records: dict[int, Any], output_dir: Path) -> dict[str, Any]:
    """Write an index and a manifest a folder, then one a split, then the run's own, which completes it."""
    from utils.chunks import INDEX_NAME, Chunk, make_index
    from utils.files import atomic_write, write_json
    from utils.manifest import MANIFEST_NAME, made_by, write_manifest
    from utils.tokenize_unit import SPLITS

    common = {
        "kind": "tokens",
        "made_by": made_by("optimize_dataset.py", "gigatoken", "tokenizers", "pyarrow", "litdata"),
        "tokenizer": plan.tokenizer,
        "settings": plan.settings,
        "fingerprint": plan.fingerprint,
    }
    ordered = [records[unit] for unit in sorted(records)]
    totals = {}
    for split in SPLITS:
        per_folder: dict[str, list[Any]] = collections.defaultdict(list)
        for record in ordered:
            if getattr(record, split).chunks:
                per_folder[record.folder].append(record)
        for folder, folder_records in per_folder.items():
            path = output_dir / split / folder
            files = [chunk for record in folder_records for chunk in getattr(record, split).chunks]
            chunks = [Chunk(c["name"], c["documents"], c["tokens"], c["bytes"]) for c in files]
            fingerprint = hashlib.sha256("".join(c["xxh3_128"] for c in files).encode()).hexdigest()
            write_json(path / INDEX_NAME, make_index(chunks, plan.job.dtype, plan.job.chunk_tokens, fingerprint))
            content = _content(folder_records, split, plan.job.dtype)
            write_manifest(path, {**common, "split": split, "content": content, "files": files, "inputs": []})
        for folder in _sub_folders(output_dir / split):
            if folder.name not in per_folder:  # an interrupted run used it, its units were then done elsewhere
                for name in (INDEX_NAME, MANIFEST_NAME):
                    (folder / name).unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    folder.rmdir()
        totals[split] = _content(ordered, split, plan.job.dtype)
        write_manifest(
            output_dir / split,
            {**common, "split": split, "content": totals[split], "files": [], "inputs": plan.inputs}
            | {"folders": sorted(per_folder)},
        )

    quarantined = plan.quarantined + [entry for record in ordered for entry in record.quarantined]
    if quarantined:
        with atomic_write(output_dir / QUARANTINE_NAME) as file:
            for entry in quarantined:
                file.write(json.dumps(entry, sort_keys=True).encode() + b"\n")
    manifest = {
        **common,
        "content": {
            **totals,
            "skipped_null": sum(record.skipped_null for record in ordered),
            "skipped_empty": sum(record.skipped_empty for record in ordered),
            "quarantined": len(quarantined),
            "checked_documents": sum(record.checked_documents for record in ordered),
        },
        "files": [],
        "inputs": plan.inputs,
    }
    write_manifest(output_dir, manifest)
    return manifest


def _content(records: list[Any], split: str, dtype: str) -> dict[str, Any]:
    parts = [getattr(record, split) for record in records]
    return {
        "documents": sum(part.documents for part in parts),
        "tokens": sum(part.tokens for part in parts),
        "text_bytes": sum(part.text_bytes for part in parts),
        "chunks": sum(len(part.chunks) for part in parts),
        "dtype": dtype,
    }


def check_nothing_lost(plan: Plan, records: dict[int, Any]) -> None:
    """Rows that were planned and rows that were accounted for must agree."""
    for unit in plan.units:
        record = records[unit.index]
        planned = unit.rows if unit.max_rows is None else unit.max_rows
        found = record.documents + record.skipped_null + record.skipped_empty
        if found != planned and not record.quarantined:
            raise RuntimeError(f"unit {unit.index}: {planned} rows planned, {found} accounted for")


def report(plan: Plan, records: dict[int, Any], manifest: dict[str, Any], elapsed_s: float) -> None:
    content = manifest["content"]
    for split in ("train", "val"):
        part = content[split]
        console.result(
            f"{split}: {part['documents']:,} documents, {part['tokens']:,} tokens, "
            f"{console.human_bytes(part['text_bytes'])} of text, {part['chunks']} chunks"
        )
    skipped = content["skipped_null"] + content["skipped_empty"]
    console.say(
        f"skipped: {content['skipped_null']:,} null and {content['skipped_empty']:,} empty texts"
        if skipped
        else "skipped: nothing"
    )
    if content["quarantined"]:
        console.warn(f"{content['quarantined']} files or row groups left out, listed in {QUARANTINE_NAME}")
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
        f"encoder: {', '.join(backends)}; {content['checked_documents']:,} documents encoded by tokenizers too, all equal"
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
    data = os.path.join(os.path.dirname(out) or ".", "DATA")
    console.next_command(
        f"python merge_files.py --source_dir={out}/train --target_dir={data}/train\n"
        f"  python merge_files.py --source_dir={out}/val --target_dir={data}/val"
    )


def main(settings: Settings) -> None:
    from utils.ray_cluster import ray_session

    start = time.monotonic()
    output_dir = Path(settings.output_dir)
    plan = make_plan(settings)
    describe_plan(plan, settings)
    if settings.dry_run:
        print_estimates(plan, settings)
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
        check_disk_space(plan, settings, done_bytes)
        with ray_session(settings.address):
            if left:
                run_units(plan, left, settings, progress_file, done_bytes)
                records = progress_file.finished(output_dir)
            again = raise_threshold_if_val_is_empty(plan, records)
            if again:
                run_units(plan, again, settings, progress_file, plan.text_bytes)
                records = progress_file.finished(output_dir)
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
