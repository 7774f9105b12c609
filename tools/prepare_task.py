"""Prepare a task of lm-evaluation-harness, so that a model can answer it while it trains.

    python -m tools.prepare_task --task=hellaswag --output_dir=tasks/hellaswag --dataset_path=data/fineweb \\
        --tokenizer_dir=checkpoints/meta-llama/Meta-Llama-3-8B --context_tokens=8192
    python distributed_pretrain.py ... --eval.tasks.hellaswag=tasks/hellaswag

lm_eval builds the requests: the same prompts as `lm_eval --model hf` gives the exported model, as the same tokens. They
become files of tokens, so that training needs neither network nor lm_eval. Any task that compares log-likelihoods
will do: multiple choice, a likeliest continuation, perplexity of documents; from the hub, or your own YAML and JSON
lines with --include_path.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from pretraining.tasks import EXAMPLES_NAME, ROWS_NAME, TOKENS_NAME
from utils import cli, console
from utils.errors import Problems
from utils.manifest import claim, file_entry, made_by, read_manifest, write_manifest
from utils.tokenizer import TokenizerInfo, read_tokenizer_info

SCRIPT = "tools/prepare_task.py"


@dataclasses.dataclass
class Settings:
    """Which task, for which data and model, and where it goes."""

    task: str
    """Name of a task of lm_eval (`lm_eval ls tasks` lists them), or of your own in include_path."""
    output_dir: str
    """Directory to make."""
    dataset_path: str
    """The training data, with train/ and val/: its manifest names the tokenizer, and the BOS before each document.
    For a mixture, one of its datasets."""
    tokenizer_dir: str
    """Tokenizer directory of the training data."""
    context_tokens: int
    """The model's context: longer prompts lose their beginning, as in lm_eval."""
    include_path: str | None = None
    """Directory with task YAMLs of your own (null: lm_eval's only)."""
    num_fewshot: int | None = None
    """Solved examples in each prompt (null: as the task says, else none)."""
    limit: int | None = None
    """The first so many examples (null: all)."""


def main(settings: Settings) -> None:
    tokenizer = check(settings)
    made_of = {
        "task": settings.task,
        "num_fewshot": settings.num_fewshot,
        "limit": settings.limit,
        "context_tokens": settings.context_tokens,
        "bos_id": tokenizer.bos_id if tokenizer.adds_bos else None,
        "include_path_sha256": hash_of_directory(settings.include_path) if settings.include_path else None,
    }
    output = Path(settings.output_dir)
    identity = {"settings": made_of, "tokenizer": tokenizer.record()}
    manifest = claim(output, "--output_dir", "task", identity)
    if manifest is not None:
        console.say(f"nothing to do: {output} is prepared.")
    else:
        manifest = prepare(settings, tokenizer, identity)
    content = manifest["content"]
    console.result(
        f"{output}: {content['task']}, {console.counted(content['examples'], 'example')}, "
        f"{console.counted(content['rows'], 'row')} of {content['row_tokens']} tokens; metrics: "
        f"{', '.join(content['metrics'])}"
    )
    name = "".join(c if c.isalnum() else "_" for c in content["task"])
    console.next_command(f"python distributed_pretrain.py ... --eval.tasks.{name}={output}", "to answer it in training")


def check(settings: Settings) -> TokenizerInfo:
    """The tokenizer as the export of a model that is trained on this dataset will have it.

    Raises:
        UserError: the tokenizer is not the dataset's, or a number is out of range.
    """
    from export.tokenizer_files import tokenizer_of_training

    problems = Problems()
    for name in ("context_tokens", "num_fewshot", "limit"):
        value, least = getattr(settings, name), 0 if name == "num_fewshot" else 1
        if value is not None and value < least:
            problems.add(f"--{name}={value}: must be at least {least}.")
    if settings.include_path is not None and not Path(settings.include_path).is_dir():
        problems.add(f"--include_path={settings.include_path}: no such directory. Give one with task YAMLs.")
    train = Path(settings.dataset_path) / "train"
    manifest = problems.collect(read_manifest, train, "dataset")
    if manifest is None:
        problems.add(
            f"--dataset_path={settings.dataset_path}: no manifest.json in train/, so its tokenizer is unknown. Give "
            "the output of merge_files.py."
        )
    tokenizer = problems.collect(read_tokenizer_info, settings.tokenizer_dir)
    made_with = (manifest or {}).get("tokenizer")
    if tokenizer is not None and made_with and made_with["sha256"] != tokenizer.sha256:
        problems.add(
            f"--tokenizer_dir={settings.tokenizer_dir}: not the tokenizer that made the dataset (sha256 "
            f"{tokenizer.sha256[:12]}... against {made_with['sha256'][:12]}...). Give that one."
        )
    problems.raise_if_any()
    return tokenizer_of_training(tokenizer, {"inputs": [{"manifest": manifest}]})


def hash_of_directory(directory: str) -> str:
    """SHA-256 of the names and contents of all files below it."""
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(directory).rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(directory)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def prepare(settings: Settings, tokenizer: TokenizerInfo, identity: dict[str, Any]) -> dict[str, Any]:
    """Build and write the task; returns its manifest."""
    from export.publishing import publishing
    from export.quiet_libraries import quiet_torchao
    from export.tokenizer_files import write_tokenizer

    console.say(f"lm_eval builds the requests of {settings.task}")
    quiet_torchao()
    from tools.task_requests import build_requests, lay_out  # lm_eval takes many seconds

    with tempfile.TemporaryDirectory() as directory:
        write_tokenizer(tokenizer, Path(directory), settings.context_tokens, pad_token=None, check=False)
        requests = build_requests(
            settings.task,
            Path(directory),
            settings.context_tokens,
            settings.include_path,
            settings.num_fewshot,
            settings.limit,
        )
    tokens, rows, num_cut = lay_out(requests, settings.context_tokens)
    if num_cut:
        console.warn(
            f"{num_cut:,} of {console.counted(len(rows), 'text')} are longer than --context_tokens="
            f"{settings.context_tokens} and lose their beginning, as in lm_eval"
        )
    with publishing(Path(settings.output_dir), "--output_dir") as temporary:
        np.save(temporary / TOKENS_NAME, tokens)
        np.save(temporary / ROWS_NAME, rows)
        with open(temporary / EXAMPLES_NAME, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(example) + "\n" for example in requests.examples)
        write_manifest(
            temporary,
            {
                "kind": "task",
                "made_by": made_by(SCRIPT, "lm_eval", "datasets", "tokenizers", "transformers"),
                **identity,
                "content": {
                    "task": requests.name,
                    "version": requests.version,
                    "output_type": requests.output_type,
                    "metrics": requests.metrics,
                    "examples": len(requests.examples),
                    "rows": len(rows),
                    "row_tokens": tokens.shape[1] - 1,
                    "rows_without_beginning": num_cut,
                },
                "files": [file_entry(temporary, name) for name in (TOKENS_NAME, ROWS_NAME, EXAMPLES_NAME)],
                "inputs": [],
            },
        )
    return read_manifest(settings.output_dir, "task")


if __name__ == "__main__":
    sys.argv[0] = "-m tools.prepare_task"  # as messages name the command
    cli.run(main, Settings, __doc__)
