"""Suggested settings: the laws' own figures, shapes of the size asked for, and a YAML that training accepts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, run_a_script

from tokenization.chunk_index import make_index
from tokenization.chunk_writer import chunk_header
from tools.scaling_laws import choose_shape, deepseek, step_law
from tools.suggest import Settings, suggest
from utils.chunks import Chunk
from utils.errors import UserError


def command(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tools.suggest", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=60
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("dataset")
    for split in ("train", "val"):
        (root / split).mkdir()
        raw = chunk_header(np.array([9000]), "uint16").tobytes() + bytes(18_000)
        (root / split / "chunk-0.bin").write_bytes(raw)
        index = make_index([Chunk("chunk-0.bin", 1, 9000, len(raw))], "uint16", None, "0" * 12)
        (root / split / "index.json").write_text(json.dumps(index))
    return root


def test_the_laws_give_what_their_papers_say():
    """Figures of the papers: DeepSeek LLM's formulas at 1e20 FLOPs, and the step law at 1 billion and 100 billion."""
    assert deepseek(1e9, 1e10, 1e20).learning_rate == pytest.approx(0.3118 * 10**-2.5)
    assert deepseek(1e9, 1e10, 1e20).batch_tokens == pytest.approx(0.2920 * 10**6.542)
    assert step_law(1e9, 1e11, 1e20).learning_rate == pytest.approx(1.79 * 10 ** (-9 * 0.713 + 11 * 0.307))
    assert step_law(1e9, 1e11, 1e20).batch_tokens == pytest.approx(0.58 * 10 ** (11 * 0.571))


def test_a_law_says_where_it_was_not_fitted():
    assert not step_law(1e9, 2e10, 1e20).outside
    assert not step_law(214_663_680, 4e9, 1e20).outside  # the smallest of the runs that its authors published
    assert step_law(1.5e8, 2e10, 1e20).outside == ["0.15 billion parameters without embeddings, fitted on 0.21 to 1.07"]
    assert len(step_law(7e9, 2e12, 1e23).outside) == 2
    assert not deepseek(1e8, 2e9, 1e18).outside and deepseek(1e9, 2e10, 1e20).outside


@pytest.mark.parametrize("parameters", [5e6, 3e7, 1.6e8, 1.3e9, 8e9, 7e10])
def test_a_shape_has_the_parameters_that_litgpts_model_has(parameters):
    import torch
    from litgpt import GPT, Config

    shape = choose_shape(parameters, 8192)
    assert shape.parameters == pytest.approx(parameters, rel=0.08)
    assert 30 < shape.n_embd / shape.n_layer < 260 and shape.n_head % shape.n_query_groups == 0
    config = yaml.safe_load(suggest(Settings(parameters, vocab_size=8192)))["model_config"]
    with torch.device("meta"):
        model = GPT(Config(**config))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count - (model.lm_head.weight.numel() if shape.tied else 0) == shape.parameters


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--parameters=1.3e9", "--tokens=26e9"], marks=pytest.mark.slow),
        pytest.param(["--parameters=8e9"], marks=pytest.mark.slow),
        ["--parameters=5e6", "--vocab_size=8192", "--accelerator=cpu", "--num_devices=2", "--context_tokens=256"],
    ],
    ids=lambda flags: flags[0],
)
def test_training_accepts_the_yaml(flags, dataset, tmp_path):
    process = command(*flags)
    assert process.returncode == 0, process.stderr
    config = tmp_path / "suggested.yaml"
    config.write_text(process.stdout)
    plan = run_a_script(
        "distributed_pretrain.py",
        f"--config={config}", f"--dataset_path={dataset}", f"--out_dir={tmp_path / 'run'}", "--dry_run",
        check=False,
    )  # fmt: skip
    values = yaml.safe_load(process.stdout)
    assert isinstance(values["optimizer"]["lr"], float) and isinstance(values["train"]["min_lr"], float)
    assert f"{values['model_config']['name']}, " in plan.stdout, plan.stderr
    problems = [line for line in plan.stderr.splitlines() if line.startswith("error:")]
    assert all("checkpoints need" in line for line in problems), plan.stderr  # this machine's disk may be small
    assert problems or "no problems found" in plan.stdout


def test_the_yaml_names_sources_and_warns_of_extrapolation():
    inside = command("--parameters=1.1e9", "--tokens=26e9", "--vocab_size=32000")
    assert "warning" not in inside.stderr and "arXiv:2503.04715" in inside.stdout
    for source in ("arXiv:2203.15556", "arXiv:2001.08361", "arXiv:2401.02954"):
        assert source in inside.stdout
    outside = command("--parameters=8e9")
    assert "an extrapolation" in outside.stderr and "Outside of it" in outside.stdout


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"parameters": 1e6, "vocab_size": 128256}, "no model of 1,000,000 parameters"),
        ({"parameters": 1e13}, "has a sound shape"),
    ],
)
def test_a_size_without_a_sound_shape_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        suggest(Settings(**settings))


def test_wrong_numbers_are_all_named():
    process = command("--parameters=-1", "--tokens=5")
    assert process.returncode == 2
    assert "--parameters=-1" in process.stderr and "--tokens=5" in process.stderr
