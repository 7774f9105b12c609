"""One trial of find_fastest: some real steps of the trainer on made-up tokens, in processes that end with it.

The loop, the model and the reading thread are the ones that train. Only saving is left out, and the first weights are
drawn in a quicker way.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import psutil
import ray
import torch
import torch.distributed as dist
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

from pretraining.plan import Plan
from pretraining.settings import Settings
from tools.measuring_processes import Member, names_of, places_of, start_members, wait_for

WARM_UP_STEPS = 3  # the first ones compile, allocate and connect
_COLLECTIVE_TIMEOUT_S = 1800  # NCCL's own default is less than a slow compilation beside a quick one takes

OUT_OF_MEMORY = "out of memory"


class TrialProcess(Member):
    def train(self, job: dict[str, Any]) -> dict[str, Any]:
        """Join the process group, and train some steps; returns what `measure_steps` returns."""
        self.join(job)
        place = {"RANK": "rank", "LOCAL_RANK": "local_rank", "WORLD_SIZE": "world_size"}
        os.environ.update({name: str(job[key]) for name, key in place.items()})
        os.environ["LOCAL_WORLD_SIZE"] = str(job["processes_per_node"])
        if job["prepare"] is not None:
            job["prepare"](job["settings"])
        return measure_steps(job["settings"], job["plan"], job["steps"])


def measure_steps(settings: Settings, plan: Plan, num_steps: int) -> dict[str, Any]:
    """The figures of this process over `num_steps` steps, after a warm-up; collective.

    `step_s_alone` is the time of the same steps when each collective is replaced by a copy of this process's own data:
    what is missing from `step_s` then is the time that communication and the wait for other processes take, as far as
    they are not hidden behind computation.
    """
    # Not before `join`: a library that asks for CUDA when it is imported would see the one GPU that Ray lends.
    from pretraining.optimizer import update_scales
    from pretraining.trainer import Trainer

    before_bytes = psutil.Process().memory_info().rss  # of the libraries, on a CPU
    trainer = Trainer(settings, plan)
    fill_quickly(trainer.model)
    update_scales(trainer.model, settings)
    trainer.writer.save = lambda *_: 0.0
    records: list[dict[str, Any]] = []
    trainer.metrics = _Records(records)

    def run(steps: int) -> dict[str, Any]:
        trainer.plan = dataclasses.replace(plan, total_steps=trainer.state.step + steps)
        trainer.run()
        return records[-1]

    run(WARM_UP_STEPS)
    record = run(num_steps)
    if trainer.state.bad_steps.nonfinite_steps:
        raise RuntimeError("the loss was not finite, so the optimizer did not run")
    peak_bytes = record["memory_peak_bytes"] - (before_bytes if trainer.device.type == "cpu" else 0)
    names = ("tokens_per_s_per_device", "mfu", "step_s", "data_wait_s")
    figures = {name: record[name] for name in names} | {"memory_peak_bytes": peak_bytes, "step_s_alone": None}
    if trainer.world_size > 1:
        replace_collectives(trainer.model)
        run(1)
        figures["step_s_alone"] = run(num_steps)["step_s"]
    return figures


class _Records:
    """Stands where the trainer's metrics.jsonl does."""

    def __init__(self, records: list[dict[str, Any]]):
        self.write = records.append


@torch.no_grad()
def fill_quickly(model: torch.nn.Module) -> None:
    """Weights for a trial: `model.initialise` draws each row from a stream of its own, which takes minutes for 8B."""
    from pretraining.parallelism import local_shard

    for parameter in model.parameters():
        if parameter.ndim > 1:
            local_shard(parameter).normal_(std=0.02)
        else:
            local_shard(parameter).fill_(1.0)


class _CopyForGather(DefaultAllGather):
    def __call__(self, output_tensor, input_tensor, group, async_op=False):
        output_tensor.view(group.size(), -1).copy_(input_tensor.clone().view(1, -1))  # the input may lie in the output


class _CopyForReduceScatter(DefaultReduceScatter):
    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        output_tensor.view(-1).copy_(input_tensor.view(group.size(), -1)[0])


def replace_collectives(model: torch.nn.Module) -> None:
    """Let every collective of this process return at once, with numbers that are wrong but finite, from now on."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(_CopyForGather())
            module.set_custom_reduce_scatter(_CopyForReduceScatter())
    dist.all_reduce = lambda *args, **kwargs: None  # FSDP2's between replicas, and the trainer's own sums


# ---------------------------------------------------------------------------------------------------------------------
# The driver's side


@dataclasses.dataclass
class Outcome:
    """How a trial ended."""

    figures: list[dict[str, Any]] | None
    """Of each process; None: it failed."""
    failure: str | None = None
    """OUT_OF_MEMORY, "died", "failed" or "no answer"."""
    detail: str | None = None
    """Which process, and its error in one line."""


def run_trial(
    settings: Settings,
    plan: Plan,
    steps: int,
    nodes: list[dict[str, str]],
    timeout_s: float,
    prepare: Callable[[Settings], None] | None,
) -> Outcome:
    """Train some steps in fresh processes on all devices, and wait for them to end.

    Args:
        settings: accelerator, num_devices and precision are settled.
        nodes: what `utils.node_check.check_nodes` gave.
        prepare: called in each process before it starts; for tests.

    Raises:
        UserError: the processes do not start.
    """
    members = start_members(TrialProcess, nodes, settings.accelerator, settings.num_devices)
    try:
        shared = {
            "settings": settings,
            "plan": plan,
            "steps": steps,
            "prepare": prepare,
            "collective_timeout_s": _COLLECTIVE_TIMEOUT_S,
        }
        places = places_of(members, nodes, settings.accelerator, settings.num_devices)
        answers = [member.train.remote({**place, **shared}) for member, place in zip(members, places)]
        return _outcome_of(answers, names_of(nodes, settings.num_devices), timeout_s)
    finally:
        for member in members:
            ray.kill(member)


def _outcome_of(answers: list, names: list[str], timeout_s: float) -> Outcome:
    failures, silent = wait_for(answers, names, timeout_s)
    if failures:
        # One that only lost its peers says less than the one that they lost.
        order = (OUT_OF_MEMORY, "died", "failed")
        told = [(_kind_of(error), f"{name}: {_last_line(error)}") for name, error in failures.items()]
        return Outcome(None, *min(told, key=lambda failure: order.index(failure[0])))
    if silent:
        return Outcome(None, "no answer", f"{silent[0]}: no answer within {timeout_s:.0f} s")
    return Outcome(ray.get(answers))


def _kind_of(error: ray.exceptions.RayError) -> str:
    words = ("out of memory", "can't allocate memory", "MemoryError", "Cannot allocate memory")
    if isinstance(error, ray.exceptions.OutOfMemoryError) or any(word in str(error) for word in words):
        return OUT_OF_MEMORY
    return "died" if isinstance(error, ray.exceptions.RayActorError) else "failed"


def _last_line(error: ray.exceptions.RayError) -> str:
    if isinstance(error, ray.exceptions.RayActorError):
        return "the process died"
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    # What torch says after the first line of an error (a C++ stack, "Exception raised from ...") tells a user nothing.
    said = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception")) and not line.startswith(" ")]
    return (said or lines)[-1][:300]


def device_of(nodes: list[dict[str, str]], accelerator: str) -> tuple[str, int | None]:
    """(name of the first node's device, bytes of its memory, or None on a CPU)."""
    if accelerator == "cpu":
        return "CPU", None
    strategy = NodeAffinitySchedulingStrategy(nodes[0]["id"], soft=False)
    ask = ray.remote(num_gpus=1, num_cpus=0, max_calls=1)(_gpu)
    return ray.get(ask.options(scheduling_strategy=strategy).remote())


def _gpu() -> tuple[str, int]:
    return torch.cuda.get_device_name(0), torch.cuda.mem_get_info(0)[1]
