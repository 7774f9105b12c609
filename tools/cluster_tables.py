"""The two tables of check_cluster: what each node has, and what each process measured."""

from __future__ import annotations

import os
from collections.abc import Callable

from pretraining.hardware_check import HardwareReport
from pretraining.node_facts import NodeFacts
from utils import console


def print_nodes(nodes: list[NodeFacts]) -> None:
    columns: dict[str, Callable[[NodeFacts], str]] = {
        "node": lambda facts: facts.node,
        "driver": lambda facts: facts.driver or "none",
        "CUDA": lambda facts: facts.cuda or "none",
        "cuDNN": lambda facts: facts.cudnn or "none",
        "NCCL": lambda facts: facts.nccl or "none",
        "GPUs": lambda facts: str(facts.num_gpus),
        "compiler": lambda facts: os.path.basename(facts.compiler) if facts.compiler else "none",
        "Python.h": lambda facts: "yes" if facts.python_h else "no",
        "free memory": lambda facts: console.human_bytes(facts.free_memory_bytes),
        "writes": lambda facts: f"{console.human_bytes(facts.write_bytes_s)}/s" if facts.write_bytes_s else "-",
    }
    print_table(list(columns), [[cell(node) for cell in columns.values()] for node in nodes])


def print_processes(report: HardwareReport) -> None:
    figures = {"tflop_s": "TFLOP/s", "memory_gb_s": "memory GB/s", "all_reduce_gb_s": "all-reduce in node GB/s"}
    if report.processes[0].free_memory_gb is not None:
        figures["free_memory_gb"] = "free GB"
    medians = {figure: report.median(figure) for figure in figures}
    rows = []
    for process in report.processes:
        row = [process.node, process.index, process.device]
        for figure, median in medians.items():
            value = getattr(process, figure)
            row += ["-", "-"] if median is None else [f"{value:,.4g}", f"{value / median - 1:+.1%}"]
        rows.append([*row, "WRONG" if process.wrong else "right"])
    middle = ["median", "", ""]
    for median in medians.values():
        middle += ["-", ""] if median is None else [f"{median:,.4g}", ""]
    heads = [head for name in figures.values() for head in (name, "vs median")]
    console.result("")
    print_table(["node", "index", "device", *heads, "results"], [*rows, [*middle, ""]])
    if report.all_reduce_gb_s is not None:
        console.result(f"all-reduce over all nodes: {report.all_reduce_gb_s:,.4g} GB/s")


def print_table(heads: list[str], rows: list[list[str]]) -> None:
    """Columns as wide as their widest cell; the first is text, the others stand on the right."""
    widths = [max(map(len, column)) for column in zip(heads, *rows)]
    for row in (heads, *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        console.result("  ".join(cells).rstrip())
