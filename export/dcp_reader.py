"""Weights in the shards that torch.distributed.checkpoint (DCP) writes, as byte ranges of the shard files.

    lit_model.pth/
      .metadata          pickle: for each tensor its chunks; for each chunk its file, first byte and length
      __0_0.distcp ..    a file a rank: chunks of weights and optimizer state, each an archive of torch.save
      meta.pt            Lightning's own file, written last

Only the headers of the weights' chunks are read here.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
from pathlib import Path
from typing import Any

from export.checkpoint_reader import (
    DCP_METADATA,
    EMBEDDING,
    Piece,
    StoredTensor,
    checksums_by_first_byte,
    load_without_data,
    whole_piece,
)
from utils.errors import UserError
from utils.manifest import safe_member

_LIGHTNING_MARKER = "meta.pt"

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
    missing = [name for name in (DCP_METADATA, _LIGHTNING_MARKER) if not (directory / name).is_file()]
    if missing:
        raise UserError(
            f"{directory}: {' and '.join(missing)} missing: saving was interrupted, or the copy is not complete. "
            "Take an earlier checkpoint, or copy it again with all its files (names with a leading dot too)."
        )
    try:
        return _MetadataUnpickler(io.BytesIO((directory / DCP_METADATA).read_bytes())).load()
    except Exception as error:  # a damaged pickle raises anything
        raise UserError(f"{directory / DCP_METADATA}: not readable ({error}). Take an earlier checkpoint.") from error


def find_in_shards(directory: Path) -> dict[str, StoredTensor]:
    """The weights in a sharded checkpoint, under the names that they were saved with.

    Raises:
        UserError: files are missing or damaged, or do not hold whole weights.
    """
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = _read_metadata(directory)
    prefixes = [name.removesuffix(EMBEDDING) for name in metadata.state_dict_metadata if name.endswith(EMBEDDING)]
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
    next_row, next_column = 0, 0
    for offsets, info in sorted(chunks, key=lambda chunk: chunk[0]):
        size = sizes.get(offsets)
        if size is None or offsets[:1] != (next_row,) or offsets[1:2] not in ((), (next_column,)) or any(offsets[2:]):
            break
        piece = _read_chunk_header(directory / info.relative_path, name, info, size, dtype)
        piece = dataclasses.replace(piece, start_row=next_row)
        if len(shape) == 2 and size[1] != shape[1]:
            piece = dataclasses.replace(piece, start_column=next_column, num_columns=size[1])
            next_column += size[1]
        if len(shape) < 2 or piece.num_columns is None or next_column == shape[1]:
            next_row, next_column = next_row + size[0], 0
        pieces.append(piece)
    if next_row != shape[0] or len(pieces) != len(chunks):
        raise UserError(
            f"{directory}: the shards do not hold the whole of '{name}', or not in rows and columns. "
            "Take an earlier checkpoint."
        )
    return StoredTensor(name, shape, dtype, tuple(pieces))


def _read_chunk_header(path: Path, name: str, info, size: tuple[int, ...], dtype) -> Piece:
    """A chunk is an archive of torch.save of its own, somewhere in the file."""
    if getattr(info, "transform_descriptors", None):
        raise UserError(f"{path}: shards written through the extension {info.transform_descriptors} cannot be read.")
    problem = None
    try:
        with open(path, "rb") as file:
            view = io.BufferedReader(_FileRange(file, info.offset, info.length))
            tensor = load_without_data(view)
            checksums = checksums_by_first_byte(view)
        if tuple(tensor.shape) != size or tensor.dtype != dtype:
            problem = f"shape {tuple(tensor.shape)}, expected {size}"
    except Exception as error:  # damaged bytes raise anything
        problem = str(error) or type(error).__name__
    if problem:
        raise UserError(
            f"{path}: damaged or truncated where '{name}' is stored ({problem.splitlines()[0]}). "
            "Copy the file again, or take an earlier checkpoint."
        )
    return whole_piece(path, name, tensor, info.offset, checksums)


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
