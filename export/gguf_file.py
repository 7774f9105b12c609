"""model.gguf, the file of llama.cpp and of the programs built on it: weights, configuration and tokenizer in one.

It is made of the Hugging Face tensors: `hf_layout` says where their rows come from, here they get llama.cpp's names
and, where llama.cpp turns neighbouring elements of a head instead of its two halves, llama.cpp's order of rows. The
names, keys and the file's form come from the `gguf` package, which llama.cpp's authors publish. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from litgpt import Config
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from export.checkpoint_files import EMBEDDING
from export.gguf_tokenizer import add_tokenizer
from export.hf_config import family_of
from export.hf_layout import HfLayout, RowRange
from export.plan import ExportPlan
from export.stored_tensor import Piece, StoredTensor
from export.weight_files import RowWriter, TensorSpec
from utils.errors import UserError

GGUF_NAME = "model.gguf"
ROPE_FACTORS = "rope_freqs.weight"
"""The one tensor that no checkpoint has: by how much each frequency of Llama 3's scaled positions is divided."""
# Not OLMo 2: its probabilities were off by up to 0.5 after 200 tokens (tried: llama.cpp as of October 2026).
_ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
_TURNS_NEIGHBOURS = ("llama", "mistral")
_FILE_TYPES = {torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16"}
_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def gguf_package() -> Any:
    """The `gguf` package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import gguf
    except ModuleNotFoundError:
        raise UserError("--formats=gguf: needs the package gguf. Install it: pip install gguf==0.19.0") from None
    return gguf


def gguf_problems(family: str, config: Config) -> list[str]:
    """Why llama.cpp cannot run a model that transformers can; empty if it can."""
    if family not in _ARCHITECTURES:
        return [f"models of type {family} are not supported, only {', '.join(_ARCHITECTURES)}"]
    window = config.sliding_window_size
    if window is not None and window < config.block_size:
        return [f"sliding_window_size is {window}, llama.cpp lets a {family} model see all {config.block_size} tokens"]
    return []


def gguf_layout(family: str, config: Config, layout: HfLayout) -> HfLayout:
    """The same rows under llama.cpp's names and in its order.

    Vectors are float32, as llama.cpp's kernels want norms and biases, whatever the matrices are.
    """
    gguf = gguf_package()
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, _ARCHITECTURES[family]), config.n_layer)
    renamed = {spec.name: names.get_name(spec.name, try_suffixes=(".weight", ".bias")) for spec in layout.specs}
    if unknown := [name for name, found in renamed.items() if found is None]:
        raise ValueError(f"the gguf package has no name for {unknown} in {family}")
    reordered = {
        name for name in renamed if family in _TURNS_NEIGHBOURS and name.split(".")[-2] in ("q_proj", "k_proj")
    }
    ranges = {
        source: [
            dataclasses.replace(moved, target=renamed[part.target])
            for part in parts
            for moved in (_as_pairs(part, config.head_size) if part.target in reordered else [part])
        ]
        for source, parts in layout.ranges.items()
    }
    specs = [
        TensorSpec(renamed[spec.name], spec.shape, torch.float32 if len(spec.shape) == 1 else spec.dtype)
        for spec in layout.specs
    ]
    return HfLayout(specs, ranges)


def _as_pairs(part: RowRange, head_size: int) -> list[RowRange]:
    """Each row of a query or key on its own, where llama.cpp has it: element i of a head's first half becomes its
    element 2 i, element i of the second half 2 i + 1."""
    rows = []
    for row in range(part.num_rows):
        head, element = divmod(part.target_row + row, head_size)
        half, i = divmod(element, head_size // 2)
        place = head * head_size + 2 * i + half
        rows.append(dataclasses.replace(part, source_row=part.source_row + row, target_row=place, num_rows=1))
    return rows


def preallocate_gguf(plan: ExportPlan, directory: Path, name: str) -> RowWriter:
    """Write everything but the weights, and make room for these.

    Args:
        plan: with what `gguf_layout` returned, and a tokenizer.
        directory: holds config.json and the tokenizer's files, as they are exported.
        name: what programs show as the model's name.

    Raises:
        UserError: llama.cpp cannot split text as this tokenizer does.
    """
    gguf = gguf_package()
    path = directory / GGUF_NAME
    architecture = getattr(gguf.MODEL_ARCH, _ARCHITECTURES[family_of(plan.config)])
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_name(name)
    writer.add_file_type(getattr(gguf.LlamaFileType, _FILE_TYPES[plan.weights[EMBEDDING].dtype]))
    _add_shapes(writer, gguf, plan.config)
    add_tokenizer(writer, gguf, directory, plan.tokenizer, plan.pad_id, plan.config.padded_vocab_size)
    factors = _rope_factors(directory)
    specs = list(plan.gguf.specs)
    if factors is not None:
        specs.append(TensorSpec(ROPE_FACTORS, tuple(factors.shape), torch.float32))
    for spec in specs:
        kind = getattr(gguf.GGMLQuantizationType, _TYPES[spec.dtype])
        writer.add_tensor_info(spec.name, spec.shape, None, spec.num_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    alignment = writer.data_alignment
    starts, end = {}, path.stat().st_size
    for spec in specs:
        starts[spec.name] = end = -(-end // alignment) * alignment
        end += spec.num_bytes
    with open(path, "r+b") as file:
        file.truncate(-(-end // alignment) * alignment)
    places = RowWriter({spec.name: (path, starts[spec.name], spec) for spec in specs})
    if factors is not None:
        places.write_rows(ROPE_FACTORS, 0, factors)
    return places


def find_in_gguf(directory: Path) -> dict[str, StoredTensor]:
    """The weights in model.gguf, but for what no checkpoint has."""
    gguf = gguf_package()
    kinds = {getattr(gguf.GGMLQuantizationType, name): dtype for dtype, name in _TYPES.items()}
    path = directory / GGUF_NAME
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name != ROPE_FACTORS:
            shape = tuple(int(size) for size in reversed(tensor.shape))
            piece = Piece(path, int(tensor.data_offset), 0, shape[0])
            found[tensor.name] = StoredTensor(tensor.name, shape, kinds[tensor.tensor_type], (piece,))
    return found


def _add_shapes(writer: Any, gguf: Any, config: Config) -> None:
    writer.add_vocab_size(config.padded_vocab_size)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_query_groups)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.rope_n_elem)
    writer.add_rope_freq_base(float(config.rope_base))
    adjustments = config.rope_adjustments or {}
    linear = adjustments.get("factor") if "low_freq_factor" not in adjustments else None
    if linear is None and config.rope_condense_ratio != 1:
        linear = config.rope_condense_ratio
    if linear is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(linear))


def _rope_factors(directory: Path) -> torch.Tensor | None:
    """By what Llama 3's scaling divides each frequency, shape (head_size / 2,); None for other models.

    transformers computes the scaled frequencies; llama.cpp reads the quotient.
    """
    config = AutoConfig.from_pretrained(directory)
    scaling = getattr(config, "rope_parameters", None) or {}
    if scaling.get("rope_type") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = 2 * len(scaled)
    plain = scaling["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    return (plain / scaled.double()).float()
