"""Cores are counted as a container's quota and the scheduler's affinity allow; threads work a bounded way ahead."""

from __future__ import annotations

import os
import subprocess
import sys

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
