"""Steps that must not change the weights are skipped; after too many the run goes back and never reads that text."""

from __future__ import annotations

import collections
import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pretrain_ranks import metrics_of, run_ranks, settings_of, start_ranks, weights_of
from tiny_runs import write_config, write_dataset

from pretraining.bad_steps import MIN_STEPS, WINDOW_STEPS, BadSteps
from pretraining.data_order import SequenceOrder
from pretraining.events import read_events
from pretraining.left_out import LeftOut, leave_out, read_left_out
from pretraining.settings import TrainSettings
from utils.errors import UserError

CONTEXT, BATCH = 32, 8
POISONED = range(200, 203)
"""Steps whose text is random."""


def judged(settings: TrainSettings, losses, norms=None) -> list[bool]:
    """Which of the steps are bad."""
    guard, bad = BadSteps(settings), []
    for loss, norm in zip(losses, norms or [1.0] * len(losses)):
        verdict = guard.judge(loss, norm)
        guard.count(verdict, loss, norm)
        bad.append(verdict is not None)
    return bad


def test_a_step_far_above_the_good_ones_before_it_is_bad_and_stays_out_of_the_comparison():
    noise = np.random.default_rng(0).normal(3, 0.1, 300).tolist()
    losses = [*noise, *[5.0] * 50, *noise]
    assert np.flatnonzero(judged(TrainSettings(spike_sigma=6), losses)).tolist() == list(range(300, 350))
    assert not any(judged(TrainSettings(), losses))
    norms = [1.0] * 320
    norms[310] = 30.0
    assert np.flatnonzero(judged(TrainSettings(spike_sigma=6), [3.0] * 320, norms)).tolist() == [310]


def test_nothing_is_a_spike_before_there_is_something_to_compare_with():
    assert not any(judged(TrainSettings(spike_sigma=6), [1.0] * (MIN_STEPS - 1) + [100.0]))
    assert judged(TrainSettings(spike_sigma=6), [1.0] * MIN_STEPS + [100.0])[-1]


def test_the_judge_resumes_where_it_was():
    settings = TrainSettings(spike_sigma=3, max_spikes=4)
    losses = [*np.random.default_rng(1).normal(3, 0.1, WINDOW_STEPS + 60).tolist(), 9.0, 9.0, float("nan")]
    one, other = BadSteps(settings), BadSteps(settings)
    for loss in losses:
        for guard in (one, other):
            guard.count(guard.judge(loss, 1.0), loss, 1.0)
        resumed = BadSteps(settings)
        resumed.restore(json.loads(json.dumps(other.state())))
        other = resumed
    assert one.state() == other.state()
    assert (one.in_a_row, one.nonfinite_in_a_row, one.must_go_back) == (3, 1, False)
    one.count(one.judge(9.0, 1.0), 9.0, 1.0)
    assert one.must_go_back


def test_what_is_left_out_is_never_read_and_the_rest_moves_up():
    left_out = LeftOut().without(range(10, 14)).without(range(10, 12)).without(range(2, 3))
    assert left_out.ranges == ((2, 3), (10, 16))
    gone = {p for first, end in left_out.ranges for p in range(first, end)}
    expected = [p for p in range(60) if p not in gone][:40]
    assert left_out.positions(np.arange(40)).tolist() == expected
    assert [left_out.end_of(n) for n in range(1, 41)] == [p + 1 for p in expected]
    assert LeftOut().positions(np.arange(5)).tolist() == list(range(5))


def test_a_checkpoint_agrees_if_it_read_nothing_of_it_and_left_out_nothing_else():
    left_out = LeftOut(((8, 16), (24, 32)))

    def manifest(position, ranges=()):
        return {"content": {"position": position, "left_out": [list(pair) for pair in ranges]}}

    assert left_out.agrees_with(manifest(8)) and left_out.agrees_with({"content": {"position": 4}})
    assert not left_out.agrees_with(manifest(9))
    assert left_out.agrees_with(manifest(24, ((8, 16),)))
    assert not left_out.agrees_with(manifest(33, ((8, 16),)))
    assert left_out.agrees_with(manifest(40, ((8, 16), (24, 32))))
    assert not left_out.agrees_with(manifest(40, ((8, 16), (20, 32))))


def test_the_third_return_to_a_step_ends_the_run(tmp_path):
    left_out, returns = LeftOut(), collections.Counter()
    for attempt in range(2):
        assert leave_out(tmp_path, left_out, range(16, 24), 3, returns) is None
        left_out = read_left_out(tmp_path)
        assert len(left_out.went_back) == attempt + 1
    assert "--optimizer.lr" in leave_out(tmp_path, left_out, range(16, 24), 3, returns)
    assert leave_out(tmp_path, left_out, range(16, 24), 3, collections.Counter()) is None  # a new start tries again


@pytest.mark.parametrize("text", ["null", "{}", '{"ranges": [[3, 1]]}', '{"ranges": [["a", 1]]}', '{"ranges": 3}', "{"])
def test_a_file_that_is_not_ours_is_refused(tmp_path, text):
    (tmp_path / "left_out.json").write_text(text)
    with pytest.raises(UserError, match=r"left_out\.json"):
        read_left_out(tmp_path)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """Counting, but for the blocks that the poisoned steps read: these are random."""
    directory = tmp_path_factory.mktemp("poisoned") / "merged"
    num_blocks = 2000
    tokens = (np.arange(num_blocks * (CONTEXT + 1)) * 7 % 97).reshape(num_blocks, -1)
    order = SequenceOrder([num_blocks], None, 42)
    poisoned = order.locate(np.arange(POISONED.start * BATCH, POISONED.stop * BATCH)).block
    tokens[poisoned] = np.random.default_rng(0).integers(100, 1024, (len(poisoned), CONTEXT + 1))
    write_dataset(directory / "train", [tokens.ravel()], 1000, chunk_documents=1)
    write_dataset(directory / "val", [tokens[:16].ravel()], 1000, chunk_documents=1)
    return directory


def run_settings(tmp_path, dataset, name, **changes):
    config = write_config(
        tmp_path / "spikes.yaml",
        train={"max_steps": 220, "save_interval": 15, "spike_sigma": 6, "max_spikes": 3},
        eval={"interval": None, "final_validation": False, "initial_validation": False},
        checkpoint={"keep_last": None},
    )
    return settings_of(config, dataset, tmp_path / name, 2, **changes)


def same_weights(one: Path, other: Path) -> bool:
    a, b = weights_of(one / "final")["model"], weights_of(other / "final")["model"]
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def of_steps(out_dir: Path) -> list[tuple]:
    return [(r["step"], r["loss"], r["grad_norm"], r["batch_digest"], r["spike_steps"]) for r in metrics_of(out_dir)]


@pytest.mark.long
def test_the_run_goes_back_and_is_the_one_that_never_had_that_text(tmp_path, dataset):
    spikes = run_settings(tmp_path, dataset, "spikes")
    run_ranks([spikes], 2, tmp_path / "job")
    out_dir = Path(spikes.out_dir)
    assert read_left_out(out_dir).ranges == ((POISONED.start * BATCH, POISONED.stop * BATCH),)
    assert read_left_out(out_dir).went_back == ((POISONED.stop, 195),)
    events = [(event["event"], event["step"]) for event in read_events(out_dir)]
    assert events == [*(("skipped step", step + 1) for step in POISONED), ("went back", POISONED.stop)]
    manifest = json.loads((out_dir / "final" / "manifest.json").read_text())
    assert manifest["content"]["left_out"] == [[1600, 1624]] and manifest["content"]["position"] == 220 * BATCH + 24
    assert manifest["content"]["step"] == 220

    clean = run_settings(tmp_path, dataset, "clean", train__spike_sigma="null", train__max_spikes="null")
    Path(clean.out_dir).mkdir()
    (Path(clean.out_dir) / "left_out.json").write_text('{"ranges": [[1600, 1624]]}')
    run_ranks([clean], 2, tmp_path / "job-clean")
    assert of_steps(out_dir) == of_steps(Path(clean.out_dir))
    assert same_weights(out_dir, Path(clean.out_dir))

    # Killed as soon as the decision is on disk, in the middle of going back.
    killed = run_settings(tmp_path, dataset, "killed")
    processes = start_ranks([killed], 2, tmp_path / "job-killed")
    decision = Path(killed.out_dir) / "left_out.json"
    while not decision.exists() and all(process.is_alive() for process in processes):
        time.sleep(0.001)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [-signal.SIGKILL] * 2
    run_ranks([killed], 2, tmp_path / "job-killed-again")
    assert of_steps(Path(killed.out_dir)) == of_steps(out_dir)
    assert same_weights(out_dir, Path(killed.out_dir))


@pytest.mark.slow
def test_spikes_are_skipped_where_the_run_is_not_to_go_back(tmp_path, dataset):
    skipped = run_settings(tmp_path, dataset, "skipped", train__max_spikes="null", train__max_steps=210)
    run_ranks([skipped], 2, tmp_path / "job")
    assert [r["step"] for r in metrics_of(skipped.out_dir) if r["step"] > 100 and r["loss"] > 6.5] == [
        s + 1 for s in POISONED
    ]
    assert metrics_of(skipped.out_dir)[-1]["spike_steps"] == len(POISONED)
    assert "step 201 updates nothing: loss" in (tmp_path / "job" / "rank-0.log").read_text()


@pytest.mark.slow
def test_a_learning_rate_that_is_too_high_ends_the_run_and_does_not_circle(tmp_path, dataset):
    high = run_settings(
        tmp_path, dataset, "high", optimizer__lr=3.0, train__spike_sigma=1, train__max_spikes=1, train__max_steps=400
    )
    codes = run_ranks([high], 2, tmp_path / "job", check=False)
    assert all(codes)
    assert "went back to step" in (tmp_path / "job" / "rank-0.log").read_text()
