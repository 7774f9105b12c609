"""What is measured of the model while it trains: the validation loss, tasks, and text that it writes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist

from pretraining.context_parallel import ALONE
from pretraining.data import even_batches
from pretraining.loss import IGNORED_TARGET
from pretraining.plan import Plan
from pretraining.samples import Samples
from pretraining.settings import Settings
from pretraining.tasks import metrics_of, read_task
from pretraining.validation import Validation


class Evaluations:
    """Every process makes one and calls `run` at the same steps.

    Args:
        model: as Fabric has set it up.
        device: where its inputs go.
    """

    def __init__(self, model: torch.nn.Module, settings: Settings, plan: Plan, device: torch.device):
        self._model = model
        self._validation = Validation(model, settings, plan, device)
        tokens = settings.train.micro_batch_size * plan.context_tokens // settings.parallel.context_parallel_size
        self._tasks = [
            TaskEvaluation(name, directory, model, tokens, device)
            for name, directory in (settings.eval.tasks or {}).items()
        ]
        self._samples = Samples(model, settings, plan, tokens, device) if settings.eval.prompts else None

    def run(self, step: int) -> dict[str, float]:
        """The validation loss and each task's metrics, the same on all processes; samples go to their file."""
        values = self._validation.run()
        if self._tasks or self._samples:
            with _evaluating(self._model):
                for task in self._tasks:
                    values |= task.run()
                if self._samples:
                    self._samples.write(step)
        return values


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """No gradients, whole sequences on each process, and nothing compiled: tasks and samples have shapes of their own,
    and compiled blocks that have met a second shape are compiled for any, training's as well."""
    gpt = model.module  # Fabric's name for what it wraps
    group, gpt.context_group = gpt.context_group, ALONE
    model.eval()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield
    model.train()
    gpt.context_group = group


class TaskEvaluation:
    """A prepared task, whose rows are spread over the processes.

    Args:
        name, directory: an entry of eval.tasks.
        batch_tokens: tokens that a process computes at a time, at most; one row in any case.
    """

    def __init__(self, name: str, directory: str, model: torch.nn.Module, batch_tokens: int, device: torch.device):
        self._task, self._model, self._device = read_task(name, directory), model, device
        self._batch_rows = max(1, batch_tokens // self._task.row_tokens)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        self._batches = even_batches(len(self._task.rows), self._batch_rows, rank, world_size)

    def run(self) -> dict[str, float]:
        """See `tasks.metrics_of`."""
        found = torch.zeros(2, len(self._task.rows), dtype=torch.float64, device=self._device)  # score, greedy
        for rows in self._batches:
            scores, greedy = self._score(rows)
            found[0, rows], found[1, rows] = scores, greedy
        dist.all_reduce(found)
        scores, greedy = found.cpu().numpy()
        return metrics_of(self._task, scores, greedy > 0)

    def _score(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Per row, the log-likelihood of its scored tokens and whether each is the most likely one; float64."""
        filled = np.resize(rows if len(rows) else np.zeros(1, np.int64), self._batch_rows)
        tokens = torch.from_numpy(self._task.tokens[filled].astype(np.int64))
        targets = tokens.where(torch.from_numpy(self._task.scored(filled)), IGNORED_TARGET)
        targets[len(rows) :] = IGNORED_TARGET  # what fills the batch up
        inputs, targets = tokens[:, :-1].to(self._device), targets[:, 1:].to(self._device)
        scores, likeliest = self._model(inputs, targets, per_token=True)
        scores, likeliest = (values.view(targets.shape)[: len(rows)] for values in (scores, likeliest))
        return scores.double().sum(dim=1), likeliest.all(dim=1).double()
