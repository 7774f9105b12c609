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

import dataclasses
import io
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

BLOCK_BYTES = 32 << 20
"""How much of a tensor is in memory at a time."""

LIT_MODEL = "lit_model.pth"
_LIGHTNING_MARKER = "meta.pt"
_DCP_METADATA = ".metadata"
# Wrappers of a module (torch.compile, activation checkpointing, Fabric, DDP) put these into parameter names.
_WRAPPER_NAMES = ("_orig_mod.", "_checkpoint_wrapped_module.", "_forward_module.")
_EMBEDDING = "transformer.wte.weight"


@dataclasses.dataclass(frozen=True)
class Piece:
    """Whole rows of a tensor, back to back in a file."""

    path: Path
    offset_bytes: int
    start_row: int
    num_rows: int
    crc32: int | None = None
    """Of exactly these bytes, where the file has it."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]
    """In the order of their rows, without gap or overlap."""

    @property
    def num_rows(self) -> int:
        return self.shape[0]

    @property
    def row_bytes(self) -> int:
        count = self.dtype.itemsize
        for size in self.shape[1:]:
            count *= size
        return count

    @property
    def num_bytes(self) -> int:
        return self.num_rows * self.row_bytes

    def blocks(self, max_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, torch.Tensor]]:
        """All rows in order, as (first row, tensor of (rows, *shape[1:])); checks checksums on the way.

        Raises:
            UserError: a file ends early, or its bytes are not those that were written.
        """
        rows_per_block = max(1, max_bytes // self.row_bytes)
        for piece in self.pieces:
            crc32 = 0
            with open(piece.path, "rb", buffering=0) as file:
                for start in range(0, piece.num_rows, rows_per_block):
                    num_rows = min(rows_per_block, piece.num_rows - start)
                    block, raw = self._read(file, piece, start, num_rows)
                    if piece.crc32 is not None:
                        crc32 = zlib.crc32(raw, crc32)
                    yield piece.start_row + start, block
            if piece.crc32 is not None and crc32 != piece.crc32:
                raise UserError(
                    f"{piece.path}: damaged: the bytes of '{self.name}' do not have the checksum that was written with "
                    "them. Copy the file again, or take an earlier checkpoint."
                )

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows start .. stop - 1, without checking a checksum."""
        import torch

        parts = []
        for piece in self.pieces:
            first = max(start, piece.start_row)
            last = min(stop, piece.start_row + piece.num_rows)
            if first < last:
                with open(piece.path, "rb", buffering=0) as file:
                    parts.append(self._read(file, piece, first - piece.start_row, last - first)[0])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read(self, file, piece: Piece, start: int, num_rows: int) -> tuple[torch.Tensor, memoryview]:
        import torch

        block = torch.empty((num_rows, *self.shape[1:]), dtype=self.dtype)
        raw = memoryview(block.view(-1).view(torch.uint8).numpy())
        file.seek(piece.offset_bytes + start * self.row_bytes)
        filled = 0
        while filled < len(raw):
            count = file.readinto(raw[filled:])
            if not count:
                raise UserError(f"{piece.path}: ends before the weights of '{self.name}' do. Copy the file again.")
            filled += count
        return block, raw


def find_weights(checkpoint_dir: str | os.PathLike) -> dict[str, StoredTensor]:
    """The weights in `checkpoint_dir`/lit_model.pth under litgpt's parameter names.

    Raises:
        UserError: there are none, or the files are not complete.
    """
    path = Path(checkpoint_dir) / LIT_MODEL
    if path.is_dir():
        return _clean_names(_find_in_shards(path), path)
    if path.is_file():
        return _clean_names(find_in_torch_file(path), path)
    raise UserError(_nothing_there(Path(checkpoint_dir)))


def _nothing_there(directory: Path) -> str:
    message = f"CKPT={directory}: no {LIT_MODEL} in it"
    if not directory.is_dir():
        return f"CKPT={directory}: no such directory."
    if (directory / f"{LIT_MODEL}.consolidated").is_file():
        return f"{message}, but {LIT_MODEL}.consolidated. Rename it: mv {directory}/{LIT_MODEL}.consolidated {directory}/{LIT_MODEL}"
    if (directory / _DCP_METADATA).is_file():
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
    if _EMBEDDING not in cleaned:
        some = ", ".join(list(cleaned)[:3]) or "nothing"
        raise UserError(
            f"{path}: no weights of a litgpt model in it ('{_EMBEDDING}' is not there; found: {some}). "
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
            state = _load_without_data(file)
            checksums = _checksums_by_offset(file)
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
        name: StoredTensor(name, tuple(tensor.shape), tensor.dtype, (_whole_piece(path, name, tensor, 0, checksums),))
        for name, tensor in state.items()
        if isinstance(tensor, torch.Tensor)
    }


def _load_without_data(file) -> Any:
    """Unpickle a file of torch.save with tensors on the meta device: they know shape, dtype and place in the file."""
    import torch

    return torch.load(file, map_location="meta", weights_only=True)


def first_data_byte(file, info: zipfile.ZipInfo) -> int:
    """Where the bytes of a record begin in an uncompressed archive."""
    file.seek(info.header_offset + 26)
    name_bytes, extra_bytes = (int.from_bytes(file.read(2), "little") for _ in range(2))
    return info.header_offset + 30 + name_bytes + extra_bytes


def _checksums_by_offset(file) -> dict[int, tuple[int, int]]:
    """For each record of the archive, by the place of its bytes: (how many, CRC-32)."""
    with zipfile.ZipFile(file) as archive:
        return {first_data_byte(file, info): (info.file_size, info.CRC) for info in archive.infolist()}


def _whole_piece(path: Path, name: str, tensor, base_bytes: int, checksums: dict[int, tuple[int, int]]) -> Piece:
    """All rows of a tensor that `_load_without_data` found in an archive at `base_bytes` of the file."""
    if not tensor.is_contiguous() or tensor.dim() == 0:
        raise UserError(f"{path}: '{name}' is not stored row after row. Save it with `.contiguous()`.")
    record_bytes = tensor.untyped_storage()._checkpoint_offset
    skipped_bytes = tensor.storage_offset() * tensor.dtype.itemsize
    size, crc32 = checksums.get(record_bytes, (None, None))
    covers_record = skipped_bytes == 0 and size == tensor.numel() * tensor.dtype.itemsize
    return Piece(
        path,
        base_bytes + record_bytes + skipped_bytes,
        start_row=0,
        num_rows=tensor.shape[0],
        crc32=crc32 if covers_record and crc32 else None,  # torch writes 0 where checksums were turned off
    )


# Shards of torch.distributed.checkpoint -------------------------------------------------------------------------------


_METADATA_TYPES = {
    "torch": {"Size", "device", "float32", "float64", "bfloat16", "float16", "int64", "int32", "uint8", "bool"}
    | {"strided", "contiguous_format", "preserve_format"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
}


class _MetadataUnpickler(pickle.Unpickler):
    """Knows what DCP itself puts into `.metadata`; anything else could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _METADATA_TYPES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")


def _read_metadata(directory: Path):
    missing = [name for name in (_DCP_METADATA, _LIGHTNING_MARKER) if not (directory / name).is_file()]
    if missing:
        raise UserError(
            f"{directory}: {' and '.join(missing)} missing: saving was interrupted, or the copy is not complete. "
            "Take an earlier checkpoint, or copy it again with all its files (names with a leading dot too)."
        )
    try:
        return _MetadataUnpickler(io.BytesIO((directory / _DCP_METADATA).read_bytes())).load()
    except Exception as error:  # a damaged pickle raises anything
        raise UserError(f"{directory / _DCP_METADATA}: not readable ({error}). Take an earlier checkpoint.") from error


def _find_in_shards(directory: Path) -> dict[str, StoredTensor]:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = _read_metadata(directory)
    prefixes = [name.removesuffix(_EMBEDDING) for name in metadata.state_dict_metadata if name.endswith(_EMBEDDING)]
    # Optimizer states are named after parameters: `optimizer.state.transformer.wte.weight.exp_avg`.
    prefix = next((found for found in ("model.", "state_dict.", "", *prefixes) if found in prefixes), "model.")
    chunks: dict[str, list] = {}
    for index, info in metadata.storage_data.items():
        if index.fqn.startswith(prefix):
            chunks.setdefault(index.fqn, []).append((tuple(index.offset or ()), info))
    _check_files_are_there(directory, {info.relative_path for found in chunks.values() for _, info in found})
    tensors = {}
    for full_name, stored in metadata.state_dict_metadata.items():
        if full_name.startswith(prefix) and isinstance(stored, TensorStorageMetadata):
            name = full_name.removeprefix(prefix)
            tensors[name] = _stored_tensor(directory, name, stored, chunks.get(full_name, []))
    return tensors


def _check_files_are_there(directory: Path, names: set[str]) -> None:
    from utils.manifest import safe_member

    missing = sorted(name for name in names if not safe_member(directory, name).is_file())
    if missing:
        raise UserError(
            f"{directory}: {len(missing)} of {len(names)} shards missing: {', '.join(missing[:5])}. Copy the checkpoint "
            "again, from a file system that every rank wrote to."
        )


def _stored_tensor(directory: Path, name: str, stored, chunks: list) -> StoredTensor:
    shape, dtype = tuple(stored.size), stored.properties.dtype
    sizes = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in stored.chunks}
    pieces = []
    next_row = 0
    for offsets, info in sorted(chunks, key=lambda chunk: chunk[0]):
        path = directory / info.relative_path
        size = sizes.get(offsets)
        if size is None or offsets[:1] != (next_row,) or any(offsets[1:]) or size[1:] != shape[1:]:
            raise UserError(
                f"{path}: '{name}' is not split into whole rows, as tensor parallelism leaves it. Consolidate first:\n"
                f"  python -m lightning.pytorch.utilities.consolidate_checkpoint {directory}"
            )
        pieces.append(_read_chunk_header(path, name, info, size, dtype, next_row))
        next_row += size[0]
    if next_row != shape[0]:
        raise UserError(
            f"{directory}: '{name}' has {shape[0]} rows, the shards hold {next_row}. Take another checkpoint."
        )
    return StoredTensor(name, shape, dtype, tuple(pieces))


def _read_chunk_header(path: Path, name: str, info, size: tuple[int, ...], dtype, start_row: int) -> Piece:
    if getattr(info, "transform_descriptors", None):
        raise UserError(f"{path}: shards written through the extension {info.transform_descriptors} cannot be read.")
    problem = None
    try:
        with open(path, "rb") as file:
            view = io.BufferedReader(_FileRange(file, info.offset, info.length))
            tensor = _load_without_data(view)
            checksums = _checksums_by_offset(view)
        if tuple(tensor.shape) != size or tensor.dtype != dtype:
            problem = f"shape {tuple(tensor.shape)}, expected {size}"
    except Exception as error:  # damaged bytes raise anything
        problem = str(error) or type(error).__name__
    if problem:
        raise UserError(
            f"{path}: damaged or truncated where '{name}' is stored ({problem.splitlines()[0]}). "
            "Copy the file again, or take an earlier checkpoint."
        )
    piece = _whole_piece(path, name, tensor, info.offset, checksums)
    return dataclasses.replace(piece, start_row=start_row)


class _FileRange(io.RawIOBase):
    """A part of an open file as a file of its own."""

    def __init__(self, file, offset_bytes: int, length_bytes: int):
        self._file, self._offset, self._length, self._position = file, offset_bytes, length_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer) -> int:
        count = max(0, min(len(buffer), self._length - self._position))
        self._file.seek(self._offset + self._position)
        count = self._file.readinto(memoryview(buffer)[:count])
        self._position += count
        return count
