"""Where each row of a Hugging Face tensor comes from, as litgpt's own converters say.

litgpt's `copy_weights_*` functions rename, split, join and reorder weights, always by whole rows. So they are run once
on a model whose "weights" are the numbers of their rows; what comes out says, for every row of every Hugging Face
tensor, from which row of which litgpt tensor it is taken:

    transformer.h.0.attn.qkv.weight, 96 rows: 0 .. 95  -->  model.layers.0.self_attn.k_proj.weight = rows 64 .. 79
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from litgpt import Config

    from export.stored_tensor import StoredTensor


@dataclasses.dataclass(frozen=True)
class RowRange:
    """Rows source_row .. source_row + num_rows - 1 of a litgpt tensor, at target_row of a Hugging Face tensor."""

    source: str
    source_row: int
    target: str
    target_row: int
    num_rows: int

    def overlap(self, start: int, num_rows: int) -> list[tuple[int, int, int]]:
        """What of the source's rows start .. start + num_rows - 1 belongs here: [(source_row, target_row, num_rows)]."""
        first = max(start, self.source_row)
        last = min(start + num_rows, self.source_row + self.num_rows)
        return [(first, self.target_row + first - self.source_row, last - first)] if first < last else []


@dataclasses.dataclass(frozen=True)
class HfLayout:
    shapes: dict[str, tuple[int, ...]]
    """Of the Hugging Face tensors, in the order in which they are written."""
    ranges: dict[str, list[RowRange]]
    """By litgpt name."""


def _converter(family: str, config: Config):
    from litgpt.scripts import convert_lit_checkpoint as litgpt

    def copy(function, **kwargs):
        return lambda into, weights: function(config, into, weights, **kwargs)

    # `untie_weights` drops lm_head; whether it is dropped is decided here from the weights, not from the family.
    def copy_olmo2(into, weights):
        # litgpt 0.5.13 gives Hugging Face's post_attention_layernorm the name norm_2 on the way out, which its own
        # model does not have, and post_attention_norm on the way in, which it does.
        weights = {name.replace(".post_attention_norm.", ".norm_2."): weight for name, weight in weights.items()}
        litgpt.copy_weights_olmo2(config, into, weights)

    return {
        "llama": lambda: copy(litgpt.copy_weights_llama, untie_weights=False),
        "mistral": lambda: copy(litgpt.copy_weights_llama, untie_weights=False),
        "gemma": lambda: copy(litgpt.copy_weights_llama, untie_weights=False),
        "gemma2": lambda: copy(litgpt.copy_weights_gemma_2, untie_weights=False),
        "gemma3_text": lambda: copy(litgpt.copy_weights_gemma_3, untie_weights=False),
        "qwen2": lambda: copy(litgpt.copy_weights_qwen_2_5),
        "qwen3": lambda: copy(litgpt.copy_weights_qwen_3),
        "olmo2": lambda: copy_olmo2,
        "phi3": lambda: copy(litgpt.copy_weights_phi),
        "gpt_neox": lambda: copy(litgpt.copy_weights_gpt_neox),
    }[family]()


def hf_layout(family: str, config: Config, tensors: dict[str, StoredTensor], tied: bool) -> HfLayout:
    """The Hugging Face tensors of a model and where their rows come from.

    Args:
        family: a model type of `hf_config.FAMILIES`.
        tensors: the litgpt weights.
        tied: leave out lm_head, because it equals the embedding.
    """
    import torch

    # Row i of the tensor that starts at `first` is the number first + i. A number is left out between two tensors, so
    # that a run of numbers never leads from one into the next.
    starts, row_numbers, first = [], {}, 0
    for name, tensor in tensors.items():
        if tied and name == "lm_head.weight":
            continue
        starts.append((first, name))
        row_numbers[name] = torch.arange(first, first + tensor.num_rows)
        first += tensor.num_rows + 1
    converted: dict[str, torch.Tensor] = {}
    _converter(family, config)(converted, row_numbers)
    if family != "gpt_neox" and "lm_head.weight" in row_numbers:  # dropped for "Phi-4-mini", whose original is tied
        converted["lm_head.weight"] = row_numbers["lm_head.weight"]

    first_rows = torch.tensor([start for start, _ in starts])
    shapes: dict[str, tuple[int, ...]] = {}
    ranges: dict[str, list[RowRange]] = {name: [] for name in row_numbers}
    for target, numbers in converted.items():
        target_row = 0
        for run in torch.tensor_split(numbers, (numbers.diff() != 1).nonzero().flatten() + 1):
            start, source = starts[int(torch.searchsorted(first_rows, run[0], right=True)) - 1]
            ranges[source].append(RowRange(source, int(run[0]) - start, target, target_row, len(run)))
            target_row += len(run)
        shapes[target] = (target_row, *tensors[source].shape[1:])
    lost = [n for n, found in ranges.items() if sum(r.num_rows for r in found) != tensors[n].num_rows]
    if lost:
        raise ValueError(f"litgpt's converter for {family} loses rows of {lost}")
    return HfLayout(shapes, ranges)
