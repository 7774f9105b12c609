"""Is every device as fast as the others, and does it compute what it should? Measured in the processes that will train.

Every process of the default process group calls `measure_hardware` at the same time, because training loads all devices
of a node at once: they share power, heat and the links between them.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from utils import console
from utils.errors import UserError

SLOW_SHARE = 0.1
_BATCH_S = 0.05  # works are timed in batches of this length, so that the gaps between launches do not count

Multiply = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


def multiply_by_torch(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    torch.mm(a, b, out=out)


@dataclasses.dataclass
class ProcessFigures:
    """What one process measured on its device. GB are 10^9 bytes."""

    node: str
    index: str
    """Of the device on its node, as Ray and nvidia-smi number it; of the process, on a CPU."""
    device: str
    tflop_s: float
    memory_gb_s: float
    """Read plus written by a copy inside the device's memory."""
    all_reduce_gb_s: float | None
    """Bus bandwidth of an all-reduce within the node; None: the node has one process."""
    free_memory_gb: float | None
    """Of the GPU, before anything was allocated; None on a CPU."""
    wrong: list[str]
    """What the device computed wrongly, in words."""

    @property
    def name(self) -> str:
        return f"node {self.node}, index {self.index} ({self.device})"


# Figures that are compared with the median: attribute, words, unit.
COMPARED = (
    ("tflop_s", "matrix product", "TFLOP/s"),
    ("memory_gb_s", "memory copy", "GB/s"),
    ("all_reduce_gb_s", "all-reduce in the node", "GB/s"),
    ("free_memory_gb", "free memory", "GB"),
)


@dataclasses.dataclass
class HardwareReport:
    """Figures of all processes, in the order of their ranks; equal on every rank."""

    processes: list[ProcessFigures]
    all_reduce_gb_s: float | None
    """Bus bandwidth of an all-reduce over all processes, as the slowest saw it; None: there is one node."""
    seconds: float

    def median(self, figure: str) -> float | None:
        values = [getattr(process, figure) for process in self.processes]
        return None if None in values else statistics.median(values)

    def slow(self, share: float = SLOW_SHARE) -> list[str]:
        """A sentence for each figure that is more than `share` below the median of all processes."""
        lines = []
        for figure, words, unit in COMPARED:
            median = self.median(figure)
            if median is None:
                continue
            named = set()
            for process in self.processes:
                value = getattr(process, figure)
                # An all-reduce waits for the slowest of its node: which one that is, only the other figures can tell.
                name = f"node {process.node}" if figure == "all_reduce_gb_s" else process.name
                if value < (1 - share) * median and name not in named:
                    named.add(name)
                    below = f"{1 - value / median:.0%} below the median of {median:.3g}"
                    lines.append(f"{name}: {words} {value:.3g} {unit}, {below}.")
        return lines

    def wrong(self) -> list[str]:
        """A paragraph with the remedy for each process that computed something wrong."""
        return [
            f"{process.name}: {what}. A run on it would learn from wrong numbers: take the node out of the cluster "
            "(`ray stop` on it), and have it tested (`dcgmi diag -r 3`)."
            for process in self.processes
            for what in process.wrong
        ]


def check_hardware(
    node: str, index: str, processes_per_node: int, device: torch.device, multiply: Multiply = multiply_by_torch
) -> None:
    """The short form before training: rank 0 names slow processes, and every rank refuses to train beside a wrong one.

    Takes the arguments of `measure_hardware`, and leaves device memory and random numbers as they were.

    Raises:
        UserError: a process computed something wrong; on all ranks.
    """
    report = measure_hardware(node, index, processes_per_node, device, 0.25, multiply)
    if dist.get_rank() == 0:
        console.say(
            f"checked {console.counted(len(report.processes), 'device')} in {console.human_seconds(report.seconds)}: "
            f"product {report.median('tflop_s'):.3g} TFLOP/s, copy {report.median('memory_gb_s'):.3g} GB/s"
        )
        for line in report.slow():
            console.warn(f"{line} Every step waits for the slowest.")
    if wrong := report.wrong():
        raise UserError(wrong)


def measure_hardware(
    node: str,
    index: str,
    processes_per_node: int,
    device: torch.device,
    seconds: float,
    multiply: Multiply = multiply_by_torch,
) -> HardwareReport:
    """Run a matrix product, a memory copy and all-reduces in every process at once. Collective.

    Args:
        node, index: names of this process's node and device, for people.
        processes_per_node: the ranks of a node follow each other.
        device: on CUDA, the current device of this process.
        seconds: how long each of the measurements takes, beside its warm-up.
        multiply: the matrix product; tests pass one that is slow or wrong.
    """
    started = time.monotonic()
    wrong = []
    free_bytes = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    tflop_s, wrong_rows = _matrix_product(device, _matrix_size(free_bytes, device), seconds, multiply)
    if wrong_rows:
        wrong.append(f"its matrix product is wrong in {console.counted(wrong_rows, 'row')}")
    memory_gb_s = _memory_copy(device, free_bytes, seconds)

    in_node = among_all = None
    if processes_per_node > 1:
        group, _ = dist.new_subgroups(processes_per_node)
        in_node, exact = _all_reduce(device, group, seconds)
        dist.destroy_process_group(group)
        if not exact:
            wrong.append("it got a wrong sum from the all-reduce within its node")
    if dist.get_world_size() > processes_per_node:
        among_all, exact = _all_reduce(device, dist.group.WORLD, seconds)
        if not exact:
            wrong.append("it got a wrong sum from the all-reduce over all nodes")

    figures = ProcessFigures(
        node=node,
        index=index,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        tflop_s=tflop_s,
        memory_gb_s=memory_gb_s,
        all_reduce_gb_s=in_node,
        free_memory_gb=None if free_bytes is None else free_bytes / 1e9,
        wrong=wrong,
    )
    if device.type == "cuda":  # training is to find the device as it was
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (figures, among_all))
    slowest = None if among_all is None else min(rate for _, rate in gathered)
    return HardwareReport([process for process, _ in gathered], slowest, time.monotonic() - started)


def _matrix_size(free_bytes: int | None, device: torch.device) -> int:
    """Rows of the square matrices, equal on all processes, as rates of different sizes cannot be compared."""
    size = torch.tensor(1024 if free_bytes is None else 8192, device=device)
    # Three matrices and what makes them take up to 16 bytes per element of one.
    while free_bytes is not None and 16 * int(size) ** 2 > free_bytes // 4:
        size //= 2
    dist.all_reduce(size, dist.ReduceOp.MIN)
    return int(size)


def _matrix_product(device: torch.device, size: int, seconds: float, multiply: Multiply) -> tuple[float, int]:
    """(TFLOP/s on random numbers, rows that are wrong in a product of small integers).

    Random numbers for the speed: zeros and ones draw less power, and a GPU at its power limit would not show. Integers
    for the result: no order of summation changes it.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)  # a generator of its own: training's numbers stay as they are
    a, b, out = (torch.empty(size, size, device=device, dtype=dtype) for _ in range(3))
    a.normal_(generator=generator)
    b.normal_(generator=generator)
    _meet(device)
    time_s = _median_s(lambda: multiply(a, b, out), device, seconds)
    # Entries of the product are sums of 8,192 numbers, an eighth of them 1 or -1, so 32 is their standard deviation.
    # bfloat16 is exact up to 256, which is 8 of them.
    a.random_(0, 2, generator=generator).mul_(2).sub_(1)
    b.random_(0, 16, generator=generator)
    b = (b == 0).to(dtype).sub_((b == 1).to(dtype))
    multiply(a, b, out)  # the device is warm by now, which is when faults show
    return 2 * size**3 / time_s / 1e12, count_wrong_rows(a, b, out)


def count_wrong_rows(a: torch.Tensor, b: torch.Tensor, product: torch.Tensor) -> int:
    """Rows of `product` that differ from a @ b, by Freivalds' check on the CPU: product @ x == a @ (b @ x), in O(n^2).

    The entries are small integers, so all sums are exact in float64. A wrong row passes with a probability of 2^-15.
    """
    x = torch.randint(0, 1 << 15, (b.shape[1],), generator=torch.Generator().manual_seed(1)).double()

    def times(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        return torch.cat([rows.cpu().double() @ vector for rows in matrix.split(1024)])

    return int((times(product, x) != times(a, times(b, x))).sum())


def _memory_copy(device: torch.device, free_bytes: int | None, seconds: float) -> float:
    """GB/s read plus written, copying between two buffers that no cache holds."""
    size = 64 << 20 if free_bytes is None else min(1 << 30, free_bytes // 8)
    source = torch.ones(size, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    _meet(device)
    return 2 * size / _median_s(lambda: target.copy_(source), device, seconds) / 1e9


def _all_reduce(device: torch.device, group: dist.ProcessGroup, seconds: float) -> tuple[float, bool]:
    """(bus bandwidth in GB/s, whether a sum of known numbers came out right).

    Bus bandwidth is 2 (n - 1) / n bytes per byte of the buffer, as in NVIDIA's nccl-tests: with it, groups of any size
    compare with what the links can do.
    """
    num_processes, rank = dist.get_world_size(group), dist.get_rank(group)
    numbers = torch.arange((64 if device.type == "cuda" else 4) << 20, device=device).remainder_(1000).float()
    buffer = numbers + rank
    dist.all_reduce(buffer, group=group)
    exact = torch.equal(buffer, numbers * num_processes + num_processes * (num_processes - 1) // 2)
    buffer.zero_()  # sums of sums would overflow
    _meet(device)
    time_s = _median_s(lambda: dist.all_reduce(buffer, group=group), device, seconds, group)
    num_bytes = buffer.numel() * buffer.element_size()
    return 2 * (num_processes - 1) / num_processes * num_bytes / time_s / 1e9, exact


def _meet(device: torch.device) -> None:
    """Wait until every process is here."""
    dist.all_reduce(torch.zeros(1, device=device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _median_s(
    work: Callable[[], object], device: torch.device, seconds: float, group: dist.ProcessGroup | None = None
) -> float:
    """Median time of one `work`, in about `seconds`; with a group, all its processes do it equally often."""
    work()  # kernels are loaded and connections made at the first
    once = torch.tensor(_time_s(work, 1, device), device=device)
    if group is not None:
        dist.all_reduce(once, dist.ReduceOp.MAX, group=group)
    once_s = max(float(once), 1e-6)
    per_batch = max(1, int(_BATCH_S / once_s))
    batches = max(3, int(seconds / (once_s * per_batch)))
    return statistics.median(_time_s(work, per_batch, device) for _ in range(batches))


def _time_s(work: Callable[[], object], times: int, device: torch.device) -> float:
    """Seconds for each of `times` works, by the device's own clock on CUDA, where Python only enqueues them."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(times):
            work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / times
    started = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - started) / times
