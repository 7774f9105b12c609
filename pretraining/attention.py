"""Attention with litgpt's parameters and results, and without two of its costs: k and v are not repeated for grouped
queries, and a sliding window needs no mask of T x T that each layer fills in a loop over T.

A token sees the tokens up to its own, of its own document where documents are masked, and of its window where the layer
has one. All of that is one number per token, the first key that it sees. Once per forward pass `attention_patterns`
turns it into what the layers need, and all layers with the same window share it:

| | on a GPU, in half precision | elsewhere |
|---|---|---|
| neither window nor documents | Causal: the fused kernels of scaled_dot_product_attention | Causal |
| window or documents | Varlen: FlashAttention, document by document | Band: blocks of a window; Masked: one mask |
| soft-capped scores | Flex: FlexAttention, since the others cannot cap | Masked or Band, step by step |
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from litgpt.model import CausalSelfAttention, apply_rope, apply_rope_interleave
from torch import Tensor
from torch.nn.attention import SDPBackend as Kernel
from torch.nn.attention import sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from pretraining.context_parallel import ALONE, ContextGroup, Ulysses

# What the kernels below are to autograd: dear to compute and small to keep, for recomputation that selects.
ATTENTION_OPERATIONS = frozenset(
    {
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.torch_attn._varlen_attn.default,
        torch.ops.higher_order.flex_attention,
    }
)
# torch would try cuDNN last, although it is the fastest of them on Hopper.
_FASTEST_FIRST = [Kernel.CUDNN_ATTENTION, Kernel.FLASH_ATTENTION, Kernel.EFFICIENT_ATTENTION, Kernel.MATH]

# More blocks compute fewer scores for nothing, but in smaller products.
_BLOCKS_PER_WINDOW = 8


def fastest_kernels(device: torch.device) -> contextlib.AbstractContextManager:
    """In this context torch chooses the fastest kernel that can take its arguments. For the whole process, so once
    around the run is enough: the backward pass, which has threads of its own, and compilation choose alike."""
    return sdpa_kernel(_FASTEST_FIRST, set_priority=True) if device.type == "cuda" else contextlib.nullcontext()


class Attention(CausalSelfAttention):
    """litgpt's attention for training: its parameters under their names, its results, no cache of keys and values."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, pattern: Pattern, *_: Any) -> Tensor:
        """`pattern` stands where litgpt's Block hands on its mask.

        Args:
            x: shape (B, T, n_embd).
            cos, sin: shape (1, T, rotary width).
        """
        config = self.config
        batch, tokens, _ = x.shape
        group_width = config.n_query_groups * config.head_size
        q, k, v = self.qkv(x).split((config.n_head * config.head_size, group_width, group_width), dim=-1)
        if config.norm_qk and config.norm_qk_type == "olmo2":
            q, k = self.norm_q(q), self.norm_k(k)
        # (B, T, heads * head_size) -> (B, heads, T, head_size); k and v have n_query_groups heads.
        q, k, v = (part.view(batch, tokens, -1, config.head_size).transpose(1, 2) for part in (q, k, v))
        if config.norm_qk and config.norm_qk_type == "default":
            q, k = self.norm_q(q), self.norm_k(k)
        q, k = self._rotate(q, cos, sin), self._rotate(k, cos, sin)
        scale = self.mscale**2 / math.sqrt(config.attention_scores_scalar or config.head_size)
        y = pattern.attend(q, k, v, scale, config.attention_logit_softcapping)  # (B, n_head, T, head_size)
        return self.proj(y.transpose(1, 2).reshape(batch, tokens, -1))

    def _rotate(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rotate = apply_rope_interleave if self.config.rope_interleave else apply_rope
        width = self.config.rope_n_elem
        if width == self.config.head_size:
            return rotate(heads, cos, sin)
        return torch.cat((rotate(heads[..., :width], cos, sin), heads[..., width:]), dim=-1)


def _scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Causal without a mask."""
    if q.is_cuda and q.dtype == torch.float32 and q.size(1) != k.size(1):
        # The one fused kernel for float32 has no groups; without it all T x T scores would be in memory.
        k, v = (part.repeat_interleave(q.size(1) // part.size(1), dim=1) for part in (k, v))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.size(1) != k.size(1)
    )


class Causal(NamedTuple):
    """A token sees every token up to its own."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> Tensor:
        return _scaled_dot_product_attention(q, k, v, None, scale)


class Masked(NamedTuple):
    """Every score is computed; the mask decides which count."""

    mask: Tensor
    """0 where a query (next to last dimension) sees a key (last), else -inf, in the type of q; shape (B or 1, 1, T, T).
    Not boolean, because each layer would make this tensor from it, and keep it for the backward pass."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> Tensor:
        if softcap is None:
            return _scaled_dot_product_attention(q, k, v, self.mask, scale)
        # The queries of a group stand one below the other, so that k and v need not be repeated.
        batch, groups, _, head_size = k.shape
        scores = torch.tanh((q * (scale / softcap)).reshape(batch, groups, -1, head_size) @ k.mT)
        scores = torch.add(self.mask, scores.view(*q.shape[:-1], -1), alpha=softcap)
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        return (weights.view(batch, groups, -1, k.size(2)) @ v).view(q.shape)


class Band(NamedTuple):
    """A window shorter than the sequence. The first tokens, as many as the window has, see only one another;
    those after them come in blocks of an eighth of the window, each with the keys of its own block and of the window
    before it. That is T * 1.125 * window scores instead of T * T."""

    first: Causal | Masked
    """What the first tokens see."""
    mask: Tensor
    """As that of `Masked`, for each block or one for all; shape (B * blocks or 1, 1, block, window + block)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> Tensor:
        batch, heads, tokens, head_size = q.shape
        if batch > 1 and len(self.mask) == 1:  # what all rows share: as heads of one row their keys are not copied
            y = self.attend(*(part.flatten(0, 1)[None] for part in (q, k, v)), scale, softcap)
            return y[0].unflatten(0, (batch, heads))
        block, keys = self.mask.shape[2:]
        window = keys - block
        num_blocks = -(-(tokens - window) // block)
        q, k, v = (F.pad(part, (0, 0, 0, window + num_blocks * block - tokens)) for part in (q, k, v))

        def overlapping(part: Tensor) -> Tensor:
            """Shape (B * blocks, groups, keys, head_size); a view of one row, copies of several."""
            return part.unfold(2, keys, block).permute(0, 2, 1, 4, 3).flatten(0, 1)

        first = self.first.attend(*(part[:, :, :window] for part in (q, k, v)), scale, softcap)
        blocks = q[:, :, window:].unflatten(2, (num_blocks, block)).transpose(1, 2).flatten(0, 1)
        y = Masked(self.mask).attend(blocks, overlapping(k), overlapping(v), scale, softcap)
        y = y.unflatten(0, (batch, num_blocks)).transpose(1, 2).reshape(batch, heads, -1, head_size)
        return torch.cat((first, y), dim=2)[:, :, :tokens]


class Varlen(NamedTuple):
    """FlashAttention over documents that lie one behind the other, whatever rows they were in."""

    offsets: Tensor
    """int32, shape (documents + 1,), on the device; see `documents.document_offsets`."""
    window: int | None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> Tensor:
        batch, heads, tokens, head_size = q.shape
        q, k, v = (part.transpose(1, 2).flatten(0, 1) for part in (q, k, v))  # (B * T, heads, head_size)
        # The longest document is taken for a whole row: the kernel's surplus blocks end at once, whereas a number that
        # changes from batch to batch would compile the model again. A window counts the tokens before the query's own.
        window = (-1 if self.window is None else self.window - 1, 0)
        y = varlen_attn(
            q, k, v, self.offsets, self.offsets, tokens, tokens, scale=scale, window_size=window, enable_gqa=True
        )
        return y.view(batch, tokens, heads, head_size).transpose(1, 2)


class Flex(NamedTuple):
    """Scores that are changed before the softmax, in one kernel; fast only when it is compiled."""

    blocks: BlockMask

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> Tensor:
        def cap(score: Tensor, *_: Tensor) -> Tensor:
            return softcap * torch.tanh(score / softcap)

        attention = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
        return attention(
            q, k, v, score_mod=cap if softcap else None, block_mask=self.blocks, scale=scale, enable_gqa=True
        )


@functools.cache
def _compiled_flex_attention():
    return torch.compile(flex_attention)


Pattern = Causal | Masked | Band | Varlen | Flex | Ulysses


def attention_patterns(
    config: Any, x: Tensor, offsets: Tensor | None = None, group: ContextGroup = ALONE
) -> list[Pattern | None]:
    """What the layers' tokens see, per layer; layers with the same window share it.

    Args:
        config: litgpt's Config.
        x: the embedded tokens, shape (B, T / group.size, n_embd), for their shape, type and device.
        offsets: where documents start (see `documents.document_offsets`), on the device; None: a row is one document.
        group: the processes that share each row.

    Returns:
        For litgpt's latent attention, which keeps its own forward pass, None (causal).

    Raises:
        ValueError: documents, or a group, with latent attention.
    """
    if config.latent_attention:
        if offsets is not None:
            raise ValueError("latent attention cannot mask documents")
        if group.size > 1:
            raise ValueError("latent attention cannot share sequences")
        return [None] * config.n_layer
    batch, tokens = x.size(0), x.size(1) * group.size
    windows: list[int | None] = [None] * config.n_layer
    if config.sliding_window_size is not None and config.sliding_window_indices is not None:
        sliding = config.sliding_window_indices
        # A window that reaches over the whole sequence hides nothing.
        if config.sliding_window_size < tokens:
            windows = [config.sliding_window_size if sliding[i] else None for i in range(config.n_layer)]
    whole = x.new_empty(()).expand(batch, tokens, 1)
    shared: dict[int | None, Pattern] = {window: _pattern(config, whole, offsets, window) for window in set(windows)}
    if group.size > 1:
        shared = {window: Ulysses(pattern, group.size, group.name) for window, pattern in shared.items()}
    return [shared[window] for window in windows]


def _pattern(config: Any, x: Tensor, offsets: Tensor | None, window: int | None) -> Pattern:
    batch, tokens, _ = x.shape
    capped = config.attention_logit_softcapping is not None
    if window is None and offsets is None and not capped:
        return Causal()
    fused = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
    if fused and not capped and config.head_size % 8 == 0 and config.head_size <= 256:
        if offsets is None:
            offsets = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=x.device)
        return Varlen(offsets, window)
    first_keys = _first_keys(batch, tokens, offsets, window, x.device)
    if fused:
        return Flex(_flex_blocks(first_keys.expand(batch, -1).contiguous()))
    if window is not None and 3 * window < 2 * tokens:
        first = Causal() if offsets is None and not capped else _masked(first_keys[:, :window], x.dtype)
        return Band(first, _band_mask(first_keys, window, x.dtype, one_for_all=offsets is None))
    return _masked(first_keys, x.dtype)


def _first_keys(batch: int, tokens: int, offsets: Tensor | None, window: int | None, device: torch.device) -> Tensor:
    """The first position in its row that each token sees: int64, shape (B, T), or (1, T) where rows do not differ."""
    positions = torch.arange(tokens, device=device)
    first = torch.zeros(1, tokens, dtype=torch.int64, device=device)
    if offsets is not None:
        flat = torch.arange(batch * tokens, dtype=offsets.dtype, device=device)
        document = torch.searchsorted(offsets, flat, right=True) - 1
        first = offsets[document].view(batch, tokens) - flat.view(batch, tokens)[:, :1]
        first = first.to(torch.int64)
    if window is not None:
        first = torch.maximum(first, positions - window + 1)
    return first


def _masked(first_keys: Tensor, dtype: torch.dtype) -> Masked:
    queries = torch.arange(first_keys.size(1), device=first_keys.device)
    visible = (queries <= queries[:, None]) & (queries >= first_keys[..., None])
    return Masked(_additive(visible, dtype)[:, None])


def _band_mask(first_keys: Tensor, window: int, dtype: torch.dtype, one_for_all: bool) -> Tensor:
    block = -(-window // _BLOCKS_PER_WINDOW)
    if one_for_all:
        first_keys = first_keys[:, : window + block]
    tokens = first_keys.size(1)
    num_blocks = -(-(tokens - window) // block)
    queries = torch.arange(window, window + num_blocks * block, device=first_keys.device)
    # Queries beyond the end see themselves alone: a row of -inf would give NaN.
    beyond = queries[tokens - window :].expand(len(first_keys), -1)
    first_keys = torch.cat((first_keys[:, window:], beyond), dim=1).view(-1, num_blocks, block, 1)
    queries = queries.view(num_blocks, block, 1)
    keys = queries[:, :1] - window + torch.arange(window + block, device=first_keys.device)
    visible = (keys <= queries) & (keys >= first_keys)  # (B or 1, blocks, block, window + block)
    return _additive(visible, dtype).flatten(0, 1)[:, None]


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -math.inf)


def _flex_blocks(first_keys: Tensor) -> BlockMask:
    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= first_keys[row, query])

    rows, tokens = first_keys.shape
    return create_block_mask(visible, rows, None, tokens, tokens, device=first_keys.device)
