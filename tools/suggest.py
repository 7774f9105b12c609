"""Suggest settings for a model of a given size, from published scaling laws, as a YAML to start from.

    python -m tools.suggest --parameters 1.3e9 --tokens 26e9 > my-run.yaml
    python distributed_pretrain.py --config my-run.yaml --dataset_path DATA --dry_run

The YAML names the source of each figure and what it was fitted on. A law is a good first guess inside of what it was
fitted on and a hope outside of it; the warnings say which. Data, tokenizer and optimizer move the optimum too.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any, Literal

from utils import cli, console
from utils.errors import Problems, UserError

# Warm-up has no published law: what DeepSeek LLM used (says its README, github.com/deepseek-ai/DeepSeek-LLM), and never
# more than a tenth of the run.
WARMUP_STEPS, MOST_WARMUP = 2000, 0.1


@dataclasses.dataclass
class Settings:
    """The model and its training, in two numbers; and what they depend on."""

    parameters: float
    """Parameters of the model, embeddings included, for example 1.3e9."""
    tokens: float | None = None
    """Tokens to train on; null: 20 per parameter, which is about compute-optimal."""
    vocab_size: int = 128256
    """Entries of the tokenizer; Llama 3's has 128256."""
    context_tokens: int = 4096
    """Tokens of a sequence."""
    num_nodes: int = 1
    """Nodes to train on."""
    num_devices: int = 8
    """GPUs on each node; the batch is rounded to what they compute."""
    accelerator: Literal["cuda", "cpu"] = "cuda"
    """What it will be trained on."""
    law: Literal["step", "deepseek"] | None = None
    """Which law gives batch and learning rate; the other one's answer stands beside it. null: the step law inside of
    what it was fitted on, else DeepSeek's."""


def check_settings(settings: Settings) -> None:
    problems = Problems()
    least_of = {
        "parameters": 1e5,
        "tokens": 1e5,
        "vocab_size": 2,
        "context_tokens": 8,
        "num_nodes": 1,
        "num_devices": 1,
    }
    for flag, least in least_of.items():
        value = getattr(settings, flag)
        if value is not None and not (math.isfinite(value) and value >= least):
            problems.add(f"--{flag}={value:g}: give at least {least:g}.")
    problems.raise_if_any()


def round_figure(value: float) -> float:
    """Two significant digits: no law is known to more."""
    return float(f"{value:.1e}")


def as_yaml(value: float) -> str:
    """A number that YAML 1.1 reads as one: 6e-4 without a point is a string there."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def choose_micro_batch(settings: Settings, shape: Any, sequences: float) -> tuple[int, str]:
    """Sequences at a time, and what is recomputed.

    As many as keep the activations of a process below 30 GB, about, and the global batch at what is wanted. Korthikanti
    et al. 2022 (arXiv:2205.05198): about 34 bytes per token, width and block in half precision.

    Args:
        sequences: of the global batch, as a law has it.
    """
    activation_bytes = 34 * settings.context_tokens * shape.n_embd * shape.n_layer
    processes = settings.num_nodes * settings.num_devices
    for micro_batch in (8, 4, 2):
        if micro_batch * activation_bytes < 30e9 and micro_batch * processes <= sequences:
            return micro_batch, "none"
    return 1, "none" if activation_bytes < 30e9 else "full"


def suggest(settings: Settings) -> str:
    """The YAML, comments included.

    Raises:
        UserError: no sound shape has so many parameters.
    """
    from tools import scaling_laws as laws

    try:
        shape = laws.choose_shape(settings.parameters, settings.vocab_size)
    except ValueError as error:
        raise UserError(
            f"--parameters={settings.parameters:g}: {error}. Give more, or a smaller --vocab_size."
        ) from error
    tokens = settings.tokens or laws.TOKENS_PER_PARAMETER * shape.parameters
    flops = shape.training_flops(tokens, settings.context_tokens)
    answers = {name: law(shape.non_embedding_parameters, tokens, flops) for name, law in laws.LAWS.items()}
    law = settings.law or ("deepseek" if answers["step"].outside else "step")
    chosen = answers.pop(law)
    ((other_name, other),) = answers.items()
    for line in chosen.outside:
        console.warn(f"--law={law}: {line}: an extrapolation")

    sequences = chosen.batch_tokens / settings.context_tokens
    micro_batch, checkpointing = choose_micro_batch(settings, shape, sequences)
    at_once = micro_batch * settings.num_nodes * settings.num_devices
    batch = max(1, round(sequences / at_once)) * at_once
    if batch * settings.context_tokens > 1.5 * chosen.batch_tokens:
        console.warn(
            f"--num_devices={settings.num_devices}: {at_once:,} processes compute at least "
            f"{batch * settings.context_tokens:,} tokens per step, the law has {chosen.batch_tokens:,.0f}: take fewer"
        )
    steps = max(1, int(tokens // (batch * settings.context_tokens)))
    warmup = max(1, min(WARMUP_STEPS, int(MOST_WARMUP * steps)))
    rate = round_figure(chosen.learning_rate)
    name = f"llama-{console.human_count(shape.parameters).replace(' ', '').replace('.00', '').replace('G', 'B')}"
    every = max(1, steps // 10)
    per_parameter = tokens / shape.parameters
    outside = "".join(f"\n#   Outside of it: {line}." for line in chosen.outside) or "\n#   This run lies inside of it."
    return f"""\
# {name}: {shape.parameters:,} parameters on {tokens / 1e9:,.4g} billion tokens, {per_parameter:.1f} per parameter;
# {flops:.2e} FLOPs without the embeddings. Where the figures come from:
#
# - Tokens: about {laws.TOKENS_PER_PARAMETER} per parameter give the least loss for the compute that is spent;
#   more make a better model of this size. Fitted on 70 million to 16 billion parameters, 5 to 500 billion tokens.
#   {laws.HOFFMANN}
# - Batch and learning rate: {chosen.batch_tokens:,.0f} tokens and {chosen.learning_rate:.2e}.
#   {chosen.source}
#   Fitted on {chosen.fitted_on}.{outside}
#   Another law (--law={other_name}) gives {other.batch_tokens:,.0f} tokens and {other.learning_rate:.2e}:
#   {other.source}
# - Shape: width over depth near 100. The loss depends little on it.
#   {laws.KAPLAN}
# - Warm-up has no law: 2,000 steps, as DeepSeek LLM used, and at most a tenth of the run.
# - Schedule: a cosine as long as the run, down to a tenth of the peak (Hoffmann et al. 2022). The step law was fitted
#   with 1e-5 at the end.
# - Weight decay, betas, clipping: what most published runs use. AdamW throughout: Muon's optimum is another one.

model_config: # litgpt's Config; Llama's architecture
  name: {name}
  block_size: {settings.context_tokens}
  vocab_size: {settings.vocab_size}
  padded_vocab_size: {settings.vocab_size}
  n_layer: {shape.n_layer}
  n_embd: {shape.n_embd}
  n_head: {shape.n_head}
  n_query_groups: {shape.n_query_groups}
  intermediate_size: {shape.intermediate_size}
  rotary_percentage: 1.0
  rope_base: {500000 if settings.context_tokens > 4096 else 10000}
  parallel_residual: false
  bias: false
  norm_class_name: RMSNorm
  norm_eps: 1.0e-5
  mlp_class_name: LLaMAMLP

num_nodes: {settings.num_nodes}
num_devices: {settings.num_devices}
accelerator: {settings.accelerator}
precision: {"bf16-mixed" if settings.accelerator == "cuda" else "32-true"}

train:
  global_batch_size: {batch} # {batch * settings.context_tokens:,} tokens per step
  micro_batch_size: {micro_batch}
  max_tokens: {int(tokens)} # {steps:,} steps
  save_interval: {every}
  lr_schedule: cosine
  lr_warmup_steps: {warmup}
  min_lr: {as_yaml(rate / 10)}
  max_norm: 1.0
  tie_embeddings: {str(shape.tied).lower()}

eval:
  interval: {every}
  max_iters: 20

optimizer:
  name: adamw
  lr: {as_yaml(rate)}
  weight_decay: 0.1
  betas: [0.9, 0.95]

parallel:
  activation_checkpointing: {checkpointing}
  compile: {str(settings.accelerator == "cuda").lower()}
"""


def main(settings: Settings) -> None:
    check_settings(settings)
    print(suggest(settings), end="")


if __name__ == "__main__":
    sys.argv[0] = "-m tools.suggest"  # as messages name the command
    cli.run(main, Settings, __doc__)
