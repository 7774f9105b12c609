"""Files of weights, laid out first and filled a few rows at a time: litgpt's lit_model.pth and Hugging Face's safetensors.

Both formats say up front where each tensor lies, so a file is made at its full size with only its headers, and rows are
written to their places in any order. Memory does not depend on the size of the model or of a tensor.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from export.checkpoint_reader import Piece, StoredTensor, first_data_byte
from utils.errors import UserError

if TYPE_CHECKING:
    import torch

_SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
_HEADER_ALIGNMENT_BYTES = 8  # so that readers that map the file get aligned numbers
_HEADER_LIMIT_BYTES = 100_000_000  # the format's own


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        return self.num_bytes // self.shape[0]


class RowWriter:
    """Puts rows into their places in files that were laid out for them."""

    def __init__(self, places: dict[str, tuple[Path, int, TensorSpec]], zip_path: Path | None = None):
        """
        Args:
            places: file, place of the first byte and specification of each tensor.
            zip_path: the file, where it is a zip archive: its checksums are filled in by `finish`.
        """
        self._places = places
        self._zip_path = zip_path
        self._descriptors = {path: os.open(path, os.O_WRONLY) for path in {place[0] for place in places.values()}}
        self._checksums: dict[int, int] = {}

    def write_rows(self, name: str, start_row: int, rows: torch.Tensor) -> None:
        """Write rows start_row .. of the tensor `name`; `rows` must have its dtype. In a zip archive: in order."""
        import torch

        path, first_byte, spec = self._places[name]
        if rows.dtype != spec.dtype or tuple(rows.shape[1:]) != spec.shape[1:]:
            raise ValueError(f"{name}: rows of {rows.dtype} {tuple(rows.shape)} do not belong into {spec}")
        raw = memoryview(rows.contiguous().view(-1).view(torch.uint8).numpy())
        if self._zip_path:
            self._checksums[first_byte] = zlib.crc32(raw, self._checksums.get(first_byte, 0))
        position = first_byte + start_row * spec.row_bytes
        while raw:
            count = os.pwrite(self._descriptors[path], raw, position)
            raw = raw[count:]
            position += count

    def finish(self) -> None:
        self.close()
        if self._zip_path:
            _write_zip_checksums(self._zip_path, self._checksums)

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors = {}


# Safetensors ----------------------------------------------------------------------------------------------------------


def shard_specs(specs: list[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    """Split into shards in the given order; a tensor larger than a shard gets one of its own."""
    shards: list[list[TensorSpec]] = [[]]
    used_bytes = 0
    for spec in specs:
        if shards[-1] and used_bytes + spec.num_bytes > max_shard_bytes:
            shards.append([])
            used_bytes = 0
        shards[-1].append(spec)
        used_bytes += spec.num_bytes
    return shards


def lay_out_safetensors(directory: Path, specs: list[TensorSpec], max_shard_bytes: int) -> RowWriter:
    """Make model*.safetensors, and the index when there are several.

    Names, index and metadata are those of `save_pretrained`, so that every reader of Hugging Face models finds them.
    """
    shards = shard_specs(specs, max_shard_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        index = {
            "metadata": {
                "total_size": sum(spec.num_bytes for spec in specs),
                "total_parameters": sum(math.prod(spec.shape) for spec in specs),
            },
            "weight_map": {spec.name: name for name, shard in zip(names, shards) for spec in shard},
        }
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    places = {}
    for name, shard in zip(names, shards):
        places.update(_lay_out_safetensors_file(directory / name, shard))
    return RowWriter(places)


def _lay_out_safetensors_file(path: Path, specs: list[TensorSpec]) -> dict[str, tuple[Path, int, TensorSpec]]:
    # | uint64 n | n bytes of JSON: name -> dtype, shape, [first byte, end] after the header | tensors, back to back |
    header: dict = {"__metadata__": {"format": "pt"}}
    offset_bytes = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": _SAFETENSORS_DTYPES[str(spec.dtype).removeprefix("torch.")],
            "shape": list(spec.shape),
            "data_offsets": [offset_bytes, offset_bytes + spec.num_bytes],
        }
        offset_bytes += spec.num_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _HEADER_ALIGNMENT_BYTES)
    start_bytes = 8 + len(encoded)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(start_bytes + offset_bytes)
    return {spec.name: (path, start_bytes + header[spec.name]["data_offsets"][0], spec) for spec in specs}


def find_in_safetensors(directory: Path) -> dict[str, StoredTensor]:
    """The weights in all model*.safetensors of `directory`."""
    import torch

    dtypes = {code: getattr(torch, name) for name, code in _SAFETENSORS_DTYPES.items()}
    tensors = {}
    for path in sorted(directory.glob("model*.safetensors")):
        with open(path, "rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if header_bytes > _HEADER_LIMIT_BYTES:
                raise UserError(f"{path}: not a safetensors file.")
            header = json.loads(file.read(header_bytes))
        for name, entry in header.items():
            if name != "__metadata__":
                shape = tuple(entry["shape"])
                piece = Piece(path, 8 + header_bytes + entry["data_offsets"][0], start_row=0, num_rows=shape[0])
                tensors[name] = StoredTensor(name, shape, dtypes[entry["dtype"]], (piece,))
    return tensors


# A file of torch.save -------------------------------------------------------------------------------------------------


def lay_out_torch_file(path: Path, specs: list[TensorSpec]) -> RowWriter:
    """Make a file of `torch.save({name: tensor, ..})` with room for the tensors' bytes."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    # Both are torch's own way to write headers only and fill in the bytes in a separate pass.
    with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save({spec.name: torch.empty(spec.shape, dtype=spec.dtype) for spec in specs}, path)
    state = torch.load(path, map_location="meta", weights_only=True)
    return RowWriter({s.name: (path, state[s.name].untyped_storage()._checkpoint_offset, s) for s in specs}, path)


def _write_zip_checksums(path: Path, checksums: dict[int, int]) -> None:
    """Write the CRC-32 of each record to the two places where zip keeps it.

        .. | bytes of a record | "PK\\x07\\x08" CRC-32 sizes | .. | directory: "PK\\x01\\x02" 12 bytes CRC-32 .. | ..

    torch reads the file without them, other readers of zip archives would call it damaged.

    Args:
        checksums: by the place of the record's first byte.
    """
    with open(path, "r+b") as file:
        with zipfile.ZipFile(file) as archive:
            infos, entry_byte = archive.infolist(), archive.start_dir
        for info in infos:
            first_byte = first_data_byte(file, info)
            if first_byte in checksums:
                for place, signature, distance in (
                    (first_byte + info.file_size, b"PK\x07\x08", 4),
                    (entry_byte, b"PK\x01\x02", 16),
                ):
                    file.seek(place)
                    if file.read(4) != signature:
                        raise ValueError(f"{path}: no zip record at byte {place}")
                    file.seek(place + distance)
                    file.write(checksums[first_byte].to_bytes(4, "little"))
            entry_byte += 46 + len(info.filename.encode()) + len(info.extra) + len(info.comment)
