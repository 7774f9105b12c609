"""Next-token cross entropy from hidden states, with as little of the logits in memory as possible.

The logits of a micro-batch of 4 sequences of 8,192 tokens and 128,256 entries are 8.4 GB in bfloat16, and twice that in
float32 inside the softmax; a model of 8 billion parameters on 32 GPUs needs less for everything else together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# Below this size the logits cost less than the bookkeeping that avoids them.
_SMALL_LOGITS_BYTES = 16 << 20


def choose_loss(
    wanted: str, *, num_tokens: int, vocab_size: int, z_loss: float, softcap: float | None, float32: bool
) -> str:
    """The loss that "auto" stands for; the others are returned as they are.

    torch's fused function returns only the loss: it has neither the log-partition function that z-loss needs nor a cap
    on the logits. And it returns the loss in the type of the hidden states: two or three digits in bfloat16.

    Args:
        float32: whether the hidden states are.
    """
    if wanted != "auto":
        return wanted
    if num_tokens * vocab_size * 4 <= _SMALL_LOGITS_BYTES:
        return "full"
    return "chunked" if z_loss or softcap or not float32 else "fused"


def next_token_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    how: str,
    chunk_tokens: int,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy in nats, summed over tokens, and what is to be minimised.

    Args:
        hidden: shape (N, width), the output of the last norm.
        weight: of the output layer, shape (vocabulary, width).
        bias: shape (vocabulary,), or None.
        targets: int64, shape (N,).
        how: "full", "fused" or "chunked".
        chunk_tokens: rows whose logits are held at once, unless "full".
        z_loss: weight of the squared log-partition function (PaLM, arXiv:2204.02311, section 5).
        softcap: logits become softcap * tanh(logits / softcap) (Gemma 2); None: off.

    Returns:
        Two float32 scalars: cross entropy, without gradient, and cross entropy + z_loss * sum of squares, to minimise.
    """
    if how == "fused":
        if z_loss or softcap:
            raise ValueError("the fused loss has neither z-loss nor soft-capping")
        options = torch.nn.LinearCrossEntropyOptions(
            batch_chunk_size=min(chunk_tokens, len(targets)), chunking_method=None
        )
        loss = F.linear_cross_entropy(hidden, weight, targets, linear_bias=bias, reduction="sum", options=options)
        return loss.detach().float(), loss.float()

    def of_rows(hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        logits = F.linear(hidden, weight, bias).float()
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        if not z_loss:
            return F.cross_entropy(logits, targets, reduction="sum"), None
        partition = logits.logsumexp(dim=-1)
        entropy = partition - logits.gather(1, targets[:, None])[:, 0]
        return entropy.sum(), partition.square().sum()

    if how == "full":
        entropy, squares = of_rows(hidden, targets)
    else:
        parts = [
            checkpoint(of_rows, rows, wanted, use_reentrant=False, preserve_rng_state=False)
            for rows, wanted in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
        ]
        entropy = sum(part[0] for part in parts)
        squares = sum(part[1] for part in parts) if z_loss else None
    return entropy.detach(), (entropy + z_loss * squares if z_loss else entropy)
