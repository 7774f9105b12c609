"""What a run will need, before it starts and without a GPU: memory of a process, steps, disk.

Parameters, gradients and optimizer state follow from the shapes and are exact. Activations are found by running the
forward pass of the model with one and with two blocks on tensors without storage (torch's FakeTensorMode) and adding up
what autograd keeps; further blocks cost what the second one cost.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretraining.plan import Plan
from pretraining.process_layout import micro_batches_per_step, shard_size
from pretraining.settings import Settings
from utils import console
from utils.errors import UserError

if TYPE_CHECKING:
    import torch


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
    """Whole weights that are in memory at once: embedding and output layer, and two blocks (all, without resharding)."""
    activations: int
    """Kept by autograd for one micro-batch, without the logits."""
    logits: int
    """Logits and their softmax that are held at once, in float32."""
    checkpoint: int
    """On disk: weights and optimizer state of the whole model."""

    @property
    def total(self) -> int:
        return (
            self.parameters
            + self.gradients
            + self.optimizer
            + self.unsharded_gradients
            + self.gathered
            + self.activations
            + self.logits
        )


def plan_memory(settings: Settings, plan: Plan, world_size: int, local_size: int) -> MemoryPlan:
    """Count; `settings.precision` must be set.

    Args:
        world_size, local_size: processes in total, and on a node.
    """
    from pretraining.model import build_model, count_parameters

    model = build_model(plan.model_config, settings, plan.context_tokens)
    parallel = settings.parallel
    shard = shard_size(settings, world_size, local_size)
    storage_bytes = 2 if settings.precision == "bf16-true" else 4
    compute_bytes = 4 if settings.precision == "32-true" else 2

    local, whole_block, whole_root, optimizer = 0, 0, 0, 0
    for name, parameter in model.named_parameters():
        shape = parameter.shape
        pieces = math.ceil(shape[0] / shard) * math.prod(shape[1:])
        local += pieces
        if name.startswith("transformer.h."):
            whole_block += math.prod(shape)
        else:
            whole_root += math.prod(shape)
        if settings.optimizer.name == "muon" and name.startswith("transformer.h.") and parameter.ndim == 2:
            optimizer += pieces * storage_bytes
        else:
            optimizer += 2 * pieces * storage_bytes + 4  # two moments, and the count of steps as one float32

    accumulation = micro_batches_per_step(settings, world_size)
    keeps_whole_gradients = accumulation > 1 and not parallel.reduce_every_micro_batch and shard > 1
    num_layers = plan.model_config["n_layer"]
    gathered_blocks = whole_block if not parallel.reshard_after_forward else min(1.0, 2 / num_layers) * whole_block
    activations = _activation_bytes(settings, plan)
    num_parameters = count_parameters(model)
    state_per_parameter = storage_bytes * (2 if settings.optimizer.name == "muon" else 3)
    return MemoryPlan(
        num_parameters=num_parameters,
        parameters=local * storage_bytes,
        gradients=local * storage_bytes,
        optimizer=optimizer,
        unsharded_gradients=4 * (whole_block + whole_root) if keeps_whole_gradients else 0,
        gathered=int((gathered_blocks + whole_root) * compute_bytes)
        if shard > 1 or compute_bytes < storage_bytes
        else 0,
        activations=activations,
        logits=_logit_bytes(settings, plan),
        checkpoint=num_parameters * state_per_parameter,
    )


def _logit_bytes(settings: Settings, plan: Plan) -> int:
    from pretraining.loss import choose_loss

    vocabulary = plan.model_config["padded_vocab_size"]
    tokens = settings.train.micro_batch_size * plan.context_tokens
    how = choose_loss(
        settings.parallel.loss,
        num_tokens=tokens,
        vocab_size=vocabulary,
        z_loss=settings.train.z_loss,
        softcap=plan.model_config["final_logit_softcapping"],
        float32=settings.precision == "32-true",
    )
    rows = tokens if how == "full" else min(tokens, settings.parallel.loss_chunk_tokens)
    held = 2 * rows * vocabulary * 4  # the logits, and their softmax or its gradient
    if how == "fused":  # torch computes the gradients of hidden states and output layer in the forward pass
        held += (tokens + vocabulary) * plan.model_config["n_embd"] * 4
    return held


def _activation_bytes(settings: Settings, plan: Plan) -> int:
    """What autograd keeps of all blocks, embedding and last norm for one micro-batch."""
    first, second = (_kept_bytes(settings, plan, layers) for layers in (1, 2))
    kept = first + (plan.model_config["n_layer"] - 1) * (second - first)
    if settings.parallel.activation_checkpointing == "none":
        return kept
    # The backward pass computes one block at a time again, and holds what that block keeps.
    plain = dataclasses.replace(
        settings, parallel=dataclasses.replace(settings.parallel, activation_checkpointing="none")
    )
    return kept + _kept_bytes(plain, plan, 2) - _kept_bytes(plain, plan, 1)


def _kept_bytes(settings: Settings, plan: Plan, num_layers: int) -> int:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from pretraining.model import build_model
    from pretraining.parallelism import checkpoint_activations

    config = {**plan.model_config, "n_layer": num_layers}
    if config["mlp_class_name"] == "LLaMAMoE":
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
        for block in model.transformer.h:
            if settings.parallel.activation_checkpointing != "none":
                checkpoint_activations(block, settings.parallel.activation_checkpointing)
        tokens = torch.zeros(settings.train.micro_batch_size, plan.context_tokens, dtype=torch.int64)
        with tensors_saved_for_backward(model) as kept:
            hidden = model.hidden_states(tokens)
            del hidden
        return sum(kept.values())


class tensors_saved_for_backward:
    """Collects what autograd saves in the block: {identity of the storage: bytes}, without the model's own tensors."""

    def __init__(self, model: torch.nn.Module):
        import torch

        def own(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to_local() if hasattr(tensor, "to_local") else tensor

        self._kept: dict[Any, int] = {}
        self._alive: list[torch.Tensor] = []  # keeps identities from being used again
        self._model = model
        self._own = own
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        import torch

        if isinstance(tensor, torch.nn.Parameter) or tensor.untyped_storage()._cdata in self._excluded():
            return tensor
        storage = tensor.untyped_storage()
        if storage._cdata not in self._kept:
            self._alive.append(tensor)
        self._kept[storage._cdata] = storage.nbytes()
        return tensor

    def _excluded(self) -> set:
        # Gathered weights come and go under FSDP2, so this is asked anew each time.
        tensors = [*self._model.parameters(), *self._model.buffers()]
        return {self._own(tensor).untyped_storage()._cdata for tensor in tensors}

    def __enter__(self) -> dict[Any, int]:
        self._hooks.__enter__()
        return self._kept

    def __exit__(self, *exception) -> None:
        self._hooks.__exit__(*exception)


def print_dry_run(settings: Settings, plan: Plan) -> None:
    """The plan in figures; raises UserError at its end if something does not fit."""
    num_devices = settings.num_devices or 1
    if settings.num_devices is None:
        console.warn("--num_devices is not given: planned with one process a node.")
    world_size = settings.num_nodes * num_devices
    accelerator = "cpu" if settings.accelerator == "cpu" else "cuda"
    settings = dataclasses.replace(
        settings, precision=settings.precision or ("32-true" if accelerator == "cpu" else "bf16-mixed")
    )
    micro_batches_per_step(settings, world_size)
    memory = plan_memory(settings, plan, world_size, num_devices)
    bytes_of = console.human_bytes
    tokens = plan.total_steps * plan.tokens_per_step
    epoch_tokens = plan.train_blocks * plan.context_tokens
    lines = [
        ("model", f"{plan.model_config['name']}, {memory.num_parameters:,} parameters"),
        ("processes", f"{world_size}: {settings.num_nodes} x {num_devices} a node, precision {settings.precision}"),
        ("data", f"{plan.train_blocks:,} sequences of {plan.context_tokens} tokens, {console.human_count(epoch_tokens)} tokens an epoch"),
        ("steps", f"{plan.total_steps:,} of {console.human_count(plan.tokens_per_step)} tokens ({micro_batches_per_step(settings, world_size)} x {settings.train.micro_batch_size} sequences a process)"),
        ("tokens", f"{console.human_count(tokens)}, {tokens / epoch_tokens:.2f} epochs"),
        ("memory a process", bytes_of(memory.total)),
        ("  parameters", bytes_of(memory.parameters)),
        ("  gradients", bytes_of(memory.gradients)),
        ("  optimizer", bytes_of(memory.optimizer)),
        ("  accumulation", f"{bytes_of(memory.unsharded_gradients)} (whole gradients; 0 with --parallel.reduce_every_micro_batch=true)"),
        ("  gathered weights", bytes_of(memory.gathered)),
        ("  activations", f"{bytes_of(memory.activations)} (estimate, checkpointing: {settings.parallel.activation_checkpointing})"),
        ("  logits", bytes_of(memory.logits)),
        ("checkpoint", f"{bytes_of(memory.checkpoint)} on disk; {_num_checkpoints(settings, plan)} at once = {bytes_of(_disk_bytes(settings, plan, memory))}"),
    ]  # fmt: skip
    for name, value in lines:
        console.result(f"{name:<18} {value}")
    problems = _problems(settings, plan, memory)
    if problems:
        raise UserError(problems)
    console.result("no problems found")


def _num_checkpoints(settings: Settings, plan: Plan) -> int:
    """Checkpoints on disk at the same time, at most: kept ones, the final one, and one that is being written."""
    every = settings.train.save_interval
    during = (plan.total_steps - 1) // every if every else 0
    keep = settings.checkpoint
    if keep.keep_last is None:
        return during + 1
    permanent = plan.total_steps // keep.keep_every_steps if keep.keep_every_steps else 0
    return min(during + 1, keep.keep_last + 1 + permanent)


def _disk_bytes(settings: Settings, plan: Plan, memory: MemoryPlan) -> int:
    return _num_checkpoints(settings, plan) * memory.checkpoint


def _problems(settings: Settings, plan: Plan, memory: MemoryPlan) -> list[str]:
    problems = []
    out_dir = Path(settings.out_dir).absolute()
    existing = next(path for path in (out_dir, *out_dir.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    needed = _disk_bytes(settings, plan, memory)
    if needed > free:
        problems.append(
            f"--out_dir={settings.out_dir}: {console.human_bytes(free)} free, checkpoints need {console.human_bytes(needed)}. "
            "Use a larger file system, or a smaller --checkpoint.keep_last."
        )
    if settings.accelerator != "cpu" and memory.total > 80e9:
        problems.append(
            f"--train.micro_batch_size={settings.train.micro_batch_size}: a process needs about {console.human_bytes(memory.total)}, an "
            "80 GB GPU holds less. Lower it, use --parallel.activation_checkpointing=full, or more processes."
        )
    return problems
