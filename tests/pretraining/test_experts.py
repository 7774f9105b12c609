"""Mixtures of experts: litgpt's results, transformers' load-balancing loss, and the same training on any processes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from litgpt.config import Config
from litgpt.model import LLaMAMoE
from pretrain_ranks import digests_of, losses_of, metrics_of, run_ranks, settings_of
from tiny_runs import TINY_MODEL, write_config
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from pretraining.experts import Experts, RoutingSums, routing_metrics
from pretraining.memory import plan_memory
from pretraining.model import build_model, count_parameters, initialise, training_flops_per_token
from pretraining.model_config import inactive_parameters
from pretraining.parallelism import checkpoint_activations
from pretraining.plan import make_plan
from pretraining.settings import Settings, TrainSettings
from utils.errors import UserError

NUM_EXPERTS = 8
TINY_EXPERTS = {
    **TINY_MODEL,
    "name": "tiny-experts",
    "mlp_class_name": "LLaMAMoE",
    "moe_intermediate_size": 24,
    "n_expert": NUM_EXPERTS,
    "n_expert_per_token": 2,
}
WEIGHT = 0.1
SAME_RESULT = {
    "recompute_selective": {"parallel__activation_checkpointing": "selective"},
    "reduce_often": {"parallel__reduce_every_micro_batch": "true"},
}


def pair(num_chosen: int, **changes) -> tuple[LLaMAMoE, Experts]:
    """litgpt's layer and this one, with the same weights."""
    torch.manual_seed(num_chosen)
    config = Config(**{**TINY_EXPERTS, "n_expert_per_token": num_chosen, **changes})
    theirs, ours = LLaMAMoE(config), LLaMAMoE(config)
    ours.load_state_dict(theirs.state_dict())
    ours.__class__ = Experts
    return theirs, ours


def assert_same_result(theirs: LLaMAMoE, ours: Experts, x: torch.Tensor) -> torch.Tensor:
    """Results and all gradients; returns the tokens of each expert."""
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    expected = theirs(inputs[0])
    found, routing = ours(inputs[1])
    direction = torch.randn_like(expected)
    expected.backward(direction)
    found.backward(direction)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=0, atol=1e-5)
    assert dict(ours.named_parameters()).keys() == dict(theirs.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs.get_parameter(name).grad, rtol=0, atol=1e-5, msg=name)
    return routing.counts


@pytest.mark.parametrize("num_chosen", [1, 2, 8])
def test_results_and_gradients_are_litgpts(num_chosen):
    counts = assert_same_result(*pair(num_chosen), torch.randn(3, 10, 32))
    assert counts.sum() == 3 * 10 * num_chosen


def test_an_expert_without_tokens_gets_a_gradient_of_zero():
    theirs, ours = pair(2)
    counts = assert_same_result(theirs, ours, torch.randn(1, 2, 32))
    unused = [expert for expert, count in zip(ours.experts, counts.tolist()) if count == 0]
    assert len(unused) >= 4
    assert all(not parameter.grad.any() for expert in unused for parameter in expert.parameters())


@pytest.mark.parametrize("num_chosen", [1, 2, 8])
def test_the_load_balancing_loss_is_that_of_transformers(num_chosen):
    _, ours = pair(num_chosen)
    x = torch.randn(3, 10, 32)
    _, routing = ours(x)
    logits = ours.gate(x.flatten(0, 1))
    expected = load_balancing_loss_func((logits,), NUM_EXPERTS, num_chosen)
    torch.testing.assert_close(routing.balance, expected)
    found, wanted = (torch.autograd.grad(loss, ours.gate.weight)[0] for loss in (routing.balance, expected))
    torch.testing.assert_close(found, wanted)


def test_compiled_in_one_graph():
    _, ours = pair(2)
    x = torch.randn(2, 10, 32, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    gradients = []
    for layer in (ours, compiled):
        y, routing = layer(x)
        gradients.append(torch.autograd.grad(y.square().sum() + routing.balance, [x, *ours.parameters()]))
    torch._dynamo.reset()
    for eager, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, eager)


def objective_and_gradients(how: str, weight: float) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], dict]:
    settings = Settings(precision="32-true", train=TrainSettings(router_aux_loss=weight))
    model = build_model(TINY_EXPERTS, settings, 32, device="cpu")
    initialise(model, model.config, seed=0)
    for block in model.transformer.h:
        if how != "none":
            checkpoint_activations(block, how)
    tokens = torch.randint(1024, (2, 33), generator=torch.Generator().manual_seed(0))
    entropy, objective = model(tokens[:, :-1], tokens[:, 1:])
    objective.backward()
    metrics = {name: value.item() for name, value in routing_metrics(model.routing.take()).items()}
    assert model.routing.take() is None
    return entropy, objective.detach(), [parameter.grad for parameter in model.parameters()], metrics


@pytest.mark.parametrize("how", ["full", "selective"])
def test_recomputed_it_counts_once(how):
    expected, found = (objective_and_gradients(which, WEIGHT) for which in ("none", how))
    assert found[3] == expected[3]
    torch.testing.assert_close(found[:3], expected[:3])


def test_it_is_added_to_the_objective_and_not_to_the_loss():
    entropy, objective, _, metrics = objective_and_gradients("none", WEIGHT)
    expected = entropy + WEIGHT * 64 * metrics["router_balance_loss"]  # a sum over 64 tokens
    torch.testing.assert_close(objective, expected)
    same_entropy, plain_objective, _, same_metrics = objective_and_gradients("none", 0.0)
    assert same_entropy == entropy == plain_objective and same_metrics == metrics


def test_validation_counts_nothing():
    model = build_model(TINY_EXPERTS, Settings(precision="32-true"), 32, device="cpu")
    initialise(model, model.config, seed=0)
    tokens = torch.zeros(1, 32, dtype=torch.int64)
    with torch.no_grad():
        entropy, objective = model(tokens, tokens)
    assert entropy == objective
    assert model.routing.take() is None


def test_sums_of_micro_batches_are_those_of_their_tokens():
    _, ours = pair(2)
    sums = RoutingSums(0.0)
    routings = [ours(torch.randn(1, length, 32))[1] for length in (10, 30)]
    for routing, num_tokens in zip(routings, (10, 30)):
        sums.add([routing], num_tokens)
    metrics = routing_metrics(sums.take())
    balances = [routing.balance.item() for routing in routings]
    assert metrics["router_balance_loss"].item() == pytest.approx((10 * balances[0] + 30 * balances[1]) / 40)
    counts = routings[0].counts + routings[1].counts
    assert metrics["expert_max_share"].item() == pytest.approx(counts.max().item() / 40)


def test_operations_are_those_of_the_experts_that_a_token_passes_through():
    """6 per parameter, forward and backward, as for the dense model of the same active width."""
    chosen = {**TINY_EXPERTS, "n_expert": 2}
    models = [build_model(config, Settings(), 32) for config in (TINY_EXPERTS, chosen)]
    flops = [training_flops_per_token(m.config, count_parameters(m), 32, tied=False) for m in models]
    routers = 6 * 2 * (NUM_EXPERTS - 2) * 32  # they look at all experts
    assert flops[0] - flops[1] == routers
    assert inactive_parameters(models[0].config) == 2 * (NUM_EXPERTS - 2) * 3 * 32 * 24
    assert inactive_parameters(Config(**TINY_MODEL)) == 0


def test_a_dense_model_has_nothing_to_balance(tmp_path, dataset):
    config = write_config(tmp_path / "tiny.yaml", train={"router_aux_loss": 0.01})
    with pytest.raises(UserError, match=r"--train.router_aux_loss=0.01: tiny-llama has no experts"):
        make_plan(settings_of(config, dataset, tmp_path / "run", 1))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, dataset) -> Path:
    directory = tmp_path_factory.mktemp("experts")
    config = write_config(
        directory / "tiny.yaml",
        model_config=TINY_EXPERTS,
        # One sequence per micro-batch: then the tokens that are balanced are the same on any number of processes.
        train={"max_steps": 6, "global_batch_size": 4, "micro_batch_size": 1, "router_aux_loss": WEIGHT},
        eval={"interval": 3},
    )
    plain = settings_of(config, dataset, directory / "plain", 2)
    measured = dataclasses.replace(plain, log=dataclasses.replace(plain.log, run="measure memory"))
    variants = [settings_of(config, dataset, directory / name, 2, **changes) for name, changes in SAME_RESULT.items()]
    longer = {"train__max_steps": 24, "eval__interval": "null", "train__lr_warmup_steps": 0}
    balanced = settings_of(config, dataset, directory / "balanced", 2, **longer)
    free = settings_of(config, dataset, directory / "free", 2, train__router_aux_loss=0, **longer)
    run_ranks([measured, *variants, balanced, free], 2, directory / "job-2")
    run_ranks([settings_of(config, dataset, directory / "one", 1)], 1, directory / "job-1")
    return directory


def metric(out_dir: Path, name: str) -> list[float]:
    return [record[name] for record in metrics_of(out_dir) if name in record]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one", *SAME_RESULT])
def test_processes_and_recomputation_do_not_change_training(runs, name):
    assert digests_of(runs / name) == digests_of(runs / "plain")
    np.testing.assert_allclose(losses_of(runs / name), losses_of(runs / "plain"), rtol=0, atol=1e-5)
    for what in ("grad_norm", "router_balance_loss", "expert_max_share"):
        np.testing.assert_allclose(metric(runs / name, what), metric(runs / "plain", what), rtol=1e-4)
    assert len(metric(runs / name, "router_balance_loss")) == 6


@pytest.mark.slow
def test_with_the_weight_tokens_spread_more_evenly(runs):
    balanced, free = (metric(runs / name, "router_balance_loss")[-1] for name in ("balanced", "free"))
    assert 2.0 <= balanced < free  # 2 experts per token: 2 is even
    shares = [metric(runs / name, "expert_max_share")[-1] for name in ("balanced", "free")]
    assert 2 / NUM_EXPERTS <= shares[0] < shares[1] <= 1


@pytest.mark.slow
def test_planned_memory_is_what_a_process_holds(runs, dataset):
    held = json.loads((runs / "plain" / "allocated-0.json").read_text())
    settings = settings_of(runs / "tiny.yaml", dataset, runs / "plain", 2)
    planned = plan_memory(settings, make_plan(settings), 2, 2)
    # The output layer keeps gradients, which are planned with the logits.
    held["activations"] -= (32 + 1024) * 32 * 4
    for name, value in held.items():
        assert getattr(planned, name) == pytest.approx(value, rel=0.1), name
