"""Best-fit packing of lengths: every token once, blocks full, documents whole where they can be."""

from __future__ import annotations

import hashlib
import itertools
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretraining.documents import Separator, document_offsets
from tokenization.packing import Piece, Window, pack

lengths_of_documents = st.lists(st.integers(0, 40), max_size=60)


class Unfolded(NamedTuple):
    """A window, its pieces by block."""

    blocks: list[list[Piece]]
    rest: list[Piece]
    documents_cut: int
    documents_too_long: int


def unfolded(window: Window, block: int) -> Unfolded:
    blocks, rest = [], []
    for piece in map(Piece._make, window.pieces.tolist()):
        rest.append(piece)
        if sum(piece.tokens for piece in rest) >= block:
            blocks.append(rest)
            rest = []
    assert len(blocks) == window.num_blocks
    assert sum(piece.tokens for piece in rest) == window.rest_tokens
    return Unfolded(blocks, rest, window.documents_cut, window.documents_too_long)


def packed(lengths: list[int], block: int, window: int, cut_at_end: bool = True) -> list[Unfolded]:
    return [unfolded(each, block) for each in pack([np.array(lengths, np.int64)], block, window, cut_at_end)]


@settings(deadline=None, max_examples=300)
@given(lengths_of_documents, st.integers(1, 20), st.integers(1, 200), st.booleans())
def test_every_token_once_in_full_blocks_without_padding(lengths, block, window, cut_at_end):
    windows = packed(lengths, block, window, cut_at_end)
    blocks = [pieces for window in windows for pieces in window.blocks]
    assert all(sum(piece.tokens for piece in pieces) == block for pieces in blocks)
    assert all(not window.rest for window in windows[:-1])
    assert sum(piece.tokens for piece in windows[-1].rest) < block
    found = sorted(piece for pieces in [*blocks, windows[-1].rest] for piece in pieces)
    tokens = [(piece.document, token) for piece in found for token in range(piece.first, piece.end)]
    assert tokens == [(document, token) for document, length in enumerate(lengths) for token in range(length)]
    assert all(piece.document_tokens == lengths[piece.document] for piece in found)
    cut = {piece.document for piece in found if not piece.is_whole}
    assert sum(window.documents_cut for window in windows) == len(cut)
    assert sum(window.documents_too_long for window in windows) == sum(length > block for length in lengths)


@settings(deadline=None, max_examples=300)
@given(lengths_of_documents, st.integers(1, 20), st.integers(1, 200), st.booleans())
def test_no_piece_is_taken_for_a_part_of_its_neighbour(lengths, block, window, cut_at_end):
    windows = packed(lengths, block, window, cut_at_end)
    for pieces in [*(pieces for window in windows for pieces in window.blocks), windows[-1].rest]:
        for before, after in itertools.pairwise(pieces):
            assert after.first == 0 if cut_at_end else before.end == before.document_tokens


@settings(deadline=None)
@given(lengths_of_documents, st.integers(1, 20), st.integers(1, 200), st.randoms(use_true_random=False))
def test_arrays_may_be_split_anywhere(lengths, block, window, random):
    cuts = sorted(random.randrange(len(lengths) + 1) for _ in range(3))
    arrays = [np.array(lengths[a:b], np.int64) for a, b in zip([0, *cuts], [*cuts, len(lengths)])]
    assert [unfolded(each, block) for each in pack(arrays, block, window, True)] == packed(lengths, block, window)


def test_the_longest_goes_where_the_least_room_is_left():
    (window,) = packed([6, 3, 7, 4, 2, 8], 10, 1000)
    assert [[piece.document for piece in block] for block in window.blocks] == [[0, 3], [1, 2], [4, 5]]
    assert (window.rest, window.documents_cut) == ([], 0)


def test_a_document_that_fits_a_room_is_never_cut():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6, 1, 5000), 20, 20_000).astype(int).tolist()
    (window,) = packed(lengths, 2049, sum(lengths))
    plain = sum(start // 2049 != (start + n - 1) // 2049 for start, n in zip(np.cumsum([0, *lengths]), lengths))
    too_long = sum(length > 2049 for length in lengths)
    assert window.documents_too_long == too_long
    # What must fill rooms is cut: a handful here, beside the third that the plain cut takes.
    assert window.documents_cut - too_long < 10 < too_long < plain / 4


@pytest.mark.parametrize("cut_at_end", [True, False])
def test_where_nothing_fits_few_documents_fill_all_rooms(cut_at_end):
    (window,) = packed([6] * 30, 10, 1000, cut_at_end)
    assert len(window.blocks) == 18
    assert window.documents_cut == 12  # each block holds one whole document, and has room for less than another


def test_a_document_much_longer_than_a_block_gives_whole_blocks_and_one_remainder():
    for cut_at_end, remainder in ((True, (0, 5)), (False, (30, 35))):
        (window,) = packed([35, 5], 10, 1000, cut_at_end)
        assert len(window.blocks) == 4 and window.documents_cut == 1
        assert any((piece.document, piece.first, piece.end) == (0, *remainder) for b in window.blocks for piece in b)


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), max_size=60), st.integers(2, 20), st.booleans())
def test_document_masking_finds_each_piece(lengths, block, has_bos):
    """As training does it: by the BOS at the beginnings, or the EOS at the ends, of whole documents."""
    documents = [np.full(length, 7) for length in lengths]
    for document in documents:
        document[0 if has_bos else -1] = 1
    for window in packed(lengths, block, 200, cut_at_end=has_bos):
        for pieces in window.blocks:
            tokens = np.concatenate([documents[piece.document][piece.first : piece.end] for piece in pieces])
            offsets = document_offsets(tokens[None, :-1], [Separator(1, begins=has_bos)]).tolist()
            begins = np.cumsum([0, *(piece.tokens for piece in pieces)])[:-1]
            assert [o for o in offsets if o < block - 1] == [b for b in begins.tolist() if b < block - 1]


@pytest.mark.parametrize(("cut_at_end", "digest"), [(True, "412ffa6751a44358"), (False, "c0f5d0002d00e8cc")])
def test_the_blocks_are_those_of_earlier_versions(cut_at_end, digest):
    """So that a merge that one of them began is finished, and a chunk that a dataset has lost made again."""
    lengths = [1 + number**3 % 151 for number in range(3000)]
    windows = packed(lengths, 64, 5000, cut_at_end)
    pieces = [tuple(piece) for window in windows for block in [*window.blocks, window.rest] for piece in block]
    assert hashlib.sha256(str(pieces).encode()).hexdigest()[:16] == digest
