"""What `--deep` adds: text is tokenized again, batches are read again, and weights are compared value by value."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tokenization.chunk_reader import read_documents
from tokenization.encoder import Encoder
from tokenization.job import SPLITS, UnitRecord
from tokenization.prepared_tokenizer import prepare_tokenizer
from tokenization.tokenize_unit import tokenize_unit
from tools.provenance import AGREES, CHANGED, UNKNOWN, Node
from tools.source_rows import NotTold, Source, unit_of
from utils import console
from utils.errors import UserError

Stored = dict[str, dict[str, tuple[Path, dict[str, Any], int]]]
"""By split and chunk name: the file, its entry in a manifest, and the first of its documents in the file, where chunks
were gathered into a larger one."""


def check_retokenized(node: Node, source: Source, tokenizer_json: Path, stored: Stored, num_units: int) -> None:
    """Tokenize some units again as step 1 did it, and compare every document with the chunks.

    Args:
        stored: the chunks of a split, or of both.
        num_units: how many, spread over all of them.
    """
    if not source.is_whole:
        node.add(UNKNOWN, "--deep: the input files are not those that were tokenized, so nothing was tokenized again")
        return
    flag = f"--tokenizer_dir={tokenizer_json.parent}"
    prepared = prepare_tokenizer(tokenizer_json.read_bytes(), source.job.parse_special_tokens, flag)
    encoder = Encoder(prepared.tokenizer_json, source.job.parse_special_tokens, prepared.fast_json, prepared.choice)
    chosen = np.unique(np.linspace(0, len(source.units) - 1, min(num_units, len(source.units))).round().astype(int))
    documents = tokens = 0
    for unit in chosen.tolist():
        wanted = {split: _of_unit(chunks, unit) for split, chunks in stored.items()}
        with tempfile.TemporaryDirectory() as directory:
            record = node.collect(_tokenize, source, unit, encoder, Path(directory), wanted)
            if record is None:
                continue
            for line in _differences(source, record, Path(directory), wanted):
                node.add(CHANGED, line)
        documents += sum(getattr(record, split).documents for split in stored)
        tokens += sum(getattr(record, split).tokens for split in stored)
    if node.is_sound():
        units = f"{len(chosen):,} of {console.counted(len(source.units), 'unit')}"
        node.add(AGREES, f"--deep: {units} tokenized again: {documents:,} documents, {tokens:,} tokens found")


def _of_unit(chunks: dict[str, Any], unit: int) -> dict[str, Any]:
    return {name: chunk for name, chunk in chunks.items() if unit_of(name) == unit}


def _tokenize(source: Source, unit: int, encoder: Encoder, directory: Path, wanted: Stored) -> UnitRecord:
    job = dataclasses.replace(source.job, output_dir=str(directory))
    record = tokenize_unit(job, source.units[unit], "again", encoder)
    if not record.val.documents and record.documents and not _is_wanted(record, wanted):
        # A small input has no hash below the threshold: then the smallest of all is validation data.
        raised = dataclasses.replace(job, val_threshold=record.min_hash + 1)
        other = tokenize_unit(raised, source.units[unit], "again", encoder)
        if _is_wanted(other, wanted):
            return other
        record = tokenize_unit(job, source.units[unit], "again", encoder)
    return record


def _is_wanted(record: UnitRecord, wanted: Stored) -> bool:
    return all(
        {chunk.name: chunk.documents for chunk in getattr(record, split).chunks}
        == {name: entry["documents"] for name, (_, entry, _) in chunks.items()}
        for split, chunks in wanted.items()
    )


def _differences(source: Source, record: UnitRecord, directory: Path, wanted: Stored) -> list[str]:
    lines = []
    for split in [split for split in SPLITS if split in wanted]:
        again = {chunk.name: chunk for chunk in getattr(record, split).chunks}
        for name in sorted(again.keys() ^ wanted[split].keys()):
            where = "only the text gives it" if name in again else "the text does not give it"
            lines.append(f"--deep: {split}: {name}: {where}")
        first = 0  # number of the chunk's first document among those of the unit
        for name in sorted(again.keys() & wanted[split].keys()):
            path, entry, skip = wanted[split][name]
            if again[name].xxh3_128 != entry["xxh3_128"]:
                total = getattr(record, split).documents
                made = directory / split / "again" / name
                lines.append(_first_difference(source, split, (path, skip), made, first, total))
            first += again[name].documents
    return lines


def _first_difference(source: Source, split: str, stored: tuple[Path, int], again: Path, first: int, total: int) -> str:
    """Names the first document of a chunk that the text does not give, and its row."""
    path, skip = stored
    prefix = f"--deep: {split}: {again.name}"
    try:
        pairs = list(zip(read_documents(path, source.job.dtype)[skip:], read_documents(again, source.job.dtype)))
    except (OSError, ValueError) as error:
        return f"{prefix}: cannot be compared ({error})"
    number = next((i for i, (a, b) in enumerate(pairs) if not np.array_equal(a, b)), None)
    if number is None:
        return f"{prefix}: the text gives other bytes than the manifest's checksum stands for"
    try:
        row = str(source.rows(unit_of(again.name), split, total)[first + number])
    except NotTold as error:
        row = f"a row that cannot be told: {error}"
    return f"{prefix}: document {number} is not what the text gives now: {row}"


def check_batches(node: Node, checkpoint: Path, directories: list[Path], num_steps: int = 5) -> None:
    """Read the batches of some logged steps again, and compare their digests with those in metrics.jsonl."""
    from tools.run_data import RunData, find_run

    run = find_run(str(checkpoint))
    digests = {step: digest for step, digest in run.digests().items() if step <= run.manifest["content"]["step"]}
    if not digests:
        node.add(UNKNOWN, "--deep: no batch_digest was logged beside the checkpoint")
        return
    data = node.collect(RunData, run.manifest["settings"], directories, run.left_out)
    if data is None:
        return
    steps = sorted(digests)
    chosen = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, min(num_steps, len(steps))).astype(int))]
    wrong = [step for step in chosen if data.digest(step) != digests[step]]
    for step in wrong:
        node.add(CHANGED, f"--deep: the batch of step {step} is not the one whose digest metrics.jsonl has")
    if not wrong:
        node.add(AGREES, f"--deep: batches of steps {', '.join(map(str, chosen))}: digests as metrics.jsonl has them")


def check_values(node: Node, export_dir: Path, manifest: dict[str, Any], checkpoint: Path, made: dict) -> None:
    """Compare every exported value with the checkpoint's, and config.json with what the model makes of it."""
    import json

    from export.checks import make_plan
    from export.hf_config import hf_config
    from export.proof import compare_weights, find_exported

    settings = manifest["settings"]
    try:
        plan = make_plan(checkpoint, made, settings["formats"], settings["dtype"], settings.get("pad_token"))
        count = compare_weights(plan, find_exported(plan, export_dir))
    except UserError as error:
        node.lines += [(CHANGED, f"--deep: {problem}") for problem in error.problems]
        return
    except TypeError as error:  # of this code, not of the files: it says nothing of them
        node.add(UNKNOWN, f"--deep: the weights cannot be compared (TypeError: {error})")
        return
    except Exception as error:  # whatever damaged files make of their readers
        node.add(CHANGED, f"--deep: the weights cannot be compared ({type(error).__name__}: {error})")
        return
    node.add(AGREES, f"--deep: {console.human_count(count)} stored values equal the checkpoint's")
    path = export_dir / "config.json"
    if settings["formats"] != "litgpt" and path.is_file():
        ids = (plan.tokenizer.bos_id, plan.tokenizer.eos_id) if plan.tokenizer else (None, None)
        wanted = json.loads(json.dumps(hf_config(plan.config, plan.tied, plan.dtype_name, *ids, plan.config_pad_id)))
        found = json.loads(path.read_bytes())
        if "transformers_version" not in found:  # of an earlier version
            del wanted["transformers_version"]
        if settings.get("pad_token") is None and found.get("pad_token_id") is None:
            wanted["pad_token_id"] = None  # an earlier version did not look for the tokenizer's own
        if node.expect("--deep: config.json", found, wanted, "the checkpoint's model"):
            node.add(AGREES, "--deep: config.json is what the checkpoint's model gives")
