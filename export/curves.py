"""The curves of training runs in one picture: for the model card, and for `python -m tools.plot_curves`."""

from __future__ import annotations

import contextlib
import math
import os
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from utils.files import atomic_write

# Okabe and Ito's colours, which everybody can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = ("-", "--", ":", "-.")
PANELS = {"lr": "learning rate", "grad_norm": "gradient norm", "tokens_per_s": "tokens/s"}

Records = list[dict[str, Any]]


def series(records: Records, x: str, y: str) -> tuple[list[float], list[float]]:
    """The points at which both were logged as finite numbers."""
    points = [(record[x], record[y]) for record in records if is_number(record.get(x)) and is_number(record.get(y))]
    return [point[0] for point in points], [point[1] for point in points]


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def smoothed(at: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """The median over about a fiftieth of the curve around each point: no lag, and a single spike does not show.

    At most 2,000 points of it, which is more than a picture has pixels for.
    """
    reach = len(values) // 100
    points = range(0, len(values), max(1, len(values) // 2000))
    # Towards the ends the window shrinks on both sides alike: the steep fall at the beginning stays where it is.
    windows = [(i, min(reach, i, len(values) - 1 - i)) for i in [*points, len(values) - 1]]
    return [at[i] for i, _ in windows], [statistics.median(values[i - r : i + r + 1]) for i, r in windows]


def draw_curves(
    runs: Mapping[str, Records],
    output: str | os.PathLike,
    x: str = "auto",
    title: str | None = None,
    events: Mapping[str, Records] | None = None,
) -> None:
    """Draw loss, validation loss, learning rate, gradient norm, throughput, and accuracy in tasks if there are any.

    Args:
        runs: by name, what `export.run_metrics.read_steps` gives.
        output: picture; its suffix tells the format.
        x: "step", "tokens", or "auto" for tokens if every run logged them.
        title: above the picture.
        events: by name, the records of events.jsonl: a vertical mark for each that has a step.
    """
    if x == "auto":
        x = "tokens" if all(len(series(records, "tokens", "step")[0]) for records in runs.values()) else "step"
    with picture(output, title) as figure:
        tasks = task_names(runs)
        num_rows = len(PANELS) + bool(tasks)
        grid = figure.add_gridspec(num_rows, 2, width_ratios=(1.9, 1))
        loss_axes = figure.add_subplot(grid[:, 0])
        draw_loss(loss_axes, runs, x)
        for row, (key, name) in enumerate(PANELS.items()):
            draw_panel(figure.add_subplot(grid[row, 1]), runs, x, key, name, is_last=row + 1 == num_rows)
        if tasks:
            draw_tasks(figure.add_subplot(grid[len(PANELS), 1]), runs, x, tasks)
        for name, records in (events or {}).items():
            prefix = f"{name}: " if len(runs) > 1 else ""
            draw_events(figure.axes, loss_axes, records, runs[name], x, prefix, colour_of(runs, name))


@contextlib.contextmanager
def picture(output: str | os.PathLike, title: str | None = None) -> Iterator[Figure]:
    """An empty figure in the style of all pictures, written to `output` at the end of the block."""
    style = {
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "font.size": 9,
        "grid.color": "#E6E6E6",
        "legend.frameon": False,
        "lines.linewidth": 1.4,
        "savefig.dpi": 150,
        "svg.hashsalt": "curves",
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(11, 5.6), layout="constrained")
        yield figure
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=12)
        with atomic_write(output) as file:
            # No date inside: equal curves give equal files.
            figure.savefig(file, format=Path(output).suffix[1:], metadata=_without_date(Path(output).suffix))


def _without_date(suffix: str) -> dict[str, None]:
    return {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}[suffix]


def colour_of(runs: Mapping[str, Records], name: str) -> str:
    return COLOURS[list(runs).index(name) % len(COLOURS)]


def draw_loss(axes: Axes, runs: Mapping[str, Records], x: str) -> None:
    """Training loss, faint, with its moving median; validation loss as points."""
    shown: list[float] = []
    for name, records in runs.items():
        colour = colour_of(runs, name)
        prefix = f"{name}: " if len(runs) > 1 else ""
        at, loss = series(records, x, "loss")
        if at:
            axes.plot(at, loss, color=colour, alpha=0.25, linewidth=0.8)
            at, middle = smoothed(at, loss)
            label = f"{prefix}training, {loss[0]:.3f} to {end_level(loss):.3f} (last steps)"
            axes.plot(at, middle, color=colour, label=label)
            shown += middle
        at, loss = series(records, x, "val_loss")
        if at:
            dark = colour if len(runs) > 1 else COLOURS[1]
            label = f"{prefix}validation, {loss[0]:.3f} to {loss[-1]:.3f}"
            axes.plot(at, loss, color=dark, linestyle="--", marker="o", markersize=3.5, linewidth=1, label=label)
            shown += loss
    if shown:
        low, high = min(shown), max(shown)
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        axes.set_ylim(low - margin, high + margin)  # a spike of the raw loss must not flatten the curve
        axes.legend(loc="upper right")
    else:
        axes.text(0.5, 0.5, "no loss was logged", transform=axes.transAxes, ha="center", color="#888888")
    axes.set_title("loss, nats per token")
    format_x(axes, x)


def draw_events(
    panels: list[Axes], loss_axes: Axes, events: Records, records: Records, x: str, prefix: str, colour: str
) -> None:
    """A vertical mark in every panel for each event, and how often each kind happened in the legend of the loss."""
    shown = [event for event in events if is_number(event.get("step"))]
    if not shown:
        return
    per_step = records[-1][x] / records[-1]["step"] if x == "tokens" and records[-1]["step"] else 1
    for axes in panels:
        for at in sorted({event["step"] * per_step for event in shown}):
            axes.axvline(at, color=colour, linestyle=":", linewidth=1, alpha=0.7)
    counts = Counter(event["event"] for event in shown)
    label = prefix + ", ".join(f"{kind} ({count})" if count > 1 else kind for kind, count in counts.items())
    loss_axes.plot([], [], color=colour, linestyle=":", linewidth=1, label=label)
    loss_axes.legend(loc="upper right")


def end_level(values: Sequence[float]) -> float:
    """The median of the last fiftieth: a single step's loss is noise."""
    return statistics.median(values[-max(1, len(values) // 50) :])


def draw_panel(axes: Axes, runs: Mapping[str, Records], x: str, key: str, name: str, is_last: bool) -> None:
    shown: list[float] = []
    for run, records in runs.items():
        at, values = series(records, x, key)
        if at:
            shown += values
            axes.plot(at, values, color=colour_of(runs, run), linewidth=1, marker="." if len(at) == 1 else None)
    axes.set_title(name)
    if not shown:
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", va="center", color="#888888")
        axes.set_yticks([])
    elif key == "tokens_per_s":
        axes.set_ylim(0, 1.15 * max(shown) or 1)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    elif key == "lr":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
    else:
        typical = sorted(shown)[int(0.99 * (len(shown) - 1))]
        if max(shown) > 4 * typical > 0:  # a spike must not flatten the rest
            axes.set_ylim(0, 2 * typical)
    format_x(axes, x, with_label=is_last)


def task_names(runs: Mapping[str, Records]) -> list[str]:
    """The tasks with an accuracy that any of the runs logged, as eval.tasks calls them."""
    found = (re.fullmatch("task_(.+)_acc", key) for records in runs.values() for record in records for key in record)
    return sorted({match[1] for match in found if match})


def draw_tasks(axes: Axes, runs: Mapping[str, Records], x: str, tasks: Sequence[str]) -> None:
    """The accuracy in each task, with its standard error as a band: a colour per task, or per run if there are more."""
    for number, task in enumerate(tasks):
        for run, records in runs.items():
            at, accuracy = series(records, x, f"task_{task}_acc")
            if not at:
                continue
            colour, line, label = COLOURS[number % len(COLOURS)], "-", task
            if len(runs) > 1:
                colour, line, label = colour_of(runs, run), LINE_STYLES[number % len(LINE_STYLES)], f"{run}: {task}"
            label = f"{label}, {accuracy[0]:.1%} to {accuracy[-1]:.1%}"
            axes.plot(at, accuracy, color=colour, linestyle=line, marker="o", markersize=2.5, linewidth=1, label=label)
            errors = [record.get(f"task_{task}_acc_stderr", 0) for record in records if f"task_{task}_acc" in record]
            low, high = ([a + sign * e for a, e in zip(accuracy, errors)] for sign in (-1, 1))
            axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_title("accuracy in tasks")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(loc="best", fontsize=7)
    format_x(axes, x)


def format_x(axes: Axes, x: str, with_label: bool = True) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    if with_label:
        axes.set_xlabel(x)
    else:
        axes.tick_params(labelbottom=False)


def short_count(value: float) -> str:
    """2500 is "2.5 k", 3000000 is "3 M"."""
    for unit, size in ((" T", 1e12), (" G", 1e9), (" M", 1e6), (" k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"
