"""Checkpoints are complete or absent, the newest good one is taken, and a full disk costs nothing that was there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from pretrain_ranks import digests_of, losses_of, metrics_of, run_ranks, settings_of, weights_of
from tiny_runs import TINY_MODEL, write_config

from pretraining.checkpoint import find_newest_good, list_checkpoints
from pretraining.checkpoint_writer import shortage
from pretraining.events import read_events
from utils.manifest import damaged_files


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_config(
        tmp_path_factory.mktemp("config") / "tiny.yaml",
        train={"max_steps": 12, "save_interval": 2},
        eval={"interval": None},
        checkpoint={"keep_last": 2, "keep_every_steps": 4},
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, dataset, config) -> Path:
    directory = tmp_path_factory.mktemp("finished")
    run_ranks([settings_of(config, dataset, directory / "out", 2)], 2, directory / "job")
    return directory / "out"


@pytest.fixture
def interrupted(finished, tmp_path) -> Path:
    """The run as if it had ended after step 10."""
    shutil.copytree(finished, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "final")
    return tmp_path / "out"


def test_the_last_ones_and_every_nth_are_kept(finished):
    assert sorted(path.name for path in finished.iterdir() if path.is_dir()) == [
        "final", "step-00000004", "step-00000008", "step-00000010",
    ]  # fmt: skip
    for checkpoint in list_checkpoints(finished)[0]:
        assert damaged_files(checkpoint.path, checkpoint.manifest["files"]) == []


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_damage_is_named_and_passed_over(interrupted):
    newest = interrupted / "step-00000010"
    flip_a_byte(newest / "lit_model.pth" / "__1_0.distcp")
    (interrupted / "step-00000008" / "manifest.json").unlink()
    found, skipped = find_newest_good(interrupted, checksums=True)
    assert found.step == 4
    assert any("step-00000010/lit_model.pth/__1_0.distcp: checksum differs" in line for line in skipped)
    assert any("step-00000008: no manifest.json" in line for line in skipped)
    by_size, _ = find_newest_good(interrupted, checksums=False)
    assert by_size.step == 10  # a flipped bit has no size: that is what checksums are for
    (newest / "lit_model.pth" / "__0_0.distcp").unlink()
    assert find_newest_good(interrupted, checksums=False)[0].step == 4


def test_a_run_goes_on_from_before_the_damage_with_the_same_result(interrupted, finished, dataset, config, tmp_path):
    import torch

    """Each process compares its share of the files, and all take the same checkpoint."""
    for shard in ("__0_0.distcp", "__1_0.distcp"):
        flip_a_byte(interrupted / "step-00000010" / "lit_model.pth" / shard)
    run_ranks([settings_of(config, dataset, interrupted, 2)], 2, tmp_path / "job")
    log = (tmp_path / "job" / "rank-0.log").read_text()
    assert "skipped checkpoint" in log
    assert "__0_0.distcp: checksum differs" in log and "__1_0.distcp: checksum differs" in log
    (event,) = read_events(interrupted)
    assert event["event"] == "checkpoint refused" and event["taken"].endswith("step-00000008")
    assert losses_of(interrupted) == losses_of(finished) and digests_of(interrupted) == digests_of(finished)
    ours, theirs = weights_of(interrupted / "final")["model"], weights_of(finished / "final")["model"]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("on_error", [pytest.param("stop", marks=pytest.mark.slow), "continue"])
def test_a_full_disk_leaves_older_checkpoints_whole(interrupted, dataset, config, tmp_path, on_error):
    settings = settings_of(
        config, dataset, interrupted, 2, train__max_steps=14, train__lr_schedule="constant",
        checkpoint__on_error=on_error,
    )  # fmt: skip
    codes = run_ranks([settings], 2, tmp_path / "job", env={"LIMIT_FILE_BYTES": "200000"}, check=False)
    assert all(codes)  # no final checkpoint: no success either way
    log = (tmp_path / "job" / "rank-0.log").read_text()
    assert "could not be written: a file could not be written to its end (disk full" in log
    assert f"the newest is {interrupted}/step-00000010" in log
    assert ("Training goes on" in log) == (on_error == "continue")
    last_step = metrics_of(interrupted)[-1]["step"]
    assert last_step == 14 if on_error == "continue" else last_step < 14
    checkpoints, skipped = list_checkpoints(interrupted)
    assert [checkpoint.step for checkpoint in checkpoints] == [10, 8, 4] and not skipped
    assert all(not damaged_files(c.path, c.manifest["files"]) for c in checkpoints)
    assert not list(interrupted.glob(".tmp-*"))


def test_the_space_for_a_checkpoint_is_checked_before_training(dataset, config, tmp_path, small_disk):
    codes = run_ranks([settings_of(config, dataset, small_disk / "out", 1)], 1, tmp_path / "job", check=False)
    log = (tmp_path / "job" / "rank-0.log").read_text()
    assert codes == [1] and "no space: a checkpoint needs 1.0 MB" in log
    assert not (small_disk / "out" / "metrics.jsonl").read_text()


def test_shortage_is_none_where_there_is_room(tmp_path):
    assert shortage(tmp_path, 1) is None
    assert "are free" in shortage(tmp_path, 10**18)


@pytest.mark.slow
def test_training_starts_from_weights_that_exist(finished, dataset, config, tmp_path):
    """From a checkpoint of ours, and from litgpt's single file."""
    import torch

    (tmp_path / "litgpt").mkdir()
    torch.save(weights_of(finished / "final")["model"], tmp_path / "litgpt" / "lit_model.pth")
    runs = [
        settings_of(config, dataset, tmp_path / name, 2, initial_checkpoint_dir=source, train__max_steps=1)
        for name, source in (("ours", finished / "final"), ("theirs", tmp_path / "litgpt"))
    ]
    run_ranks(runs, 2, tmp_path / "job")
    expected = metrics_of(finished)[-1]["val_loss"]
    for name in ("ours", "theirs"):
        assert metrics_of(tmp_path / name)[0]["val_loss"] == pytest.approx(expected, abs=1e-6)


def test_weights_of_another_model_are_refused_by_name(finished, dataset, tmp_path):
    import torch

    weights = weights_of(finished / "final")["model"]
    weights["transformer.h.0.attn.qkv.weight"] = torch.zeros(3, 3)
    del weights["lm_head.weight"]
    (tmp_path / "other").mkdir()
    torch.save(weights, tmp_path / "other" / "lit_model.pth")
    config = write_config(tmp_path / "c.yaml", model_config=TINY_MODEL)
    settings = settings_of(config, dataset, tmp_path / "out", 1, initial_checkpoint_dir=tmp_path / "other")
    assert run_ranks([settings], 1, tmp_path / "job", check=False) == [1]
    log = (tmp_path / "job" / "rank-0.log").read_text()
    assert "no weights for lm_head.weight" in log and "has shape (3, 3)" in log


def test_a_checkpoint_of_another_model_is_refused_by_name(finished, dataset, tmp_path):
    wider = write_config(tmp_path / "c.yaml", model_config={**TINY_MODEL, "intermediate_size": 96, "n_layer": 3})
    settings = settings_of(wider, dataset, tmp_path / "out", 1, initial_checkpoint_dir=finished / "final")
    assert run_ranks([settings], 1, tmp_path / "job", check=False) == [1]
    log = (tmp_path / "job" / "rank-0.log").read_text()
    assert "UserError" in log and "no weights for transformer.h.2" in log
    assert "transformer.h.0.mlp.fc_1.weight has shape (64, 32), the model's is (96, 32)" in log


@pytest.mark.parametrize("kind", ["sharded", "one file"])
def test_untied_weights_do_not_start_a_tied_model(finished, dataset, config, tmp_path, kind):
    import torch

    source = finished / "final"
    if kind == "one file":
        source = tmp_path / "litgpt"
        source.mkdir()
        torch.save(weights_of(finished / "final")["model"], source / "lit_model.pth")
    settings = settings_of(
        config, dataset, tmp_path / "out", 2, initial_checkpoint_dir=source, train__tie_embeddings="true"
    )
    assert all(run_ranks([settings], 2, tmp_path / "job", check=False))
    assert "its output layer and its embedding differ" in (tmp_path / "job" / "rank-0.log").read_text()


@pytest.mark.slow
def test_tied_weights_start_a_tied_model(dataset, config, tmp_path):
    tied = {"train__tie_embeddings": "true", "train__max_steps": 2}
    first = settings_of(config, dataset, tmp_path / "first", 2, **tied)
    run_ranks([first], 2, tmp_path / "job-1")
    second = settings_of(
        config, dataset, tmp_path / "second", 2, initial_checkpoint_dir=tmp_path / "first" / "final", **tied
    )
    run_ranks([second], 2, tmp_path / "job-2")
    expected = metrics_of(tmp_path / "first")[-1]["val_loss"]
    assert metrics_of(tmp_path / "second")[0]["val_loss"] == pytest.approx(expected, abs=1e-6)


def test_meta_holds_primitives_only(finished):
    import torch

    meta = torch.load(finished / "final" / "lit_model.pth" / "meta.pt", weights_only=True)
    assert meta["step"] == 12 and meta["position"] == 96
    assert json.loads(json.dumps(meta)) == meta
