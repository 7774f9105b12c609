"""What optimize_dataset.py is going to do: its settings, its input and its output directory, checked together."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenization.job import CHUNK_PATTERN
from utils import console
from utils.errors import Problems, UserError
from utils.files import is_temporary
from utils.manifest import MANIFEST_NAME

PLAN_NAME = "plan.json"
PROGRESS_NAME = "progress.jsonl"
QUARANTINE_NAME = "quarantine.jsonl"
MAX_FILES_NAMED = 20  # with one fault; of more, a few stand for all


@dataclasses.dataclass
class Plan:
    """What the settings and the input amount to."""

    job: Any  # tokenization.tokenize_unit.Job
    units: list  # of tokenization.units.Unit
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


def make_plan(settings: Any) -> Plan:
    """Check everything that can be checked without a cluster; raises UserError with all that was found."""
    from tokenization.chunk_writer import largest_chunk_tokens
    from tokenization.job import HASH_RANGE, Job
    from tokenization.parquet import list_parquet_files, read_footers
    from tokenization.units import default_chunk_tokens, default_unit_bytes, plan_units
    from utils.chunks import dtype_for_vocabulary
    from utils.tokenizer import read_tokenizer_info

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
        add_bad_files(quarantined, len(entries), settings.input_dir, problems)
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


def add_bad_files(bad_files: list[dict[str, Any]], num_files: int, input_dir: str, problems: Problems) -> None:
    """Each of a few bad files by name; many with the same fault together."""
    alike = collections.defaultdict(list)
    for bad in bad_files:
        alike[bad["reason"]].append(bad["path"])
    for reason, paths in alike.items():
        hint = "Name the column of the text with --text_column, mend" if "column" in reason else "Mend"
        remedy = f"{hint} or remove {'it' if len(paths) == 1 else 'them'}, or leave such files out with --on_bad_file=quarantine."
        if len(paths) <= MAX_FILES_NAMED:
            problems.add(f"--input_dir={input_dir}: {', '.join(paths)}: {reason}. {remedy}")
        else:
            shown = ", ".join(paths[:3])
            problems.add(
                f"--input_dir={input_dir}: {len(paths)} of {num_files} files ({shown}, ..): {reason}. {remedy}"
            )


def check_ranges(settings: Any, problems: Problems) -> None:
    if not 0 < settings.val_fraction < 1:
        problems.add(
            f"--val_fraction={settings.val_fraction}: must lie between 0 and 1, both excluded: training needs "
            "validation data. Give 0.005, for example."
        )
    for name in ("chunk_tokens", "unit_bytes", "num_workers", "limit_documents"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            problems.add(f"--{name}={value}: must be at least 1, or null for the default.")


def separators(settings: Any, tokenizer: Any, problems: Problems) -> tuple[int | None, int | None]:
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
    from tokenization.job import SPLITS

    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir={output_dir}: is a file. Give a directory that is new or empty.")
    if not output_dir.exists():
        return
    ours = {PLAN_NAME, PROGRESS_NAME, QUARANTINE_NAME, MANIFEST_NAME, *SPLITS}
    names = {name for name in os.listdir(output_dir) if not is_temporary(name)}
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
                    and not is_temporary(name)
                )
    if foreign:
        shown = ", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
        raise UserError(
            f"--output_dir={output_dir}: holds what this script did not write ({shown}); nothing was touched. "
            "Give a directory that is new or empty."
        )


def free_bytes(directory: str) -> int:
    path = Path(directory).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def check_disk_space(plan: Plan, output_dir: str, done_bytes: int) -> None:
    import numpy as np

    # No tokenizer in use makes fewer than one token of eight bytes of text.
    needed = (plan.text_bytes - done_bytes) / 8 * np.dtype(plan.job.dtype).itemsize
    free = free_bytes(output_dir)
    if needed > free:
        raise UserError(
            f"--output_dir={output_dir}: needs more than {console.human_bytes(needed)}, "
            f"{console.human_bytes(free)} are free. Make room or give another directory."
        )
