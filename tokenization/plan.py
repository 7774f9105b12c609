"""What optimize_dataset.py is going to do: its settings, its input and its output directory, checked together."""

from __future__ import annotations

import collections
import os
from pathlib import Path
from typing import Any

import numpy as np

from tokenization.chunk_writer import dtype_for_vocabulary, largest_chunk_tokens
from tokenization.input_files import FileEntry, list_input_files
from tokenization.input_formats import read_summaries
from tokenization.job import HASH_RANGE, InputStamp, Job, Plan, Unit, fingerprint_of_identity
from tokenization.output import check_output_dir
from tokenization.units import UnitPacker, default_chunk_tokens, default_unit_bytes
from utils import console
from utils.errors import Problems, UserError
from utils.files import free_bytes
from utils.tokenizer import read_tokenizer_info

MAX_FILES_NAMED = 20  # with one fault; where there are more, a few stand for all
# What workers take from the settings as they are.
JOB_SETTINGS = ("text_column", "dtype", "chunk_tokens", "bos_id", "eos_id", "parse_special_tokens", "shuffle_seed")


def make_plan(settings: Any) -> Plan:
    """Check everything that can be checked without a cluster; raises UserError with all that was found."""
    problems = Problems()
    check_ranges(settings, problems)
    tokenizer = problems.collect(read_tokenizer_info, settings.tokenizer_dir)
    bos_id, eos_id = separators(settings, tokenizer, problems) if tokenizer else (None, None)
    entries = problems.collect(list_input_files, settings.input_dir) or []
    problems.collect(check_output_dir, Path(settings.output_dir))

    input_bytes = sum(entry.bytes for entry in entries)
    unit_bytes = settings.unit_bytes or default_unit_bytes(input_bytes)
    inputs, bad_files, units = read_inputs(settings, entries, unit_bytes)
    if settings.on_bad_file == "fail":
        add_bad_files(bad_files, len(entries), settings.input_dir, problems)
    if entries and not units and not problems.found:
        problems.add(f"--input_dir={settings.input_dir}: no rows in its {len(entries)} files. Give files with text.")

    times = {entry.path: entry.mtime_ns for entry in entries}
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
    output_dir = os.path.abspath(settings.output_dir)
    job = make_job(settings.input_dir, output_dir, shaping, inputs, tokenizer.sha256, times)
    identity = {"settings": shaping, "tokenizer": tokenizer.record(), "inputs": inputs}
    return Plan(
        job=job,
        units=units,
        quarantined=bad_files,
        tokenizer_json=tokenizer.directory / "tokenizer.json",
        fingerprint=fingerprint_of_identity(**identity),
        **identity,
    )


def make_job(
    input_dir: str,
    output_dir: str,
    shaping: dict[str, Any],
    inputs: list[dict[str, Any]],
    tokenizer_sha256: str,
    mtimes_ns: dict[str, int | None],
) -> Job:
    """What all units have in common.

    Args:
        input_dir: a URL or a path.
        shaping: the settings that shape the result, as plan.json and manifests have them.
        inputs: path, bytes and fingerprint of each file.
        mtimes_ns: by path; None: not known.
    """
    return Job(
        input_dir=input_dir if "://" in input_dir else os.path.abspath(input_dir),
        paths=tuple(entry["path"] for entry in inputs),
        output_dir=output_dir,
        tokenizer_sha256=tokenizer_sha256,
        val_threshold=round(shaping["val_fraction"] * HASH_RANGE),
        quarantine=shaping["on_bad_file"] == "quarantine",
        stamps=tuple(InputStamp(entry["bytes"], mtimes_ns[entry["path"]], entry["fingerprint"]) for entry in inputs),
        **{key: shaping[key] for key in JOB_SETTINGS},
    )


def read_inputs(
    settings: Any, entries: list[FileEntry], unit_bytes: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[Unit]]:
    """Read every footer, or sample, once, and keep of it only what the plan needs.

    Returns:
        the usable files, those that are not, and the units of the usable ones.
    """
    inputs, bad_files, packer = [], [], UnitPacker(unit_bytes, settings.limit_documents)
    for entry, summary, reason in read_summaries(settings.input_dir, entries, settings.text_column):
        if summary is None:
            bad_files.append({"path": entry.path, "row_group": None, "reason": reason})
            continue
        packer.add(len(inputs), summary)
        rows = {} if summary.num_rows is None else {"rows": summary.num_rows}
        inputs.append({"path": entry.path, "bytes": entry.bytes, **rows, "fingerprint": summary.fingerprint})
    return inputs, bad_files, packer.finish()


def add_bad_files(bad_files: list[dict[str, Any]], num_files: int, input_dir: str, problems: Problems) -> None:
    """Each of a few bad files by name; many with the same fault together."""
    alike = collections.defaultdict(list)
    for bad in bad_files:
        alike[bad["reason"]].append(bad["path"])
    for reason, paths in alike.items():
        hint = "Name the column of the text with --text_column, fix" if "column" in reason else "Fix"
        what = "it" if len(paths) == 1 else "them"
        remedy = f"{hint} or remove {what}, or leave such files out with --on_bad_file=quarantine."
        if len(paths) <= MAX_FILES_NAMED:
            shown = ", ".join(paths)
        else:
            shown = f"{len(paths)} of {num_files} files ({', '.join(paths[:3])}, ...)"
        problems.add(f"--input_dir={input_dir}: {shown}: {reason}. {remedy}")


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


def check_disk_space(plan: Plan, output_dir: str, done_bytes: int) -> None:
    """Raises UserError if the tokens of the text that is left surely do not fit."""
    # No tokenizer in use makes fewer than one token of eight bytes of text.
    needed = (plan.text_bytes - done_bytes) / 8 * np.dtype(plan.job.dtype).itemsize
    free = free_bytes(output_dir)
    if needed > free:
        raise UserError(
            f"--output_dir={output_dir}: needs more than {console.human_bytes(needed)}, "
            f"{console.human_bytes(free)} are free. Make room or give another directory."
        )
