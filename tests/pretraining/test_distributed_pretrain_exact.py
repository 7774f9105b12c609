"""The same numbers whatever happens: against litgpt, on one process or two, after kills, on other processes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from pretrain_ranks import (
    digests_of,
    kill_when,
    losses_of,
    metrics_of,
    run_ranks,
    settings_of,
    start_ranks,
    weights_of,
)
from tiny_runs import TINY_MODEL, tokenize_dataset, write_config

from utils.metrics_file import read_metrics

# The training data has 89 sequences of 33 tokens: at 8 sequences a step, an epoch ends inside the twelfth step.
NUM_STEPS = 14
COMMON = {"train": {"max_steps": NUM_STEPS, "save_interval": 2, "lr_schedule": "constant"}, "eval": {"interval": 5}}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, documents, tokenizer_dir) -> Path:
    return tokenize_dataset(tmp_path_factory.mktemp("data") / "merged", documents[:6], tokenizer_dir)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_config(tmp_path_factory.mktemp("config") / "tiny.yaml", **COMMON)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, config, dataset) -> Path:
    """Directories `two` (14 steps on two processes) and `moving` (5 steps on two, 10 on one, 14 on two), and others."""
    directory = tmp_path_factory.mktemp("runs")

    def settings(name, num_ranks, **changes):
        return settings_of(config, dataset, directory / name, num_ranks, **changes)

    litgpt = {"train__max_steps": 50, "train__save_interval": 50, "train__lr_schedule": "cosine"}
    frozen = {"train__max_steps": 1, "optimizer__lr": 1e-30, "train__min_lr": 0, "optimizer__weight_decay": 0}
    job1 = [settings("two", 2), settings("moving", 2, train__max_steps=5), settings("frozen-2", 2, **frozen)]
    run_ranks(job1, 2, directory / "job1")
    job2 = [settings("one", 1), settings("moving", 1, train__max_steps=10), settings("litgpt", 1, **litgpt)]
    run_ranks([*job2, settings("frozen-1", 1, **frozen)], 1, directory / "job2")
    run_ranks([settings("moving", 2)], 2, directory / "job3")
    return directory


def test_losses_are_those_of_litgpts_own_training_step(runs, dataset, config):
    import torch
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    from pretraining.data import Sequences
    from pretraining.model import initialise
    from pretraining.optimizer import learning_rate

    torch.set_num_threads(1)
    model = GPT(Config(**TINY_MODEL))
    initialise(model, model.config, seed=42)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "wte" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "wte" in name]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=3e-3, betas=(0.9, 0.95)
    )
    sequences = Sequences([dataset / "train"], None, 33, seed=42)
    losses = []
    for step in range(50):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step, peak=3e-3, minimum=1e-4, total_steps=50, warmup_steps=2, schedule="cosine", decay_steps=0
            )
        loss_of_step = 0.0
        for micro_step in range(4):  # litgpt/pretrain.py, fit(): global batch 8 in micro-batches of 2
            data = sequences.read(np.arange(8 * step + 2 * micro_step, 8 * step + 2 * micro_step + 2))
            logits = model(data[:, 0:32].contiguous().long())
            loss = chunked_cross_entropy(logits, data[:, 1:33].contiguous().long())
            (loss / 4).backward()
            loss_of_step += loss.item() / 4
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss_of_step)

    np.testing.assert_allclose(losses_of(runs / "litgpt"), losses, rtol=0, atol=1e-5)
    assert losses[-1] < losses[0] - 1  # it did learn, so the comparison means something


def test_one_and_two_processes_read_the_same_batches_and_have_the_same_losses(runs):
    assert digests_of(runs / "one") == digests_of(runs / "two")
    np.testing.assert_allclose(losses_of(runs / "one"), losses_of(runs / "two"), rtol=0, atol=1e-5)
    validated = [[r["val_loss"] for r in metrics_of(runs / name) if "val_loss" in r] for name in ("one", "two")]
    assert len(validated[0]) == 4
    np.testing.assert_allclose(*validated, rtol=0, atol=1e-5)
    norms = [[r["grad_norm"] for r in metrics_of(runs / name) if "grad_norm" in r] for name in ("one", "two")]
    np.testing.assert_allclose(*norms, rtol=1e-4)


def test_an_epoch_holds_every_sequence_once_in_a_new_order(dataset):
    from pretraining.data import Sequences

    sequences = Sequences([dataset / "train"], None, 33, seed=42)
    count = sequences.num_blocks[0]
    epochs = [sequences.order.locate(np.arange(count) + e * count) for e in range(3)]
    for number, located in enumerate(epochs):
        assert sorted(located.block) == list(range(count))
        assert set(located.epoch) == {number}
    assert not (epochs[0].block == epochs[1].block).all()


def test_a_run_that_moves_from_two_processes_to_one_and_back_goes_on_alike(runs):
    assert digests_of(runs / "moving") == digests_of(runs / "two")
    np.testing.assert_allclose(losses_of(runs / "moving"), losses_of(runs / "two"), rtol=0, atol=1e-5)
    tokens = [record["tokens"] for record in metrics_of(runs / "moving")]
    assert tokens == [record["tokens"] for record in metrics_of(runs / "two")]


def test_a_run_that_is_told_to_stop_saves_where_it_is_and_goes_on_bit_identical(tmp_path, config, dataset, runs):
    import torch

    out_dir = tmp_path / "stopped"
    settings = settings_of(config, dataset, out_dir, 2, train__save_interval=5)
    out_dir.mkdir()
    (out_dir / "stop").touch()  # as the command does at SIGTERM
    run_ranks([settings], 2, tmp_path / "job-1")
    (saved,) = out_dir.glob("step-*")
    assert saved.name == f"step-{metrics_of(out_dir)[-1]['step']:08d}" and len(losses_of(out_dir)) < 5
    (out_dir / "stop").unlink()
    run_ranks([settings], 2, tmp_path / "job-2")
    assert losses_of(out_dir) == losses_of(runs / "two") and digests_of(out_dir) == digests_of(runs / "two")
    expected, found = (weights_of(run / "final")["model"] for run in (runs / "two", out_dir))
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


@pytest.mark.long
def test_kills_leave_losses_batches_and_weights_bit_identical(tmp_path, dataset):
    """Killed inside an accumulation window in which an epoch ends, and while a checkpoint is written."""
    import torch

    wide = {**TINY_MODEL, "n_embd": 256, "intermediate_size": 1024}  # a checkpoint of 30 MB takes a while to write
    config = write_config(
        tmp_path / "wide.yaml",
        model_config=wide,
        train={**COMMON["train"], "global_batch_size": 32, "micro_batch_size": 1, "max_steps": 8},
        eval={"interval": 4},
    )
    whole = settings_of(config, dataset, tmp_path / "whole", 2)
    run_ranks([whole], 2, tmp_path / "job-whole")

    epochs = {record["step"]: record["epoch"] for record in metrics_of(tmp_path / "whole") if "epoch" in record}
    assert epochs[6] > epochs[5], "the first kill shall hit a step in which an epoch ends"

    out_dir = tmp_path / "killed"
    settings = settings_of(config, dataset, out_dir, 2)

    def last_step() -> int:
        return max([0, *(record["step"] for record in read_metrics(out_dir))])

    # A step is 16 micro-batches on each process: right after the record of step 5 the window of step 6 has begun.
    kill_when(start_ranks([settings], 2, tmp_path / "job-1"), lambda: last_step() >= 5)
    kill_when(start_ranks([settings], 2, tmp_path / "job-2"), lambda: list(out_dir.glob(".tmp-step-0000000[68]-*")))
    assert list(out_dir.glob(".tmp-step-*")), "the kill came after the checkpoint was complete"
    run_ranks([settings], 2, tmp_path / "job-3")

    assert losses_of(out_dir) == losses_of(tmp_path / "whole")
    assert digests_of(out_dir) == digests_of(tmp_path / "whole")
    assert [r["step"] for r in metrics_of(out_dir)] == [r["step"] for r in metrics_of(tmp_path / "whole")]
    expected, found = weights_of(tmp_path / "whole" / "final"), weights_of(out_dir / "final")
    for name, tensor in expected["model"].items():
        assert torch.equal(tensor, found["model"][name]), name
    for name, state in expected["optimizer"]["state"].items():
        for key, tensor in state.items():
            assert torch.equal(tensor, found["optimizer"]["state"][name][key]), (name, key)
    assert not list(out_dir.glob(".tmp-*"))


def test_first_weights_do_not_depend_on_the_number_of_processes(runs):
    """Two runs whose learning rate is too small to move a weight."""
    import torch

    one, two = (weights_of(runs / name / "final")["model"] for name in ("frozen-1", "frozen-2"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name
    std = one["transformer.h.0.attn.qkv.weight"].std().item()
    assert math.isclose(std, math.sqrt(2 / 5 / 32), rel_tol=0.1)
