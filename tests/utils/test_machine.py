"""Cores are counted as a container's quota and the scheduler's affinity allow; threads work a bounded way ahead."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading

import pytest
from conftest import ROOT

from utils import machine


@pytest.mark.parametrize(
    "written, expected", [("max 100000\n", 8), ("150000 100000\n", 2), ("1000 100000\n", 1), ("?", 8)]
)
def test_the_quota_of_a_container_counts(tmp_path, monkeypatch, written, expected):
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path)
    (tmp_path / "cpu.max").write_text(written)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert machine.available_cpus() == expected


def test_the_quota_of_an_older_container_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    for quota, expected in (("-1\n", 8), ("300000\n", 3)):
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota)
        assert machine.available_cpus() == expected


def test_affinity_counts():
    program = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
        "from utils.machine import available_cpus; print(available_cpus())"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT).stdout == "1\n"


def test_a_map_on_threads_keeps_the_order_and_a_bounded_number_ahead():
    begun, both_run = [], threading.Barrier(2)

    def work(item: int) -> int:
        begun.append(item)
        if item < 2:
            both_run.wait(timeout=30)  # two items are worked on at the same time
        return item * item

    taken = []
    for result in machine.ordered_map(work, itertools.islice(itertools.count(), 50), num_threads=2, max_ahead=4):
        taken.append(result)
        assert len(begun) <= len(taken) + 3
    assert taken == [item * item for item in range(50)]


def test_an_error_on_a_thread_takes_the_place_of_its_result_and_ends_the_work():
    begun = []

    def work(item: int) -> float:
        begun.append(item)
        return 1 / (item - 2)

    results = machine.ordered_map(work, range(1000), num_threads=2, max_ahead=4)
    assert [next(results), next(results)] == [-0.5, -1.0]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert len(begun) < 10 and list(results) == []
