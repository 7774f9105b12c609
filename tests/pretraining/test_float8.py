"""float8: close to bfloat16, the same after a resume, and exported as any other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pretrain_ranks import digests_of, losses_of, metrics_of, run_ranks, settings_of, weights_of
from tiny_runs import TINY_MODEL, write_config

from pretraining.float8 import convert_block
from pretraining.plan import make_plan
from utils.errors import UserError


@pytest.fixture(scope="module")
def runs(tmp_path_factory, dataset) -> Path:
    """50 steps in bfloat16 and in float8, the latter once more in two parts, the first of which ends at step 20."""
    directory = tmp_path_factory.mktemp("float8")
    config = write_config(
        directory / "tiny.yaml", train={"max_steps": 50, "save_interval": 20, "lr_schedule": "constant"}
    )
    precisions = {"bf16": "bf16-mixed", "float8": "float8-mixed"}
    whole = [settings_of(config, dataset, directory / name, 2, precision=p) for name, p in precisions.items()]
    part = settings_of(config, dataset, directory / "parts", 2, precision="float8-mixed", train__max_steps=20)
    run_ranks([*whole, part], 2, directory / "job")
    (directory / "parts" / "final").rename(directory / "parts" / "step-00000020")
    run_ranks([settings_of(config, dataset, directory / "parts", 2, precision="float8-mixed")], 2, directory / "job-2")
    return directory


def test_losses_are_those_of_bfloat16_within_two_percent(runs):
    assert digests_of(runs / "float8") == digests_of(runs / "bf16")
    ours, theirs = np.array(losses_of(runs / "float8")), np.array(losses_of(runs / "bf16"))
    assert len(ours) == 50 and np.any(ours != theirs)
    np.testing.assert_allclose(ours, theirs, rtol=0.02)
    validated = [[r["val_loss"] for r in metrics_of(runs / name) if "val_loss" in r] for name in ("float8", "bf16")]
    np.testing.assert_allclose(*validated, rtol=0.02)


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


LAYOUTS = {
    "two": {},
    "two_kept_whole": {"parallel__reshard_after_forward": "false", "train__tie_embeddings": "true"},
    "two_copies": {"parallel__sharding": "hybrid", "parallel__shard_size": 1},
    "recomputed": {"parallel__activation_checkpointing": "selective", "optimizer__name": "muon"},
}


UNSEEN = {"eval__interval": "null", "eval__initial_validation": "false"}


@pytest.fixture(scope="module")
def validated(tmp_path_factory, dataset) -> Path:
    """For each layout 5 steps in float8 with validations and 5 almost without (-unseen), and a run in bfloat16 that
    starts from the last weights of the first, and validates them before its only step (-bf16)."""
    directory = tmp_path_factory.mktemp("validated")
    config = write_config(directory / "tiny.yaml", train={"max_steps": 5, "save_interval": None}, eval={"interval": 2})
    for num_processes, layouts in ((2, LAYOUTS), (1, {"one": {}})):

        def settings(name, **changes):
            return settings_of(config, dataset, directory / name, num_processes, **changes)  # noqa: B023

        seen = [settings(name, precision="float8-mixed", **flags) for name, flags in layouts.items()]
        unseen = [
            settings(f"{name}-unseen", precision="float8-mixed", **flags, **UNSEEN) for name, flags in layouts.items()
        ]
        run_ranks([*seen, *unseen], num_processes, directory / f"job-{num_processes}")
        in_bf16 = [
            settings(
                f"{name}-bf16",
                precision="bf16-mixed",
                train__max_steps=1,
                initial_checkpoint_dir=directory / name / "final",
                **flags,
            )
            for name, flags in layouts.items()
        ]
        run_ranks(in_bf16, num_processes, directory / f"job-{num_processes}-bf16")
    return directory


def val_losses_of(out_dir: Path) -> list[float]:
    return [record["val_loss"] for record in metrics_of(out_dir) if "val_loss" in record]


@pytest.mark.parametrize("layout", [*LAYOUTS, "one"])
def test_validation_is_that_of_bfloat16_bit_for_bit(validated, layout):
    found = val_losses_of(validated / layout)
    assert len(found) == 4  # at steps 0, 2, 4, and 5
    assert found[-1] == val_losses_of(validated / f"{layout}-bf16")[0]


@pytest.mark.parametrize("layout", [*LAYOUTS, "one"])
def test_validation_changes_nothing_in_training(validated, layout):
    unseen = validated / f"{layout}-unseen"
    assert len(val_losses_of(unseen)) == 1  # at the end
    assert losses_of(unseen) == losses_of(validated / layout) and len(losses_of(unseen)) == 5


@pytest.mark.parametrize(("changes", "named"), [({"n_embd": 40}, "n_embd is 40"), ({"intermediate_size": 60}, "60")])
def test_sizes_that_16_does_not_divide_are_refused(tmp_path, dataset, changes, named):
    config = write_config(tmp_path / "odd.yaml", model_config={**TINY_MODEL, **changes})
    settings = settings_of(config, dataset, tmp_path / "run", 1, precision="float8-mixed")
    with pytest.raises(UserError, match=named):
        make_plan(settings)


def test_uncompiled_blocks_are_refused_on_gpus():
    with pytest.raises(UserError, match=r"--parallel\.compile=true"):
        convert_block(torch.nn.Module(), "cuda", compiled=False)
