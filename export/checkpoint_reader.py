"""Weights of a checkpoint as byte ranges of files: found without reading them, read a few rows at a time.

A row is one slice along a tensor's first dimension. Whatever kind of checkpoint it is,

    sharded      lit_model.pth/ = .metadata, __0_0.distcp, __1_0.distcp, .., meta.pt   (torch DCP, Lightning's marker)
    consolidated lit_model.pth  = one file of torch.save, weights under `model`, `state_dict` or at the top
    litgpt       lit_model.pth  = one file of torch.save, weights at the top or under `model`

each weight comes out as a `StoredTensor`: its pieces lie row after row in one or several files. So memory does not
depend on the size of the model or of a tensor, and optimizer state is never read.

What is trusted: nothing is unpickled but by torch.load(weights_only=True) and, for DCP's `.metadata`, by an unpickler
that knows DCP's own record types and no others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import pickle
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError

if TYPE_CHECKING:
    import torch

BLOCK_BYTES = 16 << 20
"""How much of a tensor is in memory at a time."""

LIT_MODEL = "lit_model.pth"
DCP_METADATA = ".metadata"
# Wrappers of a module (torch.compile, activation checkpointing, Fabric, DDP) put these into parameter names.
_WRAPPER_NAMES = ("_orig_mod.", "_checkpoint_wrapped_module.", "_forward_module.")
EMBEDDING = "transformer.wte.weight"


@dataclasses.dataclass(frozen=True)
class Piece:
    """Rows of a tensor, back to back in a file; whole rows, unless tensor parallelism has split columns."""

    path: Path
    first_byte: int
    start_row: int
    num_rows: int
    start_column: int = 0
    num_columns: int | None = None
    """None: whole rows. Only matrices are split in columns."""
    crc32: int | None = None
    """Of exactly these bytes, where the file has it."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    name: str
    shape: tuple[int, ...]
    stored_dtype: torch.dtype
    pieces: tuple[Piece, ...]
    """In the order of rows, then columns; they cover the tensor without gap or overlap."""
    rounded_dtype: torch.dtype | None = None
    """Rows are converted to it when they are read; None: as they are stored."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows that are read."""
        return self.rounded_dtype or self.stored_dtype

    @property
    def num_rows(self) -> int:
        return self.shape[0]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.stored_dtype.itemsize

    def blocks(self, max_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, torch.Tensor]]:
        """All rows in order, as (first row, tensor of (rows, *shape[1:])); checks checksums on the way.

        Raises:
            UserError: a file ends early, or its bytes are not those that were written.
        """
        rows_per_block = max(1, max_bytes // self.row_bytes)
        for band in self._bands():
            with contextlib.ExitStack() as stack:
                readers = [stack.enter_context(_PieceReader(self, piece)) for piece in band]
                for start in range(0, band[0].num_rows, rows_per_block):
                    num_rows = min(rows_per_block, band[0].num_rows - start)
                    yield band[0].start_row + start, _side_by_side([r.read(start, num_rows, True) for r in readers])
                for reader in readers:
                    reader.check_checksum()

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows start .. stop - 1, without checking a checksum."""
        import torch

        parts = []
        for band in self._bands():
            first = max(start, band[0].start_row)
            last = min(stop, band[0].start_row + band[0].num_rows)
            if first < last:
                with contextlib.ExitStack() as stack:
                    readers = [stack.enter_context(_PieceReader(self, piece)) for piece in band]
                    parts.append(_side_by_side([r.read(first - band[0].start_row, last - first) for r in readers]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _bands(self) -> Iterator[list[Piece]]:
        """Pieces of the same rows."""
        for _, band in itertools.groupby(self.pieces, key=lambda piece: piece.start_row):
            yield list(band)


def _side_by_side(parts: list[torch.Tensor]) -> torch.Tensor:
    import torch

    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class _PieceReader:
    """Reads rows of one piece into memory of its own; a mapped file would count as memory that was used."""

    def __init__(self, tensor: StoredTensor, piece: Piece):
        self._tensor, self._piece = tensor, piece
        self._row_shape = tensor.shape[1:] if piece.num_columns is None else (piece.num_columns,)
        self._row_bytes = math.prod(self._row_shape) * tensor.stored_dtype.itemsize
        self._crc32 = 0

    def __enter__(self):
        self._file = open(self._piece.path, "rb", buffering=0)
        return self

    def __exit__(self, *_):
        self._file.close()

    def read(self, start: int, num_rows: int, with_checksum: bool = False) -> torch.Tensor:
        """Rows start .. of the piece. With checksum: all of them must be read, in order."""
        import torch

        block = torch.empty((num_rows, *self._row_shape), dtype=self._tensor.stored_dtype)
        raw = memoryview(block.view(-1).view(torch.uint8).numpy())
        self._file.seek(self._piece.first_byte + start * self._row_bytes)
        filled = 0
        while filled < len(raw):
            count = self._file.readinto(raw[filled:])
            if not count:
                raise UserError(
                    f"{self._piece.path}: ends before the weights of '{self._tensor.name}' do. Copy the file again."
                )
            filled += count
        if with_checksum and self._piece.crc32 is not None:
            self._crc32 = zlib.crc32(raw, self._crc32)
        return block.to(self._tensor.dtype)

    def check_checksum(self) -> None:
        if self._piece.crc32 is not None and self._crc32 != self._piece.crc32:
            raise UserError(
                f"{self._piece.path}: damaged: the bytes of '{self._tensor.name}' do not have the checksum that was "
                "written with them. Copy the file again, or take an earlier checkpoint."
            )


def find_weights(checkpoint_dir: str | os.PathLike) -> dict[str, StoredTensor]:
    """The weights in `checkpoint_dir`/lit_model.pth under litgpt's parameter names.

    Raises:
        UserError: there are none, or the files are not complete.
    """
    path = Path(checkpoint_dir) / LIT_MODEL
    if path.is_dir():
        from export.dcp_reader import find_in_shards

        return _clean_names(find_in_shards(path), path)
    if path.is_file():
        return _clean_names(find_in_torch_file(path), path)
    raise UserError(nothing_there(Path(checkpoint_dir)))


def nothing_there(directory: Path) -> str:
    message = f"checkpoint_dir={directory}: no {LIT_MODEL} in it"
    if not directory.is_dir():
        return f"checkpoint_dir={directory}: no such directory."
    if (directory / f"{LIT_MODEL}.consolidated").is_file():
        return f"{message}, but {LIT_MODEL}.consolidated. Rename it: mv {directory}/{LIT_MODEL}.consolidated {directory}/{LIT_MODEL}"
    if (directory / DCP_METADATA).is_file():
        return f"{message}: these are the shards themselves. Give the directory above: {directory.resolve().parent}"
    checkpoints = sorted(entry.parent for entry in directory.glob(f"*/{LIT_MODEL}"))
    if checkpoints:
        return f"{message}. Give one of the checkpoints below it: {', '.join(map(str, checkpoints[-5:]))}"
    return f"{message}. Give a checkpoint directory that distributed_pretrain.py, `litgpt pretrain` or `litgpt download` made."


def _clean_names(tensors: dict[str, StoredTensor], path: Path) -> dict[str, StoredTensor]:
    cleaned = {}
    for name, tensor in tensors.items():
        for wrapper in _WRAPPER_NAMES:
            name = name.replace(wrapper, "")
        cleaned[name] = dataclasses.replace(tensor, name=name)
    if any("lora_" in name for name in cleaned):
        raise UserError(f"{path}: LoRA weights. Merge them first: litgpt merge_lora {path.parent}")
    if EMBEDDING not in cleaned:
        some = ", ".join(list(cleaned)[:3]) or "nothing"
        raise UserError(
            f"{path}: no weights of a litgpt model in it ('{EMBEDDING}' is not there; found: {some}). "
            "Only models of litgpt's GPT class can be exported."
        )
    return cleaned


# One file of torch.save -----------------------------------------------------------------------------------------------


def find_in_torch_file(path: str | os.PathLike) -> dict[str, StoredTensor]:
    """The weights in a file of torch.save, under the key `model`, `state_dict` or at its top."""
    path = Path(path)
    import torch

    try:
        with open(path, "rb") as file:
            state = load_without_data(file)
            checksums = checksums_by_first_byte(file)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: holds more than tensors and plain values, which could run code when loaded; refused ({error})."
        ) from error
    except (OSError, RuntimeError, zipfile.BadZipFile, EOFError, ValueError) as error:
        raise UserError(
            f"{path}: not readable as a file of torch.save: truncated or damaged ({error}). Copy or make it again."
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, expected a dictionary of weights.")
    return {
        name: StoredTensor(name, tuple(tensor.shape), tensor.dtype, (whole_piece(path, name, tensor, 0, checksums),))
        for name, tensor in state.items()
        if isinstance(tensor, torch.Tensor)
    }


def load_without_data(file) -> Any:
    """Unpickle a file of torch.save with tensors on the meta device: they know shape, dtype and place in the file."""
    import torch

    return torch.load(file, map_location="meta", weights_only=True)


def first_data_byte(file, info: zipfile.ZipInfo) -> int:
    """Where the bytes of a record begin in an uncompressed archive."""
    file.seek(info.header_offset + 26)
    name_bytes, extra_bytes = (int.from_bytes(file.read(2), "little") for _ in range(2))
    return info.header_offset + 30 + name_bytes + extra_bytes


def checksums_by_first_byte(file) -> dict[int, tuple[int, int]]:
    """For each record of the archive, by the place of its bytes: (how many, CRC-32)."""
    with zipfile.ZipFile(file) as archive:
        return {first_data_byte(file, info): (info.file_size, info.CRC) for info in archive.infolist()}


def whole_piece(path: Path, name: str, tensor, base_byte: int, checksums: dict[int, tuple[int, int]]) -> Piece:
    """All rows of a tensor that `load_without_data` found in an archive that begins at `base_byte` of the file."""
    if not tensor.is_contiguous() or tensor.dim() == 0:
        raise UserError(f"{path}: '{name}' is not stored row after row. Save it with `.contiguous()`.")
    record_byte = tensor.untyped_storage()._checkpoint_offset
    skipped_bytes = tensor.storage_offset() * tensor.dtype.itemsize
    size, crc32 = checksums.get(record_byte, (None, None))
    covers_record = skipped_bytes == 0 and size == tensor.numel() * tensor.dtype.itemsize
    return Piece(
        path,
        base_byte + record_byte + skipped_bytes,
        start_row=0,
        num_rows=tensor.shape[0],
        crc32=crc32 if covers_record and crc32 else None,  # torch writes 0 where checksums were turned off
    )
