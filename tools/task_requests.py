"""lm_eval's own requests of a task, as tokens by lm_eval's own model class: what `lm_eval --model hf` would ask.

lm_eval evaluates a model of one layer which remembers what it is asked instead of computing anything. So the prompts,
the examples in them and their order, the split of a text into context and continuation, BOS, and the windows of long
documents are all lm_eval's, of the version that is installed.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pretraining.tasks import METRICS
from utils import console
from utils.errors import UserError

ROW_MULTIPLE_TOKENS = 16
"""Rows are filled up to a multiple of it, in which matrix products are fast."""


@dataclasses.dataclass
class Requests:
    """The requests of one task."""

    name: str
    version: Any
    output_type: str
    metrics: list[str]
    examples: list[dict[str, Any]]
    """As `pretraining.tasks` describes them."""
    rows: list[list[tuple[list[int], list[int]]]]
    """Per request, the tokens of its contexts and continuations: one pair, or one for each window of a document."""


class _Recorder(HFLM):
    """Remembers the tokens of what it is asked, by the identity of the request."""

    def __init__(self, tokenizer_dir: Path, context_tokens: int):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
        super().__init__(pretrained=model, tokenizer=tokenizer, max_length=context_tokens, batch_size=1, device="cpu")
        self.rows: dict[int, list[tuple[list[int], list[int]]]] = {}

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        ask = super().loglikelihood
        return [self._remember(request, ask) for request in requests]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        ask = super().loglikelihood_rolling
        return [self._remember(request, ask) for request in requests]

    def _remember(self, request: Instance, ask) -> Any:
        self._pairs: list[tuple[list[int], list[int]]] = []
        (answer,) = ask([request], disable_tqdm=True)
        self.rows[id(request)] = self._pairs
        return answer

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        self._pairs += [(context, continuation) for _, context, continuation in requests]
        return [(0.0, False)] * len(requests)


def build_requests(
    name: str,
    tokenizer_dir: Path,
    context_tokens: int,
    include_path: str | None,
    num_fewshot: int | None,
    limit: int | None,
) -> Requests:
    """Have lm_eval build the requests of a task.

    Args:
        tokenizer_dir: as an export has it: what it puts before a text is what the model sees.
        context_tokens: the longest text that the model reads.
        include_path: directory with task YAMLs beside lm_eval's own.
        num_fewshot: solved examples in each prompt; None: as the task says.
        limit: the first so many examples; None: all.

    Raises:
        UserError: lm_eval has no such task or cannot load it, or it needs more than log-likelihoods.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=include_path, include_defaults=False) if include_path else None
    if manager is None or name not in manager.all_tasks:  # reading its own 15,000 files takes a while
        manager = TaskManager(include_path=include_path)
    try:
        loaded = manager.load([name])
    except Exception as error:  # whatever the task's own code, the hub or a file raises
        raise UserError(
            f"--task={name}: lm_eval cannot load it ({type(error).__name__}: {error}). See `lm_eval ls tasks` for its "
            "names; data on the hub needs the network, and a task of your own --include_path."
        ) from error
    if len(loaded["tasks"]) != 1:
        raise UserError(
            f"--task={name}: is a group of {len(loaded['tasks'])} tasks. Prepare each by itself: "
            f"{', '.join(loaded['tasks'])}."
        )
    (task,) = loaded["tasks"].values()
    metrics = _check_task(name, task)
    recorder = _Recorder(tokenizer_dir, context_tokens)
    try:
        simple_evaluate(
            recorder,
            tasks=[task],
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
            task_manager=manager,
        )
    except Exception as error:
        raise UserError(
            f"--task={name}: lm_eval cannot build its requests ({type(error).__name__}: {error})."
        ) from error
    examples, rows = [], []
    for instances in _by_document(task.instances):
        example = _example(task, instances)
        examples.append(example)
        rows += [recorder.rows[id(instance)] for instance in instances[: example["requests"]]]
    return Requests(task.config.task, task.VERSION, task.OUTPUT_TYPE, metrics, examples, rows)


def _check_task(name: str, task: ConfigurableTask) -> list[str]:
    """The task's metrics that training can compute; raises UserError if there is none."""
    flag, output_type = f"--task={name}", task.OUTPUT_TYPE
    if output_type not in METRICS:
        raise UserError(
            f"{flag}: its requests are {output_type}, answers that are written out; during training only "
            f"log-likelihoods are computed ({', '.join(METRICS)}). Evaluate it on an export, with lm_eval."
        )
    if (
        not isinstance(task, ConfigurableTask)
        or callable(task.config.process_results)
        or getattr(task, "MULTIMODAL", False)
    ):
        raise UserError(
            f"{flag}: computes its metrics by code of its own, or reads more than text. Evaluate it on an export, with "
            "lm_eval."
        )
    asked = list(task.aggregation())
    metrics = [metric for metric in asked if metric in METRICS[output_type]]
    if not metrics:
        raise UserError(
            f"{flag}: has the metrics {', '.join(asked)}; known are {', '.join(METRICS[output_type])}. Evaluate it on "
            "an export, with lm_eval."
        )
    if others := [metric for metric in asked if metric not in metrics]:
        console.warn(f"{flag}: without {', '.join(others)}, which training does not compute")
    return metrics


def _by_document(instances: list[Instance]) -> list[list[Instance]]:
    """The requests of each document, as lm_eval hands them to the task's metrics."""
    found: dict[int, list[Instance]] = {}
    for instance in instances:
        found.setdefault(instance.doc_id, []).append(instance)
    return [sorted(group, key=lambda instance: instance.idx) for group in found.values()]


def _example(task: ConfigurableTask, instances: list[Instance]) -> dict[str, Any]:
    """What ConfigurableTask.process_results takes from the document."""
    document = instances[0].doc
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        text = task.doc_to_target(document)
        return {"requests": 1, "words": task.count_words(text), "text_bytes": [task.count_bytes(text)]}
    text_bytes = [len(instance.args[1].encode()) for instance in instances]
    if task.OUTPUT_TYPE == "loglikelihood":
        return {"requests": 1, "right": [0], "text_bytes": text_bytes}
    choices = task.doc_to_choice(document)
    gold = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    if isinstance(gold, str):
        gold = choices.index(gold) if gold in choices else -1
    right = [number for number in (gold if isinstance(gold, list) else [gold]) if 0 <= number < len(choices)]
    return {
        "requests": len(choices),  # behind them, acc_mutual_info's
        "right": right,
        "text_bytes": text_bytes[: len(choices)],
        "choice_bytes": [len(choice.encode()) for choice in choices],
        "choice_characters": [len(choice) for choice in choices],
    }


def lay_out(requests: Requests, context_tokens: int) -> tuple[np.ndarray, np.ndarray, int]:
    """tokens.npy, rows.npy (see `pretraining.tasks`), and the number of rows that lost their beginning.

    Raises:
        UserError: a continuation is empty, or longer than the context.
    """
    pairs = [(number, *pair) for number, windows in enumerate(requests.rows) for pair in windows]
    if not pairs:
        raise UserError(f"--task={requests.name}: has no text to score.")
    empty = sum(not context or not continuation for _, context, continuation in pairs)
    too_long = sum(len(continuation) > context_tokens for _, _, continuation in pairs)
    if empty or too_long:
        what = "are without a token" if empty else f"are longer than --context_tokens={context_tokens}"
        raise UserError(
            f"--task={requests.name}: {empty or too_long} of {console.counted(len(pairs), 'answer')} {what}; lm_eval "
            f"refuses them too. {'Change the task.' if empty else 'Train with a longer context, or change the task.'}"
        )
    # As HFLM._loglikelihood_tokens cuts them.
    kept = [(context + continuation)[-(context_tokens + 1) :] for _, context, continuation in pairs]
    longest = max(len(row) for row in kept) - 1
    width = min(context_tokens, -(-longest // ROW_MULTIPLE_TOKENS) * ROW_MULTIPLE_TOKENS) + 1
    tokens = np.zeros((len(pairs), width), np.uint32)
    for row, ids in zip(tokens, kept):
        row[: len(ids)] = ids
    rows = np.array([(number, len(ids), len(pair[1])) for (number, *pair), ids in zip(pairs, kept)], np.int32)
    num_cut = sum(len(ids) < len(context) + len(continuation) for ids, (_, context, continuation) in zip(kept, pairs))
    return tokens, rows, num_cut
