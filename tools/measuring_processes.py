"""Processes that measure: Ray actors, one per device on its node, that meet in a process group. check_cluster's measure
the hardware; find_fastest derives its own from them."""

from __future__ import annotations

import datetime
import os
import socket
import time
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pretraining.hardware_check import HardwareReport, Multiply, measure_hardware, multiply_by_torch
from pretraining.node_facts import node_name
from pretraining.worker_environment import interface_of, worker_environment
from utils.errors import UserError
from utils.machine import available_cpus

_START_TIMEOUT_S = 90.0
_MEASURE_TIMEOUT_S = 180.0
_GRACE_S = 5.0  # after the first failure, for the others, of which one may say more


class Member:
    """One process of the group that measures; an actor, since the group needs addresses and devices before it meets."""

    def where(self) -> tuple[str, int, list[str]]:
        """(address, a free port, the GPUs that Ray lends to this process)."""
        address = ray.util.get_node_ip_address()
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as listener:
            listener.bind((address, 0))
            port = listener.getsockname()[1]
        return address, port, ray.get_runtime_context().get_accelerator_ids().get("GPU", [])

    def join(self, job: dict[str, Any]) -> torch.device:
        """Take the place in the process group that `places_of` gave; returns this process's device."""
        os.environ.update(job["environment"])
        if interface := interface_of(ray.util.get_node_ip_address()):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)  # else gloo may take the loopback, and find nobody
        if job["gpus"]:  # each process sees all of its node's, as in training: NCCL finds its links by them
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(job["gpus"])
            os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # nvidia-smi's order, so that an index means one GPU
        torch.set_num_threads(max(1, available_cpus() // job["processes_per_node"]))
        if job["gpus"]:
            device = torch.device("cuda", job["local_rank"])
            torch.cuda.set_device(device)
        else:
            device = torch.device("cpu")
        dist.init_process_group(
            "nccl" if job["gpus"] else "gloo",
            init_method=job["meet_at"],
            rank=job["rank"],
            world_size=job["world_size"],
            timeout=datetime.timedelta(seconds=job["collective_timeout_s"]),
        )
        return device

    def measure(self, job: dict[str, Any]) -> HardwareReport:
        """Join the process group, and measure."""
        device = self.join(job)
        report = measure_hardware(
            job["node"],
            job["gpus"][job["local_rank"]] if job["gpus"] else str(job["local_rank"]),
            job["processes_per_node"],
            device,
            job["seconds"],
            job["multiply"] or multiply_by_torch,
        )
        dist.destroy_process_group()
        return report


def measure_together(
    nodes: list[dict[str, str]], accelerator: str, num_devices: int, seconds: float, multiply: Multiply | None
) -> HardwareReport:
    """Start a process per device on each node, pinned to it, and let them measure together."""
    names = names_of(nodes, num_devices)
    members = start_members(Member, nodes, accelerator, num_devices)
    try:
        shared = {"collective_timeout_s": 60, "seconds": seconds, "multiply": multiply}
        places = places_of(members, nodes, accelerator, num_devices)
        reports = [member.measure.remote({**place, **shared}) for member, place in zip(members, places)]
        return answers_of(reports, names, _MEASURE_TIMEOUT_S)[0]
    finally:
        for member in members:
            ray.kill(member)


def names_of(nodes: list[dict[str, str]], num_devices: int) -> list[str]:
    """For people, in the order of ranks."""
    return [f"node {node_name(node)}, process {local_rank}" for node in nodes for local_rank in range(num_devices)]


def start_members(kind: type[Member], nodes: list[dict[str, str]], accelerator: str, num_devices: int) -> list:
    """An actor per device on each node, pinned to it; in the order of ranks. The caller ends them by `ray.kill`."""
    resources = {"num_gpus": 1, "num_cpus": 0} if accelerator == "cuda" else {"num_cpus": 1}
    start = ray.remote(max_restarts=0, **resources)(kind)
    return [
        start.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["id"], soft=False)).remote()
        for node in nodes
        for _ in range(num_devices)
    ]


def places_of(members: list, nodes: list[dict[str, str]], accelerator: str, num_devices: int) -> list[dict[str, Any]]:
    """For each actor its place in the process group, as `join` takes it."""
    found = answers_of([member.where.remote() for member in members], names_of(nodes, num_devices), _START_TIMEOUT_S)
    address, port, _ = found[0]
    shared = {
        "meet_at": f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}",
        "environment": worker_environment(os.environ, accelerator),
        "world_size": len(members),
        "processes_per_node": num_devices,
    }
    places = []
    for rank in range(len(members)):
        first = rank - rank % num_devices
        gpus = sorted((gpu for _, _, lent in found[first : first + num_devices] for gpu in lent), key=by_number)
        place = {"rank": rank, "local_rank": rank % num_devices, "node": node_name(nodes[rank // num_devices])}
        places.append({**shared, **place, "gpus": gpus})
    return places


def by_number(gpu: str) -> tuple[int, str]:
    """GPU 10 after GPU 9; names that are no numbers (MIG) as they are."""
    return (int(gpu), "") if gpu.isdigit() else (0, gpu)


def wait_for(
    references: list, names: list[str], timeout_s: float
) -> tuple[dict[str, ray.exceptions.RayError], list[str]]:
    """Wait for the answers of processes; once one has failed the others get little time more, for they may wait for it.

    Returns:
        by name, what those raised that failed; and the names of those that have not answered.
    """
    deadline = time.monotonic() + timeout_s
    pending, failures = list(references), {}
    while pending and (left := deadline - time.monotonic()) > 0:
        ready, pending = ray.wait(pending, num_returns=1, timeout=left)
        for reference in ready:
            try:
                ray.get(reference)
            except ray.exceptions.RayError as error:
                failures[names[references.index(reference)]] = error
                deadline = min(deadline, time.monotonic() + _GRACE_S)
    return failures, [names[references.index(reference)] for reference in pending]


def answers_of(references: list, names: list[str], timeout_s: float) -> list:
    """All answers, in order.

    Raises:
        UserError: a process failed or does not answer. One that died is named before those that only lost it.
    """
    failures, silent = wait_for(references, names, timeout_s)
    if failures:
        died = {name: error for name, error in failures.items() if isinstance(error, ray.exceptions.RayActorError)}
        name, error = next(iter((died or failures).items()))
        what = "died" if died else f"failed ({str(error).strip().splitlines()[-1]})"
        raise UserError(
            f"{name}: the process {what} while the devices were measured. `NCCL_DEBUG=INFO` in front of this command "
            "shows what NCCL tried; Ray's log of the process is in /tmp/ray/session_latest/logs on the node."
        )
    if silent:
        others = f" and {len(silent) - 1} others" if len(silent) > 1 else ""
        raise UserError(
            f"{silent[0]}{others}: no answer within {timeout_s:.0f} s. Other work may hold the devices (see `ray "
            "status`), or the processes do not reach each other: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the "
            "interface to use, `NCCL_DEBUG=INFO` shows what was tried."
        )
    return ray.get(references)
