"""The order of the data: a bijection, a pure function, well mixed, at no cost."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretraining.data_order import SequenceOrder, interleave, permute


@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=150, deadline=None)
def test_permute_is_a_bijection(n, key):
    image = permute(np.arange(n, dtype=np.uint64), n, np.uint64(key))
    assert sorted(image.tolist()) == list(range(n))


def test_permute_is_injective_on_a_large_domain():
    n = 2_000_000_011
    some = np.concatenate([np.arange(200_000), np.arange(n - 200_000, n), np.arange(n // 2, n // 2 + 200_000)])
    image = permute(some.astype(np.uint64), n, np.uint64(7))
    assert len(np.unique(image)) == len(some) and image.max() < n


def test_neighbours_land_far_apart_and_everywhere():
    n = 1_000_000
    image = permute(np.arange(20_000, dtype=np.uint64), n, np.uint64(3)).astype(np.float64)
    per_tenth = np.histogram(image, bins=10, range=(0, n))[0]
    assert per_tenth.min() > 1800 and per_tenth.max() < 2200
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.03
    assert np.median(np.abs(np.diff(image))) > n / 10


def test_two_billion_blocks_cost_no_memory_and_no_set_up():
    order = SequenceOrder([2_000_000_000], None, seed=1)
    tracemalloc.start()
    started = time.perf_counter()
    for first in (0, 10**9, 10**12):
        located = order.locate(np.arange(first, first + 512))
        assert located.block.max() < 2_000_000_000
    elapsed, (_, peak) = time.perf_counter() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20 and elapsed < 1


def test_each_position_depends_on_nothing_but_itself():
    order = SequenceOrder([1000, 77], [3, 1], seed=5)
    together = order.locate(np.arange(5000))
    for position in (0, 1, 999, 4999):
        alone = order.locate(np.array([position]))
        assert (alone.source[0], alone.block[0], alone.epoch[0]) == (
            together.source[position], together.block[position], together.epoch[position],
        )  # fmt: skip


def test_seeds_and_epochs_give_other_orders():
    first, second = (SequenceOrder([500], None, seed=seed).locate(np.arange(1000)).block for seed in (1, 2))
    assert (first[:500] != second[:500]).mean() > 0.9
    assert (first[:500] != first[500:]).mean() > 0.9


def test_a_mixture_keeps_its_weights_and_reads_each_source_evenly():
    order = SequenceOrder([100, 1000, 50], [0.7, 0.2, 0.1], seed=0)
    located = order.locate(np.arange(10_000))
    assert np.bincount(located.source).tolist() == [7000, 2000, 1000]
    for stretch in np.split(located.source, 100):  # in every hundred positions, not only in the long run
        assert (np.abs(np.bincount(stretch, minlength=3) - [70, 20, 10]) <= 1).all()
    for source, (size, count) in enumerate(zip((100, 1000, 50), (70, 2, 20), strict=True)):
        mine = located.source == source
        for epoch in range(count):
            assert sorted(located.block[mine & (located.epoch == epoch)]) == list(range(size))


def test_without_weights_sources_count_by_their_size():
    assert np.bincount(interleave([300, 100])).tolist() == [750, 250]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_tiny_datasets_go_round(n):
    located = SequenceOrder([n], None, seed=9).locate(np.arange(4 * n))
    assert sorted(located.block) == sorted(list(range(n)) * 4)
