"""Published scaling laws, each with its source and what it was fitted on. N: parameters, D: tokens, C: FLOPs."""

from __future__ import annotations

import dataclasses
import math

HOFFMANN = "Hoffmann et al. 2022, Training Compute-Optimal Large Language Models, arXiv:2203.15556"
KAPLAN = "Kaplan et al. 2020, Scaling Laws for Neural Language Models, arXiv:2001.08361"
DEEPSEEK = "DeepSeek-AI 2024, DeepSeek LLM, arXiv:2401.02954"
STEP_LAW = "Li et al. 2025, Predictable Scale: Part I, Step Law, arXiv:2503.04715"

TOKENS_PER_PARAMETER = 20
"""Hoffmann et al.: about as many for the least loss at a given compute."""


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """What one law says of batch and learning rate, for AdamW."""

    batch_tokens: float
    learning_rate: float
    source: str
    fitted_on: str
    outside: list[str]
    """How this run lies outside of what the law was fitted on."""


def step_law(non_embedding_parameters: float, tokens: float, compute_flops: float) -> Suggestion:
    """Batch 0.58 D^0.571 tokens, learning rate 1.79 N^-0.713 D^0.307; N without embeddings.

    The range is that of the 1,911 runs of dense models whose losses its authors published (github.com/step-law/steplaw,
    data/dense_lr_bs_loss.csv): N from 214,663,680 to 1,073,741,824, D from 4e9 to 1e11, batches that make contexts of
    2,048. Whether the fit has runs of smaller models too was not checked.
    """
    outside = []
    if not 2.1e8 <= non_embedding_parameters <= 1.1e9:
        size = f"{non_embedding_parameters / 1e9:,.3g} billion parameters without embeddings"
        outside.append(f"{size}, fitted on 0.21 to 1.07")
    if not 4e9 <= tokens <= 100e9:
        outside.append(f"{tokens / 1e9:,.3g} billion tokens, fitted on 4 to 100")
    return Suggestion(
        batch_tokens=0.58 * tokens**0.571,
        learning_rate=1.79 * non_embedding_parameters**-0.713 * tokens**0.307,
        source=STEP_LAW,
        fitted_on="a grid of models of 0.21 to 1.07 billion parameters, 4 to 100 billion tokens, contexts of 2,048",
        outside=outside,
    )


def deepseek(non_embedding_parameters: float, tokens: float, compute_flops: float) -> Suggestion:
    """Batch 0.2920 C^0.3271 tokens, learning rate 0.3118 C^-0.1250; C without embeddings, with attention.

    Section 3.1 of the paper: fitted on budgets from 1e17 to 2e19, then confirmed at 1e20 with one model.
    """
    outside = []
    if not 1e17 <= compute_flops <= 2e19:
        outside.append(
            f"{compute_flops:.1e} FLOPs, fitted on 1e17 to 2e19 (its authors then used it for 7 and 67 billion)"
        )
    return Suggestion(
        batch_tokens=0.2920 * compute_flops**0.3271,
        learning_rate=0.3118 * compute_flops**-0.1250,
        source=DEEPSEEK,
        fitted_on=("runs of 1e17 to 2e19 FLOPs with a multi-step schedule"),
        outside=outside,
    )


LAWS = {"step": step_law, "deepseek": deepseek}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Llama-like model: RMSNorm, rotary positions, gated MLP, grouped keys and values, no biases."""

    n_layer: int
    n_embd: int
    n_head: int
    n_query_groups: int
    intermediate_size: int
    vocab_size: int
    tied: bool

    @property
    def embedding_parameters(self) -> int:
        return self.vocab_size * self.n_embd * (1 if self.tied else 2)

    @property
    def non_embedding_parameters(self) -> int:
        head_size = self.n_embd // self.n_head
        attention = self.n_embd * head_size * (2 * self.n_head + 2 * self.n_query_groups)
        mlp = 3 * self.n_embd * self.intermediate_size
        return self.n_layer * (attention + mlp + 2 * self.n_embd) + self.n_embd

    @property
    def parameters(self) -> int:
        return self.non_embedding_parameters + self.embedding_parameters

    def training_flops(self, tokens: float, context_tokens: int) -> float:
        """DeepSeek's C = M D, with M = 6 N + 12 layers width context per token; N without embeddings."""
        per_token = 6 * self.non_embedding_parameters + 12 * self.n_layer * self.n_embd * context_tokens
        return per_token * tokens


# Width over depth. Kaplan et al. found the loss to depend on it by a few percent over a wide range; Llama 3.2 1B has
# 128, Llama 3 8B 128, TinyLlama 93, Llama 3 70B 102.
_WIDTH_PER_LAYER = 100
_MOST_OFF = 0.08


def choose_shape(parameters: float, vocab_size: int) -> Shape:
    """The shape whose number of parameters is within 8% of what is asked for, and width over depth nearest to 100.

    Below 2 billion parameters embedding and output layer are one matrix, as in Llama 3.2 1B and SmolLM2.

    Raises:
        ValueError: no shape of at least two blocks comes near; the embedding alone is too large, or the model absurd.
    """
    tied = parameters < 2e9
    best, best_cost = None, math.inf
    # Multiples that give whole groups of four heads, and sizes that GPUs like.
    for n_embd in (*range(64, 1024, 64), *range(1024, 2048, 256), *range(2048, 20480 + 1, 512)):
        head_size = 128 if n_embd >= 2048 else 64
        n_head = n_embd // head_size
        groups = next(g for g in range(max(1, n_head // 4), n_head + 1) if n_head % g == 0)
        multiple = 256 if n_embd >= 1024 else 64
        mlp = (
            round(n_embd * 8 / 3 / multiple) * multiple
        )  # LLaMA (Touvron et al. 2023): 2/3 of 4 widths, three matrices
        one = Shape(1, n_embd, n_head, groups, mlp, vocab_size, tied)
        two = dataclasses.replace(one, n_layer=2)
        per_layer = two.parameters - one.parameters
        n_layer = round((parameters - (one.parameters - per_layer)) / per_layer)
        if n_layer < 2 or n_layer > 256:
            continue
        shape = dataclasses.replace(one, n_layer=n_layer)
        off = abs(shape.parameters / parameters - 1)
        cost = abs(math.log(n_embd / n_layer / _WIDTH_PER_LAYER)) + off
        if off <= _MOST_OFF and cost < best_cost:
            best, best_cost = shape, cost
    if best is None:
        raise ValueError(f"no model of {parameters:,.0f} parameters with {vocab_size:,} embeddings has a sound shape")
    return best
