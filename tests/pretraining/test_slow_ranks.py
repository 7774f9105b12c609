"""Whether a process that is slower than the others is named, and the times of all of them are in the records."""

from __future__ import annotations

import numpy as np
import pytest
from pretrain_ranks import SLOW_S, metrics_of, run_ranks, settings_of
from test_failures import Run
from tiny_runs import write_config

from pretraining.events import read_events
from pretraining.slow_ranks import Slowness


def test_a_rank_is_named_once_after_50_slow_steps_in_a_row():
    slowness = Slowness(4)
    even, slow = np.array([1.0, 1.1, 0.9, 1.0]), np.array([1.0, 1.1, 0.9, 1.2])
    assert [slowness.add(slow) for _ in range(49)] == 49 * [[]]
    assert slowness.add(even) == []
    assert [slowness.add(slow) for _ in range(49)] == 49 * [[]]
    assert slowness.add(slow) == [3]
    assert slowness.add(even) == [] and [slowness.add(slow) for _ in range(60)] == 60 * [[]]


def test_of_two_ranks_the_faster_one_is_the_measure():
    slowness = Slowness(2)
    assert [slowness.add(np.array([1.2, 1.0])) for _ in range(50)][-1] == [0]


@pytest.mark.long
def test_a_slow_process_is_named_with_its_place_and_the_others_wait_for_it(tmp_path, dataset):
    config = write_config(tmp_path / "tiny.yaml", train={"max_steps": 20, "save_interval": None}, eval={"interval": 8})
    run_ranks([settings_of(config, dataset, tmp_path / "run", 2)], 2, tmp_path / "job", {"SLOW_RANK": "1"})
    (event,) = read_events(tmp_path / "run")
    assert event["event"] == "slow rank" and event["rank"] == 1 and 7 <= event["step"] <= 20
    assert event["compute_s"] > event["median_compute_s"] + SLOW_S
    assert "slow: rank 1 (unknown node) computes for" in event["message"]
    records = [record for record in metrics_of(tmp_path / "run") if "loss" in record]
    assert "slowest_rank" not in records[0]  # nothing is known yet
    for record in records[2:]:
        assert record["slowest_rank"] == 1
        assert record["rank_compute_s_max"] > record["rank_compute_s_min"] + SLOW_S
    middle = sorted(records[2:], key=lambda record: record["rank_wait_s_max"])[9]
    assert middle["rank_wait_s_max"] > middle["rank_wait_s_min"] + SLOW_S
    assert middle["rank_compute_s_max"] + middle["rank_wait_s_min"] < 1.5 * middle["step_s"]


@pytest.mark.slow
def test_the_user_reads_which_process_of_which_node_is_slow(tmp_path, dataset, ray_address):
    config = write_config(tmp_path / "tiny.yaml", train={"max_steps": 70, "save_interval": None}, eval={"interval": 40})
    flags = ["--config", config, "--dataset_path", dataset, "--address", ray_address]
    run = Run(tmp_path / "out", "tests/faulty_training.py", "slow", tmp_path / "mark", *flags)
    output = run.output()
    assert run.process.returncode == 0, output
    (event,) = read_events(tmp_path / "out")
    assert event["event"] == "slow rank" and event["rank"] == 1
    assert ", process 1) computes for" in event["message"] and "slow: rank 1 (node " in output
