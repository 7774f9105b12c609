"""The search for the fastest settings: real trials on a real Ray cluster, whose processes meet over gloo."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from tiny_runs import TINY_MODEL, write_config

from pretraining.settings import Settings as TrainingSettings
from tools.fastest_report import published_for
from tools.find_fastest import SearchSettings
from tools.trials import Combination, Results, combinations, for_trial, worth_trying
from utils.cli import parse_settings

# The command, with processes that fail in some of its trials.
PROGRAM = """
import functools, os
import torch
import torch.distributed as dist
from tools.find_fastest import Settings, main
from utils import cli

def fail(settings):
    if dist.get_rank() == 1 and settings.train.micro_batch_size == 1:
        os._exit(7)
    if dist.get_rank() == 1 and settings.parallel.activation_checkpointing == "none":
        torch.empty(1 << 50)

cli.run(functools.partial(main, prepare=fail), Settings, "")
"""


def find(config: Path, out_dir: Path, address: str, *flags: str, program: str | None = None, code: int = 0):
    command = ["-m", "tools.find_fastest"] if program is None else ["-c", program]
    process = subprocess.run(
        [sys.executable, *command, f"--config={config}", f"--out_dir={out_dir}", f"--address={address}",
         "--search.sharding=[full]", "--search.compile=[false]", "--search.steps=2", *flags],
        capture_output=True, text=True, cwd=ROOT, timeout=280,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.returncode == code, process.stdout + process.stderr
    assert "Traceback" not in process.stderr, process.stderr
    return process.stdout, process.stderr


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_config(
        tmp_path_factory.mktemp("config") / "tiny.yaml", accelerator="cpu", train={"global_batch_size": 4}
    )


def rows_in(out_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (out_dir / "find_fastest.jsonl").read_text().splitlines()]


def what_ran(row: dict) -> tuple[int, str, str]:
    settings = row["settings"]
    return settings["train"]["micro_batch_size"], settings["parallel"]["activation_checkpointing"], row["outcome"]


@pytest.fixture(scope="module")
def searched(ray_address, config, tmp_path_factory) -> tuple[Path, str, list[dict]]:
    """(directory, what was said, rows) of a search in which one process dies and one runs out of memory."""
    out_dir = tmp_path_factory.mktemp("search")
    said, _ = find(config, out_dir, ray_address, program=PROGRAM)
    return out_dir, said, rows_in(out_dir)


@pytest.mark.long
def test_each_combination_is_a_row_whatever_becomes_of_it(searched):
    out_dir, said, rows = searched
    # More recomputation is tried where less turned out not to fit, and not where a process died.
    assert [what_ran(row) for row in rows] == [
        (1, "none", "died"), (2, "none", "out of memory"), (2, "selective", "ok"),
    ]  # fmt: skip
    assert "process 1: the process died" in rows[0]["error"]
    assert "process 1: RuntimeError" in rows[1]["error"] and "can't allocate memory" in rows[1]["error"]
    good = rows[2]
    assert good["tokens_per_s_per_device"] > 0 and good["mfu"] is None and good["device"] == "CPU"
    # Two sequences of 32 tokens per process and step.
    assert good["trial_sequences_per_step"] == 4
    assert good["step_s"] == pytest.approx(2 * 32 / good["tokens_per_s_per_device"])
    assert good["memory_peak_bytes"] > 0 and good["memory_planned_bytes"] > 0
    assert 0 <= good["communication_share"] < 1 and 0 <= good["data_share"] < 1
    assert "1 of 2: micro-batch 1, recompute none, full: node " in said and " left)\n" in said
    assert "no published figure is known for" in said
    assert os.listdir(out_dir) == ["find_fastest.jsonl"]


@pytest.mark.long
def test_the_best_is_yaml_that_training_takes(searched, tmp_path):
    _, said, rows = searched
    fragment = yaml.safe_load(said.partition(" per device, with\n\n")[2].partition("\n\nall figures")[0])
    assert fragment["train"] == {"micro_batch_size": 2}
    pasted = tmp_path / "best.yaml"
    pasted.write_text(yaml.safe_dump({"model_config": TINY_MODEL, **fragment}))
    settings = parse_settings(TrainingSettings, "", [f"--config={pasted}"])
    best = rows[2]["settings"]
    assert settings.parallel.activation_checkpointing == best["parallel"]["activation_checkpointing"] == "selective"
    assert settings.parallel.loss_chunk_tokens == best["parallel"]["loss_chunk_tokens"]


@pytest.mark.slow
def test_again_runs_only_what_may_go_well_another_time(searched, config, ray_address):
    out_dir, _, before = searched
    said, _ = find(config, out_dir, ray_address)
    assert "2 to try, 1 of them in find_fastest.jsonl already" in said
    rows = rows_in(out_dir)
    assert rows[:3] == before and [what_ran(row) for row in rows[3:]] == [(1, "none", "ok")]


@pytest.mark.slow
def test_dry_run_lists_what_would_be_tried(config, ray_address, tmp_path):
    said, _ = find(config, tmp_path, ray_address, "--dry_run", "--search.micro_batch_size=[1,2]")
    assert "2 to try" in said and said.count("not run") == 2
    assert os.listdir(tmp_path) == []


def test_mistakes_are_all_named_before_anything_starts(config, tmp_path):
    process = subprocess.run(
        [sys.executable, "-m", "tools.find_fastest", f"--config={config}", f"--out_dir={tmp_path}",
         "--search.micro_batch_size=[0]", "--search.compile=[]", "--search.steps=0"],
        capture_output=True, text=True, cwd=ROOT, timeout=60,
    )  # fmt: skip
    assert process.returncode == 2 and process.stderr.count("error: ") == 3
    for flag in ("--search.micro_batch_size=[0]", "--search.compile=[]", "--search.steps=0"):
        assert flag in process.stderr
    process = subprocess.run(
        [sys.executable, "-m", "tools.find_fastest", f"--config={config}", f"--out_dir={tmp_path}",
         "--train.max_seq_length=64", "--address=192.0.2.1:1"],
        capture_output=True, text=True, cwd=ROOT, timeout=60,
    )  # fmt: skip
    assert process.returncode == 2 and "--train.max_seq_length=64: the model's block_size is 32" in process.stderr
    assert os.listdir(tmp_path) == []


# --- what is tried, without a cluster ---------------------------------------------------------------------------------


def settings_of(**flags) -> TrainingSettings:
    words = [f"--{name.replace('__', '.')}={value}" for name, value in flags.items()]
    return parse_settings(TrainingSettings, "", words)


def test_every_size_sharding_and_recomputation_of_four_nodes_is_a_combination():
    settings = settings_of(num_nodes=4, num_devices=8, accelerator="cuda", train__global_batch_size=256)
    found = combinations(settings, SearchSettings(), 8192)
    assert {one.micro_batch_size for one in found} == {1, 2, 4, 8}  # 65,536 tokens are eight sequences
    assert {one.sharding for one in found} == {"full", "hybrid", "replicate"}
    assert {one.compile for one in found} == {True}
    # With eight sequences per process one micro-batch of eight accumulates nothing.
    assert {one.reduce_every_micro_batch for one in found if one.micro_batch_size == 8} == {False}
    assert {one.reduce_every_micro_batch for one in found if one.sharding == "replicate"} == {False}
    # Three sizes: full and hybrid with both kinds of reduction, replicate with one; the fourth: one each.
    assert len(found) == len(set(found)) == 3 * (3 * (2 + 2 + 1) + (1 + 1 + 1))


def test_more_recomputation_is_tried_only_where_less_does_not_fit():
    settings = settings_of(num_devices=2, accelerator="cuda", train__global_batch_size=16)
    found = combinations(settings, SearchSettings(micro_batch_size=[1, 2], sharding=["full"]), 8192)

    def tried(fits, search) -> set:
        chosen = worth_trying(found, fits, search)
        return {(one.micro_batch_size, one.activation_checkpointing, one.reduce_every_micro_batch) for one in chosen}

    assert tried(lambda one: True, SearchSettings()) == {(1, "none", False), (2, "none", False)}
    # Without recomputation there is room only if no unsharded gradients are kept: which is faster nobody knows.
    fits = lambda one: one.activation_checkpointing != "none" or one.reduce_every_micro_batch  # noqa: E731
    assert tried(fits, SearchSettings()) == {
        (size, *rest) for size in (1, 2) for rest in (("none", True), ("selective", False))
    }
    assert len(tried(lambda one: True, SearchSettings(activation_checkpointing=["none", "full"]))) == 6


def test_a_trial_accumulates_where_the_run_does():
    def sequences(size: int, global_batch: int) -> int:
        settings = settings_of(num_devices=2, train__global_batch_size=global_batch, train__micro_batch_size=size)
        return for_trial(settings, Path("data")).train.global_batch_size

    assert sequences(1, 256) == 16
    assert sequences(8, 256) == 32  # two micro-batches, so that unsharded gradients are kept as in the run
    assert sequences(8, 16) == 16
    assert sequences(1, 2) == 2


def test_a_trial_answers_no_tasks_and_writes_nothing():
    """Its tokens are made up, so there is no tokenizer for them."""
    settings = settings_of(num_devices=2, train__global_batch_size=16, tokenizer_dir="t", eval__prompts='["One"]')
    evaluation = for_trial(
        dataclasses.replace(settings, eval=dataclasses.replace(settings.eval, tasks={"a": "b"})), Path("data")
    ).eval
    assert settings.eval.prompts == ["One"] and (evaluation.prompts, evaluation.tasks) == (None, None)


def test_a_half_written_line_is_no_result(tmp_path):
    path = tmp_path / "find_fastest.jsonl"
    Results(path).add({"settings": {"a": 1}, "device": "X", "figure": 1})
    with open(path, "a") as file:
        file.write('{"settings": {"a": 2}, "dev')
    results = Results(path)
    assert results.find({"settings": {"a": 1}, "device": "X"})["figure"] == 1
    assert results.find({"settings": {"a": 2}}) is None
    results.add({"settings": {"a": 2}, "figure": 2})
    assert [row["figure"] for row in Results(path).rows] == [1, 2]
    assert Results(path).find({"settings": {"a": 1}, "device": "Y"}) is None


def test_published_figures_are_those_of_the_models_size():
    assert {one.source.split(",")[0] for one in published_for(8_030_261_248)} == {
        "NVIDIA/dgxc-benchmarking", "Megatron-Bridge", "torchtitan", "torchao",
    }  # fmt: skip
    assert [one.source for one in published_for(6_738_415_616)] == ["fms-fsdp", "lingua"]
    assert [one.model for one in published_for(1_235_814_400)] == ["about 1B bf16, 2k"]
    assert published_for(7_000_000) == published_for(70_000_000_000) == []


def test_a_combination_as_yaml_is_what_it_sets():
    one = Combination(2, "selective", "hybrid", True, 512, True)
    settings = one.apply(settings_of(parallel__sharding="hybrid", parallel__shard_size=4))
    fragment = yaml.safe_load(one.as_yaml())
    assert fragment["train"] == {"micro_batch_size": settings.train.micro_batch_size}
    assert all(getattr(settings.parallel, name) == value for name, value in fragment["parallel"].items())
    assert settings.parallel.shard_size == 4
    full = Combination(2, "none", "full", False, 512, False)
    assert full.apply(settings).parallel.shard_size is None  # which full sharding would refuse
