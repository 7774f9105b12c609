"""Training that masks documents from one another: each has the loss that it has alone, however the run computes."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from litgpt.config import Config
from litgpt.model import GPT
from pretrain_ranks import digests_of, losses_of, metrics_of, run_ranks, settings_of
from tiny_runs import TINY_MODEL, write_config, write_dataset

from pretraining.data import Sequences, prefetch, read_micro_batch
from pretraining.documents import Separator
from pretraining.memory import plan_memory, tensors_saved_for_backward
from pretraining.model import build_model, initialise
from pretraining.plan import make_plan
from pretraining.run_identity import check_same_run, result_settings
from utils.errors import UserError

MASKED = {"train__document_masking": "true"}
SAME_RESULT = {
    "one": {},
    "selective": {"parallel__activation_checkpointing": "selective"},
    "full": {"parallel__activation_checkpointing": "full"},
    "compiled": {"parallel__compile": "true", "parallel__activation_checkpointing": "selective"},
    "resumed": {},
}


@pytest.fixture(scope="module")
def dataset(short_documents) -> Path:
    return short_documents


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    train = {"max_steps": 4, "save_interval": 2, "lr_schedule": "constant"}
    return write_config(tmp_path_factory.mktemp("config") / "tiny.yaml", train=train, eval={"interval": 2})


@pytest.fixture(scope="module")
def runs(tmp_path_factory, dataset, config) -> Path:
    directory = tmp_path_factory.mktemp("runs")

    def settings(name, num_ranks=2, **changes):
        return settings_of(config, dataset, directory / name, num_ranks, **{**MASKED, **changes})

    begun = settings("resumed", train__max_steps=2)
    unmasked = settings_of(config, dataset, directory / "unmasked", 2)
    two = [settings(name, **changes) for name, changes in SAME_RESULT.items() if name != "one"]
    run_ranks([unmasked, settings("plain"), begun, *two], 2, directory / "job-2")
    run_ranks([settings("one", 1)], 1, directory / "job-1")
    return directory


@pytest.mark.parametrize("name", SAME_RESULT)
def test_the_way_to_compute_does_not_change_losses(runs, name):
    assert digests_of(runs / name) == digests_of(runs / "plain")
    exact = {"rtol": 0, "atol": 0 if name == "resumed" else 1e-5}
    np.testing.assert_allclose(losses_of(runs / name), losses_of(runs / "plain"), **exact)
    validated = [[r["val_loss"] for r in metrics_of(runs / which) if "val_loss" in r] for which in (name, "plain")]
    np.testing.assert_allclose(*validated, **exact)


def loss_of_documents_alone(rows: torch.Tensor) -> float:
    """By litgpt's own model, with the first weights of the runs: each document of a row by itself."""
    model = GPT(Config(**TINY_MODEL))
    initialise(model, model.config, seed=42)
    total = 0.0
    for row in rows:
        begins = {0, *torch.nonzero(row[:-1] == 0).flatten().tolist()}
        bounds = [*sorted(begins), len(row) - 1]
        for begin, end in itertools.pairwise(bounds):
            logits = model(row[None, begin:end])[0]
            total += F.cross_entropy(logits, row[begin + 1 : end + 1], reduction="sum").item()
    return total / rows[:, 1:].numel()


def test_a_run_trains_and_validates_on_each_document_alone(runs, dataset):
    first, validation = metrics_of(runs / "plain")[1], metrics_of(runs / "plain")[0]
    rows = Sequences([dataset / "train"], None, 33, seed=42).read(np.arange(8))
    assert (rows[:, 1:-1] == 0).sum() > 4  # documents that begin inside a sequence
    assert first["loss"] == pytest.approx(loss_of_documents_alone(rows), abs=1e-5)
    held_out = Sequences([dataset / "val"], None, 33, seed=0)
    rows = held_out.read(np.arange(min(16, held_out.num_blocks[0])))
    assert validation["val_loss"] == pytest.approx(loss_of_documents_alone(rows), abs=1e-5)

    unmasked = metrics_of(runs / "unmasked")
    assert unmasked[1]["batch_digest"] == first["batch_digest"]
    assert abs(unmasked[1]["loss"] - first["loss"]) > 1e-4
    assert abs(unmasked[0]["val_loss"] - validation["val_loss"]) > 1e-4


def test_micro_batches_carry_the_offsets_of_their_own_datasets(tmp_path):
    """A mixture of documents between BOS (0) and documents between EOS (0 too, and it ends them)."""
    documents = [np.array([0, 5, 6, 7]), np.array([0, 5, 6])] * 40
    write_dataset(tmp_path / "bos", documents, 1, separators={"bos_id": 0, "eos_id": None})
    write_dataset(tmp_path / "eos", [d[::-1] for d in documents], 1, separators={"bos_id": None, "eos_id": 0})
    separators = [Separator(0, begins=True), Separator(0, begins=False)]
    sequences = Sequences([tmp_path / "bos", tmp_path / "eos"], [1, 1], 33, 1, separators=separators)
    batches = list(prefetch(sequences, iter([np.arange(s, s + 2) for s in range(0, 8, 2)]), pin_memory=False))
    assert {batch.offsets.dtype for batch in batches} == {torch.int32}
    assert len({batch.offsets.shape for batch in batches}) == 1
    for batch in batches:
        inputs, targets, offsets = batch.to(torch.device("cpu"))
        assert (inputs.shape, targets.shape) == ((2, 32), (2, 32))
        flat, starts = inputs.flatten(), offsets[offsets < 64]
        assert {0, 32} <= set(starts.tolist()) and len(starts) > 10
        for start in set(starts.tolist()) - {0, 32}:
            assert flat[start] == 0 if start < 32 else flat[start - 1] == 0  # sources take turns: BOS, EOS
    without = Sequences([tmp_path / "bos", tmp_path / "eos"], [1, 1], 33, 1)
    assert read_micro_batch(without, np.arange(2), False).offsets is None


def test_a_dataset_without_a_separator_is_refused_and_so_is_latent_attention(tmp_path, dataset, config):
    for split in ("train", "val"):
        write_dataset(tmp_path / "bare" / split, [np.arange(1, 500)], 1)
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    settings = settings_of(config, dataset, tmp_path / "out", 2, **MASKED)
    settings.dataset_path, settings.data_mixture = None, {str(dataset): 1.0, str(tmp_path / "bare"): 1.0}
    settings.model_config = {**TINY_MODEL, "n_query_groups": 4, "latent_attention": latent}
    with pytest.raises(UserError) as raised:
        make_plan(settings)
    latent, bare = raised.value.problems
    assert latent.startswith("--train.document_masking=true: not possible for tiny-llama, whose latent attention")
    assert bare.startswith(f"--train.document_masking=true: {tmp_path}/bare/train: its manifest names neither")
    settings.train.document_masking = False
    assert make_plan(settings).separators is None


def test_a_run_that_goes_on_with_another_mask_is_told_so(dataset, config, tmp_path):
    with_mask, without = (
        result_settings(settings, make_plan(settings))
        for settings in (
            settings_of(config, dataset, tmp_path, 2, **MASKED), settings_of(config, dataset, tmp_path, 2)
        )
    )  # fmt: skip
    assert check_same_run(without, with_mask, "out") == ["train.document_masking: was False, is True"]
    before_it_existed = copy.deepcopy(without)
    del before_it_existed["train"]["document_masking"]
    assert check_same_run(before_it_existed, without, "out") == []


def test_the_memory_plan_counts_what_hides_documents(dataset, config, tmp_path):
    def planned(**changes) -> int:
        settings = settings_of(config, dataset, tmp_path, 2, **changes)
        return plan_memory(settings, make_plan(settings), 2, 2).activations

    offsets_bytes, mask_bytes = 4 * (2 + 1), 4 * 2 * 32 * 32  # micro-batches of two sequences
    for how in ("none", "selective", "full"):
        changes = {"parallel__activation_checkpointing": how}
        assert planned(**changes, **MASKED) - planned(**changes) == offsets_bytes + mask_bytes
    gpu = {"accelerator": "cuda", "precision": "bf16-mixed"}
    assert planned(**gpu, **MASKED) - planned(**gpu) == offsets_bytes

    settings = settings_of(config, dataset, tmp_path, 2, **MASKED)
    model = build_model(TINY_MODEL, settings, 32, device="cpu")
    inputs, kept = torch.zeros(2, 32, dtype=torch.int64), []
    for offsets in (None, torch.tensor([0, 32, 64], dtype=torch.int32)):
        with tensors_saved_for_backward(model) as saved:
            model.hidden_states(inputs, offsets)
        kept.append(sum(saved.values()))
    assert kept[1] - kept[0] == mask_bytes  # one mask for both layers
