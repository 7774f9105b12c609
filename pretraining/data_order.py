"""Which block stands at which position of the training sequence: a pure function, no list of indices.

A run reads an endless sequence of positions 0, 1, 2, ... `SequenceOrder` says for each of them the dataset and the
block in it. The answer depends on (seed, epoch, position) alone, so a run resumes at any position, on any number of
processes, without state; and it takes constant memory and time, so two billion blocks cost as much as two.

Within an epoch the blocks of a dataset are permuted by a keyed bijection (`permute`): a generalised Feistel network
in the manner of Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002). An index x < n is split
into two digits (left, right) of a mixed-radix number with a * b >= n; each round adds a keyed hash of one digit to the
other, modulo its radix, which can always be undone; results that are not below n are sent through again
("cycle walking") until they are. It mixes well; it is not meant to keep secrets.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

_NUM_ROUNDS = 6
_MIX_SLOTS = 1000  # resolution of the weights of a mixture: 0.1%

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def hash_u64(x: np.ndarray, key: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014) of x and key; uint64 in and out, shapes broadcast."""
    with np.errstate(over="ignore"):
        z = np.asarray(x, np.uint64) * _GOLDEN + np.asarray(key, np.uint64)
        z = (z ^ (z >> np.uint64(30))) * _MIX_1
        z = (z ^ (z >> np.uint64(27))) * _MIX_2
        return z ^ (z >> np.uint64(31))


def permute(indices: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """The keyed bijection of {0, ..., n - 1} onto itself.

    Args:
        indices: uint64, each below n; any shape.
        n: size of the domain, from 1 to 2^62.
        key: uint64, of the same shape (one permutation for each distinct key) or a scalar.

    Returns:
        uint64 array of the shape of `indices`, each below n.
    """
    x = np.array(indices, dtype=np.uint64)
    key = np.broadcast_to(np.asarray(key, np.uint64), x.shape)
    a = np.uint64(math.isqrt(n - 1) + 1)  # a * b >= n, and less than n + a: walking again is rare
    b = np.uint64(-(-n // int(a)))
    pending = np.ones(x.shape, bool)
    while pending.any():
        left, right = np.divmod(x[pending], b)  # left < a, right < b
        keys = key[pending]
        for round_number in range(_NUM_ROUNDS):
            round_key = hash_u64(np.uint64(round_number), keys)
            if round_number % 2 == 0:
                left = (left + hash_u64(right, round_key) % a) % a
            else:
                right = (right + hash_u64(left, round_key) % b) % b
        x[pending] = left * b + right
        pending = x >= np.uint64(n)
    return x


def interleave(weights: Sequence[float], num_slots: int = _MIX_SLOTS) -> np.ndarray:
    """A cycle of sources in which each stands as often as its weight says, and evenly spread.

    Returns:
        int64 array of shape (num_slots,), or (1,) for a single source. Slots go to the source that is furthest behind
        its share (largest deficit), so every stretch of the cycle keeps the proportions.
    """
    share = np.asarray(weights, np.float64) / np.sum(weights)
    if len(share) == 1:
        return np.zeros(1, np.int64)
    given = np.zeros(len(share))
    slots = np.empty(num_slots, np.int64)
    for slot in range(num_slots):
        slots[slot] = np.argmax(share * (slot + 1) - given)
        given[slots[slot]] += 1
    return slots


@dataclasses.dataclass(frozen=True)
class Located:
    """Where positions lead; three int64 arrays of the shape that was asked for."""

    source: np.ndarray
    block: np.ndarray
    """Index within the source."""
    epoch: np.ndarray
    """How often the source was read to its end before."""


class SequenceOrder:
    """The order of one dataset, or of several with weights.

    Args:
        num_blocks: of each source; every one at least 1.
        weights: share of positions of each source; None: in proportion to their sizes.
        seed: any integer.
    """

    def __init__(self, num_blocks: Sequence[int], weights: Sequence[float] | None, seed: int):
        self.num_blocks = np.asarray(num_blocks, np.int64)
        self._slots = interleave(num_blocks if weights is None else weights)
        # How many slots of the cycle before slot j belong to the source of slot j, and how many to each in total.
        one_hot = self._slots[:, None] == np.arange(len(num_blocks))
        before = np.cumsum(one_hot, axis=0) - one_hot
        self._before = before[np.arange(len(self._slots)), self._slots]
        self._per_cycle = one_hot.sum(axis=0)
        self._seed = np.uint64(seed % 2**64)

    def locate(self, positions: np.ndarray) -> Located:
        """Source, block and epoch of each position; positions is an int64 array of any shape."""
        positions = np.asarray(positions, np.int64)
        cycle, slot = np.divmod(positions, len(self._slots))
        source = self._slots[slot]
        nth_of_source = cycle * self._per_cycle[source] + self._before[slot]
        epoch, index = np.divmod(nth_of_source, self.num_blocks[source])
        block = np.empty_like(index)
        for s in np.unique(source):
            mine = source == s
            source_key = hash_u64(np.uint64(s), self._seed)
            epoch_key = hash_u64(epoch[mine].astype(np.uint64), source_key)
            block[mine] = permute(index[mine].astype(np.uint64), int(self.num_blocks[s]), epoch_key).astype(np.int64)
        return Located(source, block, epoch)
