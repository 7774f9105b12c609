"""metrics.jsonl, its follower, and the loggers that it feeds."""

from __future__ import annotations

import csv
import os
import subprocess
import threading

import pytest
from conftest import ROOT

from pretraining.loggers import Follower, make_logger, progress_line
from pretraining.metrics_writer import MetricsFile, rewind_metrics
from pretraining.settings import LogSettings
from utils.errors import UserError
from utils.metrics_file import METRICS_NAME, read_metrics

RECORD = {"step": 3, "tokens": 768, "loss": 2.5, "lr": 1e-3, "grad_norm": 0.7, "tokens_per_s": 1234.0, "eta_s": 61.0}


def test_wandb_that_does_not_start_is_the_users_error_and_keeps_the_key(tmp_path, monkeypatch):
    key = "a-key-that-nobody-may-see"
    monkeypatch.setenv("WANDB_MODE", f"neither-online-nor-{key}")
    with pytest.raises(UserError, match="WANDB_MODE=offline") as raised:
        make_logger("wandb", tmp_path, [], {}, LogSettings(), key)
    assert key not in str(raised.value) and raised.value.__cause__ is None
    assert "WANDB_API_KEY" not in os.environ


def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path):
    (tmp_path / METRICS_NAME).write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


def test_rewinding_drops_what_came_after_the_checkpoint(tmp_path):
    metrics = MetricsFile(tmp_path)
    for step in range(6):
        metrics.write({"step": step, "loss": 6.0 - step})
    assert [record["step"] for record in rewind_metrics(tmp_path, 3)] == [0, 1, 2, 3]
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1, 2, 3]


def test_the_follower_passes_each_step_on_once_even_after_a_rewind(tmp_path):
    seen, all_there = [], threading.Event()

    def consume(record):
        seen.append(record["step"])
        if record["step"] == 7:
            all_there.set()

    with Follower(tmp_path, -1, consume):
        metrics = MetricsFile(tmp_path)
        for step in range(5):
            metrics.write({"step": step})
        rewind_metrics(tmp_path, 2)  # the workers died and start again from step 2
        metrics = MetricsFile(tmp_path)
        for step in range(3, 8):
            metrics.write({"step": step})
        assert all_there.wait(timeout=30)
    assert seen == list(range(8))


def test_a_logger_that_fails_does_not_end_the_run(tmp_path, capsys):
    failed = threading.Event()

    def consume(record):
        failed.set()
        raise ConnectionError("no network")

    with Follower(tmp_path, -1, consume):
        MetricsFile(tmp_path).write({"step": 1})
        assert failed.wait(timeout=30)
    assert "ConnectionError: no network" in capsys.readouterr().err


def test_csv_holds_the_steps_from_before_a_resume_too(tmp_path):
    logger = make_logger("csv", tmp_path, [{"step": 1, "loss": 3.0}], {}, LogSettings(), None)
    logger.log(RECORD)
    assert logger.close() == []
    with open(tmp_path / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["loss"]) for row in rows] == [("1", "3.0"), ("3", "2.5")]


def test_wandb_without_a_key_is_offline_and_prints_the_command_to_upload(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    logger = make_logger("wandb", tmp_path, [], {"seed": 42}, LogSettings(), None)
    logger.log(RECORD)
    (line,) = logger.close()
    assert "wandb sync " in line
    directory = line.split("wandb sync ")[1]
    assert [name for name in os.listdir(directory) if name.endswith(".wandb")]
    first_id = (tmp_path / "wandb_run_id").read_text()
    make_logger("wandb", tmp_path, [RECORD], {"seed": 42}, LogSettings(), None).close()
    assert (tmp_path / "wandb_run_id").read_text() == first_id  # one curve, however often the run is resumed


def test_a_key_of_wandb_is_written_into_no_file(tmp_path):
    """With a key wandb goes online: in a process of its own, that has no network to reach."""
    pytest.importorskip("wandb")
    key = "0123456789abcdef0123456789abcdef01234567"
    code = (
        "import os, sys; from pathlib import Path\n"
        "from pretraining.loggers import make_logger; from pretraining.settings import LogSettings\n"
        f"make_logger('wandb', Path({str(tmp_path)!r}), [], {{}}, LogSettings(), sys.stdin.read())\n"
    )
    process = subprocess.Popen(
        [os.sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "5", "HOME": str(tmp_path)},
    )  # fmt: skip
    try:
        output = process.communicate(key, timeout=40)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        output = process.communicate()[0]
    assert key not in output
    found = subprocess.run(["grep", "-rlaF", key, str(tmp_path)], capture_output=True, text=True).stdout
    assert found == ""


def test_the_progress_line_is_for_people():
    line = progress_line({**RECORD, "val_loss": 2.25, "val_bits_per_byte": 0.9, "mfu": 0.41}, total_steps=300)
    assert line == (
        "step   3/300 (1.0%) | loss 2.5000 | val 2.2500 (0.900 bits/byte) | norm 0.70 | lr 1.00e-03 | 1.23 k tok/s | "
        "mfu 41.0% | eta 1 min 1 s"
    )
