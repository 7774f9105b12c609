"""README.md of an export: the model card, made from the manifests by a template, with the training curves as a picture.

Everything it says comes from the checkpoint's manifest, which leads back to the files of text, and from the run's
metrics.jsonl. What these do not say is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

from export.run_metrics import read_steps
from utils.console import human_bytes, human_count

CARD_NAME = "README.md"
CURVES_NAME = "loss.png"


def write_model_card(
    directory: Path,
    export: dict[str, Any],
    checkpoint_dir: Path,
    checkpoint: dict[str, Any] | None,
    describe_inputs: Callable[[list[dict[str, Any]]], str],
) -> None:
    """Write README.md, and the picture when there are losses to show.

    Args:
        export: the template's names for the exported model: config, parameters, dtype, model_type, proof, ...
        checkpoint: the manifest of `checkpoint_dir`; None where it has none.
        describe_inputs: says how many files of each kind step 1 read, which only that step's code can tell.
    """
    manifest = checkpoint or {"settings": {}, "content": {}, "inputs": []}
    settings = manifest["settings"]
    inputs = [record for record in manifest["inputs"] if record.get("manifest")]
    datasets = [(r["manifest"].get("split") or Path(r["path"]).name, r["manifest"]) for r in inputs]
    files = {
        entry["path"]: entry
        for _, dataset in datasets
        for entry in dataset["inputs"]
        if {"path", "bytes"} <= entry.keys()
    }
    made_by = [
        ("Export", export["made_by"]),
        ("Training", manifest.get("made_by")),
        *((f"Data: {split}", dataset.get("made_by")) for split, dataset in datasets),
    ]
    has_curves = draw_run(checkpoint_dir, manifest["content"].get("step"), directory / CURVES_NAME)
    card = _template().render(
        {
            **export,
            "settings": settings,
            "train": settings.get("train") or {},
            "optimizer": settings.get("optimizer") or {},
            "content": manifest["content"],
            "datasets": datasets,
            "files": [files[path] for path in sorted(files)],
            "inputs": describe_inputs(list(files.values())) if files else "",
            "curves": CURVES_NAME if has_curves else None,
            "made_by": [(what, tool) for what, tool in made_by if tool],
        }
    )
    (directory / CARD_NAME).write_text(card, encoding="utf-8")


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "count": "{:,}".format,
        "human_count": human_count,
        "human_bytes": human_bytes,
        "plain": lambda value: f"{value:g}" if isinstance(value, float) else value,
        "cell": lambda value: str(value).replace("|", "\\|").replace("\n", " "),
        "counts": _counts,
    }
    return environment.get_template("model_card.md.jinja")


def _counts(content: dict[str, Any]) -> str:
    """What a dataset's manifest counts, as "90 documents, 9,000 tokens, 36.0 kB of text"."""
    counts = [f"{content[name]:,} {name}" for name in ("documents", "tokens") if isinstance(content.get(name), int)]
    if isinstance(content.get("text_bytes"), int):
        counts.append(f"{human_bytes(content['text_bytes'])} of text")
    return ", ".join(counts)


def draw_run(checkpoint_dir: Path, last_step: int | None, path: Path) -> bool:
    """Draw the run's curves up to the checkpoint's step; False when there is nothing to draw."""
    metrics = [
        record
        for record in read_steps(checkpoint_dir.absolute().parent)
        if last_step is None or record["step"] <= last_step
    ]
    if not metrics:
        return False
    from export.curves import draw_curves, series  # matplotlib: a second that many exports do without

    if not any(len(series(metrics, "step", key)[0]) > 1 for key in ("loss", "val_loss")):
        return False
    draw_curves({"": metrics}, path)
    return True
