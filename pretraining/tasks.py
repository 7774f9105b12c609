"""Tasks of lm-evaluation-harness as token files, and their metrics from log-likelihoods. Neither lm_eval nor torch.

`python -m tools.prepare_task` has lm_eval build a task's requests, and writes them into a directory:

    tokens.npy      uint32 (rows, row_tokens + 1): a context and its continuation, zeros behind them
    rows.npy        int32 (rows, 3): the row's request, its tokens, and how many of these, the last ones, are scored
    examples.jsonl  one object per example: how many of the requests, in order, are its own; which of them are right;
                    and what its metrics need to know of the texts
    manifest.json   the task, its version and metrics; the tokenizer, and the BOS that stands before each text

A request is a text whose log-likelihood is wanted: a choice, a continuation, or a whole document, which can take
several rows. The metrics have lm_eval's names, and are computed as version 0.4.13 does.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.manifest import damaged_files, read_manifest

TOKENS_NAME, ROWS_NAME, EXAMPLES_NAME = "tokens.npy", "rows.npy", "examples.jsonl"

METRICS = {
    "multiple_choice": ("acc", "acc_norm", "acc_bytes"),
    "loglikelihood": ("acc", "perplexity"),
    "loglikelihood_rolling": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
}
"""By output type: lm_eval's metrics that need nothing but log-likelihoods and whether they are greedy."""


@dataclasses.dataclass(frozen=True)
class TaskSummary:
    """What the manifest of a prepared task says."""

    name: str
    """As the user calls it in eval.tasks."""
    directory: Path
    manifest: dict[str, Any]

    @property
    def output_type(self) -> str:
        return self.manifest["content"]["output_type"]

    @property
    def metrics(self) -> list[str]:
        """The metrics that lm_eval computes, in its words."""
        return self.manifest["content"]["metrics"]

    @property
    def row_tokens(self) -> int:
        """Tokens that the model reads of each row."""
        return self.manifest["content"]["row_tokens"]

    def columns(self) -> list[str]:
        """Their names in metrics.jsonl, standard errors included; as `metrics_of` returns them."""
        names = []
        for metric in dict.fromkeys([*self.metrics, "bits_per_byte"]):
            names.append(f"task_{self.name}_{metric}")
            if self.output_type != "loglikelihood_rolling":
                names.append(f"task_{self.name}_{metric}_stderr")
        return names


@dataclasses.dataclass(frozen=True)
class PreparedTask(TaskSummary):
    """A prepared task, read."""

    tokens: np.ndarray
    """uint32, shape (rows, row_tokens + 1); mapped, not read."""
    rows: np.ndarray
    """int32, shape (rows, 3): request, tokens, scored tokens."""
    examples: list[dict[str, Any]]

    @property
    def num_requests(self) -> int:
        return sum(example["requests"] for example in self.examples)

    def scored(self, rows: np.ndarray) -> np.ndarray:
        """Which tokens of these rows are scored: bool, shape (len(rows), row_tokens + 1)."""
        ends, counts = self.rows[rows, 1, None], self.rows[rows, 2, None]
        places = np.arange(self.tokens.shape[1])
        return (places < ends) & (places >= ends - counts)


def summarise(name: str, directory: str | Path) -> TaskSummary:
    """Read the manifest of a prepared task.

    Raises:
        UserError: there is none.
    """
    manifest = read_manifest(directory, "task")
    if manifest is None:
        raise UserError(
            f"--eval.tasks={{{name}: {directory}}}: no prepared task there. Make it: python -m tools.prepare_task "
            f"--output_dir={directory} ..."
        )
    return TaskSummary(name, Path(directory), manifest)


def read_task(name: str, directory: str | Path) -> PreparedTask:
    """Read a prepared task; raises UserError where its files are not those of its manifest."""
    summary = summarise(name, directory)
    if damage := damaged_files(directory, summary.manifest["files"]):
        raise UserError(f"--eval.tasks={{{name}: {directory}}}: {'; '.join(damage)}. Prepare the task again.")
    return PreparedTask(
        name,
        summary.directory,
        summary.manifest,
        np.load(summary.directory / TOKENS_NAME, mmap_mode="r"),
        np.load(summary.directory / ROWS_NAME),
        [json.loads(line) for line in (summary.directory / EXAMPLES_NAME).read_text().splitlines()],
    )


def metrics_of(task: PreparedTask, scores: np.ndarray, greedy: np.ndarray) -> dict[str, float]:
    """The task's metrics, by their names in metrics.jsonl.

    Args:
        scores: log-likelihood of each row in nats, float64.
        greedy: per row, whether each scored token is the most likely one.

    Returns:
        lm_eval's metrics (lm_eval/api/task.py, ConfigurableTask.process_results, and lm_eval/api/metrics.py), and bits
        per byte of the right answer, the mean over examples. The standard error of a mean is lm_eval's: the sample's
        standard deviation over the root of its size, and none for a single example. That of a perplexity, for which
        lm_eval draws samples, is perplexity times the standard error of the mean log-likelihood, to which theirs
        converges.
    """
    likelihoods = np.bincount(task.rows[:, 0], weights=scores, minlength=task.num_requests)
    values: dict[str, list[float]] = collections.defaultdict(list)
    first = 0
    for example in task.examples:
        requests = slice(first, first + example["requests"])
        for metric, value in _values(task, example, likelihoods[requests], greedy[requests]).items():
            values[metric].append(value)
        first = requests.stop
    if task.output_type == "loglikelihood_rolling":
        found = _rolling(task, likelihoods)
    else:
        found = {}
        for metric in dict.fromkeys([*task.metrics, "bits_per_byte"]):
            if not values[metric]:
                continue
            mean = sum(values[metric]) / len(values[metric])
            found[metric] = math.exp(min(-mean, 700)) if metric == "perplexity" else mean
            if len(values[metric]) > 1:
                error = math.sqrt(sum((value - mean) ** 2 for value in values[metric]) / (len(values[metric]) - 1))
                error /= math.sqrt(len(values[metric]))
                found[f"{metric}_stderr"] = error * (found[metric] if metric == "perplexity" else 1)
    return {f"task_{task.name}_{name}": float(value) for name, value in found.items()}


def _values(
    task: PreparedTask, example: dict[str, Any], likelihoods: np.ndarray, greedy: np.ndarray
) -> dict[str, float]:
    """One example's part in each metric."""
    if task.output_type == "loglikelihood_rolling":
        return {}
    right = example["right"]
    bits_per_byte = (
        {"bits_per_byte": -likelihoods[right[0]] / math.log(2) / example["text_bytes"][right[0]]} if right else {}
    )
    if task.output_type == "loglikelihood":
        return {"acc": float(greedy[0]), "perplexity": likelihoods[0], **bits_per_byte}
    return {
        "acc": float(np.argmax(likelihoods) in right),
        "acc_norm": float(np.argmax(likelihoods / np.array(example["choice_characters"], dtype=float)) in right),
        "acc_bytes": float(np.argmax(likelihoods / np.array(example["choice_bytes"], dtype=float)) in right),
        **bits_per_byte,
    }


def _rolling(task: PreparedTask, likelihoods: np.ndarray) -> dict[str, float]:
    """Of whole documents: weighted by their lengths, so there is no standard error."""
    total = -likelihoods.sum()
    words = sum(example["words"] for example in task.examples)
    num_bytes = sum(sum(example["text_bytes"]) for example in task.examples)
    found = {
        "word_perplexity": math.exp(min(total / words, 700)),
        "byte_perplexity": math.exp(min(total / num_bytes, 700)),
        "bits_per_byte": total / num_bytes / math.log(2),
    }
    return {metric: found[metric] for metric in dict.fromkeys([*task.metrics, "bits_per_byte"])}
