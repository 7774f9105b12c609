"""Mixtures of experts: all experts of a layer in three grouped matrix products, and how evenly tokens spread over them.

litgpt's layer (LLaMAMoE) takes one expert after the other and asks each time which tokens it has, so that the host
waits for the device once per expert. Here the tokens of a micro-batch are sorted by expert, and torch's grouped product
multiplies each stretch of rows with its expert's weight. All shapes are known beforehand, and nothing waits:

    tokens           0    1    2                            (N, n_embd)
    chosen experts   2 0  0 1  2 0                          (N, k)
    rows, sorted     0 1 2 | 1 | 0 2     by token           (N * k, n_embd)
                     e0      e1   e2     ends 3, 4, 6

Parameters have litgpt's names, one matrix per expert, so that checkpoints, FSDP2 and the export know them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from litgpt.model import Block, LLaMAMoE
from torch import Tensor
from torch.nn import functional

from pretraining.model_config import has_grouped_experts


class Routing(NamedTuple):
    """Where one layer sent the tokens of one micro-batch of this process."""

    balance: Tensor
    """The load-balancing loss, float32: num_experts * sum over experts of f * P, where f is the share of tokens that go
    to an expert and P the mean probability that the router gives it (Fedus et al., arXiv:2101.03961, equations 4 to 6).
    As in transformers, a token that goes to k experts counts for each, so tokens that spread evenly give k."""
    counts: Tensor
    """Tokens per expert, int32, shape (n_expert,)."""


class Experts(LLaMAMoE):
    """litgpt's LLaMAMoE with the same parameters and results; it also returns the routing."""

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """x: (B, T, n_embd), as is the result."""
        num_chosen, num_experts = self.config.n_expert_per_token, self.config.n_expert
        tokens = x.flatten(0, 1)  # (N, n_embd)
        logits = self.gate(tokens)  # (N, n_expert)
        weights, chosen = logits.topk(num_chosen)  # (N, k)
        weights = weights.softmax(dim=1, dtype=torch.float32).to(x.dtype)

        expert_of_row, order = chosen.flatten().sort(stable=True)
        inverse = order.argsort()
        experts = torch.arange(num_experts, device=x.device)
        ends = torch.searchsorted(expert_of_row, experts, right=True, out_int32=True)  # of each expert's rows

        rows = _Permute.apply(tokens.repeat_interleave(num_chosen, dim=0), order, inverse)  # (N * k, n_embd)
        hidden = functional.silu(self._multiply(rows, ends, "fc_1")) * self._multiply(rows, ends, "fc_2")
        rows = _Permute.apply(self._multiply(hidden, ends, "proj"), inverse, order)
        y = (weights.unsqueeze(1) @ rows.unflatten(0, (-1, num_chosen))).view_as(x)

        counts = ends.diff(prepend=ends.new_zeros(1))
        probabilities = logits.softmax(dim=1, dtype=torch.float32).mean(dim=0)
        balance = num_experts / len(tokens) * (counts * probabilities).sum()
        return y, Routing(balance, counts)

    def _multiply(self, rows: Tensor, ends: Tensor, name: str) -> Tensor:
        return _grouped_linear(rows, ends, [getattr(expert, name).weight for expert in self.experts])


class ExpertBlock(Block):
    """litgpt's Block, whose experts return their routing too.

    The routing is a result of the block, rather than something left lying on the module, so that recomputation and
    compilation treat it as all else: computed again it counts once.
    """

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Any = None) -> tuple[Tensor, Routing]:
        normed = self.norm_1(x)
        attended = self.post_attention_norm(self.attn(normed, cos, sin, mask)) + x
        if not self.config.parallel_residual:
            normed = self.norm_2(attended)
        elif not self.config.shared_attention_norm:
            normed = self.norm_2(x)
        y, routing = self.mlp(normed)
        return self.post_mlp_norm(y) + attended, routing


def group_experts(block: Block) -> None:
    """Make a block of litgpt's compute its experts as this module does, where it has any."""
    if isinstance(block.mlp, LLaMAMoE) and has_grouped_experts(block.config):
        block.mlp.__class__ = Experts
        block.__class__ = ExpertBlock


class RoutingSums:
    """The routing of a step's micro-batches, summed on the device.

    Args:
        weight: train.router_aux_loss.
    """

    def __init__(self, weight: float):
        self._weight = weight
        self._sums: Tensor | None = None

    def add(self, layers: list[Routing], num_tokens: int) -> Tensor:
        """Count a micro-batch; returns what it adds to the objective, which is a sum over tokens."""
        balance = torch.stack([layer.balance for layer in layers])
        tokens = torch.full_like(balance, num_tokens)
        counts = torch.stack([layer.counts for layer in layers])
        sums = torch.cat([torch.stack([balance.detach() * num_tokens, tokens], dim=1), counts], dim=1).double()
        self._sums = sums if self._sums is None else self._sums + sums
        return self._weight * num_tokens * (balance if self._weight else balance.detach()).mean()

    def take(self) -> Tensor | None:
        """Since the last call, per layer: balance * tokens, tokens, and the tokens of each expert; float64, shape
        (layers, 2 + n_expert), to be added up over processes. None without experts."""
        sums, self._sums = self._sums, None
        return sums


def routing_metrics(sums: Tensor) -> dict[str, Tensor]:
    """What is logged of the sums of all processes, as scalars on their device."""
    balance, num_tokens, counts = sums[:, 0], sums[:, 1], sums[:, 2:]
    return {
        "router_balance_loss": (balance / num_tokens).mean(),  # over layers
        "expert_max_share": (counts / num_tokens.unsqueeze(1)).max(),  # of tokens, over experts of all layers
    }


class _Permute(torch.autograd.Function):
    """rows[order]. Its gradient is another permutation, where that of indexing would add rows up in any order."""

    @staticmethod
    def forward(ctx, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows[order]

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (inverse,) = ctx.saved_tensors
        return gradient[inverse], None, None


# Operations of their own, which compilation, recomputation and tensors without storage know by the shapes of their
# results: torch's rule for the grouped product refuses float32 there, which the product itself takes.


@torch.library.custom_op("pretraining::grouped_linear", mutates_args=())
def _grouped_linear(rows: Tensor, ends: Tensor, weights: list[Tensor]) -> Tensor:
    """Linear layers without bias: rows[ends[i - 1] : ends[i]] @ weights[i].T, one below the other.

    The grouped product wants the weights in one tensor. That copy is made again in the backward pass, so that none
    outlives its product: kept, the copies would take as much memory as the weights of the whole model.
    """
    return functional.grouped_mm(rows, torch.stack(weights).transpose(1, 2), offs=ends)


@_grouped_linear.register_fake
def _(rows: Tensor, ends: Tensor, weights: list[Tensor]) -> Tensor:
    return rows.new_empty(len(rows), len(weights[0]))


@torch.library.custom_op("pretraining::grouped_linear_gradients", mutates_args=())
def _grouped_linear_gradients(
    gradient: Tensor, rows: Tensor, ends: Tensor, weights: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Of the rows, and of the weights in one tensor, shape (n_expert, out, in)."""
    gradient = gradient.contiguous()
    row_gradient = functional.grouped_mm(gradient, torch.stack(weights), offs=ends)
    return row_gradient, functional.grouped_mm(gradient.T, rows, offs=ends)


@_grouped_linear_gradients.register_fake
def _(gradient: Tensor, rows: Tensor, ends: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), rows.new_empty(len(weights), *weights[0].shape)


def _save(ctx, inputs: tuple[Tensor, Tensor, list[Tensor]], output: Tensor) -> None:
    rows, ends, weights = inputs
    ctx.save_for_backward(rows, ends, *weights)


def _backward(ctx, gradient: Tensor) -> tuple[Tensor, None, list[Tensor]]:
    rows, ends, *weights = ctx.saved_tensors
    row_gradient, weight_gradients = _grouped_linear_gradients(gradient, rows, ends, weights)
    return row_gradient, None, list(weight_gradients.unbind())


_grouped_linear.register_autograd(_backward, setup_context=_save)

GROUPED_PRODUCT = torch.ops.pretraining.grouped_linear.default
"""As recomputation sees it."""
