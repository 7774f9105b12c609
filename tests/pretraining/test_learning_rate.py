"""Learning-rate schedules at their corners."""

from __future__ import annotations

import itertools
import math

import pytest

from pretraining.optimizer import learning_rate


def rates(schedule, total=100, warmup=10, decay=20):
    return [
        learning_rate(
            step, peak=1.0, minimum=0.1, total_steps=total, warmup_steps=warmup, schedule=schedule, decay_steps=decay
        )
        for step in range(total)
    ]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_all_warm_up_linearly_to_the_peak(schedule):
    assert rates(schedule)[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_those_that_fall_end_at_the_minimum_and_never_rise(schedule):
    values = rates(schedule)
    assert values[-1] == pytest.approx(0.1)
    assert all(later <= earlier for earlier, later in itertools.pairwise(values[9:]))


def test_wsd_stays_at_the_peak_until_its_decay():
    values = rates("wsd")
    assert values[9:80] == [1.0] * 71 and values[80] == pytest.approx(1 - 0.9 / 20)


def test_cosine_is_half_way_down_in_the_middle():
    middle = rates("cosine")[54]
    assert middle == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 45 / 90)))


def test_without_warm_up_the_first_step_has_almost_the_peak():
    assert rates("linear", warmup=0)[0] == pytest.approx(1 - 0.9 / 100)
