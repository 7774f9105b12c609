"""What recomputation keeps, what compiled blocks keep, and one graph for all of them."""

from __future__ import annotations

import dataclasses
import functools
import types

import pytest
import torch
import torch.distributed as dist
from tiny_runs import TINY_MODEL
from torch._dynamo.utils import counters
from torch.testing._internal.distributed.fake_pg import FakeStore

from pretraining import memory
from pretraining.model import build_model, initialise
from pretraining.model_config import resolve_model_config
from pretraining.parallelism import checkpoint_activations, device_mesh, shard_model
from pretraining.settings import ParallelSettings, Settings, TrainSettings

TOKENS = 8192
# Bytes per block of Llama 3 8B in bfloat16.
INPUT = ATTENTION = TOKENS * 4096 * 2
QKV, FC_1 = TOKENS * (4096 + 2 * 1024) * 2, TOKENS * 14336 * 2
LOG_SUM_EXP = TOKENS * 32 * 4


def settings_with(**parallel) -> Settings:
    return Settings(
        model_name="Meta-Llama-3-8B", precision="bf16-mixed", num_devices=8, num_nodes=4,
        train=TrainSettings(micro_batch_size=1), parallel=ParallelSettings(**parallel),
    )  # fmt: skip


@pytest.fixture(scope="module")
def llama() -> types.SimpleNamespace:
    config = dataclasses.asdict(resolve_model_config(settings_with()))
    return types.SimpleNamespace(model_config=config, context_tokens=TOKENS)


def test_selective_recomputation_keeps_what_the_backward_pass_needs_and_not_the_last_product(llama):
    settings = settings_with(activation_checkpointing="selective")
    one, two = (memory._bytes_saved_for_backward(settings, llama, layers) for layers in (1, 2))
    assert two - one == INPUT + QKV + ATTENTION + LOG_SUM_EXP + FC_1
    assert memory._bytes_kept_by_compiled_block(settings, llama) == two - one


def test_compiled_blocks_keep_two_thirds_of_what_eager_ones_keep(llama):
    eager, compiled = (memory._activation_bytes(settings_with(compile=how), llama)[0] for how in (False, True))
    assert 0.5 < compiled / eager < 0.7
    full = settings_with(compile=True, activation_checkpointing="full")
    assert memory._bytes_kept_by_compiled_block(full, llama) == INPUT


@pytest.mark.slow
@pytest.mark.parametrize("how", ["none", "selective"])
def test_inductor_keeps_what_the_plan_says(how):
    """A real block on the CPU, compiled as in a run; what autograd packs is counted."""
    config = {**TINY_MODEL, "block_size": 256, "n_embd": 128, "n_head": 4, "intermediate_size": 320}
    settings = Settings(
        precision="32-true",
        train=TrainSettings(micro_batch_size=2), parallel=ParallelSettings(compile=True, activation_checkpointing=how),
    )  # fmt: skip
    planned = memory._bytes_kept_by_compiled_block(
        settings, types.SimpleNamespace(model_config=config, context_tokens=256)
    )
    kept = []
    for compiled_blocks in (1, 2):
        model = build_model({**config, "n_layer": compiled_blocks}, settings, 256, device="cpu")
        for block in model.transformer.h:
            if how != "none":
                checkpoint_activations(block, how)
            block.compile()
        with memory.tensors_saved_for_backward(model) as saved:
            model.hidden_states(torch.zeros(2, 256, dtype=torch.int64))
        kept.append(sum(saved.values()))
    assert kept[1] - kept[0] == pytest.approx(planned, rel=0.01)


@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_all_blocks_share_one_graph_for_training_and_one_for_validation(how, monkeypatch):
    """Twelve blocks, more than torch would compile one by one, as one of 32 processes. Only inductor is left out."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(compile_module, backend="aot_eager"))
    settings = Settings(
        precision="bf16-mixed", num_devices=8, num_nodes=4,
        parallel=ParallelSettings(compile=True, activation_checkpointing=how),
    )  # fmt: skip
    torch._dynamo.reset()
    counters.clear()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=32)
    try:
        model = build_model({**TINY_MODEL, "n_layer": 12}, settings, 32)
        shard_model(model, device_mesh(settings, "cpu", 32, 8), settings)
        model.to_empty(device="cpu")
        model.reset_parameters()
        initialise(model, model.config, seed=0)
        tokens = torch.zeros(2, 32, dtype=torch.int64)
        graphs = []
        for training in (True, True, False, True):
            model.train(training)
            with torch.set_grad_enabled(training):
                _, objective = model(tokens, tokens)
            if training:
                objective.backward()
            graphs.append(counters["stats"]["unique_graphs"])
    finally:
        dist.destroy_process_group()
        torch._dynamo.reset()
    assert graphs == [1, 1, 2, 2]
    assert not counters["graph_break"]
