"""Train the same model at several learning rates, each a run of distributed_pretrain.py, and draw which was best.

    python -m tools.sweep_learning_rate --config_file=my-model.yaml --dataset_path=DATA --out_dir=sweep \\
        --learning_rates='[3e-4,1e-3,3e-3,1e-2]' --max_steps=300 --n_layer=6 --n_embd=384

--n_layer and --n_embd make the model smaller, its heads fewer and its MLP narrower in proportion, so that a run is
short. A rate that is best for a small model is a start for a large one, and no more: with AdamW the best rate falls as
the model becomes wider. The same command again goes on; what is finished is not trained again.
"""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from shlex import quote
from typing import Any

import yaml

from export.run_metrics import read_steps
from pretraining.settings import Settings as Training
from utils import cli, console
from utils.errors import Problems, UserError
from utils.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = "distributed_pretrain.py"
PICTURE = "sweep.png"


@dataclasses.dataclass
class Settings:
    """What to train, at which rates, and how small."""

    config_file: str
    """The YAML of the run that the rate is for."""
    dataset_path: str
    """Directory with train/ and val/, made by merge_files.py."""
    out_dir: str
    """Directory for the runs, their YAMLs, and the picture."""
    learning_rates: list[float] = dataclasses.field(default_factory=lambda: [3e-4, 1e-3, 3e-3, 1e-2])
    """Peak rates to try; the rate at the end is the same part of each as in the config."""
    max_steps: int | None = None
    """Optimizer steps of each run (null: as the config says)."""
    n_layer: int | None = None
    """Blocks of the smaller model (null: as the config says)."""
    n_embd: int | None = None
    """Width of the smaller model (null: as the config says)."""


def main(settings: Settings) -> None:
    check_settings(settings)
    out_dir = Path(settings.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    results = []
    for number, rate in enumerate(sorted(settings.learning_rates), start=1):
        console.say(f"\nlearning rate {rate:g}, {number} of {len(settings.learning_rates)}")
        results.append((rate, *train_at(rate, settings, out_dir)))
    print_table(results)
    draw(results, out_dir / PICTURE)
    console.result(f"picture: {out_dir / PICTURE}")


def check_settings(settings: Settings) -> None:
    problems = Problems()
    if not settings.learning_rates or any(not (math.isfinite(r) and r > 0) for r in settings.learning_rates):
        problems.add(f"--learning_rates={settings.learning_rates}: give rates above 0, as '[3e-4,1e-3]'.")
    if len(set(map(name_of, settings.learning_rates))) < len(settings.learning_rates):
        problems.add(f"--learning_rates={settings.learning_rates}: two of them are the same.")
    for flag in ("max_steps", "n_layer", "n_embd"):
        value = getattr(settings, flag)
        if value is not None and value < 1:
            problems.add(f"--{flag}={value}: give at least 1.")
    if not Path(settings.config_file).is_file():
        problems.add(f"--config_file={settings.config_file}: no such file.")
    problems.raise_if_any()


def name_of(rate: float) -> str:
    return f"lr-{rate:g}"


def train_at(rate: float, settings: Settings, out_dir: Path) -> tuple[list[dict[str, Any]], str | None]:
    """One run, by the command that its user could give; what it logged, and why it failed if it did."""
    run = out_dir / name_of(rate)
    path = out_dir / f"{name_of(rate)}.yaml"
    with atomic_write(path) as file:
        file.write(yaml.safe_dump(config_at(rate, settings, run), sort_keys=False).encode())
    command = [sys.executable, SCRIPT, f"--config={path.absolute()}"]
    console.say(f"$ python {SCRIPT} --config={quote(str(path))}")
    code = subprocess.run(command, cwd=ROOT).returncode
    records = read_steps(run) if run.is_dir() else []
    if code == 0:
        return records, None
    if not records:  # nothing that a learning rate could be blamed for
        raise UserError(f"{name_of(rate)}: {SCRIPT} left with {code} before its first step, as it says above.")
    console.warn(f"{name_of(rate)} ended after step {records[-1]['step']} with exit code {code}")
    return records, f"exit code {code}"


def config_at(rate: float, settings: Settings, run: Path) -> dict[str, Any]:
    """The settings of the run at this rate, as far as the config states them."""
    config = yaml.safe_load(Path(settings.config_file).read_text()) or {}
    training = cli.parse_settings(Training, "", [f"--config={settings.config_file}"])
    train, optimizer = dict(config.get("train") or {}), dict(config.get("optimizer") or {})
    optimizer["lr"] = rate
    train["min_lr"] = rate * training.train.min_lr / training.optimizer.lr
    if settings.max_steps is not None:
        train |= {"max_steps": settings.max_steps, "max_tokens": None, "epochs": None}
    train["save_interval"] = None  # a failed run of a sweep is run again as a whole
    changes = {"train": train, "optimizer": optimizer, "out_dir": str(run.absolute())}
    changes["dataset_path"] = str(Path(settings.dataset_path).absolute())
    if settings.n_layer is not None or settings.n_embd is not None:
        changes["model_config"] = smaller(training, settings)
    return {**config, **changes}


def smaller(training: Training, settings: Settings) -> dict[str, Any]:
    """`model_config` of the same family with fewer blocks or less width; heads keep their size, the MLP its proportion.

    Raises:
        UserError: the width is not a multiple of a head's.
    """
    from pretraining.model_config import resolve_model_config

    config = resolve_model_config(training)
    width = settings.n_embd or config.n_embd
    if width % config.head_size:
        raise UserError(
            f"--n_embd={width}: give a multiple of {config.head_size}, the size of a head of {config.name}."
        )
    heads = width // config.head_size
    per_group = config.n_head // config.n_query_groups
    groups = max(1, heads // per_group)
    while heads % groups:
        groups -= 1
    sizes = {
        "n_layer": settings.n_layer or config.n_layer,
        "n_embd": width,
        "n_head": heads,
        "n_query_groups": groups,
        "head_size": config.head_size,
        "intermediate_size": max(16, round(config.intermediate_size * width / config.n_embd / 16) * 16),
    }
    return {**(training.model_config or {}), **sizes}


def final_loss(records: list[dict[str, Any]], failed: str | None) -> float | None:
    """The last validation loss, or without any the mean of the last tenth of training losses; None after a failure."""
    validated = [record["val_loss"] for record in records if record.get("val_loss") is not None]
    losses = [record["loss"] for record in records if record.get("loss") is not None]
    last = losses[-max(1, len(losses) // 10) :]
    if failed or not last:
        return None
    value = validated[-1] if validated else sum(last) / len(last)
    return value if math.isfinite(value) else None


def print_table(results: list[tuple[float, list[dict[str, Any]], str | None]]) -> None:
    console.result("\n| learning rate | last loss | steps |\n|---:|---:|---:|")
    losses = {rate: final_loss(records, failed) for rate, records, failed in results}
    best = min((loss for loss in losses.values() if loss is not None), default=None)
    for rate, records, failed in results:
        loss = losses[rate]
        shown = f"{loss:.4f}{' (best)' if loss == best else ''}" if loss is not None else f"failed: {failed}"
        console.result(f"| {rate:g} | {shown} | {records[-1]['step'] if records else 0:,} |")
    if best is not None and losses[results[-1][0]] == best:
        console.warn("the highest rate was best: try higher ones")
    if best is not None and losses[results[0][0]] == best:
        console.warn("the lowest rate was best: try lower ones")


def draw(results: list[tuple[float, list[dict[str, Any]], str | None]], path: Path) -> None:
    """The runs' losses over tokens, and the last loss at each rate."""
    from export.curves import colour_of, draw_loss, picture

    runs = {name_of(rate): records for rate, records, _ in results}
    with picture(path) as figure:
        curves, last = figure.subplots(1, 2, width_ratios=(1.9, 1))
        draw_loss(curves, runs, "tokens")
        for rate, records, failed in results:
            colour, loss = colour_of(runs, name_of(rate)), final_loss(records, failed)
            if loss is None:
                last.axvline(rate, color=colour, linestyle=":", label=f"{name_of(rate)} failed")
                last.legend()
            else:
                last.plot([rate], [loss], "o", color=colour)
        last.set(xscale="log", title="last loss by learning rate (nats per token)")


if __name__ == "__main__":
    sys.argv[0] = "-m tools.sweep_learning_rate"
    cli.run(main, Settings, __doc__)
