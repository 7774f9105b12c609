"""Processes that share sequences compute what one process computes: every attention, and whole runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from litgpt.config import Config
from pretrain_ranks import digests_of, free_port, metrics_of, run_ranks, settings_of
from test_attention import (
    TOKENS,
    VARIANTS,
    Operations,
    logits_of,
    make_model,
    make_tokens,
    offsets_of,
    our_model,
    packed,
    shrink,
    token_losses,
)
from tiny_runs import TINY_MODEL, write_config
from torch._subclasses.fake_tensor import FakeTensorMode

from pretraining.attention import Causal, attention_patterns
from pretraining.context_parallel import ALONE, ContextGroup, Ulysses, join_context_group
from pretraining.memory import plan_memory
from pretraining.model import PretrainGPT
from pretraining.parallelism import checkpoint_activations
from pretraining.plan import make_plan
from pretraining.process_layout import micro_batches_per_step
from pretraining.run_identity import result_settings
from utils.errors import UserError

EXCHANGE = torch.ops._c10d_functional.all_to_all_single.default


# --- attention --------------------------------------------------------------------------------------------------------


def shared_configs() -> dict[str, Config]:
    """Every attention of litgpt's, and numbers of groups that do not divide by the processes'."""
    found = {name: shrink(config) for name, config in VARIANTS.items() if not config.latent_attention}
    llama = Config.from_name("Llama-3.1-8B")
    sizes = {"n_head": 12, "n_embd": 192, "sliding_window_size": None}
    return {**found, **{f"{groups} groups": shrink(llama, n_query_groups=groups, **sizes) for groups in (3, 6)}}


def loss_of_part(model: PretrainGPT, tokens: torch.Tensor, masked: bool) -> torch.Tensor:
    """The losses of this process's tokens."""
    part = model.context_group.part_of(tokens)
    offsets = offsets_of(tokens[:, :-1]) if masked else None
    return token_losses(logits_of(model, part[:, :-1], offsets), part[:, 1:])


def check_variants(rank: int, port: int, world_size: int, size: int, names: list[str]) -> None:
    """Groups of `size`; each group has rows of its own. Gradients are summed over all processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    group = join_context_group(size)
    assert (group.size, group.member, group.index, group.count) == (
        size, rank % size, rank // size, world_size // size
    )  # fmt: skip
    configs = shared_configs()
    for name in names:
        for masked, how in ((False, "none"), (True, "selective")):
            theirs = make_model(configs[name])
            plain, ours = our_model(theirs), our_model(theirs)
            tokens = packed(((9, 1, 30), (17, 23)) * group.count)
            everything = loss_of_part(plain, tokens, masked)
            everything.sum().div(100).backward()

            ours.context_group = group
            for block in ours.transformer.h if how != "none" else ():
                checkpoint_activations(block, how)
            mine = slice(2 * group.index, 2 * group.index + 2)
            losses = loss_of_part(ours, tokens[mine], masked)
            length = TOKENS // size
            expected = everything[mine, group.member * length : (group.member + 1) * length]
            torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
            losses.sum().div(100).backward()
            for (key, parameter), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
                dist.all_reduce(parameter.grad)
                message = f"{name}, masked {masked}, {key}"
                torch.testing.assert_close(
                    parameter.grad, other.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=message: f"{n}: {m}"
                )
    dist.destroy_process_group()


def test_grouped_queries_windows_and_caps_give_the_losses_and_gradients_of_one_process():
    names = ["Llama-3.1-8B", "falcon-7b", "Gemma-2-2b", "Gemma-3-4b-it", "OLMo-2-1124-7B", "3 groups"]
    torch.multiprocessing.spawn(check_variants, (free_port(), 2, 2, names), nprocs=2)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "size"), [(2, 2), (4, 4), (4, 2)])
def test_every_attention_gives_the_losses_and_gradients_of_one_process(world_size, size):
    arguments = (free_port(), world_size, size, list(shared_configs()))
    torch.multiprocessing.spawn(check_variants, arguments, nprocs=world_size)


@pytest.mark.parametrize(("size", "groups", "sent_groups"), [(2, 4, 4), (4, 4, 4), (8, 4, 8), (8, 1, 8), (4, 6, 12)])
def test_one_exchange_before_attention_and_one_after_with_no_more_keys_than_needed(size, groups, sent_groups):
    heads, part = 24, 8
    attended = []

    class Recorded(Causal):
        def attend(self, q, k, v, *arguments):
            attended.append([heads_of.shape for heads_of in (q, k, v)])
            return super().attend(q, k, v, *arguments)

    with FakeTensorMode(), Operations() as operations:
        q, k = (torch.empty(3, n, part, 16, requires_grad=True) for n in (heads, groups))
        y = Ulysses(Recorded(), size, "").attend(q, k, k, 0.25, None)
        y.sum().backward()
    assert y.shape == q.shape
    assert attended == [[(3, n // size, size * part, 16) for n in (heads, sent_groups, sent_groups)]]
    sent = [args[0].numel() for function, args, _, _ in operations.seen if function is EXCHANGE]
    before, after = (3 * part * 16 * n for n in (heads + 2 * sent_groups, heads))
    assert sent == [before, after, after, before]


def test_a_part_begins_where_the_one_before_ended_and_no_target_is_lost():
    tokens = make_tokens(rows=3, tokens=40)
    parts = [ContextGroup(4, member).part_of(tokens) for member in range(4)]
    assert torch.equal(torch.cat([part[:, :-1] for part in parts], dim=1), tokens[:, :-1])
    assert torch.equal(torch.cat([part[:, 1:] for part in parts], dim=1), tokens[:, 1:])
    assert torch.equal(ALONE.part_of(tokens), tokens)


# --- runs -------------------------------------------------------------------------------------------------------------

MASKED = {"train__document_masking": "true"}
TWO, FOUR = {"parallel__context_parallel_size": 2}, {"parallel__context_parallel_size": 4}


@pytest.fixture(scope="module")
def dataset(short_documents) -> Path:
    return short_documents


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    train = {"max_steps": 6, "save_interval": 2, "lr_schedule": "constant"}
    return write_config(tmp_path_factory.mktemp("config") / "tiny.yaml", train=train, eval={"interval": 3})


@pytest.fixture(scope="module")
def runs(tmp_path_factory, dataset, config) -> Path:
    """`plain` has one process per sequence, `shared` two; `moving` goes from one to two and back."""
    directory = tmp_path_factory.mktemp("runs")

    def settings(name, num_ranks, **changes):
        return settings_of(config, dataset, directory / name, num_ranks, **{**MASKED, **changes})

    run_ranks([settings("plain", 1), settings("moving", 1, train__max_steps=2)], 1, directory / "job-1")
    checkpointed = {
        how: settings(how, 2, parallel__activation_checkpointing=how, **TWO) for how in ("selective", "full")
    }
    two = [settings("shared", 2, **TWO), settings("moving", 2, train__max_steps=4, **TWO), *checkpointed.values()]
    run_ranks(two, 2, directory / "job-2")
    run_ranks([settings("moving", 1)], 1, directory / "job-3")
    return directory


def assert_same_run(found: Path, expected: Path) -> None:
    assert digests_of(found) == digests_of(expected) and len(digests_of(found)) == 6
    for key, exact in (("loss", {"rtol": 0, "atol": 1e-5}), ("grad_norm", {"rtol": 1e-4}), ("tokens", {"rtol": 0})):
        values = [[record[key] for record in metrics_of(run) if "loss" in record] for run in (found, expected)]
        np.testing.assert_allclose(*values, **exact, err_msg=key)
    # A run in several parts validates at the end of each.
    ours, theirs = (
        {record["step"]: record["val_loss"] for record in metrics_of(run) if "val_loss" in record}
        for run in (found, expected)
    )
    np.testing.assert_allclose([ours[step] for step in theirs], list(theirs.values()), rtol=0, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("name", ["shared", "selective", "full", "moving"])
def test_a_shared_run_is_the_run_of_one_process(runs, name):
    assert_same_run(runs / name, runs / "plain")


@pytest.mark.slow
def test_four_processes_and_compiled_blocks_are_the_run_of_one_process_too(runs, config, dataset, tmp_path):
    def settings(name, num_ranks, **changes):
        return settings_of(config, dataset, tmp_path / name, num_ranks, **{**MASKED, **changes})

    compiled = {"parallel__compile": "true"}
    jobs = {
        "four": FOUR,
        "two groups": TWO,
        "hybrid": {**TWO, "parallel__sharding": "hybrid", "parallel__shard_size": 2},
        "compiled": {**FOUR, **compiled},
        "compiled and recomputed": {**FOUR, **compiled, "parallel__activation_checkpointing": "selective"},
    }
    run_ranks([settings(name, 4, **changes) for name, changes in jobs.items()], 4, tmp_path / "job")
    for name in jobs:
        assert_same_run(tmp_path / name, runs / "plain")


@pytest.mark.slow
def test_the_command_resumes_with_another_number_of_processes_per_sequence(
    runs, config, dataset, tmp_path, run_script, ray_address
):
    def train(size: int, max_steps: int):
        return run_script(
            "distributed_pretrain.py", f"--config={config}", f"--dataset_path={dataset}",
            f"--out_dir={tmp_path / 'run'}", f"--address={ray_address}", "--accelerator=cpu", "--precision=32-true",
            "--train.document_masking=true", "--num_devices=2", f"--parallel.context_parallel_size={size}",
            f"--train.max_steps={max_steps}",
        )  # fmt: skip

    first, second = train(1, 3), train(2, 6)
    assert "(2 x 2 sequences of 32 per process)" in first.stdout + first.stderr
    assert "(4 x 2 sequences of 32 per group of 2 processes)" in second.stdout + second.stderr
    assert "resume with another parallel" not in second.stdout + second.stderr
    assert_same_run(tmp_path / "run", runs / "plain")


# --- before a run -----------------------------------------------------------------------------------------------------


def refusal(config, dataset, tmp_path, num_ranks: int, model: dict | None = None, **changes) -> str:
    settings = settings_of(config, dataset, tmp_path / "out", num_ranks, **changes)
    settings.model_config = {**TINY_MODEL, **(model or {})}
    with pytest.raises(UserError) as raised:
        make_plan(settings)
    (problem,) = raised.value.problems
    return problem


def test_what_cannot_be_shared_is_refused(dataset, config, tmp_path):
    batch = {"train__global_batch_size": 24}
    heads = refusal(config, dataset, tmp_path, 8, parallel__context_parallel_size=8, **batch)
    assert heads == (
        "--parallel.context_parallel_size=8: does not divide the 4 attention heads of the model, of which each process "
        "takes an equal part. Use 1, 2 or 4, or another --train.max_seq_length."
    )
    context = refusal(config, dataset, tmp_path, 4, train__max_seq_length=30, **FOUR)
    assert "does not divide the 30 tokens of a sequence" in context and "Use 1 or 2, or another" in context
    node = refusal(config, dataset, tmp_path, 6, **FOUR, **batch)
    assert node == (
        "--parallel.context_parallel_size=4: groups of so many processes do not fill the 6 processes of a node "
        "(--num_devices). Give 1, 2, 3 or 6."
    )
    batches = refusal(config, dataset, tmp_path, 4, train__global_batch_size=6, **TWO)
    assert "times 2 groups of 2 processes. Use 4 or 8, or another micro-batch." in batches
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    model = {"n_query_groups": 4, "latent_attention": latent}
    assert "not possible for tiny-llama, whose latent attention" in refusal(config, dataset, tmp_path, 2, model, **TWO)
    assert "must be above 0" in refusal(config, dataset, tmp_path, 2, parallel__context_parallel_size=0)
    with pytest.raises(ValueError, match="share"):
        attention_patterns(Config(**{**TINY_MODEL, **model}), torch.zeros(1, 4, 1), group=ContextGroup(2))


def test_micro_batches_are_counted_per_group_and_the_result_does_not_depend_on_it(dataset, config, tmp_path):
    settings = [settings_of(config, dataset, tmp_path, 4, parallel__context_parallel_size=size) for size in (1, 2, 4)]
    assert [micro_batches_per_step(one, 4) for one in settings] == [1, 2, 4]
    plain, *others = (result_settings(one, make_plan(one)) for one in settings)
    assert all(other == plain for other in others)


@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_the_memory_plan_divides_activations(dataset, config, tmp_path, how):
    """But for what attention itself keeps, in float32 values per token and layer (a width of 32, two groups of 8)."""
    alone = {"rotated q and k": 48, "product, of which v is a part": 64, "result": 32}
    parts = {"q, k, v as they arrived, with two groups made four": 96, "result, before and after its exchange": 64}
    more_values = sum(parts.values()) - sum(alone.values()) if how == "none" else 0

    def planned(size: int):
        changes = {"parallel__context_parallel_size": size, "parallel__activation_checkpointing": how}
        settings = settings_of(config, dataset, tmp_path, 4, parallel__loss_chunk_tokens=8, **changes)
        return plan_memory(settings, make_plan(settings), 4, 4)

    whole, shared = planned(1), planned(4)
    assert shared.activations == (whole.activations + more_values * 4 * 2 * 64) / 4  # two layers, 64 tokens
    assert shared.logits < whole.logits
    assert (shared.parameters, shared.optimizer) == (whole.parameters, whole.optimizer)
