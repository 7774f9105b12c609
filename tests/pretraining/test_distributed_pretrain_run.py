"""The script as its users run it, on a real Ray cluster."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from pretrain_ranks import digests_of, losses_of, metrics_of, settings_of, weights_of
from tiny_runs import TINY_MODEL, tokenize_dataset, write_config

from pretraining.checkpoint import list_checkpoints
from pretraining.plan import make_plan
from pretraining.run_identity import check_same_run, result_settings
from utils.errors import UserError
from utils.files import held_lock
from utils.manifest import damaged_files, read_manifest
from utils.metrics_file import read_metrics

SCRIPT = "distributed_pretrain.py"
SECRET = "a-key-that-nobody-may-see-0123456789abcdef"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, documents, tokenizer_dir) -> Path:
    return tokenize_dataset(tmp_path_factory.mktemp("data") / "merged", documents[:60], tokenizer_dir)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_config(tmp_path_factory.mktemp("config") / "tiny.yaml")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, dataset, config, tokenizer_dir, ray_address) -> tuple[Path, subprocess.CompletedProcess]:
    """A whole run with an offline wandb logger and a key in the environment."""
    from conftest import run_a_script

    out_dir = tmp_path_factory.mktemp("run") / "out"
    process = run_a_script(
        SCRIPT, "--config", config, "--dataset_path", dataset, "--out_dir", out_dir, "--tokenizer_dir", tokenizer_dir,
        "--address", ray_address, "--logger_name", "tensorboard", "--check_hardware", "always",
        env={"WANDB_API_KEY": SECRET},
    )  # fmt: skip
    return out_dir, process


def test_a_run_leaves_checkpoints_metrics_and_the_next_command(finished, tokenizer_dir):
    out_dir, process = finished
    assert "finished: 6 steps" in process.stdout
    assert process.stdout.count("checked 2 devices in") == 1  # --check_hardware
    assert "convert_pretrained_checkpoint.py" in process.stdout and "consolidate_checkpoint" in process.stdout
    assert sorted(path.name for path in out_dir.iterdir() if path.is_dir()) == ["final", "step-00000003", "tensorboard"]
    for name, step in (("step-00000003", 3), ("final", 6)):
        checkpoint = out_dir / name
        manifest = read_manifest(checkpoint, "checkpoint")
        content = manifest["content"]
        assert content["step"] == step and content["tokens"] == step * 8 * 32 and content["position"] == step * 8
        assert content["parameters"] == 84_128
        assert content["val_loss"] > 0 and content["val_bits_per_byte"] > 0
        assert damaged_files(checkpoint, manifest["files"]) == []
        listed = {entry["name"] for entry in manifest["files"]} | {"manifest.json"}
        assert listed == {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()}
        assert {"lit_model.pth/meta.pt", "lit_model.pth/__1_0.distcp", "tokenizer.json", "model_config.yaml"} <= listed
        assert manifest["inputs"][0]["manifest"]["kind"] == "dataset"
        assert manifest["tokenizer"]["vocab_size"] == 1024
        assert yaml.safe_load((checkpoint / "hyperparameters.yaml").read_text())["train"]["max_steps"] == 6
        assert yaml.safe_load((checkpoint / "model_config.yaml").read_text())["n_embd"] == TINY_MODEL["n_embd"]
    records = metrics_of(out_dir)
    assert [record["step"] for record in records] == list(range(7))
    assert records[6]["val_loss"] < records[0]["val_loss"]
    assert records[6]["val_perplexity"] == pytest.approx(2.718281828 ** records[6]["val_loss"])
    for key in ("lr", "grad_norm", "tokens_per_s", "data_wait_s", "checkpoint_stall_s", "memory_peak_bytes", "eta_s"):
        assert records[6][key] is not None


def test_tensorboard_holds_the_curves(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out_dir, _ = finished
    events = EventAccumulator(str(out_dir / "tensorboard")).Reload()
    assert [round(e.value, 4) for e in events.Scalars("loss")] == [round(x, 4) for x in losses_of(out_dir)]


def test_the_key_of_wandb_is_nowhere(finished):
    out_dir, process = finished
    assert SECRET not in process.stdout + process.stderr
    places = [out_dir, (Path(os.environ["RAY_TMPDIR"]) / "ray" / "session_latest").resolve()]
    found = subprocess.run(["grep", "-rlaF", SECRET, *map(str, places)], capture_output=True, text=True).stdout
    assert found == ""


def test_the_same_command_again_has_nothing_to_do_and_starts_no_ray(finished, dataset, config, run_script):
    out_dir, _ = finished
    started = time.monotonic()
    process = run_script(
        SCRIPT, "--config", config, "--dataset_path", dataset, "--out_dir", out_dir, "--address", "203.0.113.1:1"
    )
    assert "nothing to do" in process.stdout
    assert time.monotonic() - started < 10


@pytest.mark.slow
def test_a_run_that_is_made_longer_goes_on_from_its_end(finished, dataset, config, run_script, ray_address, tmp_path):
    """And with other settings it is refused."""
    import shutil

    out_dir = tmp_path / "longer"
    shutil.copytree(finished[0], out_dir)
    common = ("--config", config, "--dataset_path", dataset, "--out_dir", out_dir, "--address", ray_address)
    refused = run_script(SCRIPT, *common, "--seed=1", "--train.max_steps=8", check=False)
    assert refused.returncode == 2 and "other settings: seed: was 42, is 1" in refused.stderr
    process = run_script(SCRIPT, *common, "--train.max_steps=8", env={"WANDB_API_KEY": ""})
    assert "steps 6 to 8" in process.stdout
    assert read_manifest(out_dir / "final")["content"]["step"] == 8
    assert read_manifest(out_dir / "step-00000006")["content"]["step"] == 6
    assert [record["step"] for record in metrics_of(out_dir)] == list(range(9))


@pytest.mark.slow
def test_the_users_error_in_a_worker_is_not_tried_again(finished, dataset, config, run_script, ray_address, tmp_path):
    import torch

    weights = weights_of(finished[0] / "final")["model"]
    del weights["lm_head.weight"]
    torch.save(weights, tmp_path / "lit_model.pth")
    out_dir = tmp_path / "out"
    process = run_script(
        SCRIPT, "--config", config, "--dataset_path", dataset, "--out_dir", out_dir, "--address", ray_address,
        "--initial_checkpoint_dir", tmp_path, "--max_failures=-1", check=False, timeout=120,
    )  # fmt: skip
    assert process.returncode == 2 and "no weights for lm_head.weight" in process.stderr
    assert not (out_dir / ".ray").exists()


def start_script(*arguments, **environment) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / SCRIPT), *map(str, arguments)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **environment},
    )  # fmt: skip


def wait_for_step(out_dir: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while not any(record["step"] >= step for record in read_metrics(out_dir)):
        assert time.monotonic() < deadline and process.poll() is None, process.stdout.read()
        time.sleep(0.01)


def training_processes(out_dir: Path) -> list[int]:
    """Process ids of Ray Train's workers that hold this run's metrics or checkpoints open or mapped: by their title."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                title = (entry / "cmdline").read_bytes()
                files = [os.readlink(link) for link in (entry / "fd").iterdir()]
            except OSError:
                continue
            if b"ray::" in title and str(out_dir / "metrics.jsonl") in files:
                found.append(int(entry.name))
    return found


@pytest.fixture(scope="module")
def long_config(tmp_path_factory) -> Path:
    """Steps of some ten milliseconds, so that a run can be hit in its middle."""
    return write_config(
        tmp_path_factory.mktemp("config") / "long.yaml",
        train={"max_steps": 30, "save_interval": 5, "global_batch_size": 32, "micro_batch_size": 1},
        eval={"interval": 10, "max_iters": 1},
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, dataset, long_config, ray_address) -> Path:
    from conftest import run_a_script

    out_dir = tmp_path_factory.mktemp("undisturbed") / "out"
    run_a_script(
        SCRIPT, "--config", long_config, "--dataset_path", dataset, "--out_dir", out_dir, "--address", ray_address
    )
    return out_dir


def assert_same_run(out_dir: Path, undisturbed: Path) -> None:
    import torch

    assert losses_of(out_dir) == losses_of(undisturbed)
    assert digests_of(out_dir) == digests_of(undisturbed)
    expected, found = weights_of(undisturbed / "final")["model"], weights_of(out_dir / "final")["model"]
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


@pytest.mark.long
def test_a_killed_worker_is_started_again_and_the_result_is_the_same(
    tmp_path, dataset, long_config, undisturbed, ray_address
):
    out_dir = tmp_path / "out"
    process = start_script(
        "--config", long_config, "--dataset_path", dataset, "--out_dir", out_dir, "--address", ray_address,
        "--max_failures=1",
    )  # fmt: skip
    wait_for_step(out_dir, 7, process)
    (worker,) = training_processes(out_dir)
    os.kill(worker, signal.SIGKILL)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    assert re.search(rf"warning: rank 0 \(node .*, process 0, pid {worker}\) died of .*SIGKILL", output)
    assert_same_run(out_dir, undisturbed)


@pytest.mark.long
def test_sigterm_saves_and_kill_9_of_the_driver_loses_nothing(tmp_path, dataset, long_config, undisturbed, ray_address):
    out_dir = tmp_path / "out"
    arguments = ("--config", long_config, "--dataset_path", dataset, "--out_dir", out_dir, "--address", ray_address)
    process = start_script(*arguments)
    wait_for_step(out_dir, 7, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert "stopped early" in output and "to go on:" in output
    steps = [json.loads((path / "manifest.json").read_text())["content"]["step"] for path in out_dir.glob("step-*")]
    assert max(steps) == metrics_of(out_dir)[-1]["step"] < 30

    process = start_script(*arguments)
    wait_for_step(out_dir, max(steps) + 7, process)
    process.kill()
    process.wait()

    process = start_script(*arguments)
    wait_for_step(out_dir, max(steps) + 10, process)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130 and "Traceback" not in output, output
    assert "interrupted; what is finished is kept. The same command goes on" in output
    assert not (out_dir / "stop").exists()

    (reached,) = metrics_of(out_dir)[-1:]
    saved, _ = list_checkpoints(out_dir)
    process = start_script(*arguments)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    assert f"resume: from {saved[0].path}" in output
    # Each step is told once, when it is made: not those of the run before.
    told = [int(step) for step in re.findall(r"^step +(\d+)/", output, re.MULTILINE)]
    assert told == list(range(saved[0].step + 1, 31)) and reached["step"] >= saved[0].step
    assert_same_run(out_dir, undisturbed)
    with open(out_dir / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["loss"]]
    assert [int(row["step"]) for row in rows] == list(range(1, 31))
    assert [float(row["loss"]) for row in rows] == losses_of(out_dir)


@pytest.mark.slow
def test_two_nodes_train_with_one_worker_each(tmp_path, dataset, config, run_script):
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        process = run_script(
            SCRIPT, "--config", config, "--dataset_path", dataset, "--out_dir", tmp_path / "out", "--num_devices=1",
            "--address", cluster.address, "--num_nodes=2", "--parallel.sharding=hybrid",
        )  # fmt: skip
    finally:
        cluster.shutdown()
    assert "on 2 cpu processes" in process.stdout and "finished: 6 steps" in process.stdout


@pytest.mark.slow
def test_rays_notice_that_a_node_goes_away_saves_and_ends(tmp_path, dataset, long_config):
    from ray.cluster_utils import Cluster

    out_dir = tmp_path / "out"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=2)
        process = start_script(
            "--config", long_config, "--dataset_path", dataset, "--out_dir", out_dir, "--address", cluster.address,
            "--train.max_steps=100000", "--eval.interval=100000", "--train.save_interval=100000",
        )  # fmt: skip
        wait_for_step(out_dir, 2, process)
        subprocess.run(
            [str(Path(sys.executable).parent / "ray"), "drain-node", "--address", cluster.address,
             "--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "taken back",
             "--deadline-remaining-seconds", "300"],
            check=True, capture_output=True, timeout=60,
        )  # fmt: skip
        output = process.communicate(timeout=150)[0]
    finally:
        cluster.shutdown()
    assert process.returncode == 0, output
    assert "a node will be taken away" in output and "to go on:" in output
    (saved,) = out_dir.glob("step-*")
    assert read_manifest(saved)["content"]["step"] == metrics_of(out_dir)[-1]["step"]


def test_wrong_settings_are_all_named_at_once(tmp_path, run_script, config, dataset):
    process = run_script(
        SCRIPT, "--config", config, "--dataset_path", tmp_path / "nowhere", "--train.min_lr=1",
        "--tokenizer_dir", tmp_path, "--train.global_batch_size=7", "--out_dir", tmp_path / "out", check=False,
    )  # fmt: skip
    assert process.returncode == 2
    for flag in ("--dataset_path=", "--train.min_lr=1", "--tokenizer_dir=", "--train.global_batch_size=7"):
        assert flag in process.stderr
    assert "Traceback" not in process.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_name=Lama-3-8B"], "Near: Llama"),
        (["--model_config.n_heads=3"], "did you mean n_head"),
        (["--model_config.padded_vocab_size=512"], "model_config: has 512 embeddings, the tokenizer 1024 tokens"),
        (["--train.max_seq_length=64"], "block_size is 32"),
        (["--train.max_seq_lenght=16"], "max_seq_lenght"),
        (["--train.max_steps=0"], "must be above 0"),
        (["--train.micro_batch_size=0", "--parallel.shard_size=0", "--num_nodes=0"], "--num_nodes=0"),
        (["--train.max_seq_length=-1"], "--train.max_seq_length=-1: must be above 0"),
        (["--parallel.tensor_parallel_size=1"], "parallel.tensor_parallel_size"),  # was a setting once
        (["--parallel.sharding=hybrid", "--parallel.shard_size=3"], "--parallel.shard_size=3: copies of so many"),
    ],
)
def test_a_wrong_setting_is_named_with_a_remedy(tmp_path, run_script, config, dataset, flags, message):
    process = run_script(
        SCRIPT, "--config", config, "--dataset_path", dataset, "--out_dir", tmp_path / "out", *flags, check=False
    )
    assert process.returncode == 2 and message in process.stderr and "Traceback" not in process.stderr


def test_other_weights_of_a_mixture_are_another_run(tmp_path, config, dataset):
    (tmp_path / "second").symlink_to(dataset)
    results = []
    for weight in (1.0, 3.0):
        mixture = {str(dataset): 1.0, str(tmp_path / "second"): weight}
        settings = dataclasses.replace(
            settings_of(config, dataset, tmp_path / "out", 2), dataset_path=None, data_mixture=mixture
        )
        results.append(result_settings(settings, make_plan(settings)))
    assert check_same_run(json.loads(json.dumps(results[0])), results[0], "out") == []
    another_rate = {**results[0], "optimizer": {**results[0]["optimizer"], "lr": 0.5}}
    assert check_same_run(results[0], another_rate, "out") == ["optimizer.lr: was 0.003, is 0.5"]
    with pytest.raises(UserError, match=r"other settings: data_weights: was \[1.0, 1.0\], is \[1.0, 3.0\]"):
        check_same_run(json.loads(json.dumps(results[0])), results[1], "out")


def test_where_and_how_a_run_goes_on_is_no_part_of_what_it_is(tmp_path, config, dataset):
    here = settings_of(config, dataset, tmp_path / "out", 2)
    there = settings_of(
        config, dataset, tmp_path / "moved", 4, num_nodes=2, max_failures=3, logger_name="wandb", log__project="mine",
        checkpoint__keep_last=7, train__max_time=60, profile_steps=1, address="local", train__micro_batch_size=1,
    )  # fmt: skip
    first, second = (result_settings(settings, make_plan(settings)) for settings in (here, there))
    assert check_same_run(first, second, "out") == ["train.micro_batch_size: was 2, is 1"]


def test_a_run_with_tensor_parallelism_is_refused_and_one_that_only_names_it_goes_on(tmp_path, config, dataset):
    """Manifests have the key from the time when it was a setting."""
    settings = settings_of(config, dataset, tmp_path / "out", 2)
    current = result_settings(settings, make_plan(settings))
    before = json.loads(json.dumps(current))
    before["parallel"]["tensor_parallel_size"] = 1
    assert check_same_run(before, current, "out") == []
    before["parallel"]["tensor_parallel_size"] = 2
    with pytest.raises(
        UserError, match=r"tensor_parallel_size=2\. Tensor parallelism is no longer .*--initial_checkpoint_dir"
    ):
        check_same_run(before, current, "out")


def test_a_weight_too_small_to_be_read_is_refused(tmp_path, config, dataset):
    (tmp_path / "second").symlink_to(dataset)
    mixture = {str(dataset): 1.0, str(tmp_path / "second"): 1e-5}
    settings = settings_of(config, dataset, tmp_path / "out", 2)
    with pytest.raises(UserError, match=r"the weight of .*second is too small"):
        make_plan(dataclasses.replace(settings, dataset_path=None, data_mixture=mixture))


def test_two_trainings_in_one_directory_do_not_meet(tmp_path, run_script, config, dataset):
    (tmp_path / "out").mkdir()
    with held_lock(tmp_path / "out") as mine:
        assert mine
        process = run_script(
            SCRIPT, "--config", config, "--dataset_path", dataset, "--out_dir", tmp_path / "out", check=False
        )
    assert process.returncode == 2 and "another distributed_pretrain.py trains there" in process.stderr
    assert "Traceback" not in process.stderr and not list((tmp_path / "out").iterdir())


def test_a_damaged_dataset_is_named(tmp_path, run_script, config, dataset):
    import shutil

    copy = tmp_path / "data"
    shutil.copytree(dataset, copy)
    (copy / "train" / "index.json").write_text("{}")
    process = run_script(SCRIPT, "--config", config, "--dataset_path", copy, "--out_dir", tmp_path / "o", check=False)
    assert process.returncode == 2 and "is not litdata's" in process.stderr


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, run_script, config, dataset):
    process = run_script(
        SCRIPT, "--config", config, "--dataset_path", dataset, "--out_dir", tmp_path / "out", "--dry_run=true"
    )
    for word in ("84,128 parameters", "memory per process", "activations", "no problems found"):
        assert word in process.stdout
    assert not (tmp_path / "out").exists()


def test_what_no_block_holds_is_reported_per_split(tmp_path, run_script, config, dataset):
    """The test's own counts: the tokens of each chunk beyond whole sequences of context + 1."""
    process = run_script(
        SCRIPT, "--config", config, "--dataset_path", dataset, "--out_dir", tmp_path / "o", "--dry_run"
    )
    context = yaml.safe_load(config.read_text())["model_config"]["block_size"]
    for split in ("train", "val"):
        counts = [chunk["dim"] for chunk in json.loads((dataset / split / "index.json").read_bytes())["chunks"]]
        share = sum(count % (context + 1) for count in counts) / sum(counts)
        assert f"{split}: {share:.2%} of {sum(counts):,} tokens are not read" in process.stdout + process.stderr


def test_a_dry_run_warns_of_a_model_that_cannot_be_exported(tmp_path, run_script, config, dataset):
    process = run_script(
        SCRIPT, "--config", config, "--dataset_path", dataset, "--out_dir", tmp_path / "out", "--dry_run",
        "--model_config.mlp_class_name=LLaMAMoE", "--model_config.n_expert=4", "--model_config.n_expert_per_token=2",
        "--model_config.n_shared_expert=1", "--model_config.moe_intermediate_size=64",
    )  # fmt: skip
    assert "cannot be exported to Hugging Face" in process.stderr and "n_shared_expert is 1" in process.stderr
    assert "no problems found" in process.stdout


def test_list_prints_every_model_that_litgpt_knows(run_script):
    names = run_script(SCRIPT, "--model_name=list").stdout.split("\n")
    assert "Llama-3-8B" in names and len(names) > 100


@pytest.mark.parametrize("path", sorted((ROOT / "config_hub").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_parses_and_starts_with_its_launch_command(path):
    from pretraining.model_config import resolve_model_config
    from pretraining.settings import Settings
    from utils.cli import parse_settings

    text = path.read_text()
    if "distributed_pretrain.py" not in text:
        pytest.skip("a config of another step")
    assert f"--config config_hub/{path.name}" in text
    settings = parse_settings(Settings, "", [f"--config={path}"])
    assert resolve_model_config(settings).padded_vocab_size > 0
    keys = [line for line in text.splitlines() if line.strip() and not line.startswith("#") and ":" in line]
    plain = [line for line in keys if line.rstrip()[-1] != ":" and "#" not in line and "_class_name" not in line]
    assert len(plain) < len(keys) / 4, f"keys without a comment: {plain}"
