"""float8: close to bfloat16, the same after a resume, and exported as any other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from own_tasks import prepare, write_tasks
from pretrain_ranks import digests_of, losses_of, metrics_of, run_ranks, settings_of, weights_of
from tiny_runs import TINY_MODEL, write_config

from pretraining.float8 import convert_block
from pretraining.plan import make_plan
from utils.errors import UserError

TASKS = ("ending", "document")
LAYOUTS = {
    "sharded": {},
    "kept whole": {
        "parallel__reshard_after_forward": "false",
        "parallel__activation_checkpointing": "selective",
        "train__tie_embeddings": "true",
    },
    "copies": {"parallel__sharding": "hybrid", "parallel__shard_size": 1},
    "alone": {"num_devices": 1},
}
ONLY_LAST = {"eval__interval": "null", "eval__initial_validation": "false"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, documents, dataset, tokenizer_dir) -> Path:
    """50 steps in bfloat16 and in float8, the latter once more in two parts, the first of which ends at step 20. And
    for each layout 3 steps in float8 with evaluations (NAME), 3 with the last one only (NAME, last), and a run in
    bfloat16 that starts from the final weights of the first, and evaluates them before its step (NAME in bf16)."""
    directory = tmp_path_factory.mktemp("float8")
    config = write_config(
        directory / "tiny.yaml", train={"max_steps": 50, "save_interval": 20, "lr_schedule": "constant"}
    )
    precisions = {"bf16": "bf16-mixed", "float8": "float8-mixed"}
    whole = [settings_of(config, dataset, directory / name, 2, precision=p) for name, p in precisions.items()]
    part = settings_of(config, dataset, directory / "parts", 2, precision="float8-mixed", train__max_steps=20)

    tasks = write_tasks(directory / "tasks", documents[:10])
    prepared = {name: prepare(name, tasks, directory / name, dataset, tokenizer_dir) for name in TASKS}
    short = write_config(
        directory / "short.yaml",
        train={"global_batch_size": 4, "max_steps": 3, "save_interval": None},
        eval={
            "interval": 2,
            "prompts": ["What", "If"],
            "sample_tokens": 20,
            "sample_temperature": 1.0,
            "tasks": {name: str(path) for name, path in prepared.items()},
        },
        tokenizer_dir=str(tokenizer_dir),
    )

    def of_layouts(num_processes: int, suffix: str, **changes):
        for name, layout in LAYOUTS.items():
            flags = {"num_devices": 2, "precision": "float8-mixed", **layout, **changes}
            if flags["num_devices"] == num_processes:
                if suffix == " in bf16":
                    flags["initial_checkpoint_dir"] = directory / name / "final"
                yield settings_of(short, dataset, directory / f"{name}{suffix}", **flags)

    def in_float8(num_processes: int) -> list:
        return [*of_layouts(num_processes, ""), *of_layouts(num_processes, ", last", **ONLY_LAST)]

    def in_bf16(num_processes: int) -> list:
        return list(of_layouts(num_processes, " in bf16", precision="bf16-mixed", train__max_steps=1))

    run_ranks([*whole, part, *in_float8(2)], 2, directory / "job")
    (directory / "parts" / "final").rename(directory / "parts" / "step-00000020")
    rest = settings_of(config, dataset, directory / "parts", 2, precision="float8-mixed")
    run_ranks([rest, *in_bf16(2)], 2, directory / "job-2")
    run_ranks(in_float8(1), 1, directory / "job-3")
    run_ranks(in_bf16(1), 1, directory / "job-4")
    return directory


def task_results_of(out_dir: Path) -> list[dict[str, float]]:
    results = [{name: value for name, value in r.items() if name.startswith("task_")} for r in metrics_of(out_dir)]
    return [result for result in results if result]


def val_losses_of(out_dir: Path) -> list[float]:
    return [record["val_loss"] for record in metrics_of(out_dir) if "val_loss" in record]


def samples_of(out_dir: Path, step: int) -> list[list[int]]:
    records = map(json.loads, (out_dir / "samples.jsonl").read_text().splitlines())
    return [record["tokens"] for record in records if record["step"] == step]


def test_losses_are_those_of_bfloat16_within_two_percent(runs):
    assert digests_of(runs / "float8") == digests_of(runs / "bf16")
    ours, theirs = np.array(losses_of(runs / "float8")), np.array(losses_of(runs / "bf16"))
    assert len(ours) == 50 and np.any(ours != theirs)
    np.testing.assert_allclose(ours, theirs, rtol=0.02)
    np.testing.assert_allclose(val_losses_of(runs / "float8"), val_losses_of(runs / "bf16"), rtol=0.02)


def test_a_resumed_run_is_bit_identical(runs):
    assert losses_of(runs / "parts") == losses_of(runs / "float8")
    one, other = (weights_of(runs / name / "final")["model"] for name in ("parts", "float8"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_holds_plain_float32_tensors_under_litgpts_names(runs):
    ours, theirs = (weights_of(runs / name / "final")["model"] for name in ("float8", "bf16"))
    assert ours.keys() == theirs.keys()
    assert all(type(tensor) is torch.Tensor and tensor.dtype == torch.float32 for tensor in ours.values())
    shards = [path.read_bytes() for path in (runs / "float8" / "final" / "lit_model.pth").glob("*.distcp")]
    assert shards and not any(b"torchao" in shard for shard in shards)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_is_that_of_bfloat16_bit_for_bit(runs, layout):
    float8, bf16 = runs / layout, runs / f"{layout} in bf16"
    assert len(val_losses_of(float8)) == 3  # at steps 0, 2 and 3
    assert val_losses_of(float8)[-1] == val_losses_of(bf16)[0]
    assert task_results_of(float8)[-1] == task_results_of(bf16)[0]
    assert {name.split("_")[1] for name in task_results_of(bf16)[0]} == set(TASKS)
    assert len(samples_of(bf16, 0)) == 4 and samples_of(float8, 3) == samples_of(bf16, 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_changes_nothing_in_training(runs, layout):
    every, last = runs / layout, runs / f"{layout}, last"
    assert losses_of(every) == losses_of(last) and len(losses_of(last)) == 3
    assert val_losses_of(every)[-1:] == val_losses_of(last)
    one, other = (weights_of(directory / "final")["model"] for directory in (every, last))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("changes", "named"), [({"n_embd": 40}, "n_embd is 40"), ({"intermediate_size": 60}, "60")])
def test_sizes_that_16_does_not_divide_are_refused(tmp_path, dataset, changes, named):
    config = write_config(tmp_path / "odd.yaml", model_config={**TINY_MODEL, **changes})
    settings = settings_of(config, dataset, tmp_path / "run", 1, precision="float8-mixed")
    with pytest.raises(UserError, match=named):
        make_plan(settings)


def test_weights_that_the_processes_cannot_share_evenly_are_seen_before_they_start(tmp_path, dataset):
    config = write_config(tmp_path / "tiny.yaml", train={"global_batch_size": 18})
    nine = {"num_nodes": 3, "num_devices": 3, "precision": "float8-mixed"}
    with pytest.raises(UserError, match="9 processes share a copy of the model, and a weight has 32 rows"):
        make_plan(settings_of(config, dataset, tmp_path / "run", **nine))
    make_plan(settings_of(config, dataset, tmp_path / "run", **nine, parallel__sharding="replicate"))
    with pytest.raises(UserError, match="--num_nodes=0: must be above 0") as raised:
        make_plan(settings_of(config, dataset, tmp_path / "run", **{**nine, "num_nodes": 0}))
    assert "rows" not in str(raised.value)


def test_uncompiled_blocks_are_refused_on_gpus():
    with pytest.raises(UserError, match=r"--parallel\.compile=true"):
        convert_block(torch.nn.Module(), 1, "cuda", compiled=False)


def test_weights_that_cannot_be_shared_out_evenly_are_refused_instead_of_hanging():
    block = torch.nn.Sequential(torch.nn.Linear(32, 96, bias=False), torch.nn.Linear(96, 32, bias=False))
    convert_block(block, 2, "cpu", compiled=False)
    with pytest.raises(UserError, match=r"3 processes .* 32 rows"):
        convert_block(torch.nn.Sequential(torch.nn.Linear(96, 32, bias=False)), 3, "cpu", compiled=False)
