"""For how long the watchdog waits, and the limits of the process groups behind it."""

from __future__ import annotations

import time

import pytest
from pretrain_ranks import run_ranks, settings_of
from tiny_runs import write_config

from pretraining.heartbeat import Beat, Heartbeat, Process, read_beat
from pretraining.node_watcher import Seen
from pretraining.settings import Settings, TrainSettings
from pretraining.watchdog import Watchdog, Watchers


def seen(phase: str, longest_s: float = 0.0, steps_done: int = 9, state: str = "S") -> Seen:
    process = Process(0, 1, 1, "out", "node", "process 0", None)
    return Seen(process, Beat(9, phase, steps_done, 0.0, longest_s), 0.0, state, None, False)


@pytest.mark.parametrize(
    ("others", "expected_s"),
    [
        ([seen("validation", 9)], 90),
        ([seen("validation", 2)], 60),
        ([seen("save", 100)], 1000),
        ([seen("save", 3)], 600),
        ([seen("save", 3000)], 3600),
        ([seen("validation", 9), seen("save", 100)], 1000),
        ([seen("reading data"), seen("validation", 9)], 90),
        # Nothing is known of its length.
        ([seen("validation")], 3600),
        ([seen("ending", 2)], 3600),
        ([seen("start", 2), seen("validation", 2)], 3600),
        ([seen("forward and backward pass", steps_done=1)], 3600),
        # Within a step, or stopped.
        ([seen("reading data")], 7),
        ([seen("validation", 9, state="T")], 7),
    ],
)
def test_how_long_a_process_may_stand_still(others, expected_s):
    watchdog = Watchdog(Watchers(), "token", Settings(train=TrainSettings(step_timeout=7)))
    assert watchdog.timeout_s(others[0], others) == expected_s


def test_a_heartbeat_says_how_long_its_phase_has_taken_before(tmp_path):
    path = tmp_path / "rank-0.beat"
    heartbeat = Heartbeat(path)
    heartbeat.beat("validation")
    assert read_beat(path).longest_s == 0
    began = time.monotonic()
    time.sleep(0.05)
    heartbeat.beat("reading data")
    took_s = time.monotonic() - began
    for _ in range(2):
        heartbeat.beat("validation")
        assert 0.05 <= read_beat(path).longest_s <= took_s + 0.01
        heartbeat.beat("save", 7.5)  # what it takes in the background counts too
        assert read_beat(path).longest_s == 7.5


def test_every_process_group_has_the_intended_limit(tmp_path, dataset):
    config = write_config(tmp_path / "tiny.yaml", train={"max_steps": 1}, parallel={"sharding": "hybrid"})
    settings = settings_of(config, dataset, tmp_path / "run", 2, train__slow_timeout=7200, parallel__shard_size=1)
    run_ranks([settings], 2, tmp_path / "job", {"PRINT_TIMEOUTS": "1"})
    lines = (tmp_path / "job" / "rank-0.log").read_text().splitlines()
    timeouts = [line.split()[1] for line in lines if line.startswith("timeout_s")]
    assert len(timeouts) >= 3 and set(timeouts) == {"7800.0"}
