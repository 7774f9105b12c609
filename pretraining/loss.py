"""Next-token cross entropy from hidden states, with the logits of only a few tokens in memory at a time.

The logits of a micro-batch of 4 sequences of 8,192 tokens over 128,256 entries take 8.4 GB in bfloat16 and twice that
in float32 inside the softmax; everything else that a model of 8 billion parameters needs on each of 32 GPUs is smaller.

The loss is a sum over tokens, so the gradient of a chunk's logits is known as soon as the chunk's softmax is: the
forward pass computes both gradients beside the loss, and the backward pass only scales them. That is three matrix
products per chunk (logits, gradient of the hidden states, gradient of the weight) where recomputing the logits in the
backward pass takes four, and no logits outlive their chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED_TARGET = -1
"""A target that counts for nothing, in the loss as in its gradients: that of a row which only fills a batch."""


class OutputLayer(torch.nn.Linear):
    """The output layer, with the loss as its forward pass.

    Because the weight is used nowhere else, FSDP2 can shard this module by itself: its weight is gathered while the
    blocks still compute, and its gradient is reduced while they compute backward. Parameters have nn.Linear's names.
    """

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        *,
        chunk_tokens: int = 1024,
        z_loss: float = 0.0,
        softcap: float | None = None,
        per_token: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The logits, without targets; with them, what `next_token_loss` or, `per_token`, `token_scores` returns."""
        if targets is None:
            return super().forward(hidden)
        if per_token:
            return token_scores(hidden, self.weight, self.bias, targets, chunk_tokens=chunk_tokens, softcap=softcap)
        return next_token_loss(
            hidden, self.weight, self.bias, targets, chunk_tokens=chunk_tokens, z_loss=z_loss, softcap=softcap
        )


def next_token_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    chunk_tokens: int,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross entropy in nats, summed over tokens, and the objective to be minimised.

    Gradients are summed over the chunks in float32, scaled by the incoming gradient, and rounded once to the type of
    their tensor. There can be one backward pass per forward pass. Without gradients (validation) only the loss is
    computed, by the same operations.

    Args:
        hidden: shape (N, width), the output of the last norm.
        weight: of the output layer, shape (vocabulary, width), of the type of `hidden`.
        bias: shape (vocabulary,), or None.
        targets: int64, shape (N,); IGNORED_TARGET where a row counts for nothing.
        chunk_tokens: rows whose logits are held at once.
        z_loss: weight of the squared log-partition function (PaLM, arXiv:2204.02311, section 5).
        softcap: logits become softcap * tanh(logits / softcap) (Gemma 2, arXiv:2408.00118); None: off.

    Returns:
        Two float32 scalars: the cross entropy, without gradient; and the cross entropy + z_loss * the sum of squares of
        the log-partition function, to be minimised.
    """
    return _NextTokenLoss.apply(hidden, weight, bias, targets, chunk_tokens, z_loss, softcap, torch.is_grad_enabled())


class _NextTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, chunk_tokens, z_loss, softcap, grad_enabled):
        wanted = [grad_enabled and needed for needed in ctx.needs_input_grad[:3]]
        # Sums are in float32. So are the products on a CPU: few have units for bfloat16, and without them a product
        # takes 20 to 50 times as long. On a GPU factors stay in bfloat16 and the units add up in float32.
        sum_dtype = torch.promote_types(hidden.dtype, torch.float32)
        factor_dtype = hidden.dtype if hidden.is_cuda else sum_dtype
        gradients = [
            torch.zeros_like(tensor, dtype=sum_dtype) if needed else None
            for tensor, needed in zip((hidden, weight, bias), wanted, strict=True)
        ]
        hidden_gradient, weight_gradient, bias_gradient = gradients
        weight = weight.to(factor_dtype)
        entropy, squares = hidden.new_zeros(2, dtype=sum_dtype)
        # One buffer for all chunks: on a CPU fresh memory costs as much as a pass over it.
        buffer = hidden.new_empty(min(chunk_tokens, len(hidden)), len(weight), dtype=sum_dtype)

        for first in range(0, len(hidden), chunk_tokens):
            rows = hidden[first : first + chunk_tokens].to(factor_dtype)
            target = targets[first : first + chunk_tokens, None]
            counts = (target != IGNORED_TARGET).to(sum_dtype)
            target = target.clamp(min=0)
            logits = _multiply(rows, weight.T, out=buffer[: len(rows)])
            if bias is not None:
                logits += bias
            if softcap:
                slope = 1 - logits.div_(softcap).tanh_().square() if any(wanted) else None
                logits *= softcap
            largest = logits.amax(dim=1, keepdim=True)
            target_logit = logits.gather(1, target)
            exponentials = logits.sub_(largest).exp_()
            denominator = exponentials.sum(dim=1, keepdim=True)
            log_partition = largest + denominator.log()
            entropy += ((log_partition - target_logit) * counts).sum()
            if z_loss:
                squares += (log_partition.square() * counts).sum()
            if not any(wanted):
                continue

            # softmax * (1 + 2 z log_partition) - one_hot(target), in the memory of the logits.
            scale = (1 + 2 * z_loss * log_partition) / denominator * counts
            logits_gradient = exponentials.mul_(scale).scatter_add_(1, target, -counts)
            if softcap:
                logits_gradient *= slope
            if bias_gradient is not None:
                bias_gradient += logits_gradient.sum(dim=0)
            logits_gradient = logits_gradient.to(factor_dtype)
            if hidden_gradient is not None:
                _multiply(logits_gradient, weight, out=hidden_gradient[first : first + chunk_tokens])
            if weight_gradient is not None:
                _multiply_add(weight_gradient, logits_gradient.T, rows)

        ctx.dtype = hidden.dtype
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(entropy)
        return entropy, entropy + z_loss * squares

    @staticmethod
    def backward(ctx, _, incoming):
        # In place, because the weight's gradient is large; autograd notices a second backward pass by it and raises.
        gradients = [
            None if gradient is None else gradient.mul_(incoming).to(ctx.dtype) for gradient in ctx.saved_tensors
        ]
        return *gradients, None, None, None, None, None


def token_scores(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, chunk_tokens: int, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """The log-probability of each target in nats, and whether it is the most likely token; without gradients.

    Args:
        hidden, weight, bias, targets, chunk_tokens, softcap: see `next_token_loss`.

    Returns:
        float32 and bool, shape (N,). Where the target is IGNORED_TARGET nothing is computed: 0 and True.
    """
    factor_dtype = hidden.dtype if hidden.is_cuda else torch.promote_types(hidden.dtype, torch.float32)
    scores = hidden.new_zeros(len(hidden), dtype=torch.float32)
    likeliest = torch.ones_like(targets, dtype=torch.bool)
    weight = weight.to(factor_dtype)
    for counted in (targets != IGNORED_TARGET).nonzero()[:, 0].split(chunk_tokens):
        rows, target = hidden[counted].to(factor_dtype), targets[counted]
        logits = _multiply(rows, weight.T, out=rows.new_empty(len(rows), len(weight), dtype=torch.float32))
        if bias is not None:
            logits += bias
        if softcap:
            logits = logits.div_(softcap).tanh_().mul_(softcap)
        scores[counted] = logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(dim=1)
        likeliest[counted] = logits.argmax(dim=1) == target
    return scores, likeliest


def _multiply(left: Tensor, right: Tensor, *, out: Tensor) -> Tensor:
    """The matrix product, added up and returned in out's type."""
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=out.dtype, out=out)


def _multiply_add(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, added up in total's type."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
