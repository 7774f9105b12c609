"""Best-fit packing: documents into blocks of a fixed number of tokens, with few cuts and no padding. Lengths alone.

As in Ding et al. 2024, "Fewer Truncations Improve Language Modeling" (arXiv:2404.10830): a document that is longer than
a block is cut into whole blocks and a remainder, and these and all other documents are placed by best-fit decreasing:
the longest first, each into the block with the least room that still holds it.

What is different: no block is padded, so every token is text and the loss needs no mask. Where nothing fits any more, a
few documents are cut up to fill the rooms that are left. They are those that are cut already, then the longest.

A reader tells documents apart by BOS or EOS alone. So the pieces of a block have an order in which no piece is taken
for a part of its neighbour:

    BOS    | ...rest of d7 | BOS d3 | BOS d5 | BOS d9, its beginning... |
    EOS    | ...rest of d7 EOS | d3 EOS | d5 EOS | d9, its beginning... |

With BOS only the first piece of a block may lack its document's beginning, with EOS only the last one its end.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

# Of a piece, tokens first .. end - 1 of a document. In arrays, because a window of short documents has millions, and
# as Python objects each would take more than a hundred bytes. A document of 2^31 tokens does not fit a chunk file.
PIECE = np.dtype([("document", "<i8"), ("first", "<i4"), ("end", "<i4"), ("document_tokens", "<i4")])


class Piece(NamedTuple):
    """One item of an array of PIECE."""

    document: int
    """Its number in the dataset, from 0."""
    first: int
    end: int
    document_tokens: int

    @property
    def tokens(self) -> int:
        return self.end - self.first

    @property
    def is_whole(self) -> bool:
        return self.tokens == self.document_tokens


@dataclasses.dataclass(frozen=True)
class Window:
    """Documents that follow one another, packed together."""

    pieces: np.ndarray
    """Of PIECE, shape (n,): those of the first block, of the second, and so on, then the rest. Each block has exactly
    its tokens. Blocks are ordered by the first of their documents."""
    num_blocks: int
    rest_tokens: int
    """In the last window: what fills no block, less than one."""
    documents_cut: int
    """That are cut here for the first time."""
    documents_too_long: int
    """Of these, those that are longer than a block."""


def pack(lengths: Iterable[np.ndarray], block_tokens: int, window_tokens: int, cut_at_end: bool) -> Iterator[Window]:
    """Pack documents window by window; what fills no block of a window goes into the next one.

    A function of the lengths and their order alone, however they are split into arrays.

    Args:
        lengths: tokens of the documents, in the order of the dataset; arrays of shape (n,).
        window_tokens: a window ends before the document with which it would have more; it has one document at least.
        cut_at_end: cut pieces off the ends of documents, so that what is left has the BOS; False: off their
            beginnings, so that it has the EOS.
    """
    carried = np.empty(0, PIECE)
    first_document = 0
    for new, is_last in _windows(lengths, window_tokens):
        whole, pieces = _cut_too_long(new, first_document, block_tokens, cut_at_end)
        first_document += len(new)
        too_long = int((new > block_tokens).sum())
        pieces, blocks, carried, cut = _best_fit(np.concatenate([carried, pieces]), block_tokens, cut_at_end)
        num_blocks = len(whole) + int(tokens_of(pieces).sum()) // block_tokens
        blocks = np.concatenate([np.arange(len(whole)), len(whole) + blocks])
        pieces, rest_tokens = _in_order(np.concatenate([whole, pieces]), blocks, cut_at_end), 0
        if is_last:
            rest_tokens = int(tokens_of(carried).sum())
            pieces = np.concatenate([pieces, _in_order(carried, np.zeros(len(carried), np.int64), cut_at_end)])
        yield Window(pieces, num_blocks, rest_tokens, too_long + cut, too_long)


def tokens_of(pieces: np.ndarray) -> np.ndarray:
    """Of each piece; shape (n,)."""
    return pieces["end"] - pieces["first"]


def _windows(lengths: Iterable[np.ndarray], window_tokens: int) -> Iterator[tuple[np.ndarray, bool]]:
    """The lengths of each window's documents, and whether it is the last window."""
    held, held_tokens = [np.empty(0, np.int64)], 0
    for array in lengths:
        ends = np.cumsum(array, dtype=np.int64)
        begin = 0
        while begin < len(array):
            before = int(ends[begin - 1]) if begin else 0
            end = max(begin, int(np.searchsorted(ends, before + window_tokens - held_tokens, side="right")))
            if end == begin and held_tokens:
                yield np.concatenate(held), False
                held, held_tokens = [], 0
                continue
            end = max(end, begin + 1)  # a document that is longer than a window
            held.append(array[begin:end])
            held_tokens += int(ends[end - 1]) - before
            begin = end
    yield np.concatenate(held), True


def _cut_too_long(
    lengths: np.ndarray, first_document: int, block_tokens: int, cut_at_end: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The whole blocks of the documents that are longer than a block; their remainders and the other documents."""
    num_whole = np.where(lengths > block_tokens, lengths // block_tokens, 0)
    remainders = lengths - num_whole * block_tokens
    of = np.repeat(np.arange(len(lengths)), num_whole)
    nth = np.arange(len(of)) - np.repeat(np.cumsum(num_whole) - num_whole, num_whole)
    firsts = nth * block_tokens + (remainders[of] if cut_at_end else 0)
    whole = _pieces(first_document + of, firsts, firsts + block_tokens, lengths[of])
    of = np.flatnonzero(remainders)  # documents without a token have no piece
    lengths, remainders = lengths[of], remainders[of]
    firsts = np.zeros_like(lengths) if cut_at_end else lengths - remainders
    return whole, _pieces(first_document + of, firsts, firsts + remainders, lengths)


def _pieces(*columns: np.ndarray) -> np.ndarray:
    pieces = np.empty(len(columns[0]), PIECE)
    for name, column in zip(PIECE.names, columns):
        pieces[name] = column
    return pieces


def _best_fit(
    pieces: np.ndarray, block_tokens: int, cut_at_end: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Fill blocks with pieces of at most a block, each of another document.

    Args:
        pieces: each begins with its document's BOS or ends with its EOS, as `cut_at_end` says.

    Returns:
        The pieces in blocks; the number of each one's block; the pieces that are left, which together have less than a
        block; how many whole documents were cut.
    """
    pieces = pieces[np.lexsort((pieces["document"], -tokens_of(pieces)))]
    tokens = tokens_of(pieces)
    num_blocks = int(tokens.sum()) // block_tokens
    bins = _Bins(block_tokens)
    bin_of = bins.place(tokens)
    kept = np.argsort(np.array(bins.room, np.int64), kind="stable")[:num_blocks]  # the fullest
    block_of_bin = np.full(len(bins.room), -1)
    block_of_bin[kept] = np.arange(num_blocks)
    blocks = block_of_bin[bin_of]
    bins = _Bins(block_tokens, [bins.room[number] for number in kept.tolist()])
    others = np.flatnonzero(blocks < 0)
    blocks[others] = bins.place(tokens[others], may_open=False)
    placed = blocks >= 0
    # Each of these is longer than every room, so they are few: fewer than there are blocks and tokens of a block.
    fill, fill_blocks, left, cut = _fill(bins.room, map(Piece._make, pieces[~placed].tolist()), cut_at_end)
    return np.concatenate([pieces[placed], fill]), np.concatenate([blocks[placed], fill_blocks]), left, cut


def _fill(
    rooms: list[int], pieces: Iterable[Piece], cut_at_end: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Cut up pieces until no block has room left; returns what `_best_fit` does. They have enough tokens for that."""
    pieces = sorted(pieces, key=lambda piece: (not piece.is_whole, piece.tokens, piece))  # taken from the end
    taken_pieces, blocks, documents_cut = [], [], 0
    for block, room in enumerate(rooms):
        while room:
            piece = pieces.pop()
            taken = min(room, piece.tokens)
            room -= taken
            if taken < piece.tokens:
                documents_cut += piece.is_whole
                middle = piece.end - taken if cut_at_end else piece.first + taken
                parts = piece._replace(end=middle), piece._replace(first=middle)
                piece, left = reversed(parts) if cut_at_end else parts
                pieces.append(left)
            taken_pieces.append(piece)
            blocks.append(block)
    return np.array(taken_pieces, PIECE), np.array(blocks, np.int64), np.array(pieces, PIECE), documents_cut


def _in_order(pieces: np.ndarray, blocks: np.ndarray, cut_at_end: bool) -> np.ndarray:
    """The pieces block by block, the blocks by their first document; in a block as in the drawing above.

    Args:
        blocks: the number of each piece's block; each number from 0 has a piece.
    """
    document, first = pieces["document"], pieces["first"]
    by_document = np.lexsort((first, document, blocks))
    leads = by_document[np.unique(blocks[by_document], return_index=True)[1]]
    rank = np.empty(len(leads), np.int64)
    rank[np.lexsort((first[leads], document[leads]))] = np.arange(len(leads))
    goes_last = first == 0 if cut_at_end else pieces["end"] < pieces["document_tokens"]
    return pieces[np.lexsort((first, document, goes_last, rank[blocks]))]


class _Bins:
    """Blocks that are being filled, found by the room that is left in them."""

    def __init__(self, block_tokens: int, rooms: Iterable[int] = ()):
        self._block_tokens = block_tokens
        self.room: list[int] = []
        """Of each."""
        self._rooms: list[int] = []
        """The different values above 0, ascending: at most as many as a block has tokens."""
        self._with_room: dict[int, list[int]] = {}
        for number, room in enumerate(rooms):
            self.room.append(room)
            self._list(number)

    def place(self, tokens: np.ndarray, may_open: bool = True) -> np.ndarray:
        """Each piece into the bin with the least room that holds it, else into a new one.

        Args:
            tokens: of the pieces, the longest first; shape (n,).

        Returns:
            The number of each one's bin, -1 where there is neither.
        """
        numbers, times = [], []
        lengths, counts = np.unique(tokens, return_counts=True)
        for length, count in zip(lengths[::-1].tolist(), counts[::-1].tolist()):
            while count:
                number = self._take(length, may_open)
                # The bin that took one has the least room that holds another, if any: all that fit go there at once.
                fit = count if number < 0 else min(count, self.room[number] // length)
                if number >= 0:
                    self.room[number] -= fit * length
                    self._list(number)
                numbers.append(number)
                times.append(fit)
                count -= fit
        return np.repeat(np.array(numbers, np.int64), times)

    def _take(self, tokens: int, may_open: bool) -> int:
        """A bin that is listed no more; -1 where there is none."""
        at = bisect.bisect_left(self._rooms, tokens)
        if at == len(self._rooms):
            if not may_open:
                return -1
            self.room.append(self._block_tokens)
            return len(self.room) - 1
        alike = self._with_room[self._rooms[at]]
        number = alike.pop()
        if not alike:
            del self._with_room[self._rooms.pop(at)]
        return number

    def _list(self, number: int) -> None:
        if room := self.room[number]:
            if room not in self._with_room:
                bisect.insort(self._rooms, room)
                self._with_room[room] = []
            self._with_room[room].append(number)
