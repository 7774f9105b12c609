"""metrics.jsonl, its follower, and the loggers that it feeds."""

from __future__ import annotations

import csv
import os
import subprocess
import threading

import pytest
from conftest import ROOT

from pretraining.events import record_event
from pretraining.follower import Follower
from pretraining.loggers import make_logger, progress_line
from pretraining.metrics_writer import MetricsFile, rewind_metrics
from pretraining.settings import LogSettings
from utils.errors import UserError
from utils.metrics_file import METRICS_NAME, read_metrics, read_records

RECORD = {"step": 3, "tokens": 768, "loss": 2.5, "lr": 1e-3, "grad_norm": 0.7, "tokens_per_s": 1234.0, "eta_s": 61.0}


def test_wandb_that_does_not_start_is_the_users_error_and_keeps_the_key(tmp_path, monkeypatch):
    key = "a-key-that-nobody-may-see"
    monkeypatch.setenv("WANDB_MODE", f"neither-online-nor-{key}")
    with pytest.raises(UserError, match="WANDB_MODE=offline") as raised:
        make_logger("wandb", tmp_path, [], {}, LogSettings(), key)
    assert key not in str(raised.value) and raised.value.__cause__ is None
    assert "WANDB_API_KEY" not in os.environ


@pytest.mark.parametrize("end", ['{"step": 3, "lo', '{"step": 3}', '[3]\n{"step": \xe9\n'])
def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path, end):
    (tmp_path / METRICS_NAME).write_bytes(b'{"step": 1}\n{"st\n{"step": 2}\n' + end.encode("latin-1"))
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    assert read_records(tmp_path / "nowhere") == []


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


class Kept:
    """A logger that remembers what it is told."""

    def __init__(self):
        self.told, self.saw_step_4, self.saw_step_7 = [], threading.Event(), threading.Event()

    def log(self, record):
        self.told.append((record["step"], record["loss"]))
        if record["step"] in (4, 7):
            {4: self.saw_step_4, 7: self.saw_step_7}[record["step"]].set()

    def event(self, record):
        self.told.append(record["event"])

    def undo(self, step):
        self.told.append(f"undo after {step}")


def test_steps_that_a_rollback_undid_are_undone_in_the_loggers_too(tmp_path):
    record_event(tmp_path, "restart", "of an earlier start", step=1)
    kept = Kept()
    with Follower(tmp_path, -1, kept.log, kept):
        metrics = MetricsFile(tmp_path)
        for step in range(5):
            metrics.write({"step": step, "loss": 1.0})
        assert kept.saw_step_4.wait(timeout=30)
        record_event(tmp_path, "went back", "the text was bad", step=5, to_step=2)
        rewind_metrics(tmp_path, 2)
        metrics = MetricsFile(tmp_path)
        for step in range(3, 8):
            metrics.write({"step": step, "loss": 2.0})
        assert kept.saw_step_7.wait(timeout=30)
    before, after = [(step, 1.0) for step in range(5)], [(step, 2.0) for step in range(3, 8)]
    assert kept.told == [*before, "undo after 2", "went back", *after]


def test_csv_drops_the_steps_that_are_undone(tmp_path):
    metrics = MetricsFile(tmp_path)
    logger = make_logger("csv", tmp_path, [], {}, LogSettings(), None)
    for step in range(1, 6):
        metrics.write({"step": step, "loss": 1.0})
        logger.log({"step": step, "loss": 1.0})
    rewind_metrics(tmp_path, 3)
    logger.undo(3)
    logger.event({"event": "went back", "message": "", "step": 5})
    logger.log({"step": 4, "loss": 2.0})
    logger.close()
    with open(tmp_path / "metrics.csv") as file:
        assert [(row["step"], row["loss"]) for row in csv.DictReader(file)] == [
            ("1", "1.0"), ("2", "1.0"), ("3", "1.0"), ("4", "2.0")
        ]  # fmt: skip


def test_tensorboard_shows_events_and_not_the_steps_that_are_undone(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = make_logger("tensorboard", tmp_path, [], {}, LogSettings(), None)
    for step in range(1, 6):
        logger.log({"step": step, "loss": 1.0})
    logger.event({"event": "skipped step", "message": "step 5 updates nothing", "step": 5})
    logger.undo(3)
    logger.event({"event": "went back", "message": "to step 3", "step": 5})
    logger.log({"step": 4, "loss": 2.0})
    logger.close()
    found = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    losses = [(point.step, point.value) for point in found.Scalars("loss")]
    assert losses == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "events"))
    events.Reload()
    texts = {tag: [point.step for point in events.Tensors(tag)] for tag in events.Tags()["tensors"]}
    assert texts == {"skipped step/text_summary": [5], "went back/text_summary": [5]}


def test_wandb_keeps_events_and_says_which_steps_are_undone(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    logger = make_logger("wandb", tmp_path, [], {}, LogSettings(), None)
    for step in range(1, 6):
        logger.log({"step": step, "loss": 1.0})
    logger.event({"event": "went back", "message": "the text was bad", "step": 5})
    logger.undo(3)
    logger.log({"step": 4, "loss": 2.0})
    assert logger._run.summary["undone_steps"] == "4-5"
    assert logger._run.summary["loss"] == 1.0 and logger._run.summary["events/went back"] == 5
    logger.log({"step": 6, "loss": 3.0})
    logger.close()
    wandb.teardown()  # as at a script's end: finish() does not wait for the process that writes the file
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"the text was bad" in file.read_bytes()


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
