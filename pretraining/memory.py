"""The memory that a process will need, before it starts and without a GPU.

Parameters, gradients and optimizer state follow from the shapes and are exact. Activations are found by running the
forward pass of the model with one and with two blocks on tensors without storage (torch's FakeTensorMode) and adding up
what autograd keeps; further blocks cost what the second one cost. A compiled block keeps what torch's partitioner
chooses, two thirds of it or less, so it is asked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from litgpt.config import Config
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from pretraining.attention import attention_patterns
from pretraining.context_parallel import ContextGroup
from pretraining.documents import Separator, document_offsets
from pretraining.model import PretrainGPT, build_model, count_parameters
from pretraining.model_config import has_grouped_experts, joined_parameters
from pretraining.parallelism import SELECTED_IS_COUNTABLE, checkpoint_activations, local_shard
from pretraining.plan import Plan
from pretraining.process_layout import micro_batches_per_step, shard_size
from pretraining.settings import Settings

OVERHEAD_BYTES = 4_000_000_000


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes of the process that holds most (rank 0)."""

    num_parameters: int
    """Of the whole model."""
    parameters: int
    """This process's pieces, padded to equal size as FSDP2 pads them."""
    gradients: int
    optimizer: int
    unsharded_gradients: int
    """Whole gradients kept while micro-batches are accumulated."""
    gathered: int
    """Whole weights in memory at once: embedding and output layer, and two blocks (all of them without resharding)."""
    activations: int
    """Kept by autograd for one micro-batch, without the logits."""
    logits: int
    """Logits that are held at once, in float32, and the gradients that come from them. Gone when the backward pass of
    the blocks begins, which then needs the next two."""
    recomputed: int
    """What one block keeps, when it is computed again in the backward pass."""
    reductions: int
    """Gradients on their way: those of the output layer and of a block in the buffers that are reduced, and those of
    the next block, whose experts need one matrix of each in one tensor besides."""
    overhead: int
    """On GPUs: CUDA's context, NCCL's buffers, and what fragmentation leaves unused."""
    checkpoint: int
    """On disk: weights and optimizer state of the whole model."""

    @property
    def total(self) -> int:
        always = self.parameters + self.gradients + self.optimizer + self.unsharded_gradients + self.gathered
        return always + self.activations + max(self.logits, self.recomputed + self.reductions) + self.overhead


def plan_memory(settings: Settings, plan: Plan, world_size: int, local_size: int) -> MemoryPlan:
    """Count; `settings.precision` must be set.

    Args:
        world_size, local_size: processes in total, and on a node.
    """
    model = build_model(plan.model_config, settings, plan.context_tokens)
    parallel = settings.parallel
    shard = shard_size(settings, world_size, local_size)
    storage_bytes = 2 if settings.precision == "bf16-true" else 4
    compute_bytes = 4 if settings.precision == "32-true" else 2

    local, blocks, root, optimizer = 0, 0, 0, 0
    for name, parameter in model.named_parameters():
        piece = math.ceil(parameter.size(0) / shard) * math.prod(parameter.shape[1:])
        local += piece
        in_block = name.startswith("transformer.h.")
        if in_block:
            blocks += parameter.numel()
        else:
            root += parameter.numel()
        if settings.optimizer.name == "muon" and in_block and parameter.ndim == 2:
            optimizer += piece * storage_bytes
        else:
            optimizer += 2 * piece * storage_bytes + 4  # two moments, and the count of steps as one float32

    accumulates = micro_batches_per_step(settings, world_size) > 1 and not parallel.reduce_every_micro_batch
    gathers = shard > 1 or compute_bytes < storage_bytes
    share_of_blocks = min(1.0, 2 / plan.model_config["n_layer"]) if parallel.reshard_after_forward else 1.0
    num_parameters = count_parameters(model)
    reduce_bytes = 2 if parallel.reduce_dtype == "bf16" else 4
    output_layer = 0 if settings.train.tie_embeddings else model.lm_head.weight.numel()
    block = blocks // plan.model_config["n_layer"]
    joined = joined_parameters(model.config)
    activations, recomputed = _activation_bytes(settings, plan)
    state_per_parameter = storage_bytes * (2 if settings.optimizer.name == "muon" else 3)
    return MemoryPlan(
        num_parameters=num_parameters,
        parameters=local * storage_bytes,
        gradients=local * storage_bytes,
        optimizer=optimizer,
        unsharded_gradients=reduce_bytes * (blocks + root) if accumulates and shard > 1 else 0,
        gathered=int((share_of_blocks * blocks + root) * compute_bytes) if gathers else 0,
        activations=activations + _document_bytes(settings, plan),
        logits=_logit_bytes(settings, plan),
        recomputed=recomputed,
        reductions=reduce_bytes * (output_layer + block) + compute_bytes * (block + joined),
        overhead=0 if settings.accelerator == "cpu" else OVERHEAD_BYTES,
        checkpoint=num_parameters * state_per_parameter,
    )


def _logit_bytes(settings: Settings, plan: Plan) -> int:
    vocabulary = plan.model_config["padded_vocab_size"]
    tokens = settings.train.micro_batch_size * plan.context_tokens // settings.parallel.context_parallel_size
    rows = min(tokens, settings.parallel.loss_chunk_tokens)
    computes_in_bf16 = settings.precision != "32-true"
    # One buffer for the logits in float32, and their gradient in the type of the products.
    held = rows * vocabulary * (4 + 2 * computes_in_bf16)
    # Gradients of the hidden states and of the weight are summed in float32; while they are rounded they exist twice.
    return held + (tokens + vocabulary) * plan.model_config["n_embd"] * (4 + 2 * computes_in_bf16)


def _document_bytes(settings: Settings, plan: Plan) -> int:
    """What hides documents from one another, shared by layers: offsets, and masks where no fused kernel takes these."""
    if not settings.train.document_masking:
        return 0
    inputs = np.zeros((settings.train.micro_batch_size, plan.context_tokens), np.int64)
    num_offsets = len(document_offsets(inputs, [Separator(1, begins=True)] * len(inputs)))
    dtype = torch.float32 if settings.precision == "32-true" else torch.bfloat16
    with FakeTensorMode(), torch.device("cpu" if settings.accelerator == "cpu" else "cuda"):
        offsets = torch.empty(num_offsets, dtype=torch.int32)
        patterns = attention_patterns(Config(**plan.model_config), torch.empty(*inputs.shape, 1, dtype=dtype), offsets)
    shared = {id(part): part.nbytes for part in tree_leaves((offsets, patterns)) if isinstance(part, torch.Tensor)}
    return sum(shared.values())


def _activation_bytes(settings: Settings, plan: Plan) -> tuple[int, int]:
    """What is kept for the backward pass of all blocks, embedding and last norm for one micro-batch; and what one block
    keeps besides while the backward pass computes it again."""
    how = settings.parallel.activation_checkpointing
    compiled = settings.parallel.compile or (how == "selective" and not SELECTED_IS_COUNTABLE)
    plain = dataclasses.replace(
        settings, parallel=dataclasses.replace(settings.parallel, activation_checkpointing="none")
    )
    one = _bytes_saved_for_backward(plain, plan, 1)
    per_eager_block = _bytes_saved_for_backward(plain, plan, 2) - one
    rest = one - per_eager_block  # of the embedding and the last norm

    def per_block(settings: Settings) -> int:
        if compiled:
            return _bytes_kept_by_compiled_block(settings, plan)
        if settings is plain:
            return per_eager_block
        return _bytes_saved_for_backward(settings, plan, 2) - _bytes_saved_for_backward(settings, plan, 1)

    kept = rest + plan.model_config["n_layer"] * per_block(plain if how == "none" else settings)
    return kept, 0 if how == "none" else per_block(plain)


@contextlib.contextmanager
def _fake_model(settings: Settings, plan: Plan, num_layers: int) -> Iterator[tuple[PretrainGPT, torch.Tensor]]:
    """The model with so many blocks, in the type of computation, and a micro-batch, as tensors without storage."""
    config = {**plan.model_config, "n_layer": num_layers}
    if config["mlp_class_name"] == "LLaMAMoE" and not has_grouped_experts(Config(**config)):
        # Which expert a token goes to cannot be known here; each token passes through so many of them.
        width = config.get("moe_intermediate_size") or config["intermediate_size"]
        config |= {"mlp_class_name": "LLaMAMLP", "intermediate_size": width * config["n_expert_per_token"]}
        config |= {"n_expert": 0, "n_expert_per_token": 0}
    dtype = torch.float32 if settings.precision == "32-true" else torch.bfloat16
    default = torch.get_default_dtype()
    with FakeTensorMode():
        torch.set_default_dtype(dtype)
        try:
            model = build_model(
                config, dataclasses.replace(settings, precision="32-true"), plan.context_tokens, device="cpu"
            )
        finally:
            torch.set_default_dtype(default)
        model.cos, model.sin = model.cos.float(), model.sin.float()
        model.context_group = ContextGroup(settings.parallel.context_parallel_size)
        for block in model.transformer.h:
            if settings.parallel.activation_checkpointing != "none":
                checkpoint_activations(block, settings.parallel.activation_checkpointing)
        part_tokens = plan.context_tokens // model.context_group.size
        yield model, torch.zeros(settings.train.micro_batch_size, part_tokens, dtype=torch.int64)


def _bytes_saved_for_backward(settings: Settings, plan: Plan, num_layers: int) -> int:
    with _fake_model(settings, plan, num_layers) as (model, tokens), tensors_saved_for_backward(model) as saved:
        model.hidden_states(tokens)
    return sum(saved.values())


def _bytes_kept_by_compiled_block(settings: Settings, plan: Plan) -> int:
    """Its input, and what its forward graph hands to its backward graph, as inductor's partitioner divides them."""
    kept: dict[int, int] = {}

    def record(graph: torch.fx.GraphModule, _) -> Callable:
        (output,) = graph.graph.find_nodes(op="output")
        for node in output.args[0][1:]:  # the first is the block's result
            value = node.meta.get("val") if isinstance(node, torch.fx.Node) and node.op != "placeholder" else None
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                kept[storage._cdata] = storage.nbytes()
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=record,
        bw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    torch._dynamo.reset()
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)  # "context_fn is passed to .."
    with _fake_model(settings, plan, 1) as (model, tokens):
        model.transformer.h[0].compile(backend=backend)
        hidden = model.hidden_states(tokens)
    torch._dynamo.reset()
    return hidden.numel() * hidden.element_size() + sum(kept.values())


@contextlib.contextmanager
def tensors_saved_for_backward(model: torch.nn.Module) -> Iterator[dict[int, int]]:
    """Collect what autograd saves in the block, without the model's own tensors: {identity of the storage: bytes}."""
    saved: dict[int, int] = {}
    own: dict[int, torch.UntypedStorage] = {}
    alive: list[torch.Tensor] = []  # keeps identities from being used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # Gathered weights come and go under FSDP2, so the model is asked again for each tensor that is not known to be
        # its own; not for all, for with experts it has hundreds per block. Kept, so that identities stay theirs.
        if storage._cdata not in own:
            storages = (local_shard(t).untyped_storage() for t in (*model.parameters(), *model.buffers()))
            own.update((storage._cdata, storage) for storage in storages)
        if not isinstance(tensor, torch.nn.Parameter) and storage._cdata not in own:
            alive.append(tensor)
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
