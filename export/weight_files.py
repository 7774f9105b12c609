"""Files of weights, made at full size first and then filled: litgpt's lit_model.pth and Hugging Face's safetensors.

Both formats say up front where each tensor lies, so a file begins as headers only, and a few rows at a time are written
to their places in any order. Memory does not depend on the size of the model or of a tensor.
"""

from __future__ import annotations

import dataclasses
import json
import math
import zipfile
import zlib
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from export.checkpoint_weights import SAFETENSORS_DTYPES
from export.stored_tensor import bytes_of

_HEADER_ALIGNMENT_BYTES = 8  # so that readers that map the file get aligned numbers


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class RowWriter:
    """Puts rows into their places in files that were preallocated for them."""

    def __init__(self, places: dict[str, tuple[Path, int, TensorSpec]]):
        """
        Args:
            places: by tensor: its file, the place of its first byte there, and its specification.
        """
        self._places = places
        self._files = {path: open(path, "r+b", buffering=0) for path in {path for path, _, _ in places.values()}}

    def write_rows(self, name: str, start_row: int, rows: torch.Tensor) -> None:
        """Write rows start_row, start_row + 1, ... of the tensor `name`; `rows` must have its dtype."""
        path, first_byte, spec = self._places[name]
        if rows.dtype != spec.dtype or tuple(rows.shape[1:]) != spec.shape[1:]:
            raise ValueError(f"{name}: rows of {rows.dtype} {tuple(rows.shape)} do not belong in {spec}")
        raw = bytes_of(rows.contiguous())
        self._files[path].seek(first_byte + start_row * (spec.num_bytes // spec.shape[0]))
        while raw:
            raw = raw[self._files[path].write(raw) :]

    def finish(self) -> None:
        for file in self._files.values():
            file.close()


# Safetensors ----------------------------------------------------------------------------------------------------------


def preallocate_safetensors(directory: Path, specs: list[TensorSpec], max_shard_bytes: int) -> RowWriter:
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
        places |= _preallocate_safetensors_file(directory / name, shard)
    return RowWriter(places)


def shard_specs(specs: list[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    """Split into shards in the given order; a tensor larger than a shard gets its own."""
    shards: list[list[TensorSpec]] = [[]]
    used_bytes = 0
    for spec in specs:
        if shards[-1] and used_bytes + spec.num_bytes > max_shard_bytes:
            shards.append([])
            used_bytes = 0
        shards[-1].append(spec)
        used_bytes += spec.num_bytes
    return shards


def _preallocate_safetensors_file(path: Path, specs: list[TensorSpec]) -> dict[str, tuple[Path, int, TensorSpec]]:
    """Write the header, which `checkpoint_weights.find_in_safetensors` draws; returns the places of the tensors."""
    codes = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
    header: dict = {"__metadata__": {"format": "pt"}}
    offset_bytes = 0
    for spec in specs:
        end_bytes = offset_bytes + spec.num_bytes
        header[spec.name] = {
            "dtype": codes[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset_bytes, end_bytes],
        }
        offset_bytes = end_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _HEADER_ALIGNMENT_BYTES)
    start_bytes = 8 + len(encoded)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(start_bytes + offset_bytes)
    return {spec.name: (path, start_bytes + header[spec.name]["data_offsets"][0], spec) for spec in specs}


# A file of torch.save -------------------------------------------------------------------------------------------------


def preallocate_torch_file(path: Path, specs: list[TensorSpec]) -> RowWriter:
    """Make a file of `torch.save({name: tensor, ...})` with room for the tensors' bytes."""
    # Both are torch's own way to write headers only and fill in the bytes in a separate pass.
    with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save({spec.name: torch.empty(spec.shape, dtype=spec.dtype) for spec in specs}, path)
    state = torch.load(path, map_location="meta", weights_only=True)
    return _TorchFileWriter({s.name: (path, state[s.name].untyped_storage()._checkpoint_offset, s) for s in specs})


class _TorchFileWriter(RowWriter):
    """Wants the rows in order, for the checksums: torch reads a file without them, but others call it damaged."""

    def __init__(self, places: dict[str, tuple[Path, int, TensorSpec]]):
        super().__init__(places)
        self._checksums = dict.fromkeys(places, 0)

    def write_rows(self, name: str, start_row: int, rows: torch.Tensor) -> None:
        super().write_rows(name, start_row, rows)
        self._checksums[name] = zlib.crc32(bytes_of(rows.contiguous()), self._checksums[name])

    def finish(self) -> None:
        """Write the CRC-32 of each tensor to the two places where a zip archive keeps it.

        ... | bytes of a tensor | "PK\\x07\\x08" CRC-32 sizes | ... | "PK\\x01\\x02" 12 bytes CRC-32 ... | ...
        """
        ((path, file),) = self._files.items()
        with zipfile.ZipFile(file) as archive:
            records, entry_byte = archive.infolist(), archive.start_dir
        tensor_of_record = {f"{path.stem}/data/{i}": name for i, name in enumerate(self._places)}
        for record in records:
            if name := tensor_of_record.get(record.filename):
                _, first_byte, spec = self._places[name]
                for start, signature, distance_bytes in (
                    (first_byte + spec.num_bytes, b"PK\x07\x08", 4),
                    (entry_byte, b"PK\x01\x02", 16),
                ):
                    file.seek(start)
                    if file.read(4) != signature:
                        raise ValueError(f"{path}: no zip record at byte {start}")
                    file.seek(start + distance_bytes)
                    file.write(self._checksums[name].to_bytes(4, "little"))
            entry_byte += 46 + len(record.filename.encode()) + len(record.extra) + len(record.comment)
        super().finish()
