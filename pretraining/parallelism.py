"""How the model is laid over the processes: mesh, FSDP2, recomputation, and this process's piece of a parameter."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from pretraining.process_layout import shard_size
from pretraining.settings import Settings


def device_mesh(settings: Settings, device_type: str, world_size: int, local_world_size: int) -> DeviceMesh:
    """Processes as (replicate, shard): model copies, and pieces of a copy."""
    shard = shard_size(settings, world_size, local_world_size)
    return init_device_mesh(device_type, (world_size // shard, shard), mesh_dim_names=("replicate", "shard"))


def shard_model(model: torch.nn.Module, mesh: DeviceMesh, settings: Settings) -> torch.nn.Module:
    """Apply recomputation, compilation and FSDP2 to each block, then FSDP2 to the rest."""
    import torch

    parallel = settings.parallel
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if settings.precision == "bf16-mixed" else None,
        reduce_dtype=torch.float32 if settings.precision != "32-true" else None,
        # The table of rotary positions must stay in float32: bfloat16 cannot tell position 8,191 from 8,192.
        cast_forward_inputs=False,
    )
    sharding = {
        "mesh": mesh["shard"] if parallel.sharding == "full" else mesh,
        "mp_policy": policy,
        "reshard_after_forward": parallel.reshard_after_forward,
    }
    for block in model.transformer.h:
        if parallel.activation_checkpointing != "none":
            checkpoint_activations(block, parallel.activation_checkpointing)
        if parallel.compile:
            block.compile()
        fully_shard(block, **sharding)
    # The root's own weights (embedding, last norm, output layer) are needed at once again by the backward pass.
    fully_shard(model, **{**sharding, "reshard_after_forward": False})
    return model


def checkpoint_activations(block: torch.nn.Module, how: str) -> None:
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


def _local(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def fill_local_shard(parameter: torch.Tensor, read_rows) -> None:
    """Fill this process's piece of a parameter from a function (first_row, num_rows) -> full rows."""
    local = _local(parameter)
    if local.numel() == 0:
        return
    first_row = 0
    if isinstance(parameter, DTensor):  # FSDP2 splits along the first dimension only
        _, (first_row, *_) = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
    local.copy_(read_rows(first_row, len(local)))
