"""The worker's side: one process of the training, as Ray Train starts it on a node of the cluster."""

from __future__ import annotations

import os
from typing import Any

import ray
import ray.train.torch
import torch._C._distributed_c10d as c10d
import torch.distributed as dist

from pretraining.failures import UnevenPlacement
from pretraining.hardware_check import check_hardware
from pretraining.heartbeat import beats_directory, watched
from pretraining.node_facts import node_name
from pretraining.plan import Plan
from pretraining.settings import Settings
from pretraining.trainer import Trainer
from pretraining.user_error_note import leave_note
from utils import console
from utils.errors import UserError


def train_worker(settings: Settings, plan: Plan, verbosity: int, token: str) -> None:
    """Train from the newest good checkpoint to the last step; runs in every process.

    Args:
        token: of this start of the processes, for `heartbeat.beats_directory`.
    """
    console.VERBOSITY = verbosity
    settle_local_ranks(settings)  # leaves no note: with the next start the nodes may be whole again
    node, index = this_device()
    device_name = f"GPU {index}" if settings.accelerator == "cuda" else f"process {index}"
    directory = beats_directory(token, ray.get_runtime_context().get_node_id())
    with watched(directory, dist.get_rank(), settings.out_dir, node, device_name, last_collectives) as heartbeat:
        try:
            if settings.checks_hardware():
                check_hardware(node, index, settings.num_devices, ray.train.torch.get_device())
            trainer = Trainer(settings, plan, preempted_nodes, heartbeat)
            trainer.resume_or_initialise()
            trainer.run()
        except UserError as error:
            leave_note(settings.out_dir, error)
            raise


def last_collectives() -> bytes:
    """What torch's flight recorder holds, as JSON. torch has no public function for it."""
    from_gpus = dist.get_backend() == "nccl"
    return c10d._dump_nccl_trace_json() if from_gpus else c10d._dump_fr_trace_json()


def settle_local_ranks(settings: Settings) -> None:
    """Number the processes of each node by Ray's node ids; Ray Train goes by addresses, which two nodes may share."""
    nodes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(nodes, ray.get_runtime_context().get_node_id())
    starts = range(0, len(nodes), settings.num_devices)
    whole = all(len(set(nodes[start : start + settings.num_devices])) == 1 for start in starts)
    if not whole or len(set(nodes)) != settings.num_nodes:
        counts = sorted((nodes.count(node) for node in set(nodes)), reverse=True)
        raise UnevenPlacement(
            f"--num_nodes={settings.num_nodes} with --num_devices={settings.num_devices}: Ray placed {counts} "
            "processes on its nodes. Give it nodes of one size, without other work."
        )
    os.environ["LOCAL_RANK"] = str(dist.get_rank() % settings.num_devices)
    os.environ["LOCAL_WORLD_SIZE"] = str(settings.num_devices)


def this_device() -> tuple[str, str]:
    """(node, index of this process's device on it), for people; after `settle_local_ranks`."""
    context = ray.get_runtime_context()
    gpus = context.get_accelerator_ids().get("GPU")
    node = {"id": context.get_node_id(), "address": ray.util.get_node_ip_address()}
    return node_name(node), gpus[0] if gpus else os.environ["LOCAL_RANK"]


def preempted_nodes() -> list[str] | None:
    """The nodes that Ray was told will be taken away, or None."""
    info = ray.train.get_preemption_info()
    return None if info is None else info.preempted_node_ids
