"""Positions of the training sequence that a run leaves out for good, because of what they did to it.

OUT_DIR/left_out.json is the run's word on it, written before anything goes back: whatever ends the run in between, the
next start finds it, passes over the checkpoints that have read those positions, and goes on from before them. The rest
of the sequence moves up, so that the run is the one that never had these positions: the same batches, losses and
weights. Each checkpoint and its manifest say which positions it was made without.

    {"ranges": [[4096, 4608]], "went_back": [{"from_step": 41, "to_step": 30}]}
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from pretraining.checkpoint import list_checkpoints
from pretraining.events import record_event
from utils.errors import UserError
from utils.files import atomic_write, fsync_directory

LEFT_OUT_NAME = "left_out.json"
MAX_RETURNS_TO_A_STEP = 2
"""The third time that a run would go back to the same step it ends instead: other text does not help it."""

Ranges = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """Which positions are left out."""

    ranges: Ranges = ()
    """First position and the one after the last, ascending, with something between any two."""
    went_back: tuple[tuple[int, int], ...] = ()
    """For the record: the step that the run had reached each time it went back, and that from which it went on."""

    @classmethod
    def of(cls, content: dict[str, Any]) -> LeftOut:
        """What a checkpoint was made without, by its manifest's content; older ones leave nothing out."""
        return cls(tuple((first, end) for first, end in content.get("left_out") or ()))

    def positions(self, numbers: np.ndarray) -> np.ndarray:
        """The positions of the sequences that the run reads, by their number (0 is the first that it reads).

        Args:
            numbers: int64, any shape.
        """
        if not self.ranges:
            return numbers
        ranges = np.array(self.ranges, np.int64)
        lengths = ranges[:, 1] - ranges[:, 0]
        jumps = ranges[:, 0] - (np.cumsum(lengths) - lengths)  # the number from which each range has been passed
        passed = np.concatenate([[0], np.cumsum(lengths)])
        return numbers + passed[np.searchsorted(jumps, numbers, side="right")]

    def end_of(self, num_sequences: int) -> int:
        """The position after the last of the first `num_sequences` that the run reads."""
        return int(self.positions(np.array([num_sequences - 1], np.int64))[0]) + 1 if num_sequences else 0

    def without(self, numbers: range) -> LeftOut:
        """What the sequences of these numbers read is left out, too."""
        first, end = int(self.positions(np.array([numbers.start], np.int64))[0]), self.end_of(numbers.stop)
        return LeftOut(_merged((*self.ranges, (first, end))), self.went_back)

    def up_to(self, end: int) -> Ranges:
        """The ranges below position `end`."""
        return tuple((first, min(last, end)) for first, last in self.ranges if first < end)

    def agrees_with(self, manifest: dict[str, Any]) -> bool:
        """Whether the checkpoint of this manifest has read nothing that is left out, and left out nothing else."""
        content = manifest["content"]
        end = content.get("position", 0)
        return LeftOut.of(content).up_to(end) == self.up_to(end)


def _merged(ranges: Ranges) -> Ranges:
    merged: list[tuple[int, int]] = []
    for first, end in sorted(ranges):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((first, end))
    return tuple(merged)


def read_left_out(out_dir: Path) -> LeftOut:
    """What the run in `out_dir` leaves out; nothing where there is no file.

    Raises:
        UserError: the file is not one of ours.
    """
    path = out_dir / LEFT_OUT_NAME
    try:
        raw = json.loads(path.read_bytes())
        ranges = tuple((first, end) for first, end in raw["ranges"])
        went_back = tuple((entry["from_step"], entry["to_step"]) for entry in raw.get("went_back", ()))
        if not all(isinstance(n, int) for pair in ranges for n in pair) or any(a >= b or a < 0 for a, b in ranges):
            raise ValueError("its ranges are not pairs of ascending numbers")
    except FileNotFoundError:
        return LeftOut()
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a list of positions to leave out ({error!r}). Take it from a backup, or remove it to read "
            "all of the text."
        ) from error
    return LeftOut(_merged(ranges), went_back)


def write_left_out(out_dir: Path, left_out: LeftOut) -> None:
    """Put it on disk; returns when it is safe."""
    went_back = [{"from_step": start, "to_step": end} for start, end in left_out.went_back]
    with atomic_write(out_dir / LEFT_OUT_NAME) as file:
        file.write(json.dumps({"ranges": left_out.ranges, "went_back": went_back}).encode() + b"\n")


def set_aside_checkpoints(out_dir: Path, left_out: LeftOut) -> list[Path]:
    """Rename the checkpoints that have read what is left out, so that nothing takes them up; returns the new paths."""
    moved = []
    for checkpoint in list_checkpoints(out_dir)[0]:
        if not left_out.agrees_with(checkpoint.manifest):
            aside = out_dir / f"left-out-{checkpoint.path.name}"
            if aside.exists():  # the run went back over this step before
                shutil.rmtree(aside)
            os.rename(checkpoint.path, aside)
            moved.append(aside)
    if moved:
        fsync_directory(out_dir)
    return moved


def leave_out(
    out_dir: Path, left_out: LeftOut, numbers: range, step: int, returns: collections.Counter[int]
) -> str | None:
    """On rank 0: put on disk that what these sequences read is left out; returns why the run must end instead, if so.

    Args:
        left_out: what has been left out so far.
        numbers: of the sequences that the bad steps read.
        step: that the run has reached.
        returns: how often this start of the run went back to each step; this one is added.
    """
    more = left_out.without(numbers)
    good = [checkpoint.step for checkpoint in list_checkpoints(out_dir)[0] if more.agrees_with(checkpoint.manifest)]
    to_step = max(good, default=0)
    returns[to_step] += 1
    if returns[to_step] > MAX_RETURNS_TO_A_STEP:
        return (
            f"steps up to {step} had a loss or gradient norm out of bounds, and the run went back to step {to_step} "
            f"{MAX_RETURNS_TO_A_STEP} times before, to read other text (--train.max_spikes). The text is not the "
            "reason: lower --optimizer.lr, lengthen the warm-up, or look at what changed at that step, and start again."
        )
    write_left_out(out_dir, dataclasses.replace(more, went_back=(*left_out.went_back, (step, to_step))))
    message = (
        f"step {step}: going back to step {to_step}; the {len(numbers):,} sequences of the last bad steps are left out "
        f"from now on ({LEFT_OUT_NAME})"
    )
    record_event(out_dir, "went back", message, step=step, to_step=to_step, ranges=[list(pair) for pair in more.ranges])
    return None
