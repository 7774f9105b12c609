"""Where each row of a Hugging Face tensor comes from, as litgpt's own converters say.

litgpt's `copy_weights_*` functions rename, split, join and reorder weights, always by whole rows. So they are run once
on a model whose "weights" are the numbers of their rows; what comes out says, for every row of every Hugging Face
tensor, from which row of which litgpt tensor it is taken:

    transformer.h.0.attn.qkv.weight, 96 rows: 0 to 95  -->  model.layers.0.self_attn.k_proj.weight = rows 64 to 79
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from functools import partial

import torch
from litgpt import Config
from litgpt.scripts import convert_lit_checkpoint as litgpt

from export.stored_tensor import StoredTensor
from export.weight_files import TensorSpec


@dataclasses.dataclass(frozen=True)
class RowRange:
    """Rows source_row to source_row + num_rows - 1 of a litgpt tensor, at target_row of a Hugging Face tensor."""

    source_row: int
    target: str
    target_row: int
    num_rows: int


@dataclasses.dataclass(frozen=True)
class HfLayout:
    """The Hugging Face tensors of a model, and which rows of which litgpt tensor they are made of."""

    specs: list[TensorSpec]
    """In the order in which they are written."""
    ranges: dict[str, list[RowRange]]
    """By litgpt name; a tied lm_head has none."""

    @functools.cached_property
    def _dtypes(self) -> dict[str, torch.dtype]:
        return {spec.name: spec.dtype for spec in self.specs}

    def distribute(self, name: str, start: int, block: torch.Tensor) -> Iterator[tuple[str, int, torch.Tensor]]:
        """Rows start, start + 1, ... of a litgpt tensor, as (Hugging Face tensor, row in it, rows in its dtype)."""
        for part in self.ranges.get(name, ()):
            first = max(start, part.source_row)
            stop = min(start + len(block), part.source_row + part.num_rows)
            if first < stop:
                rows = block[first - start : stop - start].to(self._dtypes[part.target])
                yield part.target, part.target_row + first - part.source_row, rows


def _copy_weights_olmo2(config: Config, into: dict, weights: dict) -> None:
    # litgpt 0.5.13 gives Hugging Face's post_attention_layernorm the name norm_2 on the way out, which its own model
    # does not have, and post_attention_norm on the way in, which it does.
    weights = {name.replace(".post_attention_norm.", ".norm_2."): weight for name, weight in weights.items()}
    litgpt.copy_weights_olmo2(config, into, weights)


def _copy_weights_falcon(config: Config, into: dict, weights: dict) -> None:
    # litgpt asks the name which of the two architectures it is, which a model of one's own need not tell.
    name = "falcon-7b" if config.shared_attention_norm else "falcon-40b"
    litgpt.copy_weights_falcon(dataclasses.replace(config, name=name), into, weights)


# `untie_weights` drops lm_head; whether it is dropped is decided here from the weights, not from the family.
_CONVERTERS = {
    "llama": partial(litgpt.copy_weights_llama, untie_weights=False),
    "mistral": partial(litgpt.copy_weights_llama, untie_weights=False),
    "gemma": partial(litgpt.copy_weights_llama, untie_weights=False),
    "gemma2": partial(litgpt.copy_weights_gemma_2, untie_weights=False),
    "gemma3_text": partial(litgpt.copy_weights_gemma_3, untie_weights=False),
    "mixtral": partial(litgpt.copy_weights_llama, untie_weights=False),
    "qwen2": litgpt.copy_weights_qwen_2_5,
    "qwen3": litgpt.copy_weights_qwen_3,
    "qwen3_moe": litgpt.copy_weights_qwen_3,
    "olmo2": _copy_weights_olmo2,
    "phi3": litgpt.copy_weights_phi,
    "gpt_neox": litgpt.copy_weights_gpt_neox,
    "phi": litgpt.copy_weights_phi,
    "falcon": _copy_weights_falcon,
    "stablelm": partial(litgpt.copy_weights_llama, untie_weights=False),
    "olmo": partial(litgpt.copy_weights_llama, untie_weights=False),
}


def hf_layout(family: str, config: Config, tensors: dict[str, StoredTensor], tied: bool) -> HfLayout:
    """The Hugging Face tensors of a model and where their rows come from.

    Args:
        family: a model type of `hf_config.FAMILIES`.
        tensors: the litgpt weights.
        tied: leave out lm_head, because it equals the embedding.
    """
    # Row i of the tensor that starts at `first` is the number first + i. A number is left out between two tensors, so
    # that consecutive numbers never lead from one into the next.
    names, starts, row_numbers, first = [], [], {}, 0
    for name, tensor in tensors.items():
        if not (tied and name == "lm_head.weight"):
            names.append(name)
            starts.append(first)
            row_numbers[name] = torch.arange(first, first + tensor.num_rows)
            first += tensor.num_rows + 1
    converted: dict[str, torch.Tensor] = {}
    _CONVERTERS[family](config, converted, row_numbers)
    if family != "gpt_neox" and "lm_head.weight" in row_numbers:  # dropped for "Phi-4-mini", whose original is tied
        converted["lm_head.weight"] = row_numbers["lm_head.weight"]

    specs = []
    ranges: dict[str, list[RowRange]] = {name: [] for name in names}
    for target, numbers in converted.items():
        target_row = 0
        for run in torch.tensor_split(numbers, (numbers.diff() != 1).nonzero().flatten() + 1):
            index = int(torch.searchsorted(torch.tensor(starts), run[0], right=True)) - 1
            ranges[names[index]].append(RowRange(int(run[0]) - starts[index], target, target_row, len(run)))
            target_row += len(run)
        source = tensors[names[index]]
        specs.append(TensorSpec(target, (target_row, *source.shape[1:]), source.dtype))
    lost = [name for name, parts in ranges.items() if sum(p.num_rows for p in parts) != tensors[name].num_rows]
    if lost:
        raise ValueError(f"litgpt's converter for {family} loses rows of {lost}")
    return HfLayout(specs, ranges)
