"""What a run's page shows of a run: its records, events, samples, settings and data, as plain values for JSON."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from export.run_metrics import read_steps
from pretraining.checkpoint import list_checkpoints
from pretraining.events import read_events
from pretraining.metrics_writer import SAMPLES_NAME
from utils.errors import UserError
from utils.metrics_file import METRICS_NAME, read_records

MAX_RECORDS = 3000
"""Of a run, so that the page of a long one opens at once."""


def read_run(run_dir: str, name: str) -> dict[str, Any]:
    """A run's part of the page; what it has not written yet is empty.

    Raises:
        UserError: no run has logged a step there.
    """
    directory = Path(run_dir)
    if not (directory / METRICS_NAME).is_file():
        raise UserError(f"{run_dir}: no {METRICS_NAME} there. Give the --out_dir of a run that has logged a step.")
    records = with_hours(read_steps(directory))
    if not records:
        raise UserError(f"{run_dir}/{METRICS_NAME}: no step was logged yet. Make the page later.")
    checkpoints, _ = list_checkpoints(directory)
    manifest = checkpoints[0].manifest if checkpoints else {}
    return {
        "name": name,
        "records": [plain(record) for record in thinned(records)],
        "events": [plain(event) for event in read_events(directory)],
        "samples": [
            plain({key: sample.get(key) for key in ("step", "prompt", "text", "temperature")})
            for sample in read_records(directory / SAMPLES_NAME)
        ],
        "settings": flat(manifest.get("settings", {})),
        "checkpoint": checkpoints[0].path.name if checkpoints else None,
        "data": [data_row(record) for record in manifest.get("inputs", [])],
    }


def with_hours(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each with `hours`: of training steps so far, without validation, saving and restarts; none without any speed.

    A record's `step_s` is the mean over the steps since the record before it that has one.
    """
    if not any("step_s" in record for record in records):
        return records
    found, hours, counted_steps = [], 0.0, 0
    for record in records:
        if record.get("step_s") is not None:
            hours += record["step_s"] * (record["step"] - counted_steps) / 3600
            counted_steps = record["step"]
        found.append({**record, "hours": hours})
    return found


def thinned(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most about MAX_RECORDS: each stands for its neighbours by their mean loss; every validation stays."""
    size = -(-len(records) // MAX_RECORDS)
    if size == 1:
        return records
    found = []
    for start in range(0, len(records), size):
        group = records[start : start + size]
        losses = [record["loss"] for record in group if record.get("loss") is not None]
        mean = {"loss": sum(losses) / len(losses)} if losses else {}
        found += [record for record in group[:-1] if "val_loss" in record]
        found.append({**group[-1], **mean})
    return found


def plain(record: dict[str, Any]) -> dict[str, Any]:
    """Without numbers that JSON has not: a loss that is not finite is a gap in its curve."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings by dotted name, as text."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, str) else repr(value)
    return found


def data_row(record: dict[str, Any]) -> dict[str, Any]:
    """One dataset that the run read, by its manifest."""
    manifest = record.get("manifest") or {}
    content, tokenizer = manifest.get("content") or {}, manifest.get("tokenizer") or {}
    return {
        "path": record.get("path"),
        "split": manifest.get("split"),
        "documents": content.get("documents"),
        "tokens": content.get("tokens"),
        "text_bytes": content.get("text_bytes"),
        "tokenizer": str(tokenizer.get("sha256", ""))[:16] or None,
        "manifest": str(record.get("sha256") or "")[:16] or None,
        "sources": len(manifest.get("inputs", [])),
    }
