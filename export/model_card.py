"""README.md of an export: the model card, made from the manifests, with the loss curve as a picture.

Everything it says comes from the checkpoint's manifest, which leads back to the parquet files, and from the run's
metrics.jsonl. What these do not say is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.console import human_bytes, human_count
from utils.errors import UserError

CARD_NAME = "README.md"
LOSS_CURVE_NAME = "loss.png"
_MAX_LISTED_FILES = 20


def write_model_card(
    directory: Path, export: dict[str, Any], checkpoint: dict[str, Any] | None, metrics: list[dict[str, Any]]
) -> None:
    """Write README.md, and the picture when there are losses to show.

    Args:
        export: model, parameters, dtype, model_type, verification .. of the export, and its config's fields.
        checkpoint: the checkpoint's manifest; None where it has none.
        metrics: records of the run's metrics.jsonl.
    """
    curve = draw_loss_curve(metrics, directory / LOSS_CURVE_NAME)
    lines = [
        *_front_matter(export),
        f"# {export['name']}",
        "",
        f"A language model of {human_count(export['parameters'])} parameters, pretrained from scratch.",
        "",
        *_table(_summary(export, checkpoint)),
        *_loading(export),
        *_data(checkpoint),
        *_training(checkpoint),
        *([f"![Curves of the training run]({LOSS_CURVE_NAME})", ""] if curve else []),
        *_verification(export),
        *_versions(export, checkpoint),
    ]
    (directory / CARD_NAME).write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _front_matter(export: dict[str, Any]) -> list[str]:
    """What the Hugging Face hub reads; as JSON, which is YAML and needs no quoting rules."""
    tags = ["pretrained", "litgpt", *([export["model_type"]] if export["model_type"] else [])]
    fields = {"library_name": "transformers" if export["model_type"] else "litgpt", "pipeline_tag": "text-generation"}
    lines = [f"{name}: {json.dumps(value)}" for name, value in {**fields, "tags": tags}.items()]
    return ["---", *lines, "---", ""]


def _table(rows: list[tuple[str, Any]]) -> list[str]:
    rows = [(name, value) for name, value in rows if value is not None]
    return ["| | |", "|---|---|", *[f"| {name} | {_cell(value)} |" for name, value in rows], ""] if rows else []


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _summary(export: dict[str, Any], checkpoint: dict[str, Any] | None) -> list[tuple[str, Any]]:
    config = export["config"]
    content = checkpoint["content"] if checkpoint else {}
    tokenizer = export["tokenizer"] or {}
    loss, bits = content.get("val_loss"), content.get("val_bits_per_byte")
    context = checkpoint["settings"].get("context_tokens") if checkpoint else None
    return [
        ("Architecture", f"{export['architecture'] or 'litgpt GPT'}, configured like {config.name}"),
        ("Parameters", f"{export['parameters']:,}{' (embedding and output share weights)' if export['tied'] else ''}"),
        ("Layers, width, MLP width", f"{config.n_layer}, {config.n_embd}, {config.intermediate_size}"),
        (
            "Attention heads, key-value heads, head size",
            f"{config.n_head}, {config.n_query_groups}, {config.head_size}",
        ),
        ("Context length", f"{config.block_size:,} tokens"),
        ("Trained on sequences of", f"{context:,} tokens" if context else None),
        ("Number type", export["dtype"]),
        ("Embedding rows", f"{config.padded_vocab_size:,}"),
        ("Tokenizer", _tokenizer(tokenizer) if tokenizer else None),
        ("Training steps", f"{content['step']:,}" if "step" in content else None),
        ("Tokens seen", f"{content['tokens']:,}" if "tokens" in content else None),
        ("Validation loss", f"{loss:.4f} nats per token" if loss is not None else None),
        ("Validation bits per byte", f"{bits:.4f}" if bits is not None else None),
    ]


def _tokenizer(tokenizer: dict[str, Any]) -> str:
    return (
        f"{tokenizer['vocab_size']:,} entries, BOS {tokenizer['bos_id']}, EOS {tokenizer['eos_id']}, "
        f"SHA-256 of tokenizer.json `{tokenizer['sha256'][:16]}..`"
    )


def _loading(export: dict[str, Any]) -> list[str]:
    lines = ["## How to load it", ""]
    if export["model_type"]:
        lines += [
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{export["name"]}")  # this directory',
            f'tokenizer = AutoTokenizer.from_pretrained("{export["name"]}")',
            'inputs = tokenizer("Once upon a time", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0], skip_special_tokens=True))",
            "```",
            "",
        ]
    commands = []
    if export["litgpt"]:
        commands += [f"litgpt chat {export['name']}"]
    if export["model_type"]:
        commands += [f"lm_eval --model hf --model_args pretrained={export['name']} --tasks hellaswag"]
    lines += [
        "```bash",
        *commands,
        "```",
        "",
        "It is a base model: it continues text, and follows no instructions.",
        "",
    ]
    return lines


def _datasets(checkpoint: dict[str, Any] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    for record in checkpoint["inputs"] if checkpoint else []:
        manifest = record.get("manifest") if isinstance(record, dict) else None
        if manifest:
            yield manifest.get("split") or Path(record["path"]).name, manifest


def _data(checkpoint: dict[str, Any] | None) -> list[str]:
    rows, files = [], {}
    for split, manifest in _datasets(checkpoint):
        content = manifest["content"]
        counts = [f"{content[name]:,} {name}" for name in ("documents", "tokens") if isinstance(content.get(name), int)]
        if isinstance(content.get("text_bytes"), int):
            counts.append(f"{human_bytes(content['text_bytes'])} of text")
        rows.append((split, ", ".join(counts)))
        files.update({entry["path"]: entry for entry in manifest["inputs"] if {"path", "rows", "bytes"} <= set(entry)})
    if not rows:
        return []
    lines = ["## Data", "", *_table(rows)]
    if files:
        listed = sorted(files)[:_MAX_LISTED_FILES]
        names = ", ".join(f"`{Path(path).name}`" for path in listed)
        more = f" and {len(files) - len(listed):,} more" if len(files) > len(listed) else ""
        total = (
            f"{sum(f['rows'] for f in files.values()):,} rows, {human_bytes(sum(f['bytes'] for f in files.values()))}"
        )
        lines += [f"Made from {len(files):,} parquet files ({total}): {names}{more}. manifest.json names all.", ""]
    return lines


def _training(checkpoint: dict[str, Any] | None) -> list[str]:
    if not checkpoint:
        return []
    settings = checkpoint["settings"]
    train, optimizer = settings.get("train") or {}, settings.get("optimizer") or {}
    context = settings.get("context_tokens")
    batch = train.get("global_batch_size")
    rows = [
        ("Batch", f"{batch:,} sequences of {context:,} tokens" if batch and context else None),
        ("Optimizer", optimizer.get("name")),
        *[(f"Optimizer: {name}", _plain(value)) for name, value in optimizer.items() if name != "name"],
        ("Learning rate schedule", train.get("lr_schedule")),
        ("Warm-up steps", train.get("lr_warmup_steps")),
        ("Smallest learning rate", _plain(train.get("min_lr"))),
        ("Gradient norm limit", train.get("max_norm")),
        ("Precision", settings.get("precision")),
        ("Seed", settings.get("seed")),
    ]
    return ["## Training", "", *_table([(name, value) for name, value in rows if value not in (None, "")])]


def _plain(value: Any) -> Any:
    return f"{value:g}" if isinstance(value, float) else value


def _verification(export: dict[str, Any]) -> list[str]:
    proof = export["verification"]
    if proof["mode"] == "off":
        return ["## Verification", "", "This export was not verified (`--verify=off`).", ""]
    text = f"{proof['compared_values']:,} stored values were read again and equal the checkpoint's."
    if "max_abs_logit_difference" in proof:
        text += (
            f" litgpt and transformers were run in float32 on {proof['tokens']} random tokens: their logits differ by at "
            f"most {proof['max_abs_logit_difference']:.2g}, the KL divergence is {proof['kl_divergence_nats']:.2g} nats."
        )
    return ["## Verification", "", text, ""]


def _versions(export: dict[str, Any], checkpoint: dict[str, Any] | None) -> list[str]:
    rows = [("Export", _version_list(export["made_by"]))]
    if checkpoint:
        rows.append(("Training", _version_list(checkpoint.get("made_by"))))
        rows += [
            (f"Data: {split}", _version_list(manifest.get("made_by"))) for split, manifest in _datasets(checkpoint)
        ]
    return ["## Made with", "", *_table(rows)]


def _version_list(made_by: dict[str, Any] | None) -> str | None:
    if not made_by:
        return None
    return ", ".join([made_by["script"], *[f"{name} {version}" for name, version in made_by["versions"].items()]])


def draw_loss_curve(metrics: list[dict[str, Any]], path: Path) -> bool:
    """The run's curves; False when there is nothing to draw."""
    from export.curves import draw_curves, series

    if not any(len(series(metrics, "step", key)[0]) > 1 for key in ("loss", "val_loss")):
        return False
    draw_curves({"": metrics}, path)
    return True


def read_run_metrics(checkpoint_dir: Path, step: int | None) -> list[dict[str, Any]]:
    """Records of the run up to the checkpoint's step, from the directory above it; empty where there are none."""
    from export.curves import read_records
    from utils.metrics_file import METRICS_NAME

    run_dir = checkpoint_dir.absolute().parent
    if not (run_dir / METRICS_NAME).is_file():
        return []
    try:
        records = read_records(run_dir)
    except UserError:  # an empty file: the card does without a picture
        return []
    return [record for record in records if step is None or record["step"] <= step]
