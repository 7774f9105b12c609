"""The ids that transformers gives a text, without the flag that it advises for some tokenizers of Mistral and with it.

python ids_with_fix_mistral_regex.py TEXT DIRECTORY [DIRECTORY ..]

Run by test_clients.py in the environment of another version of transformers; prints JSON.
"""

from __future__ import annotations

import json
import logging
import sys

import transformers


class Collect(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def main(text: str, directories: list[str]) -> None:
    collected = Collect()
    logging.getLogger("transformers").addHandler(collected)
    answers = []
    for directory in directories:
        collected.messages.clear()
        ids = transformers.AutoTokenizer.from_pretrained(directory)(text)["input_ids"]
        advises = any("fix_mistral_regex" in message for message in collected.messages)
        try:
            fixed = transformers.AutoTokenizer.from_pretrained(directory, fix_mistral_regex=True)(text)["input_ids"]
        except TypeError as error:  # a defect of some versions
            fixed = f"TypeError: {error}"
        answers.append({"advises": advises, "ids": ids, "fixed": fixed})
    print(json.dumps({"version": transformers.__version__, "answers": answers}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
