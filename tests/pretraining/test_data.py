"""Blocks by number: those of litdata's StreamingDataset, and delivered ahead of time."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import tokenize_dataset, write_dataset

from pretraining.data import Sequences, TokenBlocks, prefetch, rank_positions, read_micro_batch
from utils.errors import UserError


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, documents, tokenizer_dir) -> Path:
    return tokenize_dataset(tmp_path_factory.mktemp("data") / "merged", documents[:200], tokenizer_dir)


def test_blocks_are_those_of_litdatas_dataset(dataset):
    import torch
    from litdata import StreamingDataset, TokensLoader

    ours = TokenBlocks(dataset / "train", 65)
    theirs = StreamingDataset(str(dataset / "train"), item_loader=TokensLoader(block_size=65))
    assert len(ours) == len(theirs) > 100
    for block in [0, 1, len(ours) - 1, *range(0, len(ours), 17)]:
        assert torch.equal(ours[block].long(), theirs[block].long())


def test_every_position_belongs_to_one_process():
    for world_size in (1, 2, 3, 8):
        parts = [rank_positions(24, 24, rank, world_size) for rank in range(world_size)]
        assert sorted(np.concatenate(parts)) == list(range(24, 48))


def test_the_digest_tells_which_sequences_a_batch_holds_in_whatever_pieces(dataset):
    sequences = Sequences([dataset / "train"], None, 65, seed=1)
    whole = read_micro_batch(sequences, np.arange(8), False).digest
    pieces = [read_micro_batch(sequences, rank_positions(0, 8, rank, 2), False).digest for rank in range(2)]
    assert sum(pieces) % 2**64 == whole
    assert read_micro_batch(sequences, np.arange(1, 9), False).digest != whole


def test_the_prefetcher_hands_on_what_went_wrong(dataset):
    sequences = Sequences([dataset / "train"], None, 65, seed=1)

    def positions():
        yield np.arange(2)
        raise RuntimeError("the disk is gone")

    batches = prefetch(sequences, positions(), pin_memory=False)
    assert next(batches).tokens.shape == (2, 65)
    with pytest.raises(RuntimeError, match="disk is gone"):
        next(batches)
    batches.close()


def test_closing_the_prefetcher_ends_its_thread(dataset):
    sequences = Sequences([dataset / "train"], None, 65, seed=1)
    positions = iter([np.arange(i, i + 2) for i in range(1000)])
    batches = prefetch(sequences, positions, pin_memory=False, depth=2)
    next(batches)
    assert any(thread.name.startswith("prefetch") for thread in threading.enumerate())
    batches.close()
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())
    assert len(list(positions)) >= 1000 - 4  # and it read no further ahead than it was told


def test_a_missing_chunk_is_named(tmp_path):
    write_dataset(tmp_path / "d", [np.arange(500)], 100)
    (tmp_path / "d" / "chunk-0.bin").unlink()
    with pytest.raises(UserError, match=r"chunk-0\.bin: missing"):
        TokenBlocks(tmp_path / "d", 33)


def test_too_little_data_is_said(tmp_path):
    write_dataset(tmp_path / "d", [np.arange(20)], 100)
    with pytest.raises(UserError, match="too few for one block of 33"):
        TokenBlocks(tmp_path / "d", 33)
