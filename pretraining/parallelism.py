"""How the model is laid over the processes: Fabric, FSDP2, recomputation, and a process's own piece of a parameter."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.fabric.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from pretraining.attention import ATTENTION_OPERATIONS
from pretraining.context_parallel import join_context_group
from pretraining.experts import GROUPED_PRODUCT
from pretraining.process_layout import group_timeout, shard_size
from pretraining.settings import Settings
from utils.machine import available_cpus

# Lets saved_tensors_hooks see what selective recomputation keeps, so that memory.py can count it. New in torch 2.14;
# before it the plan counts such blocks as if they were compiled.
SELECTED_IS_COUNTABLE = "respect_saved_tensors_hooks" in inspect.signature(checkpoint).parameters
_COUNTABLE = {"respect_saved_tensors_hooks": True} if SELECTED_IS_COUNTABLE else {}


def launch_fabric(settings: Settings) -> L.Fabric:
    """Join the process group; `fabric.setup_module` then shards a model that was built on the meta device.

    The environment holds RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT (Ray Train and
    torchrun set them).
    """
    world_size, local_size = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if settings.accelerator == "cpu":
        # It misses CUDA when the model is compiled for a CPU.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        torch.set_num_threads(settings.parallel.cpu_threads or max(1, available_cpus() // local_size))

    def parallelize(model: torch.nn.Module, _) -> torch.nn.Module:
        # Fabric passes its own mesh, which has no dimension for replicas.
        mesh = device_mesh(settings, fabric.device.type, world_size, local_size)
        # Torch's own limits, 10 or 30 minutes, would end processes that wait for one that saves or compiles.
        for group in (dist.group.WORLD, *mesh.get_all_groups()):
            dist.set_timeout(group_timeout(settings), group)
        shard_model(model, mesh, settings)
        model.to_empty(device=fabric.device)
        model.reset_parameters()  # the table of rotary positions is not a parameter, and is empty too
        return model

    fabric = L.Fabric(
        accelerator=settings.accelerator,
        devices=local_size,
        num_nodes=settings.num_nodes,
        strategy=ModelParallelStrategy(parallelize, data_parallel_size=world_size, tensor_parallel_size=1),
        plugins=[TorchElasticEnvironment()],  # otherwise the node's SLURM variables would win
    )
    fabric.launch()
    return fabric


def device_mesh(settings: Settings, device_type: str, world_size: int, local_size: int) -> DeviceMesh:
    """Processes as (replicate, shard): copies of the model, and pieces of a copy."""
    shard = shard_size(settings, world_size, local_size)
    return init_device_mesh(device_type, (world_size // shard, shard), mesh_dim_names=("replicate", "shard"))


def shard_model(model: torch.nn.Module, mesh: DeviceMesh, settings: Settings) -> None:
    """Apply recomputation, compilation and FSDP2 to each block, then FSDP2 to the rest.

    Processes that share sequences hold pieces of the model like all others: each computes the loss of its own tokens,
    and FSDP2 averages gradients over all processes.
    """
    parallel = settings.parallel
    model.context_group = join_context_group(parallel.context_parallel_size, group_timeout(settings))
    sharding = {
        "mesh": mesh["shard"] if parallel.sharding == "full" else mesh,
        "reshard_after_forward": parallel.reshard_after_forward,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if settings.precision in ("bf16-mixed", "float8-mixed") else None,
            reduce_dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[parallel.reduce_dtype],
            # The table of rotary positions must stay in float32: bfloat16 cannot tell position 8,191 from 8,192.
            cast_forward_inputs=False,
        ),
    }
    for block in model.transformer.h:
        if settings.precision == "float8-mixed":
            from pretraining.float8 import convert_block  # torchao is an extra

            convert_block(block, mesh["shard"].size(), mesh.device_type, parallel.compile)
        if parallel.activation_checkpointing != "none":
            checkpoint_activations(block, parallel.activation_checkpointing)
        if parallel.compile:
            block.compile()
        fully_shard(block, **sharding)
    # The output layer's backward pass needs no weight, and the backward pass of the whole begins with the last norm.
    sharding["reshard_after_forward"] = False
    if model.lm_head.weight is not model.transformer.wte.weight:
        # By itself: gathered while the blocks still compute, and reduced while they compute backward.
        fully_shard(model.lm_head, **sharding)
    fully_shard(model, **sharding)


def schedule_reductions(model: torch.nn.Module, settings: Settings, last: bool) -> None:
    """Say what the next backward pass reduces; `last`: it is that of the step's last micro-batch.

    A copy of the model may reduce among its own processes after each micro-batch, which saves memory. Between copies
    (across nodes, where sharding is hybrid) the sum of all micro-batches is enough: the same gradient, for one
    all-reduce per step.
    """
    model.set_requires_gradient_sync(last or settings.parallel.reduce_every_micro_batch)
    model.set_requires_all_reduce(last)  # after the line above, which sets both


def checkpoint_activations(block: torch.nn.Module, how: str) -> None:
    """Replace the block's forward pass by one that keeps only its input, and if `how` is "selective" what is dear to
    make and small to keep: attention, and every second of the matrix products that the backward pass needs.

    A product of inner width k costs k multiplications per number kept, and k is the model's width for each of them:
    keeping another one would save as much per byte. Attention costs as many as the context has tokens.

    Setting `forward` instead of wrapping the module leaves the names of parameters as they are.
    """
    forward = block.forward
    if how == "full":
        block.forward = lambda *args: checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False)
        return

    aten = torch.ops.aten
    # Which argument is the second factor; _scaled_mm is float8's.
    products = {aten.mm.default: 1, aten._scaled_mm.default: 1, aten.addmm.default: 2}
    never_needed = _shape_of_last_product(block)

    def contexts():
        num_products = {True: 0, False: 0}

        def policy(context, operation, *args, **kwargs):
            if operation in ATTENTION_OPERATIONS:
                return CheckpointPolicy.MUST_SAVE
            needed = operation in products and args[products[operation]].shape != never_needed
            if needed or operation == GROUPED_PRODUCT:
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
        **_COUNTABLE,
    )


def _shape_of_last_product(block: torch.nn.Module) -> torch.Size | None:
    """Of the second factor. The result goes into the residual stream, which only adds, so that the backward pass does
    not need it; with a norm in between it does, and with experts other products have this shape."""
    projection = getattr(block.mlp, "proj", None)
    return None if projection is None or block.config.post_mlp_norm else projection.weight.T.shape


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """This process's piece of a tensor, sharing its memory and detached from the graph."""
    tensor = plain(tensor.detach())
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without the wrapper by which torchao makes FSDP2 gather it in float8, sharing its memory.

    Checkpoints hold plain tensors: they need no torchao to be read, and can be taken up in any precision.
    """
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if not hasattr(local, "fsdp_pre_all_gather"):
        return tensor
    return DTensor(local._tensor, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else local._tensor


def model_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights by litgpt's names, as a checkpoint holds them: plain, and sharing the model's memory."""
    return {name: plain(tensor) for name, tensor in get_model_state_dict(model).items()}


def fill_local_shard(parameter: torch.Tensor, read_rows: Callable[[int, int], torch.Tensor]) -> None:
    """Fill this process's piece of a parameter; `read_rows(first_row, num_rows)` returns rows of the whole."""
    local = local_shard(parameter)
    if local.numel() == 0:
        return
    first_row = 0
    if isinstance(parameter, DTensor):  # FSDP2 splits along the first dimension only
        _, (first_row, *_) = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
    local.copy_(read_rows(first_row, len(local)))
