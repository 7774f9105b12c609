"""The worker's side: one process of the training, as Ray Train starts it on a node of the cluster."""

from __future__ import annotations

import os
from typing import Any

import ray
import ray.train
import torch.distributed as dist

from pretraining.plan import Plan
from pretraining.settings import Settings
from pretraining.trainer import Trainer
from pretraining.user_error_note import leave_note, read_note
from utils import console
from utils.errors import UserError


def train_worker(settings: Settings, plan: Plan, verbosity: int) -> None:
    """Train from the newest good checkpoint to the last step; runs in every process."""
    console.VERBOSITY = verbosity
    if failed_before(settings):
        return
    settle_local_ranks(settings)  # leaves no note: with the next start the nodes may be whole again
    try:
        trainer = Trainer(settings, plan, preempted_nodes)
        trainer.resume_or_initialise()
        trainer.run()
    except UserError as error:
        leave_note(settings.out_dir, error)
        raise


def failed_before(settings: Settings) -> bool:
    """Whether a worker has left a note; all processes take rank 0's word, for a network file system may be late."""
    noted = [dist.get_rank() == 0 and read_note(settings.out_dir) is not None]
    dist.broadcast_object_list(noted)
    return noted[0]


def settle_local_ranks(settings: Settings) -> None:
    """Number the processes of each node by Ray's node ids; Ray Train goes by addresses, which two nodes may share."""
    nodes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(nodes, ray.get_runtime_context().get_node_id())
    starts = range(0, len(nodes), settings.num_devices)
    whole = all(len(set(nodes[start : start + settings.num_devices])) == 1 for start in starts)
    if not whole or len(set(nodes)) != settings.num_nodes:
        counts = sorted((nodes.count(node) for node in set(nodes)), reverse=True)
        raise UserError(
            f"--num_nodes={settings.num_nodes} with --num_devices={settings.num_devices}: Ray placed {counts} "
            "processes on its nodes. Give it nodes of one size, without other work."
        )
    os.environ["LOCAL_RANK"] = str(dist.get_rank() % settings.num_devices)
    os.environ["LOCAL_WORLD_SIZE"] = str(settings.num_devices)


def preempted_nodes() -> list[str] | None:
    """The nodes that Ray was told will be taken away, or None."""
    info = ray.train.get_preemption_info()
    return None if info is None else info.preempted_node_ids
