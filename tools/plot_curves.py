"""Draw the curves of one or several training runs into one picture.

    python -m tools.plot_curves RUN [RUN ...] --output=curves.png

RUN is a directory with the metrics.jsonl that distributed_pretrain.py writes, or that file itself. What a run did
not log is left out; steps that were logged twice, by a run that was restarted, count as they were logged last. What
happened to a run (restarts, hangs, skipped steps: its events.jsonl) is marked by vertical lines.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export.run_metrics import read_steps
from pretraining.events import read_events
from utils import cli, console
from utils.errors import Problems, UserError
from utils.metrics_file import METRICS_NAME

SUFFIXES = (".png", ".svg", ".pdf")


@dataclasses.dataclass
class Settings:
    """Which runs to draw, and how."""

    run_dirs: list[str] = dataclasses.field(
        metadata={"nargs": "+", "help": "Directories of runs, or their metrics.jsonl files."}
    )
    output: str = "curves.png"
    """Picture to write; .png, .svg or .pdf."""
    x: str = "auto"
    """Axis: step, tokens, or auto: tokens if every run logged them."""
    title: str | None = None
    """Above the picture; null: none."""


def read_run(run_dir: str) -> list[dict[str, Any]]:
    """The logged steps of a run.

    Raises:
        UserError: there is no metrics.jsonl, or no step in it.
    """
    path = Path(run_dir)
    path = path / METRICS_NAME if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{run_dir}: no {METRICS_NAME} there. Give the --out_dir of a run that has logged a step.")
    steps = read_steps(path)
    if not steps:
        raise UserError(f"{path}: no step was logged yet. Draw it later.")
    return steps


def directory_of(run_dir: str) -> Path:
    path = Path(run_dir).absolute()
    return path.parent if path.is_file() else path


def names_of(run_dirs: Sequence[str]) -> list[str]:
    """The shortest endings of the paths that tell the runs apart."""
    paths = [directory_of(run) for run in run_dirs]
    depth = 1
    while depth < 8 and len({path.parts[-depth:] for path in paths}) < len(set(paths)):
        depth += 1
    return [os.path.join(*path.parts[-depth:]) for path in paths]


def main(settings: Settings) -> None:
    problems = Problems()
    found = [problems.collect(read_run, run) for run in settings.run_dirs]
    output = Path(settings.output)
    if output.suffix not in SUFFIXES:
        problems.add(f"--output={output}: give a name that ends in {', '.join(SUFFIXES)}.")
    if not output.parent.is_dir():
        problems.add(f"--output={output}: no directory {output.parent}. Make it first.")
    if settings.x not in ("auto", "step", "tokens"):
        problems.add(f"--x={settings.x}: give step, tokens or auto.")
    problems.raise_if_any()

    from export.curves import draw_curves

    names = names_of(settings.run_dirs)
    events = {name: read_events(directory_of(run)) for name, run in zip(names, settings.run_dirs)}
    draw_curves(dict(zip(names, found)), output, settings.x, settings.title, events)
    console.say(f"{output}: curves of {', '.join(names)}")


if __name__ == "__main__":
    sys.argv[0] = "-m tools.plot_curves"  # as messages name the command
    cli.run(main, Settings, __doc__, positional=True)
