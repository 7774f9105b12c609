"""Environment variables of the training processes: the user's, defaults, and the network interface of each node."""

from __future__ import annotations

import os
from collections.abc import Mapping

import psutil  # litgpt depends on it
import ray
from ray.train.v2._internal.execution.callback import WorkerCallback

# Settings of these libraries reach the workers on a joined cluster only if they are handed on.
FORWARDED_PREFIXES = ("NCCL_", "TORCH_", "TORCHINDUCTOR_", "PYTORCH_", "CUDA_", "GLOO_", "FI_")

# On GPUs, where the user sets nothing else.
GPU_DEFAULTS = {
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",  # less of the GPU's memory is lost to gaps
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",  # which collective each process waits in, written when one times out
    "TORCH_FR_BUFFER_SIZE": "2000",  # collectives that this record holds
    "TORCHINDUCTOR_COMPILE_THREADS": "8",  # per process: its own default is up to 32, and a node has 8 processes
}


def forwarded_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of the driver's shell that workers get; never a secret, since Ray's dashboard shows them."""
    secret = ("KEY", "TOKEN", "SECRET", "PASSWORD")
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(FORWARDED_PREFIXES) and not any(word in name for word in secret)
    }


def worker_environment(environment: Mapping[str, str], accelerator: str) -> dict[str, str]:
    """What the workers get: defaults, and over them what the driver's shell has."""
    return {**(GPU_DEFAULTS if accelerator == "cuda" else {}), **forwarded_environment(environment)}


def interface_of(address: str) -> str | None:
    """The network interface that holds an IP address of this machine, such as "eth0"; None: no interface has it."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in addresses):
            return name
    return None


class ChooseInterface(WorkerCallback):
    """Ray Train calls it in each worker before the process group is made.

    Gloo looks up the machine's own name, which many systems map to the loopback: processes on other nodes then find
    nobody there. The interface that Ray reaches the node by is right.
    """

    def after_init_train_context(self) -> None:
        if interface := interface_of(ray.util.get_node_ip_address()):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
