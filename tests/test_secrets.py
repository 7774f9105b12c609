"""Keys in the environment are to be found nowhere: no output, no file, no Ray log, not in Ray's state API."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from test_pipeline import TINY_CONFIG, run_pipeline

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef5ec2e7ab",
    "HF_TOKEN": "hf_madeUpTokenMadeUpTokenMadeUp5ec2e7",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def cluster(tmp_path_factory):
    """(address, log directory) of a cluster with a dashboard, which `ray start` makes from a shell without secrets."""
    directory = Path("/tmp") / f"ray-secrets-{os.getpid()}"  # a Unix socket's path must be short
    port, dashboard = free_port(), free_port()
    env = {name: value for name, value in os.environ.items() if name not in SECRETS}
    ray = Path(sys.executable).with_name("ray")
    options = [f"--port={port}", f"--dashboard-port={dashboard}", f"--temp-dir={directory}", "--num-cpus=4"]
    env["RAY_AUTH_MODE"] = "token"
    subprocess.run([ray, "get-auth-token", "--generate"], check=True, env=env, capture_output=True, timeout=60)
    subprocess.run([ray, "start", "--head", *options], check=True, env=env, capture_output=True, timeout=120)
    yield f"127.0.0.1:{port}", directory
    ours = [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(str(directory) in part for part in process.info["cmdline"] or [])
    ]
    for process in ours:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(ours, timeout=20)
    shutil.rmtree(directory, ignore_errors=True)


def state_of(address: str) -> str:
    """All that Ray's state API tells, as text."""
    program = (
        "import json, ray; from ray.util import state\n"
        f"ray.init(address={address!r}, logging_level='ERROR')\n"
        "for name in ('actors', 'jobs', 'nodes', 'workers', 'tasks', 'objects', 'runtime_envs', 'placement_groups'):\n"
        "    found = getattr(state, 'list_' + name)(detail=True, limit=1000, raise_on_missing_output=False)\n"
        "    print(name, len(found), [getattr(entry, 'asdict', lambda: dict(entry))() for entry in found])\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "RAY_AUTH_MODE": "token", "RAY_ADDRESS": address},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    assert "workers" in process.stdout
    return process.stdout


@pytest.mark.parametrize(
    "command",
    [
        "optimize_dataset.py --input_dir=/nowhere --tokenizer_dir=/nowhere --output_dir=/nowhere/out",
        "merge_files.py --source_dir=/nowhere --target_dir=/nowhere/out",
        "distributed_pretrain.py --dataset_path=/nowhere",
        "convert_pretrained_checkpoint.py /nowhere /nowhere/out",
    ],
)
def test_what_a_failing_command_says_with_details_has_no_key(command, run_script):
    process = run_script(*command.split(), "-v", env=SECRETS, check=False)
    assert process.returncode == 2 and "Traceback" in process.stderr
    assert not [secret for secret in SECRETS.values() if secret in process.stdout + process.stderr]


@pytest.mark.long
def test_made_up_keys_are_nowhere(cluster, tmp_path, parquet_dir, tokenizer_dir):
    address, ray_dir = cluster
    (tmp_path / "tiny.yaml").write_text(TINY_CONFIG)
    process = run_pipeline(
        tmp_path,
        **SECRETS,
        WANDB_MODE="offline",
        PARQUET=parquet_dir,
        TOKENIZER=tokenizer_dir,
        WORK=tmp_path / "work",
        CONFIG=tmp_path / "tiny.yaml",
        OPTIMIZE_FLAGS="--val_fraction=0.1 -v",
        TRAIN_FLAGS="--logger_name=wandb --train.max_steps=3 -v",
        EXPORT_FLAGS="-v",
        RAY_ADDRESS=address,
        RAY_AUTH_MODE="token",
    )
    said = {
        "output": process.stdout + process.stderr,
        "state": state_of(address),
    }
    searched = 0
    for directory in (tmp_path, ray_dir):
        for path in directory.rglob("*"):
            if path.is_file() and not path.is_symlink():
                said[str(path)] = path.read_bytes().decode("latin-1")
                searched += 1
    assert searched > 50 and any("logs" in name for name in said)
    assert any("wandb" in name for name in said), "wandb was not used, so this shows nothing"
    for secret in SECRETS.values():
        leaks = [name for name, text in said.items() if secret in text]
        assert not leaks, json.dumps(leaks)
