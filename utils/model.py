"""litgpt's GPT for pretraining: its configuration, its first weights, and how it is spread over processes."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import math
import sys
from typing import TYPE_CHECKING, Any

from utils.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

    from utils.training_settings import Settings


@functools.cache
def litgpt_config_module():
    """litgpt/config.py by itself: importing the package around it costs eight seconds, for torch and transformers."""
    if "litgpt.config" in sys.modules:
        return sys.modules["litgpt.config"]
    origin = importlib.util.find_spec("litgpt").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("_litgpt_config_alone", f"{origin}/config.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


def model_names() -> list[str]:
    return sorted(litgpt_config_module().name_to_config)


def resolve_model_config(settings: Settings) -> Any:
    """litgpt's Config for --model_name and model_config.

    Raises:
        UserError: neither is given, the name is unknown (with the nearest names), or a key or size is wrong.
    """
    module = litgpt_config_module()
    sizes = dict(settings.model_config or {})
    name = settings.model_name
    known = {field.name for field in dataclasses.fields(module.Config)}
    unknown = sorted(set(sizes) - known)
    if unknown:
        import difflib

        hints = [
            f"{key} (did you mean {near[0]}?)" if (near := difflib.get_close_matches(key, known, 1)) else key
            for key in unknown
        ]
        raise UserError(f"model_config: litgpt's Config has no {', '.join(hints)}.")
    if name is None and not sizes:
        raise UserError("--model_name: give the name of a model ('list' prints them), or sizes under model_config.")
    try:
        if name is None:
            return module.Config(**{"name": "custom", **sizes})
        own_name = sizes.pop("name", None)
        config = module.Config.from_name(name.rpartition("/")[2] if name.count("/") == 1 else name, **sizes)
        config.name = own_name or config.name
        return config
    except ValueError as error:
        import difflib

        near = ", ".join(difflib.get_close_matches(name or "", model_names(), 3, cutoff=0.4))
        raise UserError(
            f"--model_name={name}: {error}. {f'Near: {near}. ' if near else ''}`--model_name list` prints all names."
        ) from error
    except (AssertionError, TypeError) as error:
        raise UserError(
            f"model_config: these sizes do not fit together ({error or 'n_embd must be a multiple of n_head'})."
        ) from error


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

    from utils.losses import choose_loss, next_token_loss

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


def device_mesh(settings: Settings, device_type: str, world_size: int, local_world_size: int) -> DeviceMesh:
    """Processes as (replicate, shard, tensor): model copies, pieces of a copy, and MLP columns within a node."""
    from torch.distributed.device_mesh import init_device_mesh

    from utils.process_layout import shard_size

    tensor = settings.parallel.tensor_parallel_size
    shard = shard_size(settings, world_size, local_world_size)
    shape = (world_size // tensor // shard, shard, tensor)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard", "tensor"))


def spread_model(model: torch.nn.Module, mesh: DeviceMesh, settings: Settings) -> torch.nn.Module:
    """Apply tensor parallelism, recomputation, compilation and FSDP2 to each block, then FSDP2 to the rest."""
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    parallel = settings.parallel
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if settings.precision == "bf16-mixed" else None,
        reduce_dtype=torch.float32 if settings.precision != "32-true" else None,
        # The table of rotary positions must stay in float32: bfloat16 cannot tell position 8,191 from 8,192.
        cast_forward_inputs=False,
    )
    sharding = {
        "mesh": mesh["shard"] if parallel.sharding == "full" else mesh["replicate", "shard"],
        "mp_policy": policy,
        "reshard_after_forward": parallel.reshard_after_forward,
    }
    for block in model.transformer.h:
        if parallel.tensor_parallel_size > 1:
            _split_mlp(block.mlp, mesh["tensor"])
        if parallel.activation_checkpointing != "none":
            recompute_block(block, parallel.activation_checkpointing)
        if parallel.compile:
            block.compile()
        fully_shard(block, **sharding)
    # The root's own weights (embedding, last norm, output layer) are needed at once again by the backward pass.
    fully_shard(model, **{**sharding, "reshard_after_forward": False})
    return model


def _split_mlp(mlp: torch.nn.Module, mesh: DeviceMesh) -> None:
    """Columns of the way up, rows of the way down. litgpt's attention keeps q, k and v in one matrix, in an order that a
    split into equal pieces would tear apart, so attention stays whole."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {name: ColwiseParallel() for name in ("fc", "fc_1", "fc_2") if hasattr(mlp, name)}
    parallelize_module(mlp, mesh, {**plan, "proj": RowwiseParallel()})


def recompute_block(block: torch.nn.Module, how: str) -> None:
    """Replace the block's forward pass by one that keeps little. Setting `forward` instead of wrapping the module leaves
    the names of parameters as they are."""
    import torch
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    forward = block.forward
    if how == "full":
        block.forward = lambda *args: checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False)
        return

    aten = torch.ops.aten
    attention = {
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
    }

    def contexts():
        num_products = {True: 0, False: 0}

        def policy(context, operation, *args, **kwargs):
            if operation in attention:
                return CheckpointPolicy.MUST_SAVE
            if operation in (aten.mm.default, aten.addmm.default):
                num_products[context.is_recompute] += 1
                if num_products[context.is_recompute] % 2 == 1:
                    return CheckpointPolicy.MUST_SAVE
            return CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(policy)

    block.forward = lambda *args: checkpoint(
        forward,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=contexts,
        respect_saved_tensors_hooks=True,  # what torch will do by default, so that saved tensors can be counted
    )


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
            fill(parameter, functools.partial(normal_rows, name, parameter))
        elif name.endswith("bias"):
            torch.nn.init.zeros_(_local(parameter))
        else:
            torch.nn.init.ones_(_local(parameter))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def fill(parameter: torch.Tensor, read_rows) -> None:
    """Fill this process's piece of a parameter from a function (first_row, num_rows) -> full rows."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    local = _local(parameter)
    if isinstance(parameter, DTensor):
        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
    else:
        shape, offset = parameter.shape, (0,) * parameter.ndim
    if local.numel() == 0:
        return
    rows = read_rows(offset[0], shape[0])
    for dimension in range(1, parameter.ndim):
        rows = rows.narrow(dimension, offset[dimension], shape[dimension])
    local.copy_(rows)


def training_flops_per_token(config: Any, num_parameters: int, context_tokens: int, tied: bool) -> float:
    """Floating-point operations of forward and backward pass for one token: 6 N + 12 * layers * heads * head size * context.

    N counts the parameters that multiply: all but the embedding table, which is looked up (PaLM, arXiv:2204.02311,
    appendix B). Recomputation is not counted: it is no progress.
    """
    table = 0 if tied else config.padded_vocab_size * config.n_embd
    attention = 12 * config.n_layer * config.n_head * config.head_size * context_tokens
    return 6 * (num_parameters - table) + attention
