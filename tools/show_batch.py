"""Show what a run read: the documents of a global batch, or the steps at which a text was read.

    python -m tools.show_batch RUN --step=100
    python -m tools.show_batch RUN --step=100:102 --rank=0
    python -m tools.show_batch RUN --position=51200
    python -m tools.show_batch RUN --search='a sentence of the corpus'

A step has the number that metrics.jsonl gives it, from 1. Each document is shown with its dataset, chunk and number
and, where the input files of step 1 are at hand, with file and row. The order of the data is a function of seed and
position, so this holds across resumes, mixtures and epochs; the digest of each batch is compared with the logged one.

Exit code 1: a batch is not the one whose digest was logged.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from utils import cli, console
from utils.errors import Problems, UserError

EXIT_OTHER_BATCH = 1


@dataclasses.dataclass
class Settings:
    """Which part of which run is shown."""

    run_dir: str
    """The --out_dir of a run, or one of its checkpoints."""
    step: str | None = None
    """The step whose global batch is shown, or FIRST:LAST, both included."""
    position: int | None = None
    """Show one sequence alone, by its position in the run's order of the data, from 0."""
    rank: int | None = None
    """Only the sequences that this process read."""
    num_processes: int | None = None
    """How many processes there were at these steps, for --rank; null: as the checkpoint says."""
    search: str | None = None
    """Show at which steps this text was read, instead; upper and lower case differ."""
    text_chars: int = 200
    """Characters of each document to show; 0: all of them."""
    rows: bool = True
    """Find each document's row; a whole unit of the input is read again for it."""
    dataset_dir: str | None = None
    """Directory with train/ and val/, or the directory above those of a mixture; null: where the manifest says."""
    parquet_dir: str | None = None
    """The input of optimize_dataset.py, a path or a URL; null: near the dataset."""
    tokenizer_dir: str | None = None
    """To decode with; null: the checkpoint's own tokenizer."""


def check_settings(settings: Settings) -> None:
    problems = Problems()
    asked = [flag for flag in ("step", "position", "search") if getattr(settings, flag) is not None]
    if len(asked) != 1:
        given = " and ".join(f"--{flag}" for flag in asked) or "none of them"
        problems.add(f"--step, --position, --search: give one of them, not {given}.")
    if settings.search == "":
        problems.add("--search: give a text that is not empty.")
    if settings.rank is not None and settings.step is None:
        problems.add(f"--rank={settings.rank}: needs --step.")
    if settings.text_chars < 0:
        problems.add(f"--text_chars={settings.text_chars}: must not be negative; 0 shows whole documents.")
    problems.raise_if_any()


def steps_of(text: str, last_step: int) -> range:
    """Raises UserError where `text` is neither N nor FIRST:LAST, or the run did not get there."""
    first, colon, last = text.partition(":")
    try:
        steps = range(int(first), int(last if colon else first) + 1)
    except ValueError as error:
        raise UserError(f"--step={text}: give a step as 100, or a range as 100:102.") from error
    if not steps or steps[0] < 1 or steps[-1] > last_step:
        raise UserError(f"--step={text}: this run has steps 1 to {last_step:,}.")
    return steps


def show_steps(settings: Settings, view: Any, steps: range) -> int:
    """Returns how many batches are not those that were logged.

    Args:
        view: a batch_view.View. For type hints, too, the parser would import it, and torch with it.
    """
    num_processes = settings.num_processes or view.num_processes()
    if settings.rank is not None and not 0 <= settings.rank < num_processes:
        raise UserError(f"--rank={settings.rank}: the run had {num_processes:,} process(es), from 0 on.")
    wrong = 0
    logged = view.run.digests()
    for step in steps:
        positions = view.data.positions(step)
        digest = view.data.digest(step)
        as_logged = "not logged" if step not in logged else "as logged"
        if logged.get(step, digest) != digest:
            as_logged, wrong = f"NOT THE ONE THAT WAS LOGGED, {logged[step]}", wrong + 1
        console.result(f"step {step}: positions {positions[0]:,} to {positions[-1]:,}; digest {digest}, {as_logged}")
        ranks = range(len(positions))  # a sequence goes to a process by its number, which has no gaps
        ranks = [((step - 1) * len(positions) + i) % num_processes for i in ranks]
        chosen = [i for i, rank in enumerate(ranks) if settings.rank in (None, rank)]
        for lines in view.describe(positions[chosen].tolist(), [f"rank {ranks[i]} of {num_processes}" for i in chosen]):
            console.result("\n".join(lines))
    return wrong


def main(settings: Settings) -> None:
    check_settings(settings)
    from tools.batch_view import View
    from tools.run_data import RunData, find_datasets, find_run

    run = find_run(settings.run_dir)
    steps = steps_of(settings.step, run.last_step) if settings.step is not None else None
    directories = find_datasets(run, settings.dataset_dir)
    view = View(run, RunData(run.manifest["settings"], directories, run.left_out), directories, settings)
    if settings.search is not None:
        show_search(settings, view)
    elif steps is not None:
        if wrong := show_steps(settings, view, steps):
            console.error(f"digests that differ from the logged ones: {wrong:,} of {len(steps):,}")
            sys.exit(EXIT_OTHER_BATCH)
    else:
        if settings.position < 0:
            raise UserError(f"--position={settings.position}: positions begin with 0.")
        for lines in view.describe([settings.position], ["by itself"]):
            console.result("\n".join(lines))


def show_search(settings: Settings, view: Any) -> None:
    count = 0
    for lines in view.search(settings.search):
        count += 1
        console.result("\n".join(lines))
    if not count:
        raise UserError(f"--search={settings.search!r}: in no document of {', '.join(map(str, view.directories))}")
    console.result(f"\nfound {console.counted(count, 'time')}; the run has {view.run.last_step:,} steps so far")


if __name__ == "__main__":
    sys.argv[0] = "-m tools.show_batch"  # as messages name the command
    cli.run(main, Settings, __doc__, positional=True)
