"""Whether the text on disk is what was merged: its checksums, compared in the background while the run trains.

Each process has a thread for it, from its start on, and the processes of a node share the chunks. A chunk that is not
what its manifest says may have been trained on: the error names the steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from pretraining.checkpoint import list_checkpoints
from pretraining.data_order import SequenceOrder
from pretraining.events import record_event
from pretraining.plan import Plan
from pretraining.settings import Settings
from utils.chunks import read_index
from utils.errors import UserError
from utils.files import checksum
from utils.manifest import read_manifest

_SEQUENCES_AT_A_TIME = 1 << 20
_NUM_READS = 3
_SECONDS_BETWEEN_LOOKS = 5.0


class DatasetCheck:
    """Compares the chunks of a run's datasets with their manifests, in the background. Every process makes one."""

    def __init__(self, settings: Settings, plan: Plan):
        self._train_directories = plan.train_directories
        directories = [Path(path) for path in plan.train_directories + plan.val_directories]
        work = _checksums(directories) if settings.data.verify == "checksums" else []
        self._work = work[int(os.environ["LOCAL_RANK"]) :: int(os.environ["LOCAL_WORLD_SIZE"])]
        self.problem: Damage | None = None
        """The first that was found."""
        self._num_read = 0
        self._thread = threading.Thread(target=self._run, name="checksums", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for directory, name, expected in self._work:
            try:
                found = _checksum_with_retries(directory / name)
            except OSError as error:
                self.problem = Damage(str(directory), name, f"cannot be read ({error.strerror})", unreadable=True)
                return
            self._num_read += 1
            if found != expected:
                self.problem = Damage(str(directory), name, f"its checksum is {found}, its manifest says {expected}")
                return

    def wait(self, get_on: Callable[[], None]) -> None:
        """Return on all processes when each has read its chunks or one has found something.

        Args:
            get_on: called while some process still reads.
        """
        num_before = -1
        while True:
            self._thread.join(_SECONDS_BETWEEN_LOOKS)
            looks: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(looks, (self._thread.is_alive(), self._num_read, self.problem is not None))
            num_read = sum(count for _, count, _ in looks)
            if num_read > num_before:
                get_on()
            num_before = num_read
            if not any(busy for busy, _, _ in looks) or any(found for _, _, found in looks):
                return

    def raise_if_damaged(self, read: Reading, out_dir: Path) -> None:
        """Called by all processes at once, when one of them has found something or the run ends.

        Raises:
            UserError: on all of them, with the steps that have read from the chunk and the newest checkpoint from
                before them.
            OSError: a chunk could not be read; the next start may be luckier.
        """
        problems: list[Damage | None] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, self.problem)
        problem = next((problem for problem in problems if problem is not None), None)
        if problem is None:
            return
        if problem.unreadable:
            raise OSError(f"{problem.directory}/{problem.chunk} {problem.reason}")
        message, steps = self._what_to_do(problem, read, out_dir)
        if dist.get_rank() == 0:
            facts = {"step": read.num_steps, "chunk": f"{problem.directory}/{problem.chunk}", "steps": len(steps)}
            record_event(out_dir, "damaged text", message, tell=False, **facts, first_step=steps[0] if steps else None)
        raise UserError(message)

    def _what_to_do(self, problem: Damage, read: Reading, out_dir: Path) -> tuple[str, list[int]]:
        """For the user, and the steps that have read from the chunk."""
        directory = problem.directory
        message = f"--dataset_path={directory}: {problem.chunk}: {problem.reason}. "
        if directory not in self._train_directories:
            more = "It holds validation text: no weight depends on it. Merge the dataset again with --verify=checksums."
            return message + more, []
        steps = read.steps_with(Path(directory), self._train_directories.index(directory), problem.chunk)
        if not steps:
            more = "No step has read from it yet. Merge the dataset again with --verify=checksums, and run the same "
            return f"{message}{more}command.", []
        good = [checkpoint for checkpoint in list_checkpoints(out_dir)[0] if checkpoint.step < steps[0]]
        more = (
            f"{len(steps)} of {read.num_steps} steps have read from it, the first is {steps[0]}, the last {steps[-1]}. "
            f"Newest checkpoint from before them: {good[0].path if good else 'none'}. Merge the dataset again with "
            "--verify=checksums; remove the later checkpoints, and run the same command to train these steps again."
        )
        return message + more, steps


@dataclasses.dataclass(frozen=True)
class Damage:
    """A chunk that is not what its manifest says."""

    directory: str
    chunk: str
    reason: str
    unreadable: bool = False
    """Not what is in it is wrong, as far as is known, but the file system."""


def _checksum_with_retries(path: Path) -> str:
    for _ in range(_NUM_READS - 1):
        with contextlib.suppress(OSError):
            return checksum(path)
    return checksum(path)


def _checksums(directories: list[Path]) -> list[tuple[Path, str, str]]:
    """Dataset, name and checksum of every chunk whose checksum is known."""
    found = []
    for directory in directories:
        manifest = read_manifest(directory) or {}
        entries = (entry for entry in manifest.get("files", []) if isinstance(entry, dict) and "xxh3_128" in entry)
        found += [(directory, entry["name"], entry["xxh3_128"]) for entry in entries]
    return found


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a run has read so far."""

    order: SequenceOrder
    positions: Callable[[np.ndarray], np.ndarray]
    """Of the sequences that the run reads, by their number (see left_out.LeftOut)."""
    block_tokens: int
    global_batch_size: int
    num_steps: int

    def steps_with(self, directory: Path, source: int, chunk_name: str) -> list[int]:
        """The steps, from 1, whose global batch held a sequence of this chunk; ascending.

        Args:
            source: the dataset's number in `order`.
        """
        index = read_index(directory, "--dataset_path")
        ends = np.cumsum([chunk.tokens // self.block_tokens for chunk in index.chunks])
        place = next(i for i, chunk in enumerate(index.chunks) if chunk.name == chunk_name)
        first, end = int(ends[place - 1]) if place else 0, int(ends[place])
        steps: set[int] = set()
        for numbers in _pieces(self.num_steps * self.global_batch_size):
            located = self.order.locate(self.positions(numbers))
            inside = (located.source == source) & (located.block >= first) & (located.block < end)
            steps.update((numbers[inside] // self.global_batch_size + 1).tolist())
        return sorted(steps)


def _pieces(count: int) -> Iterator[np.ndarray]:
    for start in range(0, count, _SEQUENCES_AT_A_TIME):
        yield np.arange(start, min(count, start + _SEQUENCES_AT_A_TIME), dtype=np.int64)
