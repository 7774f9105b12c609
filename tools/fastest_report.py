"""What find_fastest prints at its end: its rows, and what others have published for a model of that size."""

from __future__ import annotations

import dataclasses
from typing import Any

from pretraining.plan import Plan
from tools.cluster_tables import print_table
from utils import console


@dataclasses.dataclass(frozen=True)
class Published:
    """A figure on H100 GPUs from its makers' own pages, as of November 2026."""

    model: str
    num_parameters: float
    num_gpus: str
    tokens_per_s: str
    """Per GPU."""
    mfu: str
    """On 989 TFLOP/s, full attention counted."""
    how: str
    source: str


PUBLISHED = (
    Published(
        "Llama 3.1 8B bf16, 8k", 8.03e9, "8; 128", "10,682; 10,630", "62.5%",
        "NeMo, context parallel 2, micro-batch 1, no recomputation", "NVIDIA/dgxc-benchmarking, llama3.1",
    ),
    Published(
        "Llama 3 8B FP8, 8k", 8.03e9, "8", "14,451", "-",
        "Megatron FSDP, micro-batch 1, 16 accumulations", "Megatron-Bridge, performance summary",
    ),
    Published(
        "Llama 3.1 8B bf16, 8k", 8.03e9, "8", "6,667", "39%",
        "FSDP2, micro-batch 2, selective recomputation, compile (500 W cards)", "torchtitan, benchmarks",
    ),
    Published(
        "Llama 3.1 8B float8, 8k", 8.03e9, "8", "8,532", "-",
        "the same, with float8", "torchtitan, benchmarks",
    ),
    Published("Llama 3 8B bf16, 8k", 8.03e9, "8", "6,150", "36%", "micro-batch 1", "torchao, documentation"),
    Published(
        "Llama 2 7B bf16, 4k", 6.74e9, "96", "9,600", "46%",
        "HSDP, micro-batch 2, no recomputation, compile", "fms-fsdp",
    ),
    Published("7B bf16", 6.74e9, "8", "9,080", "45.5%", "full shard, no recomputation, compile", "lingua"),
    Published(
        "about 1B bf16, 2k", 1.2e9, "8", "42,000 to 45,455", "42%", "FSDP, no recomputation", "nanotron, llm-foundry",
    ),
)  # fmt: skip


def published_for(num_parameters: int) -> list[Published]:
    """The figures for a model of this size, within 15%."""
    return [one for one in PUBLISHED if abs(num_parameters / one.num_parameters - 1) <= 0.15]


def print_rows(rows: dict[Any, dict[str, Any]], plan: Plan, device: str) -> None:
    """The fastest first, then what failed. Settings that are the same in all rows are named above."""
    order = sorted(rows, key=lambda one: -rows[one].get("tokens_per_s_per_device", 0.0))
    names = [item.name for item in dataclasses.fields(order[0])]
    varying = [name for name in names if len({getattr(one, name) for one in order}) > 1]
    fixed = ", ".join(f"{name} {_word(getattr(order[0], name))}" for name in names if name not in varying)
    console.result(f"\n{plan.model_config['name']}, context {plan.context_tokens:,}, {device}; {fixed}")
    figures = ["tokens/s per device", "MFU", "communication", "data", "peak memory", "planned"]
    table = []
    for number, one in enumerate(order, 1):
        row = rows[one]
        knobs = [_word(getattr(one, name)) for name in varying]
        planned = console.human_bytes(row["memory_planned_bytes"])
        cells = ["-", "-", "-", "-", row.get("outcome", "not run")]
        if row.get("outcome") == "ok":
            cells = [
                f"{row['tokens_per_s_per_device']:,.0f}",
                "-" if row["mfu"] is None else f"{row['mfu']:.1%}",
                f"{row['communication_share']:.1%}",
                f"{row['data_share']:.1%}",
                console.human_bytes(row["memory_peak_bytes"]),
            ]
        table.append([str(number), *knobs, *cells, planned])
    print_table(["", *varying, *figures], table)
    for one in order:
        if rows[one].get("error"):
            console.result(f"row {order.index(one) + 1}: {rows[one]['error']}")


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def print_published(num_parameters: int) -> None:
    found = published_for(num_parameters)
    if not found:
        console.result(f"\nno published figure is known for {console.human_count(num_parameters)} parameters")
        return
    console.result("\npublished for this size, on H100 GPUs:")
    heads = ["model", "GPUs", "tokens/s per GPU", "MFU", "how", "source"]
    print_table(heads, [[one.model, one.num_gpus, one.tokens_per_s, one.mfu, one.how, one.source] for one in found])
