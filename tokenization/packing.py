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


class Piece(NamedTuple):
    """Tokens first .. end - 1 of a document."""

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

    blocks: list[list[Piece]]
    """Each has exactly the tokens of a block. Ordered by the first of their documents."""
    rest: list[Piece]
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
    window = _Window(block_tokens, cut_at_end)
    for document, length in enumerate(int(length) for array in lengths for length in array.tolist()):
        if window.new_tokens and window.new_tokens + length > window_tokens:
            blocks, left = window.close()
            yield Window(blocks, [], window.documents_cut, window.documents_too_long)
            window = _Window(block_tokens, cut_at_end, left)
        window.add(document, length)
    blocks, left = window.close()
    yield Window(blocks, sorted(left, key=window.order_in_block), window.documents_cut, window.documents_too_long)


class _Window:
    def __init__(self, block_tokens: int, cut_at_end: bool, carried: Iterable[Piece] = ()):
        self._block_tokens, self._cut_at_end = block_tokens, cut_at_end
        self._pieces = list(carried)
        """Each begins with its document's BOS or ends with its EOS, as `cut_at_end` says."""
        self._blocks: list[list[Piece]] = []
        self.new_tokens = self.documents_cut = self.documents_too_long = 0

    def add(self, document: int, length: int) -> None:
        self.new_tokens += length
        remainder = length % self._block_tokens if length > self._block_tokens else length
        begin = remainder if self._cut_at_end else 0
        if length > self._block_tokens:
            self.documents_cut += 1
            self.documents_too_long += 1
            for first in range(begin, begin + length - remainder, self._block_tokens):
                self._blocks.append([Piece(document, first, first + self._block_tokens, length)])
        if remainder:
            first = 0 if self._cut_at_end else length - remainder
            self._pieces.append(Piece(document, first, first + remainder, length))

    def close(self) -> tuple[list[list[Piece]], list[Piece]]:
        """The blocks, and the pieces that are left, which together have less than one."""
        longest_first = sorted(self._pieces, key=lambda piece: (-piece.tokens, piece))
        num_blocks = sum(piece.tokens for piece in longest_first) // self._block_tokens
        bins = _Bins(self._block_tokens)
        for piece in longest_first:
            bins.place(piece)
        fullest_first = sorted(range(len(bins.contents)), key=lambda number: (bins.room[number], number))
        kept = _Bins(self._block_tokens)
        for number in fullest_first[:num_blocks]:
            kept.open(bins.contents[number], bins.room[number])
        others = [piece for number in fullest_first[num_blocks:] for piece in bins.contents[number]]
        others.sort(key=lambda piece: (-piece.tokens, piece))
        left = [piece for piece in others if not kept.place(piece, may_open=False)]
        left = self._fill(kept, left)
        blocks = self._blocks + [sorted(content, key=self.order_in_block) for content in kept.contents]
        return sorted(blocks, key=min), left

    def _fill(self, bins: _Bins, pieces: list[Piece]) -> list[Piece]:
        """Cut up pieces until no bin has room left; returns what is left of them. They have enough tokens for that."""
        pieces = sorted(pieces, key=lambda piece: (not piece.is_whole, piece.tokens, piece))  # taken from the end
        for content, room in zip(bins.contents, bins.room):
            while room:
                piece = pieces.pop()
                taken = min(room, piece.tokens)
                room -= taken
                if taken < piece.tokens:
                    self.documents_cut += piece.is_whole
                    middle = piece.end - taken if self._cut_at_end else piece.first + taken
                    parts = piece._replace(end=middle), piece._replace(first=middle)
                    piece, left = reversed(parts) if self._cut_at_end else parts
                    pieces.append(left)
                content.append(piece)
        return pieces

    def order_in_block(self, piece: Piece) -> tuple[bool, Piece]:
        """See the drawing above."""
        return (piece.first == 0 if self._cut_at_end else piece.end < piece.document_tokens), piece


class _Bins:
    """Blocks that are being filled, found by the room that is left in them."""

    def __init__(self, block_tokens: int):
        self._block_tokens = block_tokens
        self.contents: list[list[Piece]] = []
        self.room: list[int] = []
        """Of each."""
        self._rooms: list[int] = []
        """The different values above 0, ascending: at most as many as a block has tokens."""
        self._with_room: dict[int, list[int]] = {}

    def open(self, content: list[Piece], room: int) -> None:
        self.contents.append(content)
        self.room.append(room)
        self._list(len(self.room) - 1)

    def place(self, piece: Piece, may_open: bool = True) -> bool:
        """Into the bin with the least room that holds it, else into a new one; False where there is neither."""
        at = bisect.bisect_left(self._rooms, piece.tokens)
        if at == len(self._rooms):
            if may_open:
                self.open([piece], self._block_tokens - piece.tokens)
            return may_open
        alike = self._with_room[self._rooms[at]]
        number = alike.pop()
        if not alike:
            del self._with_room[self._rooms.pop(at)]
        self.contents[number].append(piece)
        self.room[number] -= piece.tokens
        self._list(number)
        return True

    def _list(self, number: int) -> None:
        if room := self.room[number]:
            if room not in self._with_room:
                bisect.insort(self._rooms, room)
                self._with_room[room] = []
            self._with_room[room].append(number)
