"""Where the weights of a checkpoint, or of an export, lie in its files; found without reading them.

    sharded      lit_model.pth/ = .metadata, __0_0.distcp, __1_0.distcp, ..., meta.pt
                 .metadata: pickle of torch.distributed.checkpoint (DCP): the chunks of each tensor; the file, first
                            byte and length of each chunk
                 *.distcp:  one file per rank: chunks of weights and optimizer state, each an archive of torch.save
                 meta.pt:   Lightning's own file, written last
    consolidated lit_model.pth  = one file of torch.save, weights under `model`, `state_dict` or at the top
    litgpt       lit_model.pth  = one file of torch.save, weights at the top or under `model`
    transformers model*.safetensors

Each weight comes out as a `StoredTensor`; optimizer state is never read.

What is trusted: nothing is unpickled except by torch.load(weights_only=True) and, for DCP's `.metadata`, by an
unpickler that knows DCP's own record types and no others.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from export.checkpoint_files import DCP_METADATA, EMBEDDING, LIT_MODEL, nothing_there
from export.stored_tensor import Piece, StoredTensor
from utils.errors import UserError
from utils.manifest import safe_member

_LIGHTNING_MARKER = "meta.pt"
# Wrappers of a module (torch.compile, activation checkpointing, Fabric, DDP) put these into parameter names.
_WRAPPER_NAMES = ("_orig_mod.", "_checkpoint_wrapped_module.", "_forward_module.")


def find_weights(checkpoint_dir: str | os.PathLike) -> dict[str, StoredTensor]:
    """The weights in `checkpoint_dir`/lit_model.pth under litgpt's parameter names.

    Raises:
        UserError: there are none, or the files are not complete.
    """
    path = Path(checkpoint_dir) / LIT_MODEL
    if not path.exists():
        raise UserError(nothing_there(Path(checkpoint_dir)))
    found = find_in_shards(path) if path.is_dir() else find_in_torch_file(path)
    weights = {}
    for name, tensor in found.items():
        for wrapper in _WRAPPER_NAMES:
            name = name.replace(wrapper, "")
        weights[name] = dataclasses.replace(tensor, name=name)
    if any("lora_" in name for name in weights):
        raise UserError(f"{path}: LoRA weights. Merge them first: litgpt merge_lora {path.parent}")
    if EMBEDDING not in weights:
        some = ", ".join(list(weights)[:3]) or "nothing"
        raise UserError(
            f"{path}: no weights of a litgpt model in it ('{EMBEDDING}' is not there; found: {some}). "
            "Only models of litgpt's GPT class can be exported."
        )
    return weights


# One file of torch.save -----------------------------------------------------------------------------------------------


def find_in_torch_file(path: str | os.PathLike) -> dict[str, StoredTensor]:
    """The weights in a file of torch.save, under the key `model`, `state_dict` or at its top."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            state = _load_without_data(file)
            for key in ("model", "state_dict"):
                if isinstance(state, dict) and isinstance(state.get(key), dict):
                    state = state[key]
                    break
            if not isinstance(state, dict):
                raise UserError(f"{path}: holds a {type(state).__name__}, expected a dictionary of weights.")
            tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
            pieces = {name: _piece_in_archive(file, path, name, tensor) for name, tensor in tensors.items()}
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: holds more than tensors and plain values, which could run code when loaded; refused ({error})."
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(
            f"{path}: not readable as a file of torch.save: truncated or damaged ({error}). Copy or make it again."
        ) from error
    return {
        name: StoredTensor(name, tuple(tensor.shape), tensor.dtype, (pieces[name],)) for name, tensor in tensors.items()
    }


def _load_without_data(file: BinaryIO) -> Any:
    """Unpickle an archive of torch.save with tensors on the meta device: they know shape, dtype and place."""
    return torch.load(file, map_location="meta", weights_only=True)


def _piece_in_archive(
    file: BinaryIO, path: Path, name: str, tensor: torch.Tensor, archive_byte: int = 0, start_row: int = 0
) -> Piece:
    """All rows of a tensor that `_load_without_data` found in the archive that begins at `archive_byte` of the file.

    The archive is a zip file without compression. torch.save puts the checksum behind the data:

        ... | bytes of a tensor | "PK\\x07\\x08" CRC-32 sizes | ...
    """
    if not tensor.is_contiguous() or tensor.dim() == 0:
        raise UserError(f"{path}: '{name}' is not stored row after row. Save it with `.contiguous()`.")
    storage = tensor.untyped_storage()
    if storage._checkpoint_offset is None:
        raise ValueError("written in the format of torch before 1.6")
    first_byte = archive_byte + storage._checkpoint_offset + tensor.storage_offset() * tensor.dtype.itemsize
    crc32 = None
    if tensor.nbytes == storage.nbytes():  # not a view of a larger tensor
        file.seek(first_byte + tensor.nbytes)
        behind = file.read(8)
        if behind.startswith(b"PK\x07\x08"):
            crc32 = int.from_bytes(behind[4:], "little") or None  # torch writes 0 where checksums are turned off
    return Piece(path, first_byte, start_row, tensor.shape[0], crc32)


# Shards of torch.distributed.checkpoint -------------------------------------------------------------------------------

_METADATA_TYPES = {
    "torch": "Size device float32 float64 bfloat16 float16 int64 int32 uint8 bool strided "
    "contiguous_format preserve_format",
    "torch.serialization": "_get_layout",
    "torch.distributed.checkpoint.metadata": "Metadata MetadataIndex TensorStorageMetadata BytesStorageMetadata "
    "ChunkStorageMetadata TensorProperties StorageMeta _MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "collections": "OrderedDict",
    "pathlib": "PosixPath PurePosixPath Path",
}


def _member_of_enum(owner: Any, name: str) -> enum.Enum:
    if not isinstance(owner, enum.EnumMeta):
        raise pickle.UnpicklingError(f"an attribute of {owner!r} has no place in a checkpoint's metadata")
    return owner[name]


class _MetadataUnpickler(pickle.Unpickler):
    """Knows what DCP itself puts into `.metadata`; anything else could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # by which Python 3.11.2, Debian 12's, pickles an enum's member
            return _member_of_enum
        if name in _METADATA_TYPES.get(module, "").split():
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")


def find_in_shards(directory: Path) -> dict[str, StoredTensor]:
    """The weights in a sharded checkpoint, under the names that they were saved with.

    Raises:
        UserError: files are missing or damaged, or do not hold whole weights.
    """
    metadata = _read_metadata(directory)
    prefixes = [name.removesuffix(EMBEDDING) for name in metadata.state_dict_metadata if name.endswith(EMBEDDING)]
    # Optimizer states are named after parameters: `optimizer.state.transformer.wte.weight.exp_avg`.
    prefix = next((found for found in ("model.", "state_dict.", "", *prefixes) if found in prefixes), "model.")
    chunks: dict[str, list] = {}
    for index, info in metadata.storage_data.items():
        if index.fqn.startswith(prefix):
            chunks.setdefault(index.fqn, []).append((tuple(index.offset or ()), info))
    _check_shards_are_there(directory, {info.relative_path for found in chunks.values() for _, info in found})
    return {
        name.removeprefix(prefix): _join_chunks(directory, name.removeprefix(prefix), stored, chunks.get(name, []))
        for name, stored in metadata.state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(stored, TensorStorageMetadata)
    }


def _read_metadata(directory: Path) -> Any:
    missing = [name for name in (DCP_METADATA, _LIGHTNING_MARKER) if not (directory / name).is_file()]
    if missing:
        raise UserError(
            f"{directory}: {' and '.join(missing)} missing: saving was interrupted, or the copy is not complete. "
            "Take an earlier checkpoint, or copy it again with all its files (names with a leading dot too)."
        )
    try:
        with open(directory / DCP_METADATA, "rb") as file:
            return _MetadataUnpickler(file).load()
    except Exception as error:  # a damaged pickle raises anything
        raise UserError(f"{directory / DCP_METADATA}: not readable ({error}). Take an earlier checkpoint.") from error


def _check_shards_are_there(directory: Path, names: set[str]) -> None:
    missing = sorted(name for name in names if not safe_member(directory, name).is_file())
    if missing:
        raise UserError(
            f"{directory}: {len(missing)} of {len(names)} shards missing: {', '.join(missing[:5])}. Copy the "
            "checkpoint again, from a file system that every rank wrote to."
        )


def _join_chunks(directory: Path, name: str, stored: TensorStorageMetadata, chunks: list) -> StoredTensor:
    """A tensor whose chunks, as (offsets of the first element, place), must be whole rows without gap or overlap."""
    shape = tuple(stored.size)
    sizes = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in stored.chunks}
    if any(size[1:] != shape[1:] for size in sizes.values()):
        raise UserError(
            f"{directory}: '{name}' is split by columns, as tensor parallelism splits it; only weights that are split "
            "by rows can be exported. Make it one file first, with Lightning's consolidate_checkpoint."
        )
    pieces: list[Piece] = []
    num_rows = 0
    for offsets, info in sorted(chunks, key=lambda chunk: chunk[0]):
        if offsets not in sizes or offsets[:1] != (num_rows,):
            break
        pieces.append(_read_chunk_header(directory / info.relative_path, name, info, sizes[offsets], stored, num_rows))
        num_rows += sizes[offsets][0]
    if (num_rows,) != shape[:1] or len(pieces) != len(chunks):
        raise UserError(f"{directory}: the shards do not hold all rows of '{name}'. Take an earlier checkpoint.")
    return StoredTensor(name, shape, stored.properties.dtype, tuple(pieces))


def _read_chunk_header(
    path: Path, name: str, info, size: tuple[int, ...], stored: TensorStorageMetadata, start_row: int
) -> Piece:
    """A chunk is an archive of torch.save of its own, somewhere in the file."""
    if getattr(info, "transform_descriptors", None):
        raise UserError(f"{path}: shards written through the extension {info.transform_descriptors} cannot be read.")
    try:
        with open(path, "rb") as file:
            tensor = _load_without_data(_create_file_view(file, info.offset, info.length))
            if tuple(tensor.shape) != size or tensor.dtype != stored.properties.dtype:
                raise ValueError(f"shape {tuple(tensor.shape)}, expected {size}")
            return _piece_in_archive(file, path, name, tensor, info.offset, start_row)
    except UserError:
        raise
    except Exception as error:  # damaged bytes raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path}: damaged or truncated where '{name}' is stored ({reason}). "
            "Copy the file again, or take an earlier checkpoint."
        ) from error


# Safetensors ----------------------------------------------------------------------------------------------------------

SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_HEADER_LIMIT_BYTES = 100_000_000  # the format's own


def find_in_safetensors(directory: Path) -> dict[str, StoredTensor]:
    """The weights in all model*.safetensors of `directory`."""
    # | uint64 n | n bytes of JSON: name -> dtype, shape, [first byte, end] after the header | tensors, back to back |
    tensors = {}
    for path in sorted(directory.glob("model*.safetensors")):
        with open(path, "rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if header_bytes > _HEADER_LIMIT_BYTES:
                raise UserError(f"{path}: not a safetensors file.")
            header = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            shape = tuple(entry["shape"])
            piece = Piece(path, 8 + header_bytes + entry["data_offsets"][0], start_row=0, num_rows=shape[0])
            tensors[name] = StoredTensor(name, shape, SAFETENSORS_DTYPES[entry["dtype"]], (piece,))
    return tensors
