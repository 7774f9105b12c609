"""A tensor that lies in files: read a few rows at a time, so memory depends neither on the model's size nor on its own.

A row is one slice along a tensor's first dimension:

    transformer.wte.weight, 1088 rows  =  rows 0 to 543 at byte 704 of __0_0.distcp, rows 544 to 1087 in __1_0.distcp
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from utils.errors import UserError

BLOCK_BYTES = 16 << 20
"""How much of a tensor is in memory at a time."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """Whole rows of a tensor, back to back in a file."""

    path: Path
    first_byte: int
    start_row: int
    num_rows: int
    crc32: int | None = None
    """Of exactly these bytes, where the file has it."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor's shape, and where its rows lie."""

    name: str
    shape: tuple[int, ...]
    stored_dtype: torch.dtype
    pieces: tuple[Piece, ...]
    """In the order of their rows, which they cover without gap or overlap."""
    rounded_dtype: torch.dtype | None = None
    """Rows are converted to it when they are read; None: they stay as they are stored."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows that are read."""
        return self.rounded_dtype or self.stored_dtype

    @property
    def num_rows(self) -> int:
        return self.shape[0]

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """All rows in order, as (first row, tensor of (rows, *shape[1:])); checks checksums on the way.

        Raises:
            UserError: a file ends early, or its bytes are not those that were written.
        """
        row_bytes = math.prod(self.shape[1:]) * self.stored_dtype.itemsize
        rows_per_block = max(1, BLOCK_BYTES // row_bytes)
        for piece in self.pieces:
            crc32 = 0
            with open(piece.path, "rb") as file:
                for start in range(piece.start_row, piece.start_row + piece.num_rows, rows_per_block):
                    num_rows = min(rows_per_block, piece.start_row + piece.num_rows - start)
                    block = self._read(file, piece, start, num_rows)
                    if piece.crc32 is not None:
                        crc32 = zlib.crc32(bytes_of(block), crc32)
                    yield start, block.to(self.dtype)
            if piece.crc32 not in (None, crc32):
                raise UserError(
                    f"{piece.path}: damaged: the bytes of '{self.name}' do not have the checksum that was written with "
                    "them. Copy the file again, or take an earlier checkpoint."
                )

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows start to stop - 1, without checking a checksum."""
        parts = []
        for piece in self.pieces:
            first, last = max(start, piece.start_row), min(stop, piece.start_row + piece.num_rows)
            if first < last:
                with open(piece.path, "rb") as file:
                    parts.append(self._read(file, piece, first, last - first).to(self.dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read(self, file: BinaryIO, piece: Piece, start: int, num_rows: int) -> torch.Tensor:
        """Rows of one piece, read into memory of their own: a mapped file would count as memory that was used."""
        block = torch.empty((num_rows, *self.shape[1:]), dtype=self.stored_dtype)
        row_bytes = block.nbytes // num_rows
        file.seek(piece.first_byte + (start - piece.start_row) * row_bytes)
        if file.readinto(bytes_of(block)) < block.nbytes:
            raise UserError(f"{piece.path}: ends before the weights of '{self.name}' do. Copy the file again.")
        return block


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())
