"""The command that verifies and shows a dataset."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import ROOT
from token_folders import make_folder, make_split_manifest


@pytest.fixture
def dataset(tmp_path):
    source = tmp_path / "train"
    make_folder(source / "0", {"chunk-0000000-0.bin": [300, 40, 7], "chunk-0000001-0.bin": [5, 1000]})
    make_split_manifest(source)
    subprocess.run(
        [sys.executable, ROOT / "merge_files.py", f"--source_dir={source}", f"--target_dir={tmp_path / 'DATA'}", "-q"],
        check=True,
    )
    return tmp_path / "DATA"


def inspect(*arguments, code: int = 0) -> str:
    process = subprocess.run(
        [sys.executable, "-m", "tools.inspect_dataset", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert process.returncode == code, process.stdout + process.stderr
    assert "Traceback" not in process.stderr
    return process.stdout + process.stderr


def test_shows_counts_samples_and_a_picture(dataset, tmp_path):
    said = inspect(dataset, f"--picture={tmp_path / 'lengths.png'}")
    assert "5 documents, 1,352 tokens of uint16" in said and "every checksum" in said
    assert said.count("--- document") == 3 and "most 1,000" in said
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("damage", ["token", "header", "count", "manifest"])
def test_every_damage_is_found(dataset, damage):
    chunk = dataset / "chunk-0000001-0.bin"
    if damage in ("token", "header"):
        raw = bytearray(chunk.read_bytes())
        raw[-5 if damage == "token" else 8] ^= 2
        chunk.unlink()  # it is a hard link: leave the source as it is
        chunk.write_bytes(raw)
    else:
        path = dataset / ("index.json" if damage == "count" else "manifest.json")
        content = json.loads(path.read_text())
        if damage == "count":
            content["chunks"][1]["chunk_size"] = 1
        else:
            content["content"]["tokens"] += 1
        path.write_text(json.dumps(content))
    said = inspect(dataset, code=2)
    assert "chunk-0000001-0.bin" in said or "tokens is 1352" in said


def test_other_tokenizer_is_refused(dataset, tokenizer_dir):
    assert "is not the tokenizer that made the dataset" in inspect(dataset, f"--tokenizer_dir={tokenizer_dir}", code=2)
