"""What is known of tasks and samples before a run starts: whether they fit the data and the model. No torch."""

from __future__ import annotations

import re
from typing import Any

from tokenizers import Tokenizer

from pretraining.settings import Settings
from pretraining.tasks import TaskSummary, summarise
from utils.console import counted, human_count
from utils.errors import Problems, UserError
from utils.manifest import damaged_files
from utils.tokenizer import read_tokenizer_info


def check_evaluations(
    settings: Settings, context_tokens: int | None, manifests: list[dict[str, Any] | None], problems: Problems
) -> None:
    """Add a problem for each task that was prepared for another tokenizer or a longer context, and for prompts.

    Args:
        context_tokens: of the run; None: unknown, for another problem.
        manifests: of the training datasets, None where one has none.
    """
    for name, directory in (settings.eval.tasks or {}).items():
        if not re.fullmatch(r"[\w-]+", name):
            problems.add(f"--eval.tasks={{{name}: {directory}}}: call it by letters, digits, - and _.")
        if task := problems.collect(summarise, name, directory):
            problems.collect(_check_task, task, context_tokens, manifests)
    if settings.eval.prompts:
        problems.collect(_check_prompts, settings, context_tokens, manifests)


def _check_task(task: TaskSummary, context_tokens: int | None, manifests: list[dict[str, Any] | None]) -> None:
    flag = f"--eval.tasks={{{task.name}: {task.directory}}}"
    damage = damaged_files(task.directory, task.manifest["files"], checksums=False)
    found = [f"{flag}: {line}. Prepare the task again." for line in damage]
    if context_tokens is not None and task.row_tokens > context_tokens:
        found.append(
            f"{flag}: has texts of {task.row_tokens} tokens, the run's context is {context_tokens}. Prepare it with "
            f"--context_tokens={context_tokens}."
        )
    tokenizers = [manifest["tokenizer"] for manifest in manifests if manifest and manifest.get("tokenizer")]
    if tokenizers and tokenizers[0]["sha256"] != task.manifest["tokenizer"]["sha256"]:
        found.append(
            f"{flag}: was prepared with another tokenizer than the dataset's (sha256 "
            f"{task.manifest['tokenizer']['sha256'][:12]}... against {tokenizers[0]['sha256'][:12]}...). Prepare it "
            "with that one."
        )
    bos_ids = bos_of_training(manifests)
    if bos_ids and bos_ids[0] != task.manifest["settings"]["bos_id"]:
        found.append(
            f"{flag}: was prepared with {task.manifest['settings']['bos_id']} as BOS before each text, the dataset has "
            f"{bos_ids[0]} before each document. Prepare it for this dataset."
        )
    if found:
        raise UserError(found)


def _check_prompts(settings: Settings, context_tokens: int | None, manifests: list[dict[str, Any] | None]) -> None:
    if settings.tokenizer_dir is None:
        raise UserError("--eval.prompts: writing needs the tokenizer. Give --tokenizer_dir.")
    longest = max(map(len, prompts_as_tokens(settings, manifests)))
    if context_tokens is not None and longest + settings.eval.sample_tokens > context_tokens:
        raise UserError(
            f"--eval.prompts: the longest has {longest} tokens; with --eval.sample_tokens="
            f"{settings.eval.sample_tokens} after it that is more than the context of {context_tokens}. Shorten one of "
            "them."
        )


def prompts_as_tokens(settings: Settings, manifests: list[dict[str, Any] | None]) -> list[list[int]]:
    """The prompts as the tokenizer of the export will encode them.

    Args:
        manifests: of the training datasets, None where one has none.

    Raises:
        UserError: a prompt has no token, so that there is nothing to go on from.
    """
    info = read_tokenizer_info(settings.tokenizer_dir)
    (bos_id,) = bos_of_training(manifests) or [info.bos_id if info.adds_bos else None]
    before = [] if bos_id is None else [bos_id]
    tokenizer = Tokenizer.from_file(str(info.directory / "tokenizer.json"))
    prompts = [before + tokenizer.encode(text, add_special_tokens=False).ids for text in settings.eval.prompts]
    if [] in prompts:
        raise UserError("--eval.prompts: one is empty, and the model was trained without BOS. Give it a word.")
    return prompts


def task_columns(settings: Settings) -> list[str]:
    """The names that tasks have in metrics.jsonl."""
    return [column for task in _summaries(settings) for column in task.columns()]


def evaluation_lines(settings: Settings) -> dict[str, str]:
    """For the dry run: what each validation computes besides the loss."""
    lines = {}
    for task in _summaries(settings):
        content = task.manifest["content"]
        tokens = human_count(content["rows"] * task.row_tokens)
        lines[f"task {task.name}"] = (
            f"{content['task']}, {counted(content['examples'], 'example')}: {counted(content['rows'], 'text')} of "
            f"{task.row_tokens} tokens, {tokens} per validation"
        )
    if settings.eval.prompts:
        lines["samples"] = (
            f"{counted(len(settings.eval.prompts), 'prompt')}, {settings.eval.sample_tokens} tokens after each"
        )
    return lines


def _summaries(settings: Settings) -> list[TaskSummary]:
    return [summarise(name, directory) for name, directory in (settings.eval.tasks or {}).items()]


def bos_of_training(manifests: list[dict[str, Any] | None]) -> list[int | None]:
    """In a list, the BOS that stands before the documents of these datasets, None where there is none; [] if their
    manifests do not say. What the tokenizer of the export puts before a text (export/tokenizer_files.py)."""
    recorded = [manifest["settings"] for manifest in manifests if manifest]
    put = [settings["bos_id"] for settings in recorded if "bos_id" in settings]
    return [next((number for number in put if number is not None), None)] if put else []
