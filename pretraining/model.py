"""litgpt's GPT for pretraining: its configuration, its first weights, and how it is spread over processes."""

from __future__ import annotations

import functools
import hashlib
import math
from typing import TYPE_CHECKING, Any

from pretraining.parallelism import _local, fill_local_shard

if TYPE_CHECKING:
    import torch

    from pretraining.settings import Settings


def build_model(
    config: dict[str, Any], settings: Settings, context_tokens: int, device: str = "meta"
) -> torch.nn.Module:
    """A `GPT` on the meta device whose forward pass returns the loss; parameters have litgpt's own names.

    Args:
        config: fields of litgpt's Config.
        context_tokens: longest sequence, for the table of rotary positions.
        device: where parameters are made; on "meta" they take no memory until they are spread.

    Returns:
        Module with hidden_states(inputs (B, T)) -> (B, T, n_embd) and forward(inputs (B, T), targets (B, T)) -> (cross entropy summed, objective summed), see
        losses.next_token_loss.
    """
    import torch
    from litgpt.config import Config
    from litgpt.model import GPT

    from pretraining.loss import choose_loss, next_token_loss

    parallel, z_loss = settings.parallel, settings.train.z_loss

    class PretrainGPT(GPT):
        def hidden_states(self, inputs: torch.Tensor) -> torch.Tensor:
            """GPT.forward up to the output layer; shape (B, T, n_embd)."""
            positions = inputs.size(1)
            cos, sin = self.cos[:positions].unsqueeze(0), self.sin[:positions].unsqueeze(0)  # (1, T, rotary width)
            x = self.transformer.wte(inputs)  # (B, T, n_embd)
            if self.config.scale_embeddings:
                x = x * torch.tensor(self.config.n_embd**0.5, dtype=x.dtype)
            for i, block in enumerate(self.transformer.h):
                if self.config.rope_indices is not None:
                    which = self.config.rope_indices[i]
                    x = block(x, cos[..., which], sin[..., which])
                else:
                    x = block(x, cos, sin)
            return self.transformer.ln_f(x)

        # The loss is computed inside the forward pass because only there FSDP2 has gathered lm_head's weight.
        def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            num_tokens = inputs.numel()
            x = self.hidden_states(inputs).view(num_tokens, -1)
            return next_token_loss(
                x,
                self.lm_head.weight,
                self.lm_head.bias,
                targets.reshape(-1),
                how=choose_loss(
                    parallel.loss,
                    num_tokens=num_tokens,
                    vocab_size=self.lm_head.weight.size(0),
                    z_loss=z_loss,
                    softcap=self.config.final_logit_softcapping,
                    float32=x.dtype == torch.float32,
                ),
                chunk_tokens=parallel.loss_chunk_tokens,
                z_loss=z_loss,
                softcap=self.config.final_logit_softcapping,
            )

    with torch.device(device):
        model = PretrainGPT(Config(**config))
    model.max_seq_length = context_tokens
    if settings.train.tie_embeddings:
        model.lm_head.weight = model.transformer.wte.weight
    if settings.precision == "bf16-true":
        model.to(torch.bfloat16)
    return model


def count_parameters(model: torch.nn.Module) -> int:
    """Parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def initialise(model: torch.nn.Module, config: Any, seed: int) -> None:
    """Draw the first weights, the same whatever the number of processes.

    Each row of each matrix has a random stream of its own, keyed by (seed, parameter's name, row), and a process draws
    only the rows that it holds. Distribution as in litgpt's pretrain: normal with standard deviation sqrt(2 / (5 * n_embd))
    (GPT-NeoX, arXiv:2204.06745), and 1 / (n_layer * sqrt(n_embd)) for projections back into the residual stream; norms
    start at one, biases at zero.
    """
    import torch

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
            torch.nn.init.zeros_(_local(parameter))
        else:
            torch.nn.init.ones_(_local(parameter))


def training_flops_per_token(config: Any, num_parameters: int, context_tokens: int, tied: bool) -> float:
    """Floating-point operations of forward and backward pass for one token: 6 N + 12 * layers * heads * head size * context.

    N counts the parameters that multiply: all but the embedding table, which is looked up (PaLM, arXiv:2204.02311,
    appendix B). Recomputation is not counted: it is no progress.
    """
    table = 0 if tied else config.padded_vocab_size * config.n_embd
    attention = 12 * config.n_layer * config.n_head * config.head_size * context_tokens
    return 6 * (num_parameters - table) + attention
