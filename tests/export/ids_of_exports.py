"""The ids that transformers gives a text with each of many tokenizers, as JSON on stdout.

python ids_of_exports.py TEXT DIRECTORY [DIRECTORY ..]

Run by test_clients.py in the environment of another version of transformers.
"""

from __future__ import annotations

import json
import sys

import transformers


def main(text: str, directories: list[str]) -> None:
    ids = [transformers.AutoTokenizer.from_pretrained(directory)(text)["input_ids"] for directory in directories]
    print(json.dumps({"version": transformers.__version__, "ids": ids}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
