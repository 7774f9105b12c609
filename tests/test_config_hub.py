"""Every file of config_hub is accepted by the script, plans to fit an 80 GB GPU, and says what it is."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT
from tiny_runs import write_dataset

CONFIGS = sorted((ROOT / "config_hub").glob("*.yaml"))
EXPECTED = {
    "demo-cpu", "pythia-160m", "smollm2-360m", "tinyllama-1.1b", "llama3.2-1b", "llama3.2-3b", "llama3-8b",
    "llama3.1-8b-long", "qwen3-1.7b", "qwen3-30b-a3b", "llama3-70b",
}  # fmt: skip
BIG_ENOUGH_DISK = "checkpoints need"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """Long enough for two sequences of 131,072 tokens in both splits, with EOS between documents."""
    root = tmp_path_factory.mktemp("dataset")
    for split in ("train", "val"):
        write_dataset(root / split, [np.zeros(270_000, np.int64)], 1, separators={"bos_id": None, "eos_id": 0})
    return root


def test_all_are_there():
    assert {path.stem for path in CONFIGS} == EXPECTED


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_says_what_on_what_and_how_to_launch_and_comments_every_key(path):
    text = path.read_text()
    header = text[: text.index("\n\n")]
    assert all(line.startswith("#") for line in header.splitlines())
    assert f"--config config_hub/{path.name}" in header
    assert re.search(r"million parameters|billion parameters", header)
    for line in text[len(header) :].splitlines():
        if line.strip() and not line.rstrip().endswith(":") and not line.startswith("#"):
            key = line.split(":")[0].strip()
            assert "#" in line or key in ("accelerator", "name"), line
    assert isinstance(yaml.safe_load(text), dict)


# Planning a compiled model's memory takes a quarter of a minute each.
QUICK = ("llama3-8b", "demo-cpu")


@pytest.mark.parametrize(
    "path",
    [path if path.stem in QUICK else pytest.param(path, marks=pytest.mark.slow) for path in CONFIGS],
    ids=lambda path: path.stem,
)
def test_dry_run_plans_it_on_80_gb(path, dataset, tmp_path, run_script):
    process = run_script(
        "distributed_pretrain.py",
        f"--config={path}",
        f"--dataset_path={dataset}",
        "--tokenizer_dir=null",
        "--eval.prompts=null",  # which need a tokenizer
        f"--out_dir={tmp_path / 'run'}",
        "--dry_run",
        check=False,
        timeout=200,
    )
    problems = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    # This machine's disk need not hold the checkpoints of a model of 70 billion parameters.
    assert all(BIG_ENOUGH_DISK in problem for problem in problems), process.stderr
    memory = re.search(r"memory per process\s+([\d.]+) (GB|MB)", process.stdout)
    gigabytes = float(memory[1]) / (1000 if memory[2] == "MB" else 1)
    assert gigabytes < 76
    stated = re.search(r"Expected memory per GPU: ([\d.]+) GB", path.read_text())
    if stated:
        assert gigabytes == pytest.approx(float(stated[1]), abs=0.11)
    else:
        assert path.stem == "demo-cpu"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_documents_are_masked_from_4096_tokens_on(path):
    train = yaml.safe_load(path.read_text())["train"]
    assert train.get("document_masking", False) == (train.get("max_seq_length", 0) >= 4096)


def test_unknown_key_is_refused_naming_file_and_key(tmp_path, run_script):
    path = ROOT / "config_hub" / "llama3-8b.yaml"
    mine = tmp_path / "mine.yaml"
    mine.write_text(path.read_text().replace("micro_batch_size", "mikro_batch_size"))
    process = run_script("distributed_pretrain.py", f"--config={mine}", "--dry_run", check=False)
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert "mine.yaml" in process.stderr and "mikro_batch_size" in process.stderr
