"""Make a small task for lm_eval out of the demo corpus: in which order do these words follow?

    python examples/make_demo_task.py --corpus_dir=demo/parquet --output_dir=demo/task

Each question is a few words of a document, four endings of the same words, and one of the four is the document's. An
untrained model is right once in four times; one that has learnt which words follow each other is right mostly. The
documents are those that optimize_dataset.py keeps for validation, so no answer was read in training.

Writes JSON lines and the YAML by which lm_eval finds them, with --include_path.
"""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from export.publishing import publishing
from utils import cli, console
from utils.errors import UserError
from utils.manifest import claim, file_entry, made_by, read_manifest, write_manifest

SCRIPT = "make_demo_task.py"
TASK = "demo_word_order"
TEXT_WORDS, ENDING_WORDS, NUM_ENDINGS, PASSAGE_WORDS = 16, 6, 4, 60
YAML = """\
# Which of four endings follows, all of the same words: lm_eval --include_path {directory} --tasks {task} ...
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {directory}/{task}.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: endings
doc_to_target: right
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


@dataclasses.dataclass
class Settings:
    """Which corpus, how many questions, and where they go."""

    corpus_dir: str
    """The parquet files of make_demo_corpus.py."""
    output_dir: str
    """Directory to make."""
    val_fraction: float = 0.02
    """As optimize_dataset.py was told: which documents are held out."""
    num_questions: int = 200
    """At most; one per passage of 60 words, and these drawn from all held-out documents."""


def held_out_texts(corpus_dir: str, val_fraction: float) -> Iterator[str]:
    """The documents that optimize_dataset.py keeps for validation."""
    import pyarrow.parquet as pq

    from tokenization.job import HASH_RANGE
    from tokenization.tokenize_unit import is_validation, text_hashes

    for path in sorted(Path(corpus_dir).glob("*.parquet")):
        texts = pq.read_table(path, columns=["text"]).column("text").combine_chunks()
        for number in is_validation(text_hashes(texts), round(val_fraction * HASH_RANGE)).nonzero()[0].tolist():
            yield texts[number].as_py()


def make_questions(text: str, draw: random.Random) -> Iterator[dict[str, Any]]:
    """A question from each passage of a text."""
    words = text.split()
    for first in range(0, len(words) - PASSAGE_WORDS + 1, PASSAGE_WORDS):
        if question := make_question(words[first : first + PASSAGE_WORDS], draw):
            yield question


def make_question(words: list[str], draw: random.Random) -> dict[str, Any] | None:
    """A question from somewhere in these words; None where a word of the ending stands there twice."""
    length = TEXT_WORDS + ENDING_WORDS
    start = draw.randrange(len(words) - length + 1)
    ending = words[start + TEXT_WORDS : start + length]
    if len(set(ending)) < ENDING_WORDS:
        return None
    endings = [ending]
    while len(endings) < NUM_ENDINGS:
        shuffled = draw.sample(ending, len(ending))
        if shuffled not in endings:
            endings.append(shuffled)
    draw.shuffle(endings)
    return {
        "text": " ".join(words[start : start + TEXT_WORDS]),
        "endings": [" ".join(words) for words in endings],
        "right": endings.index(ending),
    }


def main(settings: Settings) -> None:
    output, corpus = Path(settings.output_dir), read_manifest(settings.corpus_dir, "corpus")
    if corpus is None:
        raise UserError(f"--corpus_dir={settings.corpus_dir}: no demo corpus there. Run make_demo_corpus.py.")
    made_of = {
        "val_fraction": settings.val_fraction,
        "num_questions": settings.num_questions,
        "corpus": corpus["files"],
    }
    manifest = claim(output, "--output_dir", "questions", {"settings": made_of})
    if manifest is None:
        draw = random.Random(0)
        texts = held_out_texts(settings.corpus_dir, settings.val_fraction)
        questions = [question for text in texts for question in make_questions(text, draw)]
        found = draw.sample(questions, min(len(questions), settings.num_questions))
        if not found:
            raise UserError(
                f"--val_fraction={settings.val_fraction}: holds out no document of {PASSAGE_WORDS} words. Raise it."
            )
        with publishing(output, "--output_dir") as temporary:
            lines = "".join(json.dumps(question) + "\n" for question in found)
            (temporary / f"{TASK}.jsonl").write_text(lines, encoding="utf-8")
            (temporary / f"{TASK}.yaml").write_text(YAML.format(task=TASK, directory=output), encoding="utf-8")
            write_manifest(
                temporary,
                {
                    "kind": "questions",
                    "made_by": made_by(SCRIPT),
                    "settings": made_of,
                    "content": {"questions": len(found)},
                    "files": [file_entry(temporary, f"{TASK}.{suffix}") for suffix in ("jsonl", "yaml")],
                    "inputs": [],
                },
            )
        manifest = read_manifest(output)
    console.say(f"task {output}: {TASK}, {console.counted(manifest['content']['questions'], 'question')}")


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
