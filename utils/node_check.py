"""Before the work: does every node of the Ray cluster run the same software and see the same files?"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from utils.errors import UserError
from utils.files import temporary_sibling


@contextlib.contextmanager
def probe_in(directory: str) -> Iterator[str]:
    """A file that this process has just made: a node that has its own directory of that name does not see it."""
    probe = temporary_sibling(Path(directory) / "preflight")
    probe.touch()
    try:
        yield str(probe)
    finally:
        probe.unlink()


def _inspect_node(paths: list[str], packages: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """Versions on this node, and which of the paths it does not see."""
    versions = {"python": platform.python_version(), **dict.fromkeys(packages, "not installed")}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            # Without what follows a plus: the head may have torch for CPUs, the others the same torch for CUDA.
            versions[package] = importlib.metadata.version(package).partition("+")[0]
    return versions, [path for path in paths if not os.path.exists(path)]


def check_nodes(
    paths: dict[str, list[str]], packages: tuple[str, ...], node_ids: set[str] | None = None, timeout_s: float = 120
) -> list[dict[str, str]]:
    """Compare every node with this process.

    Args:
        paths: flag -> local paths that each node must see, as on a shared file system.
        packages: distributions whose versions must be equal everywhere.
        node_ids: Ray's ids of the nodes to check; None: all.
        timeout_s: how long a node may take to answer.

    Returns:
        The nodes that are alive, in a fixed order: {"id": ..., "address": ...}.

    Raises:
        UserError: naming each node that differs, and how.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive = [node for node in ray.nodes() if node["Alive"] and (node_ids is None or node["NodeID"] in node_ids)]
    nodes = [{"id": node["NodeID"], "address": node["NodeManagerAddress"]} for node in alive]
    nodes.sort(key=lambda node: (node["address"], node["id"]))
    if len(nodes) == 1 and nodes[0]["address"] == ray.util.get_node_ip_address():
        return nodes  # this machine, this environment: nothing to compare
    inspect = ray.remote(num_cpus=0, max_retries=0)(_inspect_node)
    all_paths = [path for group in paths.values() for path in group]
    answers = []
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["id"], soft=False)
        answers.append(inspect.options(scheduling_strategy=there).remote(all_paths, packages))
    here, _ = _inspect_node([], packages)
    problems = []
    for node, answer in zip(nodes, answers):
        name = f"node {node['address']} ({node['id'][:8]})"
        try:
            versions, missing = ray.get(answer, timeout=timeout_s)
        except ray.exceptions.GetTimeoutError:
            problems.append(f"{name}: no answer within {timeout_s:.0f} s. Look at `ray status`, or remove the node.")
            continue
        except ray.exceptions.RayError as error:
            problems.append(f"{name}: the check failed there ({error}). Is the checkout at the same path on it?")
            continue
        problems += [
            f"{name}: {package} {version}, here {here[package]}. Install this checkout's requirements.txt there."
            for package, version in versions.items()
            if version != here[package]
        ]
        problems += [
            f"{name}: does not see {flag}={path}. Put it on a file system that all nodes mount."
            for flag, group in paths.items()
            for path in group
            if path in missing
        ]
    if problems:
        raise UserError(problems)
    return nodes
