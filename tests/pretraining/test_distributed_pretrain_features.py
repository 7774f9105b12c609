"""Every way to spread, save memory, or change the objective trains the same model, or the model that it promises."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from pretrain_ranks import digests_of, losses_of, metrics_of, run_ranks, settings_of, weights_of
from tiny_runs import TINY_MODEL, tokenize_dataset, write_config

SAME_RESULT = {
    "hybrid": {"parallel__sharding": "hybrid"},
    "hybrid_reduce_often": {
        "parallel__sharding": "hybrid",
        "parallel__shard_size": 1,
        "parallel__reduce_every_micro_batch": "true",
    },
    "replicate": {"parallel__sharding": "replicate"},
    "no_reshard": {"parallel__reshard_after_forward": "false"},
    "reduce_often": {"parallel__reduce_every_micro_batch": "true"},
    "recompute_full": {"parallel__activation_checkpointing": "full"},
    "recompute_selective": {"parallel__activation_checkpointing": "selective"},
    "loss_chunks": {"parallel__loss_chunk_tokens": 24},
    "saved_at_once": {"checkpoint__asynchronous": "false"},
}
OTHER_RESULT = {
    "bf16": {"precision": "bf16-mixed"},
    "bf16_true": {"precision": "bf16-true"},
    "bf16_sums": {"parallel__reduce_dtype": "bf16"},
    "muon": {"optimizer__name": "muon"},
    "tied": {"train__tie_embeddings": "true"},
    "z_loss": {"train__z_loss": 1e-2},
    "wsd": {"train__lr_schedule": "wsd", "train__lr_decay_fraction": 0.5},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_config(
        tmp_path_factory.mktemp("config") / "tiny.yaml", train={"max_steps": 6}, eval={"interval": None}
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory, documents, tokenizer_dir) -> Path:
    """Eight sequences or so, of other text: a batch of eight with weight 3 of 4 takes six of them."""
    return tokenize_dataset(tmp_path_factory.mktemp("small") / "merged", documents[40:43], tokenizer_dir)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, dataset, small, config) -> Path:
    """All variants on two processes, and some on one (directories ending in -1)."""
    directory = tmp_path_factory.mktemp("variants")
    plain = settings_of(config, dataset, directory / "plain", 2)
    measured = dataclasses.replace(plain, log=dataclasses.replace(plain.log, run="measure memory"))
    variants = {**SAME_RESULT, **OTHER_RESULT}
    mixed = dataclasses.replace(
        plain, dataset_path=None, data_mixture={str(dataset): 1.0, str(small): 3.0}, out_dir=str(directory / "mixed")
    )
    profiled = dataclasses.replace(plain, out_dir=str(directory / "profiled"), profile_steps=2)
    two = [mixed, profiled] + [
        settings_of(config, dataset, directory / name, 2, **changes) for name, changes in variants.items()
    ]
    run_ranks([measured, *two], 2, directory / "job-2")
    names = ("muon", "tied", "z_loss")
    one = [settings_of(config, dataset, directory / f"{name}-1", 1, **OTHER_RESULT[name]) for name in names]
    run_ranks(one, 1, directory / "job-1")
    return directory


@pytest.mark.parametrize("name", SAME_RESULT)
def test_the_way_to_compute_does_not_change_losses_and_batches(runs, name):
    assert digests_of(runs / name) == digests_of(runs / "plain")
    np.testing.assert_allclose(losses_of(runs / name), losses_of(runs / "plain"), rtol=0, atol=1e-5)
    norms = [[r["grad_norm"] for r in metrics_of(runs / which) if "grad_norm" in r] for which in (name, "plain")]
    np.testing.assert_allclose(*norms, rtol=1e-4)


@pytest.mark.parametrize("name", ["muon", "tied", "z_loss"])
def test_other_objectives_and_optimizers_do_not_depend_on_the_number_of_processes(runs, name):
    np.testing.assert_allclose(losses_of(runs / name), losses_of(runs / f"{name}-1"), rtol=0, atol=1e-5)
    assert losses_of(runs / name) != losses_of(runs / "plain")


def test_a_mixture_reads_its_datasets_by_weight(runs, dataset, small):
    from pretraining.data import Sequences, read_micro_batch

    sequences = Sequences([dataset / "train", small / "train"], [1.0, 3.0], 33, seed=42)
    assert digests_of(runs / "mixed") == [
        f"{read_micro_batch(sequences, np.arange(8 * step, 8 * step + 8), False).digest:016x}" for step in range(6)
    ]
    sources = sequences.order.locate(np.arange(48)).source
    assert np.bincount(sources).tolist() == [12, 36]


def test_the_profiler_writes_a_trace_of_the_steps_asked_for(runs):
    trace = json.loads((runs / "profiled" / "profile" / "trace.json").read_text())
    steps = {event["name"] for event in trace["traceEvents"] if event.get("name", "").startswith("ProfilerStep")}
    assert len(steps) == 2
    assert losses_of(runs / "profiled") == losses_of(runs / "plain")


@pytest.mark.slow
def test_copies_of_two_processes_each_have_the_same_losses_and_norms(tmp_path, dataset, config):
    """Gradients are summed over the pieces of a copy, and averaged over copies."""
    ways = {"plain": {}, "hybrid": {"parallel__sharding": "hybrid", "parallel__shard_size": 2}}
    runs = [settings_of(config, dataset, tmp_path / name, 4, **changes) for name, changes in ways.items()]
    run_ranks(runs, 4, tmp_path / "job")
    assert digests_of(tmp_path / "hybrid") == digests_of(tmp_path / "plain")
    np.testing.assert_allclose(losses_of(tmp_path / "hybrid"), losses_of(tmp_path / "plain"), rtol=0, atol=1e-5)
    norms = [[r["grad_norm"] for r in metrics_of(tmp_path / name) if "grad_norm" in r] for name in ways]
    np.testing.assert_allclose(*norms, rtol=1e-4)


@pytest.mark.slow
def test_compiled_blocks_have_the_same_losses(runs, config, dataset, tmp_path):
    settings = settings_of(config, dataset, tmp_path / "out", 2, parallel__compile="true")
    run_ranks([settings], 2, tmp_path / "job")
    np.testing.assert_allclose(losses_of(tmp_path / "out"), losses_of(runs / "plain"), rtol=0, atol=1e-5)


def test_copies_that_are_summed_once_per_step_train_as_copies_that_hold_all_of_the_sum(runs):
    """Two micro-batches, two copies of one process each: without an all-reduce after the first micro-batch."""
    np.testing.assert_allclose(
        losses_of(runs / "hybrid_reduce_often"), losses_of(runs / "replicate"), rtol=0, atol=1e-6
    )


def test_bfloat16_follows_float32(runs):
    for name in ("bf16", "bf16_true", "bf16_sums"):
        np.testing.assert_allclose(losses_of(runs / name), losses_of(runs / "plain"), atol=0.05)
        assert losses_of(runs / name) != losses_of(runs / "plain")


def test_weights_are_stored_in_the_precision_of_the_run(runs):
    import torch

    assert {w.dtype for w in weights_of(runs / "bf16" / "final")["model"].values()} == {torch.float32}
    assert {w.dtype for w in weights_of(runs / "bf16_true" / "final")["model"].values()} == {torch.bfloat16}


def test_tied_embeddings_are_one_tensor_in_every_checkpoint(runs):
    import torch

    weights = weights_of(runs / "tied" / "final")["model"]
    assert torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"])
    untied = weights_of(runs / "plain" / "final")["model"]
    assert not torch.equal(untied["lm_head.weight"], untied["transformer.wte.weight"])


def test_checkpoints_have_litgpts_own_names_however_they_were_made(runs):
    from litgpt.config import Config
    from litgpt.model import GPT

    model = GPT(Config(**TINY_MODEL))
    for name in ("plain", "recompute_full", "replicate", "muon"):
        model.load_state_dict(weights_of(runs / name / "final")["model"], strict=True)


def test_lightnings_own_loader_reads_the_checkpoint(runs, tmp_path):
    import subprocess
    import sys

    output = tmp_path / "whole.pth"
    subprocess.run(
        [sys.executable, "-m", "lightning.pytorch.utilities.consolidate_checkpoint",
         str(runs / "plain" / "final" / "lit_model.pth"), "--output_file", str(output)],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    assert output.stat().st_size > 0


def test_wsd_falls_at_the_end_only(runs):
    rates = [record["lr"] for record in metrics_of(runs / "wsd") if "lr" in record]
    assert rates[1:3] == [3e-3, 3e-3] and rates[5] == pytest.approx(1e-4) and rates[3] > rates[4] > rates[5]


def test_the_planned_memory_is_what_a_run_allocates(runs, config, dataset):
    from pretraining.memory import plan_memory
    from pretraining.plan import make_plan

    settings = settings_of(config, dataset, runs / "plain", 2)
    planned = plan_memory(settings, make_plan(settings), 2, 2)
    allocated = json.loads((runs / "plain" / "allocated-0.json").read_text())
    assert planned.parameters == allocated["parameters"]
    assert planned.gradients == allocated["gradients"]
    assert planned.optimizer == allocated["optimizer"]
    # Autograd keeps one of the two that the plan counts at the peak: logits, and their softmax.
    assert planned.activations + planned.logits / 2 == pytest.approx(allocated["activations"], rel=0.2)


@pytest.mark.slow
def test_a_step_that_is_not_finite_on_one_process_updates_none(tmp_path, config, dataset):
    """An embedding of infinity for a rare token makes exactly the batches that hold it overflow."""
    import torch
    from litgpt.config import Config
    from litgpt.model import GPT

    from pretraining.data import Sequences
    from pretraining.model import initialise

    batches = [Sequences([dataset / "train"], None, 33, 42).read(np.arange(8 * s, 8 * s + 8)) for s in range(6)]
    held_by = {int(t): [int(t) in b[:, :-1] for b in batches] for t in torch.cat(batches).unique()}
    token = next(t for t, held in held_by.items() if sum(held) == 2 and not held[0] and not (held[2] and held[3]))
    model = GPT(Config(**TINY_MODEL))
    initialise(model, model.config, seed=42)
    with torch.no_grad():
        model.transformer.wte.weight[token] = float("inf")
    (tmp_path / "start").mkdir()
    torch.save({"model": model.state_dict()}, tmp_path / "start" / "lit_model.pth")

    start = {"initial_checkpoint_dir": tmp_path / "start"}
    tolerant = settings_of(config, dataset, tmp_path / "tolerant", 2, train__max_nonfinite_steps=9, **start)
    run_ranks([tolerant], 2, tmp_path / "job-1")
    counts = [record["nonfinite_steps"] for record in metrics_of(tmp_path / "tolerant") if "loss" in record]
    assert counts == list(np.cumsum(held_by[token]))
    weights = weights_of(tmp_path / "tolerant" / "final")["model"]
    assert all(torch.isfinite(w).all() for name, w in weights.items() if "wte" not in name)

    strict = settings_of(
        config, dataset, tmp_path / "strict", 2, train__max_nonfinite_steps=1, train__save_interval=1, **start
    )
    codes = run_ranks([strict], 2, tmp_path / "job-2", check=False)
    assert all(codes)
    first_bad = held_by[token].index(True)
    log = (tmp_path / "job-2" / "rank-0.log").read_text()
    assert f"Last good checkpoint: {tmp_path}/strict/step-{first_bad:08d}" in log
    last = metrics_of(tmp_path / "strict")[-1]
    assert last["step"] == first_bad + 1 and last["nonfinite_steps"] == 1
