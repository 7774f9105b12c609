"""litgpt's GPT for pretraining: a forward pass that returns the loss, and its first weights."""

from __future__ import annotations

import functools
import hashlib
import math
from typing import Any

import torch
from litgpt.config import Config
from litgpt.model import GPT

from pretraining.attention import Attention, attention_patterns
from pretraining.context_parallel import ALONE
from pretraining.experts import ExpertBlock, Routing, RoutingSums, group_experts
from pretraining.loss import OutputLayer
from pretraining.model_config import inactive_parameters
from pretraining.parallelism import fill_local_shard, local_shard
from pretraining.settings import Settings


class PretrainGPT(GPT):
    """A `GPT` whose forward pass returns the loss. Its parameters have litgpt's own names."""

    def __init__(self, config: Config, settings: Settings):
        super().__init__(config)
        self.lm_head = OutputLayer(config.n_embd, config.padded_vocab_size, bias=config.lm_head_bias)
        if not config.latent_attention:
            for i, block in enumerate(self.transformer.h):
                block.attn = Attention(config, i)
        for block in self.transformer.h:
            group_experts(block)
        self.routing = RoutingSums(settings.train.router_aux_loss)
        """Of the training since it was last taken from here; without experts, of nothing."""
        self.context_group = ALONE
        """The processes that share each sequence; set when the model is laid over them."""
        self._chunk_tokens, self._z_loss = settings.parallel.loss_chunk_tokens, settings.train.z_loss

    def hidden_states(self, inputs: torch.Tensor, offsets: torch.Tensor | None = None) -> torch.Tensor:
        """GPT.forward up to the output layer: inputs (B, T) -> (B, T, n_embd); T are the tokens of this process.

        Args:
            offsets: where documents start in the whole sequences (see `documents.document_offsets`); None: a sequence
                is one document.
        """
        return self._hidden_states(inputs, offsets)[0]

    def _hidden_states(self, inputs: torch.Tensor, offsets: torch.Tensor | None) -> tuple[torch.Tensor, list[Routing]]:
        """The same, and the routing of each layer that has experts."""
        first = self.context_group.member * inputs.size(1)
        positions = slice(first, first + inputs.size(1))
        cos, sin = self.cos[positions].unsqueeze(0), self.sin[positions].unsqueeze(0)  # (1, T, rotary width)
        x = self.transformer.wte(inputs)  # (B, T, n_embd)
        if self.config.scale_embeddings:
            x = x * torch.tensor(self.config.n_embd**0.5, dtype=x.dtype)
        patterns = attention_patterns(self.config, x, offsets, self.context_group)
        routings = []
        for i, block in enumerate(self.transformer.h):
            which = ... if self.config.rope_indices is None else (..., self.config.rope_indices[i])
            x = block(x, cos[which], sin[which], patterns[i])
            if isinstance(block, ExpertBlock):
                x, routing = x
                routings.append(routing)
        return self.transformer.ln_f(x), routings

    def forward(
        self,
        inputs: torch.Tensor,
        targets: torch.Tensor | None = None,
        offsets: torch.Tensor | None = None,
        per_token: bool = False,
        positions: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
        """Inputs and targets (B, T) -> cross entropy and objective, both summed: see `loss.next_token_loss`.

        In training the objective of a model with experts includes their load-balancing loss: see `experts.Routing`.

        With `per_token`, what `loss.token_scores` returns, shape (B * T,). Without targets the logits of the token
        that follows `positions` (B,), shape (B, vocabulary).
        """
        hidden, routings = self._hidden_states(inputs, offsets)
        if targets is None:
            logits = self.lm_head(hidden[torch.arange(len(hidden), device=hidden.device), positions])
            softcap = self.config.final_logit_softcapping
            return torch.tanh(logits / softcap) * softcap if softcap else logits
        result = self.lm_head(
            hidden.flatten(0, 1),
            targets.flatten(),
            chunk_tokens=self._chunk_tokens,
            z_loss=self._z_loss,
            softcap=self.config.final_logit_softcapping,
            per_token=per_token,
        )
        if routings and torch.is_grad_enabled():
            entropy, objective = result
            return entropy, objective + self.routing.add(routings, targets.numel())
        return result


def build_model(config: dict[str, Any], settings: Settings, context_tokens: int, device: str = "meta") -> PretrainGPT:
    """The model of a run.

    Args:
        config: fields of litgpt's Config.
        context_tokens: longest sequence, for the table of rotary positions.
        device: where parameters are made; on "meta" they take no memory until they are sharded.
    """
    with torch.device(device):
        model = PretrainGPT(Config(**config), settings)
    model.max_seq_length = context_tokens
    if settings.train.tie_embeddings:
        model.lm_head.weight = model.transformer.wte.weight
    if settings.precision == "bf16-true":
        model.to(torch.bfloat16)
    return model


def count_parameters(model: torch.nn.Module) -> int:
    """Parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def initialise(model: torch.nn.Module, config: Config, seed: int) -> None:
    """Draw the first weights, the same whatever the number of processes.

    Each row of each matrix has its own random stream, keyed by (seed, parameter's name, row), and a process draws
    only the rows that it holds. The distribution is that of litgpt's pretrain: normal with standard deviation
    sqrt(2 / (5 * n_embd)) (GPT-NeoX, arXiv:2204.06745), and 1 / (n_layer * sqrt(n_embd)) for projections back into the
    residual stream; norms start at one, biases at zero.
    """
    std = math.sqrt(2.0 / 5 / config.n_embd)
    residual_std = 1 / math.sqrt(config.n_embd) / config.n_layer
    generator = torch.Generator()

    def normal_rows(name: str, parameter: torch.nn.Parameter, first_row: int, num_rows: int) -> torch.Tensor:
        scale = residual_std if name.endswith("proj.weight") else std
        rows = torch.empty(num_rows, *parameter.shape[1:])
        key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little")
        for row in range(num_rows):
            generator.manual_seed((key + (first_row + row) * 0x9E3779B97F4A7C15) % 2**63)
            rows[row].normal_(0.0, scale, generator=generator)
        return rows

    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            fill_local_shard(parameter, functools.partial(normal_rows, name, parameter))
        elif name.endswith("bias"):
            torch.nn.init.zeros_(local_shard(parameter))
        else:
            torch.nn.init.ones_(local_shard(parameter))


def training_flops_per_token(config: Config, num_parameters: int, context_tokens: int, tied: bool) -> float:
    """Floating-point operations per token, forward and backward: 6 N + 12 * layers * heads * head size * context.

    N counts the parameters that multiply a token: all but the embedding table, which is looked up (PaLM,
    arXiv:2204.02311, appendix B), and of the experts those that it passes through. Recomputation is not counted: it is
    no progress.
    """
    table = 0 if tied else config.padded_vocab_size * config.n_embd
    attention = 12 * config.n_layer * config.n_head * config.head_size * context_tokens
    return 6 * (num_parameters - inactive_parameters(config) - table) + attention
