"""Before a process group exists: does each node have what training needs? Driver, libraries, compiler, memory, disk."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import re
import shutil
import statistics
import subprocess
import sysconfig
import time
from pathlib import Path

import psutil  # litgpt depends on it
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from utils import console
from utils.errors import Problems
from utils.files import temporary_sibling

# The oldest driver for each major version of CUDA (NVIDIA, "CUDA Compatibility", minor version compatibility).
OLDEST_DRIVERS = {12: 525, 13: 580}

_WRITE_BLOCK_BYTES = 64 << 20
_WRITE_MAX_BYTES = 2 << 30
_WRITE_MAX_S = 2.0
_ANSWER_TIMEOUT_S = 90.0


@dataclasses.dataclass
class NodeFacts:
    """What a node has; None: it has none, or it was not asked for."""

    node: str
    driver: str | None
    cuda: str | None
    """Of torch's wheel."""
    cudnn: str | None
    """The one that torch found at run time."""
    cudnn_shadowed: str | None
    """Version of the wheel, where another cuDNN was found instead of it."""
    nccl: str | None
    num_gpus: int
    """GPUs that torch can use."""
    gpu_error: str | None
    """Why torch can use none, where a process was to have one."""
    compiler: str | None
    python_h: bool
    free_memory_bytes: int
    """Of the machine, not of a GPU."""
    write_bytes_s: float | None
    """Sequential writes to out_dir, fsync included, while the other nodes write too."""
    write_error: str | None


def check_nodes_for_training(
    nodes: list[dict[str, str]], accelerator: str, num_devices: int, out_dir: str | None, compiles: bool
) -> list[NodeFacts]:
    """Ask every node at once, and warn of what makes training slow there.

    Args:
        nodes: what `utils.node_check.check_nodes` gave.
        accelerator: "cuda" or "cpu".
        num_devices: processes that will run on each of the nodes.
        out_dir: where each node writes for two seconds; None: nowhere.
        compiles: whether training compiles, so that a compiler is needed.

    Raises:
        UserError: with everything that training cannot do without, node by node.
    """
    options = {"num_gpus": 1} if accelerator == "cuda" else {}
    look = ray.remote(num_cpus=0, max_retries=0, max_calls=1)(node_facts)
    answers = [
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["id"], soft=False), **options).remote(
            node_name(node), accelerator, out_dir
        )
        for node in nodes
    ]
    deadline = time.monotonic() + _ANSWER_TIMEOUT_S
    problems, found = Problems(), []
    for node, answer in zip(nodes, answers):
        name = f"node {node_name(node)}"
        try:
            facts = ray.get(answer, timeout=max(0.0, deadline - time.monotonic()))
        except ray.exceptions.GetTimeoutError:
            ray.cancel(answer, force=True)
            problems.add(
                f"{name}: no answer within {_ANSWER_TIMEOUT_S:.0f} s. Either other work holds its devices (see `ray "
                "status`), or its disk hangs: wait for that work, or take the node out."
            )
        except ray.exceptions.RayError as error:
            first_line = str(error).strip().splitlines()[-1]
            problems.add(f"{name}: the check failed there ({first_line}). Is the checkout at the same path on it?")
        else:
            found.append(facts)
            for problem in problems_of(facts, accelerator, num_devices, out_dir, compiles):
                problems.add(problem)
    problems.raise_if_any()
    for line in [*cautions_of(found), *differences_of(found)]:
        console.warn(line)
    return found


def node_name(node: dict[str, str]) -> str:
    """For people: the address, and the start of Ray's id, since nodes can share an address."""
    return f"{node['address']} ({node['id'][:8]})"


def node_facts(node: str, accelerator: str, out_dir: str | None) -> NodeFacts:
    """Everything about the machine that this process runs on."""
    gpu_error = _gpu_error() if accelerator == "cuda" else None
    cudnn, shadowed = _cudnn_versions()
    write_bytes_s, write_error = _write_speed(out_dir) if out_dir else (None, None)
    return NodeFacts(
        node=node,
        driver=_driver_version(),
        cuda=torch.version.cuda,
        cudnn=cudnn,
        cudnn_shadowed=shadowed,
        nccl=".".join(map(str, torch.cuda.nccl.version()[:3])) if torch.distributed.is_nccl_available() else None,
        num_gpus=_num_gpus(),
        gpu_error=gpu_error,
        compiler=_compiler(accelerator),
        python_h=(Path(sysconfig.get_paths()["include"]) / "Python.h").is_file(),
        free_memory_bytes=psutil.virtual_memory().available,
        write_bytes_s=write_bytes_s,
        write_error=write_error,
    )


def problems_of(facts: NodeFacts, accelerator: str, num_devices: int, out_dir: str | None, compiles: bool) -> list[str]:
    """What keeps training from running on a node, each with its remedy."""
    name, found = f"node {facts.node}", []
    if accelerator == "cuda":
        needed = OLDEST_DRIVERS.get(int((facts.cuda or "0").partition(".")[0]), 0)
        if facts.cuda is None:
            found.append(f"{name}: its torch has no CUDA. Install requirements.txt of this checkout there.")
        elif facts.gpu_error and facts.driver is None:
            found.append(
                f"{name}: no NVIDIA driver answers (`nvidia-smi` fails), and torch says: {facts.gpu_error} Install "
                f"driver {needed} or newer; a container must be started with its GPUs (`--gpus=all`)."
            )
        elif facts.gpu_error and int(facts.driver.partition(".")[0]) < needed:
            found.append(
                f"{name}: driver {facts.driver}, torch's CUDA {facts.cuda.partition('.')[0]} needs {needed} or newer. "
                "Install a newer driver on the node, or take it out of the cluster."
            )
        elif facts.gpu_error:
            found.append(
                f"{name}: torch cannot use a GPU under driver {facts.driver}: {facts.gpu_error} Run `nvidia-smi` on "
                "it. The usual remedy is a restart of the node, or of NVIDIA's fabric manager."
            )
        elif facts.num_gpus < num_devices:
            found.append(
                f"{name}: {console.counted(facts.num_gpus, 'GPU')} there, and {num_devices} are wanted. Has one fallen "
                "off the bus (`nvidia-smi`, `dmesg | grep -i xid`)? Give a smaller --num_devices, or take the node out."
            )
    if compiles and facts.compiler is None:
        found.append(f"{name}: no compiler, which torch.compile needs. Install gcc and g++ there, or set CC and CXX.")
    if compiles and not facts.python_h:
        found.append(
            f"{name}: no Python.h, which torch.compile needs. Install Python's headers (`apt-get install python3-dev`)."
        )
    if facts.write_error:
        found.append(f"{name}: cannot write to --out_dir={out_dir} ({facts.write_error}). Mount it there, writable.")
    return found


def cautions_of(nodes: list[NodeFacts]) -> list[str]:
    """What makes a node slower than it could be."""
    lines = [
        f"node {facts.node}: torch found cuDNN {facts.cudnn}, not its wheel's {facts.cudnn_shadowed}, so attention may "
        "be slower. Take the other one's directory out of LD_LIBRARY_PATH, and start Ray there again."
        for facts in nodes
        if facts.cudnn_shadowed
    ]
    speeds = [facts.write_bytes_s for facts in nodes if facts.write_bytes_s is not None]
    for facts in nodes:
        # Half, not a tenth: on a shared file system one second is unlike the next.
        if facts.write_bytes_s is not None and facts.write_bytes_s < statistics.median(speeds) / 2:
            median = console.human_bytes(statistics.median(speeds))
            lines.append(
                f"node {facts.node}: writes {console.human_bytes(facts.write_bytes_s)}/s to out_dir, the median is "
                f"{median}/s. Every checkpoint waits for the slowest: look at its mount."
            )
    return lines


def differences_of(nodes: list[NodeFacts]) -> list[str]:
    """A line for each version that is not the same on all nodes."""
    lines = []
    for field in ("driver", "cuda", "cudnn", "nccl"):
        by_value: dict[str | None, list[str]] = {}
        for facts in nodes:
            by_value.setdefault(getattr(facts, field), []).append(facts.node)
        if len(by_value) > 1:
            fewest_first = sorted(by_value.items(), key=lambda item: len(item[1]))
            shown = "; ".join(f"{value} on {', '.join(names[:4])}" for value, names in fewest_first[:-1])
            lines.append(f"{field} differs between the nodes: {shown}; {fewest_first[-1][0]} on the others.")
    return lines


# --- on the node ------------------------------------------------------------------------------------------------------


def _driver_version() -> str | None:
    """From nvidia-smi, since torch does not start under a driver that is too old; else from the kernel module."""
    try:
        said = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=30,
        ).stdout  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        said = ""
    if match := re.match(r"\d+(\.\d+)+", said):
        return match[0]
    try:
        match = re.search(r"Module.*?\s(\d+(\.\d+)+)\s", Path("/proc/driver/nvidia/version").read_text())
        return match[1] if match else None
    except OSError:
        return None


def _gpu_error() -> str | None:
    """Why torch cannot use a GPU here; None: it can."""
    if torch.cuda.is_available():
        return None
    try:
        torch.cuda.init()  # `is_available` swallows the reason
    except (RuntimeError, AssertionError) as error:
        return f"{str(error).strip().splitlines()[0].rstrip('.')}."
    return "torch.cuda.is_available() is false."


def _num_gpus() -> int:
    """GPUs of the node, not only the one that Ray lends to this process."""
    try:
        said = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return torch.cuda.device_count()
    return len(re.findall(r"^GPU \d+:", said, re.M)) or torch.cuda.device_count()


def _cudnn_versions() -> tuple[str | None, str | None]:
    """(version that is in use, the wheel's version if it is another one)."""
    try:
        number = torch.backends.cudnn.version()
    except RuntimeError as error:  # older than what torch was compiled for; its message says where to look
        return f"unusable: {error}", _wheel_version("nvidia-cudnn-cu")
    if not number:
        return None, None
    version = f"{number // 10000}.{number // 100 % 100}.{number % 100}"
    wheel = _wheel_version("nvidia-cudnn-cu")
    return version, None if wheel in (None, version) else wheel


def _wheel_version(prefix: str) -> str | None:
    """The first three numbers of the version of the installed package whose name starts so."""
    for package in importlib.metadata.distributions():
        if package.name.startswith(prefix):
            return ".".join(package.version.split(".")[:3])
    return None


def _compiler(accelerator: str) -> str | None:
    """What would compile: Triton looks for a C compiler (triton/runtime/build.py), Inductor on a CPU for g++."""
    given, names = ("CC", ("gcc", "clang")) if accelerator == "cuda" else ("CXX", ("g++",))
    candidates = [os.environ[given]] if os.environ.get(given) else names
    return next((found for name in candidates if (found := shutil.which(name))), None)


def _write_speed(directory: str) -> tuple[float | None, str | None]:
    """(bytes per second, None) or (None, why it failed); writes for two seconds, or 2 GiB."""
    path = temporary_sibling(Path(directory) / "write_speed")
    block = memoryview(os.urandom(1 << 20) * (_WRITE_BLOCK_BYTES >> 20))  # zeros would be compressed away by some
    written, started = 0, time.perf_counter()
    try:
        with open(path, "wb", buffering=0) as file:
            while written < _WRITE_MAX_BYTES and time.perf_counter() - started < _WRITE_MAX_S:
                written += file.write(block)
                os.fsync(file.fileno())
        return written / (time.perf_counter() - started), None
    except OSError as error:
        return None, error.strerror or str(error)
    finally:
        path.unlink(missing_ok=True)
