"""One rank of a large run, on a fake process group with tensors without storage: its collectives and its memory.

Nothing is computed and nothing is sent, but the model, its sharding, the forward and backward pass and the optimizer
are the real ones at full size, on a laptop.

    python tests/fake_ranks.py CONFIG.yaml NUM_NODES NUM_DEVICES
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import sys
import types
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.fsdp._fully_shard import _fsdp_collectives
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from pretraining.memory import plan_memory
from pretraining.model import build_model, count_parameters
from pretraining.model_config import resolve_model_config
from pretraining.optimizer import make_optimizers
from pretraining.parallelism import device_mesh, local_shard, schedule_reductions, shard_model
from pretraining.process_layout import micro_batches_per_step
from pretraining.settings import Settings
from utils.cli import parse_settings


class CountedExchanges(TorchDispatchMode):
    """Adds the exchanges around attention to the counters of `counted_collectives`."""

    def __init__(self, counts: collections.Counter, num_bytes: collections.Counter):
        super().__init__()
        self._counts, self._num_bytes = counts, num_bytes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops._c10d_functional.all_to_all_single.default:
            key = f"all_to_all over {len(args[1])}"
            self._counts[key] += 1
            self._num_bytes[key] += args[0].numel() * args[0].element_size()
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted_collectives():
    """Yields two counters by "KIND over GROUP_SIZE": calls, and bytes of the unsharded tensors."""
    counts: collections.Counter = collections.Counter()
    num_bytes: collections.Counter = collections.Counter()

    def count(kind: str, tensor: torch.Tensor, group) -> None:
        key = f"{kind} over {group.size()}"
        counts[key] += 1
        num_bytes[key] += tensor.numel() * tensor.element_size()

    undo = []
    for owner, kind, argument in (
        (_fsdp_collectives.DefaultAllGather, "all_gather", "output_tensor"),
        (_fsdp_collectives.DefaultReduceScatter, "reduce_scatter", "input_tensor"),
    ):
        original = owner.__call__

        def call(self, *args, original=original, kind=kind, argument=argument, **kwargs):
            count(kind, kwargs[argument], kwargs["group"])
            return original(self, *args, **kwargs)

        owner.__call__ = call
        undo.append((owner, original))
    all_reduce = dist.all_reduce

    def counted_all_reduce(tensor, *args, group=None, **kwargs):
        count("all_reduce", tensor, group or dist.group.WORLD)
        return all_reduce(tensor, *args, group=group, **kwargs)

    dist.all_reduce = counted_all_reduce
    try:
        with CountedExchanges(counts, num_bytes):
            yield counts, num_bytes
    finally:
        dist.all_reduce = all_reduce
        for owner, original in undo:
            owner.__call__ = original


def measure(settings: Settings) -> dict[str, Any]:
    """Two micro-batches, or one where the run accumulates none, and an optimizer step; figures of rank 0."""
    world_size, local_size = settings.num_nodes * settings.num_devices, settings.num_devices
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    config = dataclasses.asdict(resolve_model_config(settings))
    context = settings.train.max_seq_length or config["block_size"]
    accumulation = min(2, micro_batches_per_step(settings, world_size))
    # The tracker does not see into compiled blocks.
    settings = dataclasses.replace(settings, parallel=dataclasses.replace(settings.parallel, compile=False))

    model = build_model(config, settings, context)
    shard_model(model, device_mesh(settings, "cpu", world_size, local_size), settings)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        model.reset_parameters()
        optimizers = make_optimizers(model, settings.optimizer)
        part_tokens = context // model.context_group.size
        tokens = torch.zeros(settings.train.micro_batch_size, part_tokens, dtype=torch.int64)
        tracker = FSDPMemTracker(model, optimizers[0])
        tracker.track_inputs((tokens,))
        with tracker, counted_collectives() as (calls, num_bytes):
            for micro_step in range(accumulation):
                last = micro_step + 1 == accumulation
                schedule_reductions(model, settings, last)
                tracker.reset_mod_stats()
                _, objective = model(tokens, tokens)
                objective.backward()
        peak_bytes = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
        for optimizer in optimizers:
            optimizer.step()
        states = [
            local_shard(value)
            for optimizer in optimizers
            for state in optimizer.state.values()
            for value in state.values()
        ]
    plan = plan_memory(
        settings, types.SimpleNamespace(model_config=config, context_tokens=context), world_size, local_size
    )
    return {
        "calls": dict(calls),
        "bytes": dict(num_bytes),
        "accumulation": accumulation,
        "block_parameters": sum(parameter.numel() for parameter in model.transformer.h.parameters()),
        "parameters": count_parameters(model),
        "layers": config["n_layer"],
        "peak_bytes": peak_bytes + sum(state.numel() * state.element_size() for state in states),
        "planned_bytes": plan.total - plan.overhead,
    }


if __name__ == "__main__":
    print(json.dumps(measure(parse_settings(Settings, "", sys.argv[1:]))))
