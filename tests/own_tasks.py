"""Tasks of lm_eval's three kinds that need no network, as a user writes them: a YAML and JSON lines each."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

TASKS = ("ending", "last_word", "document")


def write_tasks(directory: Path, documents: list[str]) -> Path:
    """directory with a task of each kind, made of these texts.

    ending: which of four texts follows, of unlike lengths and with letters of two bytes; last_word: the end of a
    sentence; document: perplexity of a whole document.
    """
    directory.mkdir(parents=True)
    sentences = [" ".join(document.split()) for document in documents]
    choices = [[text[100 + 7 * i : 115 + 17 * i] + "é" * (6 - 2 * i) for i in range(4)] for text in sentences]
    right = [0, 1, 1, 2, 2, 2, 3, 3, 3, 3]  # not as often each: who always takes the shortest is right otherwise often
    rows = {
        "ending": [
            {"text": text[:100], "choices": four, "right": right[i % 10]}
            for i, (text, four) in enumerate(zip(sentences, choices))
        ],
        # What a model of a few steps says after anything, sometimes: the end is a single frequent token.
        "last_word": [{"text": text[:60].rsplit(" ", 1)[0], "end": "\n" if i % 2 else " the"} for i, text in
                      enumerate(sentences)],
        "document": [{"document": text[: 100 + 10 * i]} for i, text in enumerate(sentences)],
    }  # fmt: skip
    settings = {
        "ending": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}}",
            "doc_to_choice": "choices",
            "doc_to_target": "right",
            "metric_list": [{"metric": name} for name in ("acc", "acc_norm", "acc_bytes")],
        },
        "last_word": {"output_type": "loglikelihood", "doc_to_text": "{{text}}", "doc_to_target": "{{end}}"},
        "document": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{document}}"},
    }
    for name in TASKS:
        lines = "".join(json.dumps(row) + "\n" for row in rows[name])
        (directory / f"{name}.jsonl").write_text(lines)
        write_task(directory, name, **settings[name])
    return directory


def write_task(directory: Path, name: str, **settings) -> None:
    """The YAML of a task over directory/NAME.jsonl."""
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(directory / f"{name}.jsonl")}},
        "test_split": "test",
        "metadata": {"version": 1.0},
        **settings,
    }
    (directory / f"{name}.yaml").write_text(yaml.safe_dump(task))


def prepare(name: str, tasks: Path, output: Path, dataset: Path, tokenizer_dir: Path, **settings) -> Path:
    """What `python -m tools.prepare_task` makes of a task, for the context of the tiny runs."""
    from tools import prepare_task

    settings = {"context_tokens": 32, "include_path": str(tasks), **settings}
    prepare_task.main(prepare_task.Settings(name, str(output), str(dataset), str(tokenizer_dir), **settings))
    return output
