"""Experts as transformers 5 holds them: one tensor for all experts of a layer, where the files have one per expert.

    model.layers.0.block_sparse_moe.experts.{0..7}.{w1,w3}.weight  -->  model.layers.0.mlp.experts.gate_up_proj
    model.layers.0.mlp.experts.{0..127}.down_proj.weight           -->  model.layers.0.mlp.experts.down_proj

transformers joins them while it loads (its conversion_mapping), and transformers 4 and other programs read the files as
they are. Here it is done for the proof, which reads the files itself.
"""

from __future__ import annotations

import collections
import dataclasses
import re

import torch

from export.stored_tensor import StoredTensor

_EXPERT = re.compile(r"(.*)\.(?:block_sparse_moe|mlp)\.experts\.(\d+)\.(\w+)\.weight")
# By name of a weight in the files: the joined tensor, and its place in it.
_JOINED = {
    "w1": ("gate_up_proj", 0),
    "w3": ("gate_up_proj", 1),
    "w2": ("down_proj", 0),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "down_proj": ("down_proj", 0),
}


@dataclasses.dataclass(frozen=True)
class JoinedExperts:
    """One weight of every expert; a row of it is an expert, as a StoredTensor's is a slice of its first dimension."""

    parts: list[list[StoredTensor]]
    """By expert: what lies one below the other in its slice."""

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0]
        return (len(self.parts), sum(part.num_rows for part in first), *first[0].shape[1:])

    @property
    def num_rows(self) -> int:
        return len(self.parts)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Experts start to stop - 1, shape (stop - start, *shape[1:])."""
        return torch.stack(
            [torch.cat([part.rows(0, part.num_rows) for part in parts]) for parts in self.parts[start:stop]]
        )


def join_experts(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor | JoinedExperts]:
    """Weights by transformers' own names; those of experts are joined, the others stay as they are."""
    found: dict[str, StoredTensor | JoinedExperts] = {}
    experts: dict[str, dict[int, dict[int, StoredTensor]]] = collections.defaultdict(dict)
    for name, tensor in tensors.items():
        if match := _EXPERT.fullmatch(name):
            layer, number, weight = match.groups()
            joined, place = _JOINED[weight]
            experts[f"{layer}.mlp.experts.{joined}"].setdefault(int(number), {})[place] = tensor
        else:
            found[name.replace(".block_sparse_moe.", ".mlp.")] = tensor
    for name, by_number in experts.items():
        parts = [[weights[place] for place in sorted(weights)] for _, weights in sorted(by_number.items())]
        found[name] = JoinedExperts(parts)
    return found
