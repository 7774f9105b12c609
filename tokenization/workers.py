"""What optimize_dataset.py asks of the processes that tokenize, wherever they are, and what it says when they fail."""

from __future__ import annotations

import abc
import errno

from tokenization.encoder import EncodingMismatch, fast_tokenizer_json
from tokenization.job import Job, Plan, Unit, UnitRecord
from tokenization.parquet import CorruptRowGroup
from utils import console
from utils.errors import UserError, WorkerDied

MAX_RETRIES = 3
"""How often a unit is tried again when its process died."""


class Workers(abc.ABC):
    """Processes that tokenize one unit at a time each: LocalWorkers on this machine, RayWorkers on a cluster.

    A unit whose process dies is tried again alone; the other units do not notice.
    """

    @abc.abstractmethod
    def num_free(self) -> int:
        """Units that can be submitted now."""

    @abc.abstractmethod
    def submit(self, job: Job, unit: Unit) -> None:
        """Have a unit tokenized; returns at once. Only while `num_free` is positive."""

    @abc.abstractmethod
    def finished(self) -> list[tuple[Unit, UnitRecord | Exception]]:
        """Wait for units to finish: each with its record, or with what went wrong. Empty when the wait grew long."""


def load_tokenizer(plan: Plan) -> tuple[bytes, bytes]:
    """tokenizer.json, and what gigatoken loads: made once, and not once per worker."""
    tokenizer_json = plan.tokenizer_json.read_bytes()
    return tokenizer_json, fast_tokenizer_json(tokenizer_json, plan.job.parse_special_tokens)


def record_or_user_error(outcome: UnitRecord | Exception, plan: Plan) -> UnitRecord:
    """A finished unit's record; what went wrong in it becomes a UserError where the user can fix it."""
    if isinstance(outcome, UnitRecord):
        return outcome
    go_on = f"the same command goes on:\n  {console.this_command()}"
    output_dir = f"--output_dir={plan.job.output_dir}"
    if isinstance(outcome, CorruptRowGroup):
        message = (
            f"--input_dir: {plan.job.paths[outcome.file_index]}, row group {outcome.row_group}: {outcome.reason}. Fix "
            "or remove the file, or leave such row groups out with --on_bad_file=quarantine in a new --output_dir."
        )
    elif isinstance(outcome, EncodingMismatch):
        message = (
            f"--tokenizer_dir={plan.tokenizer_json.parent}: the fast encoder disagrees with Hugging Face "
            f"tokenizers, so nothing can be trusted: {outcome}. Please report this tokenizer."
        )
    elif isinstance(outcome, OSError) and outcome.errno in (errno.ENOSPC, errno.EDQUOT):
        message = (
            f"{output_dir}: the disk is full ({outcome.strerror}). Nothing half-written was kept. Make room; {go_on}"
        )
    elif isinstance(outcome, OSError) and outcome.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        message = f"{output_dir}: cannot be written ({outcome})."
    elif isinstance(outcome, OSError):
        message = f"reading or writing failed on a node ({type(outcome).__name__}: {outcome}). Then {go_on}"
    elif isinstance(outcome, WorkerDied):
        message = (
            f"a worker process died {MAX_RETRIES + 1} times on the same unit, most likely because it ran out of memory "
            f"({outcome}). Lower --num_workers or --unit_bytes; {go_on}"
        )
    else:
        raise outcome
    raise UserError(message) from outcome
