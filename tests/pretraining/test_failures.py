"""Training processes that die, fail, stop or hang, in real runs on a real Ray cluster."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import ROOT, real_documents, run_a_script
from pretrain_ranks import digests_of, losses_of, weights_of
from tiny_runs import tokenize_dataset, write_config

from pretraining.events import read_events, record_event
from pretraining.failures import Failure, Restarts, TrainingEnded, cause_of_death
from pretraining.heartbeat import read_beat
from utils.files import TEMPORARY_PREFIX

SCRIPT = "distributed_pretrain.py"


@pytest.fixture(scope="module")
def flags(tmp_path_factory, tokenizer_dir, ray_address) -> list[str]:
    directory = tmp_path_factory.mktemp("failures")
    dataset = tokenize_dataset(directory / "merged", real_documents()[:60], tokenizer_dir)
    config = write_config(
        directory / "config.yaml",
        train={"max_steps": 30, "save_interval": 5, "global_batch_size": 32, "micro_batch_size": 1},
        eval={"interval": 10, "max_iters": 1},
    )
    return ["--config", str(config), "--dataset_path", str(dataset), "--address", ray_address]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory, flags) -> Path:
    """The run that nothing happens to."""
    out_dir = tmp_path_factory.mktemp("quiet") / "out"
    run_a_script(SCRIPT, *flags, "--out_dir", out_dir)
    assert read_events(out_dir) == []
    return out_dir


def assert_same_run(out_dir: Path, quiet: Path) -> None:
    import torch

    assert losses_of(out_dir) == losses_of(quiet)
    assert digests_of(out_dir) == digests_of(quiet)
    expected, found = weights_of(quiet / "final")["model"], weights_of(out_dir / "final")["model"]
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


class Run:
    """The script in the background, and its training processes as their heartbeats show them."""

    def __init__(self, out_dir: Path, *command):
        self.out_dir = out_dir
        self.pids: set[int] = set()
        self.process = subprocess.Popen(
            [sys.executable, *map(str, command), "--out_dir", str(out_dir)], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def wait_for(self, rank: int, condition) -> int:
        """The process id of a rank, as soon as condition(step, phase) holds of one that was not returned before."""
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.process.stdout.read()
            with contextlib.suppress(OSError):  # a start's directory goes away while this looks into it
                for path in Path(tempfile.gettempdir()).glob(f"pretraining-*/rank-{rank}.json"):
                    process, beat = json.loads(path.read_text()), read_beat(path.with_suffix(".beat"))
                    is_ours = process.get("out_dir") == str(self.out_dir) and process["pid"] not in self.pids
                    if is_ours and condition(beat.step, beat.phase):
                        self.pids.add(process["pid"])
                        return process["pid"]
            time.sleep(0.0005)
        raise AssertionError("the run did not get there")

    def output(self) -> str:
        return self.process.communicate(timeout=300)[0]


def wait_for_hang(out_dir: Path, within_s: float) -> None:
    began = time.monotonic()
    while not [event for event in read_events(out_dir) if event["event"] == "hang"]:
        assert time.monotonic() - began < within_s
        time.sleep(0.1)


@pytest.mark.long
def test_a_crash_and_a_stopped_process_are_told_and_change_nothing(tmp_path, flags, quiet):
    """Each is the only restart that is allowed, and the checkpoint between them clears the count."""
    out_dir = tmp_path / "out"
    run = Run(out_dir, SCRIPT, *flags, "--max_failures=1", "--train.step_timeout=5")
    crashed = run.wait_for(1, lambda step, _: step >= 7)
    os.kill(crashed, signal.SIGSEGV)
    stopped = run.wait_for(1, lambda step, _: step >= 17)
    os.kill(stopped, signal.SIGSTOP)
    wait_for_hang(out_dir, 5 + 15)
    output = run.output()
    assert run.process.returncode == 0, output
    assert_same_run(out_dir, quiet)
    assert not Path(f"/proc/{stopped}").exists()

    crash, hang, restart = read_events(out_dir)
    assert (crash["event"], hang["event"], restart["event"]) == ("restart", "hang", "restart")
    assert f"pid {crashed}) died of SIGSEGV (Segmentation fault)" in crash["message"]
    assert "Fatal Python error: Segmentation fault. Its log is in" in crash["message"]
    # The signals come a little later, or more on a busy machine.
    assert crash["from_step"] in (5, 10) and crash["from_step"] + crash["lost_steps"] >= 7
    assert crash["restarts_left"] == 0
    (log,) = (out_dir / "failures").iterdir()
    assert "SIGSEGV received" in log.read_text()
    assert hang["ranks"] == [1] and f"pid {stopped}) is stopped by a signal" in hang["message"]
    assert "pretraining/trainer.py" in (Path(hang["stacks"]) / "rank-0.txt").read_text()
    assert "pretraining/trainer.py" in (Path(hang["stacks"]) / "rank-1.txt").read_text()
    assert restart["from_step"] in (15, 20, 25) and restart["restarts_left"] == 0
    # The user reads two paragraphs per failure at most, and no report of a crash.
    assert "Traceback" not in output and "SIGSEGV received" not in output and "Extension modules" not in output
    assert output.count("warning:") == 3 + output.count("documents begin with BOS and do not end with EOS")


@pytest.mark.slow
def test_a_process_that_is_stopped_in_a_validation_or_during_a_save(tmp_path, flags, quiet):
    out_dir = tmp_path / "out"
    run = Run(out_dir, SCRIPT, *flags, "--max_failures=1", "--train.step_timeout=5")
    os.kill(run.wait_for(1, lambda step, phase: step == 10 and phase == "validation"), signal.SIGSTOP)
    os.kill(run.wait_for(1, lambda *_: any(out_dir.glob(f"{TEMPORARY_PREFIX}step-*"))), signal.SIGSTOP)
    output = run.output()
    assert run.process.returncode == 0, output
    assert_same_run(out_dir, quiet)
    hangs = [event for event in read_events(out_dir) if event["event"] == "hang"]
    assert [hang["ranks"] for hang in hangs] == [[1], [1]]
    assert hangs[0]["phases"]["1"] == "validation"


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["sleep", "raise"])
def test_a_reader_that_sleeps_or_fails(tmp_path, flags, quiet, fault):
    out_dir = tmp_path / "out"
    run = Run(out_dir, "tests/faulty_training.py", fault, tmp_path / "mark", *flags, "--train.step_timeout=5")
    output = run.output()
    assert run.process.returncode == 0, output
    assert_same_run(out_dir, quiet)
    told = read_events(out_dir)[0]
    if fault == "sleep":
        assert told["event"] == "hang" and told["ranks"] == [1]
        assert "is in the phase 'reading data' after step" in told["message"]
        assert (
            "time.sleep(1000)" in (Path(told["stacks"]) / "rank-1.txt").read_text()
            or "faulty_training" in (Path(told["stacks"]) / "rank-1.txt").read_text()
        )
    else:
        assert "rank 1 (" in told["message"] and "RuntimeError: the reader found a dragon" in told["message"]
        assert "Traceback" not in output


@pytest.mark.slow
def test_a_hang_in_a_validation_is_measured_by_the_ones_before(tmp_path, flags, quiet):
    """After a minute, since they took less than 6 s; not after an hour."""
    out_dir = tmp_path / "out"
    run = Run(out_dir, "tests/faulty_training.py", "validation", tmp_path / "mark", *flags)
    assert run.wait_for(1, lambda *_: (tmp_path / "mark").exists())
    wait_for_hang(out_dir, 60 + 15)
    output = run.output()
    assert run.process.returncode == 0, output
    assert_same_run(out_dir, quiet)
    hang = read_events(out_dir)[0]
    assert hang["ranks"] == [1] and hang["phases"]["1"] == "validation"
    assert "validation_that_sleeps" in (Path(hang["stacks"]) / "rank-1.txt").read_text()


@pytest.mark.slow
def test_the_same_failure_each_time_ends_the_run_and_says_so(tmp_path, flags):
    out_dir = tmp_path / "out"
    run = Run(out_dir, "tests/faulty_training.py", "raise-always", tmp_path / "mark", *flags, "--max_failures=1")
    output = run.output()
    assert run.process.returncode == 3, output
    assert "It was the same each of 2 times, at the same step" in output
    assert output.rstrip().splitlines()[-1].startswith("  python tests/faulty_training.py")
    assert "Traceback" not in output
    assert [event["event"] for event in read_events(out_dir)] == ["restart", "end"]


FULL = "SIGKILL: the kernel ended it, because its node's memory (not a GPU's) was full"


@pytest.mark.parametrize(
    ("status", "out_of_memory", "log", "said", "expected"),
    [
        (signal.SIGSEGV, False, "", "", "SIGSEGV (Segmentation fault)"),
        (signal.SIGKILL, True, "", "", FULL),
        (signal.SIGKILL, False, "", "", "SIGKILL (Killed)"),
        (3 << 8, False, "", "", "exit code 3"),
        # What is left to go by where the kernel does not give the exit status.
        (None, False, "*** SIGABRT received at time=1 on cpu 1 ***", "", "SIGABRT (Aborted)"),
        (None, True, "", "", FULL),
        (None, False, "", "ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory.",
         "out of memory: Ray ended it, because its node's memory (not a GPU's) was nearly full"),
    ],
)  # fmt: skip
def test_the_cause_of_a_death_is_named(status, out_of_memory, log, said, expected):
    assert cause_of_death(status, out_of_memory, log, said) == expected


@pytest.mark.long
def test_restarts_are_counted_until_there_is_progress(tmp_path, quiet):
    import shutil

    restarts = Restarts(tmp_path, max_failures=2)
    restarts.add(Failure("A died.", "A", 3))
    restarts.add(Failure("B died.", "B", 4))
    shutil.copytree(quiet / "step-00000020", tmp_path / "step-00000020")
    restarts.add(Failure("A died.", "A", 22))
    restarts.add(Failure("A died.", "A", 22))
    with pytest.raises(TrainingEnded, match="the same each of 3 times, at the same step"):
        restarts.add(Failure("A died.", "A", 22))
    events = read_events(tmp_path)
    assert [event.get("restarts_left") for event in events] == [1, 0, 1, 0, None]
    assert [event.get("lost_steps") for event in events] == [3, 4, 2, 2, None]
    assert "step-00000020 (step 20); 2 steps after it are done again. 1 restart left" in events[2]["message"]


def test_events_are_appended_whole_and_a_cut_line_is_passed_over(tmp_path):
    record_event(tmp_path, "restart", "first", step=1)
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"event": "cut sh')
    assert [event["message"] for event in read_events(tmp_path)] == ["first"]
