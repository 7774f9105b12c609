"""Check the nodes of a Ray cluster before they train: software, devices, links, disk. Takes half a minute.

    python -m tools.check_cluster --num_nodes=4 --out_dir=RUN [--compile] [--output=report.json]

On each node: NVIDIA's driver, CUDA, cuDNN, NCCL, the number of GPUs, the compiler, free memory, and how fast it writes
to --out_dir. On all devices at once: a matrix product, whose result is checked, a copy in memory, an all-reduce within
each node, and one over all nodes. What is more than 10% below the median is named with node and index. A node that
cannot train, or that computes something wrong, ends the check with exit code 2.

Without a GPU it runs on CPU processes: --accelerator=cpu --num_devices=2.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable
from typing import Literal

from utils import cli, console
from utils.errors import UserError
from utils.files import write_json

CHECKED_PACKAGES = ("torch", "ray", "lightning", "litgpt")


@dataclasses.dataclass
class Settings:
    """What is checked, and for how long."""

    num_nodes: int | None = None
    """Nodes to check (null: all that have devices)."""
    num_devices: int | None = None
    """Processes on each node (null: one per GPU; without a GPU, one CPU process)."""
    address: str | None = None
    """Ray cluster: HOST:PORT, 'auto', or 'local' for one of its own (null: RAY_ADDRESS, or the cluster that runs on
    this machine, else one of its own)."""
    accelerator: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: cuda where the cluster has GPUs."""
    out_dir: str | None = None
    """Directory on the shared file system whose writing speed is measured (null: none)."""
    compile: bool = False
    """Training will compile (--parallel.compile): nodes without compiler or Python.h are refused."""
    seconds: float = 1.0
    """How long each of the four measurements takes."""
    slow_percent: float = 10.0
    """What is further below the median than this is named as slow."""
    output: str | None = None
    """JSON file for everything that was found; null: none."""


def main(settings: Settings, multiply: Callable | None = None) -> None:
    """`multiply` is for tests: a matrix product that is slow or wrong in some process."""
    check_settings(settings)
    from utils.ray_cluster import find_cluster, ray_session

    if settings.out_dir is not None:
        settings = dataclasses.replace(settings, out_dir=os.path.abspath(settings.out_dir))
    os.environ.pop("WANDB_API_KEY", None)  # before Ray starts: what Ray starts inherits this environment
    with ray_session(find_cluster(settings.address)):
        wrong = check_cluster(settings, multiply)
    if wrong:
        raise UserError(wrong)


def check_settings(settings: Settings) -> None:
    problems = []
    for flag in ("num_nodes", "num_devices"):
        value = getattr(settings, flag)
        if value is not None and value < 1:
            problems.append(f"--{flag}={value}: must be at least 1.")
    if settings.seconds <= 0:
        problems.append(f"--seconds={settings.seconds}: must be more than 0.")
    if not 0 < settings.slow_percent < 100:
        problems.append(f"--slow_percent={settings.slow_percent}: must be between 0 and 100.")
    if settings.out_dir is not None and not os.path.isdir(settings.out_dir):
        problems.append(f"--out_dir={settings.out_dir}: no such directory. Make it, or give one that exists.")
    if problems:
        raise UserError(problems)


def check_cluster(settings: Settings, multiply: Callable | None) -> list[str]:
    """Check, print, and write --output; Ray is connected. Returns a paragraph for everything that came out wrong.

    Raises:
        UserError: a node cannot train at all, or its processes do not find each other.
    """
    from pretraining.node_facts import check_nodes_for_training
    from tools.cluster_tables import print_nodes, print_processes
    from tools.measuring_processes import measure_together
    from utils.node_check import check_nodes, probe_in

    started = time.monotonic()
    accelerator, num_devices, node_ids = choose_nodes(settings)
    with probe_in(settings.out_dir) if settings.out_dir else contextlib.nullcontext() as probe:
        nodes = check_nodes({"--out_dir": [probe]} if probe else {}, CHECKED_PACKAGES, node_ids)
    facts = check_nodes_for_training(nodes, accelerator, num_devices, settings.out_dir, settings.compile)
    print_nodes(facts)
    report = measure_together(nodes, accelerator, num_devices, settings.seconds, multiply)
    slow, wrong = report.slow(settings.slow_percent / 100), report.wrong()
    print_processes(report)
    for line in slow:
        console.warn(f"{line} Training would wait for it at every step.")
    if settings.output is not None:
        found = {
            "nodes": [dataclasses.asdict(node) for node in facts],
            **dataclasses.asdict(report),
            "slow": slow,
            "wrong": wrong,
        }
        write_json(settings.output, found)
    verdict = f"{console.counted(len(slow), 'figure')} far below the median" if slow else "all right"
    console.result(
        f"\nchecked {console.counted(len(report.processes), 'device')} of {console.counted(len(nodes), 'node')} in "
        f"{console.human_seconds(time.monotonic() - started)}: " + ("WRONG RESULTS" if wrong else verdict)
    )
    return wrong


def choose_nodes(settings: Settings) -> tuple[str, int, set[str]]:
    """(accelerator, processes per node, Ray's ids of the nodes). Raises UserError where the cluster has too little."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    accelerator = settings.accelerator
    if accelerator == "auto":
        accelerator = "cuda" if any(node["Resources"].get("GPU", 0) >= 1 for node in nodes) else "cpu"
    resource = {"cuda": "GPU", "cpu": "CPU"}[accelerator]
    room = {node["NodeID"]: int(node["Resources"].get(resource, 0)) for node in nodes}
    num_devices = settings.num_devices or (max(room.values()) if accelerator == "cuda" else 1)
    fitting = sorted(node for node, count in room.items() if count >= num_devices > 0)
    if not any(room.values()):
        raise UserError(
            f"--accelerator={accelerator}: no node of the cluster has a {resource}. Start Ray on nodes that have some, "
            "or give another accelerator."
        )
    if len(fitting) < (settings.num_nodes or 1):
        raise UserError(
            f"--num_nodes={settings.num_nodes or 1} with --num_devices={num_devices}: "
            f"{console.counted(len(fitting), 'node')} of the cluster have so many {resource}s (per node: "
            f"{sorted(room.values(), reverse=True)}). Start more, or ask for less."
        )
    return accelerator, num_devices, set(fitting[: settings.num_nodes])


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
