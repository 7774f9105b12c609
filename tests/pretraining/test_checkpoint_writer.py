"""Saving and loading in one process: what may be deleted, what counts as a failed save, what a resumed run keeps."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.filesystem as filesystem
from tiny_runs import TINY_MODEL

from pretraining.checkpoint import FINAL_NAME, list_checkpoints, rename_final_to_its_step
from pretraining.checkpoint_loading import load_initial_weights, load_training_state
from pretraining.checkpoint_writer import CheckpointWriter
from pretraining.model import build_model, initialise
from pretraining.optimizer import make_optimizers
from pretraining.settings import CheckpointSettings, OptimizerSettings, Settings, TrainSettings


@pytest.fixture(scope="module", autouse=True)
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def tiny_model(tied: bool = False) -> torch.nn.Module:
    settings = Settings(train=TrainSettings(tie_embeddings=tied), precision="32-true")
    model = build_model(TINY_MODEL, settings, context_tokens=32, device="cpu")
    initialise(model, model.config, seed=1)
    return model


def make_writer(out_dir: Path, keep_last: int | None = None, **optimizer) -> CheckpointWriter:
    model = tiny_model()
    optimizers = make_optimizers(model, OptimizerSettings(**optimizer))
    return CheckpointWriter(
        out_dir, model, optimizers, lambda directory: None,
        lambda files, state: {
            "kind": "checkpoint", "settings": {}, "content": {"step": state["step"]}, "files": files, "inputs": [],
        },
        CheckpointSettings(keep_last=keep_last),
    )  # fmt: skip


def save(writer: CheckpointWriter, step: int, name: str | None = None) -> None:
    writer.save(name or f"step-{step:08d}", {"step": step}, asynchronous=False)


def test_damaged_checkpoints_of_later_steps_do_not_push_the_good_one_out(tmp_path):
    writer = make_writer(tmp_path, keep_last=2)
    for step in (2, 8, 10):
        save(writer, step)
    for step in (8, 10):
        (tmp_path / f"step-{step:08d}" / "lit_model.pth" / "__0_0.distcp").unlink()
    save(writer, 4)  # as a run that goes on from before the damage
    assert writer.error is None
    assert {found.step for found in list_checkpoints(tmp_path)[0]} >= {4}
    save(writer, 6)
    assert [found.step for found in list_checkpoints(tmp_path)[0]] == [10, 8, 6, 4]


def test_a_file_that_another_process_wrote_and_nobody_sees_here_is_a_failed_save(tmp_path):
    """As when out_dir is a directory of each node by itself."""
    writer = make_writer(tmp_path)
    temporary = tmp_path / ".tmp-step-00000001-0123456789ab"
    (temporary / "lit_model.pth").mkdir(parents=True)
    elsewhere = {"name": "lit_model.pth/__1_0.distcp", "bytes": 5, "xxh3_128": "0" * 32}
    with pytest.raises(RuntimeError, match=r"__1_0\.distcp: missing.*all nodes share"):
        writer._publish(temporary, "step-00000001", [elsewhere], {"step": 1})
    assert not (tmp_path / "step-00000001").exists()


def test_writing_what_is_in_main_memory_waits_for_no_device(tmp_path, monkeypatch):
    """Where CUDA exists, torch's default writer waits for the device's stream again and again."""
    waits = []

    class Stream:
        def synchronize(self):
            waits.append(1)

        def wait_stream(self, other):
            pass

    class Device:
        stream_of_all = Stream()

        def current_stream(self):
            return self.stream_of_all

        def stream(self, stream):
            return contextlib.nullcontext()

    writer = make_writer(tmp_path)
    save(writer, 1)  # makes the optimizer's state, which would ask a device for its capabilities
    monkeypatch.setattr(filesystem, "_get_device_module", lambda kind: Device())
    monkeypatch.setattr(filesystem, "_get_available_device_type", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    writer._write(
        tmp_path / ".tmp-step-00000002-0123456789ab", "step-00000002", {"weight": torch.zeros(8)}, {"step": 2}
    )
    assert writer.error is None and not waits
    dcp.save({"weight": torch.zeros(8)}, storage_writer=dcp.FileSystemWriter(tmp_path / "default"))
    assert waits  # so the test would see them


def test_a_peer_that_is_gone_is_a_failed_save(tmp_path, monkeypatch):
    writer = make_writer(tmp_path)

    def closed(*args, **kwargs):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(dist, "all_gather_object", closed)
    writer.save("step-00000001", {"step": 1}, asynchronous=True)
    writer.wait()
    assert "Connection closed by peer" in writer.error and not (tmp_path / "step-00000001").exists()


def test_a_directory_that_cannot_be_made_is_a_failed_save(tmp_path):
    writer = make_writer(tmp_path / "file" / "out")
    (tmp_path / "file").write_text("")
    save(writer, 1)
    assert "could not be written: NotADirectoryError" in writer.error


@pytest.mark.parametrize("manifest", ["{", '{"schema_version": 1}', None])
def test_a_final_checkpoint_with_a_damaged_manifest_keeps_no_run_from_going_on(tmp_path, manifest):
    writer = make_writer(tmp_path)
    save(writer, 6, FINAL_NAME)
    path = tmp_path / FINAL_NAME / "manifest.json"
    path.unlink() if manifest is None else path.write_text(manifest)
    rename_final_to_its_step(tmp_path)
    assert (tmp_path / FINAL_NAME).is_dir()
    save(writer, 8, FINAL_NAME)
    assert [found.step for found in list_checkpoints(tmp_path)[0]] == [8]


def test_a_manifest_without_a_step_keeps_no_run_from_going_on(tmp_path):
    save(make_writer(tmp_path), 6, FINAL_NAME)
    path = tmp_path / FINAL_NAME / "manifest.json"
    path.write_text(path.read_text().replace('"step"', '"stop"'))
    rename_final_to_its_step(tmp_path)
    assert os.listdir(tmp_path) == [FINAL_NAME]


def test_what_an_interrupted_save_left_is_deleted_and_what_only_looks_like_it_stays(tmp_path):
    unfinished = tmp_path / ".tmp-step-00000001-0123456789ab"
    foreign = tmp_path / ".tmp-my-notes"
    for directory in (unfinished, foreign):
        directory.mkdir()
        (directory / "file").write_text("")
    writer = make_writer(tmp_path, keep_last=1)
    save(writer, 2)
    save(writer, 2)  # replaces the first
    save(writer, 4)  # and this deletes it
    assert writer.error is None
    assert sorted(os.listdir(tmp_path)) == [".tmp-my-notes", "step-00000004"]
    assert (foreign / "file").exists()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_resumed_run_has_the_optimizers_settings_of_its_command(tmp_path, name):
    first = make_writer(tmp_path, name=name, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8, momentum=0.95)
    first.model(torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64))[1].backward()
    for optimizer in first.optimizers:
        optimizer.step()
    save(first, 1)
    second = make_writer(tmp_path, name=name, weight_decay=0.3, betas=(0.8, 0.9), eps=1e-6, momentum=0.5)
    assert load_training_state(tmp_path / "step-00000001", second.model, second.optimizers) == {"step": 1}
    decayed, plain = second.optimizers[0].param_groups
    assert decayed["weight_decay"] == 0.3 and plain["weight_decay"] == 0.0
    assert decayed["betas"] == plain["betas"] == (0.8, 0.9) and decayed["eps"] == 1e-6
    if name == "muon":
        (hidden,) = second.optimizers[1].param_groups
        assert hidden["weight_decay"] == 0.3 and hidden["momentum"] == 0.5
    for mine, theirs in zip(second.optimizers, first.optimizers):
        for a, b in zip(mine.param_groups, theirs.param_groups):
            for p, q in zip(a["params"], b["params"]):
                assert torch.equal(p, q)
                for key, value in theirs.state[q].items():
                    assert torch.equal(mine.state[p][key], value)


@pytest.mark.parametrize("names", [("transformer.wte.weight",), ("lm_head.weight",), None])
def test_tied_embeddings_start_from_a_file_with_either_name(tmp_path, names):
    source = tiny_model(tied=True).state_dict()
    both = {"transformer.wte.weight", "lm_head.weight"}
    if names is not None:
        source = {name: value for name, value in source.items() if name not in both - set(names)}
    torch.save(source, tmp_path / "lit_model.pth")
    model = tiny_model(tied=True)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    load_initial_weights(tmp_path, model)
    assert model.lm_head.weight is model.transformer.wte.weight
    for name, value in source.items():
        assert torch.equal(model.state_dict()[name], value), name
