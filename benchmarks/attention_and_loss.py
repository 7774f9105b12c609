"""The output layer's loss and the attention layer: ours beside what one would use instead, in one run.

    python benchmarks/attention_and_loss.py [--rounds 3] [--parts loss attention]

Loss: forward and backward pass over a vocabulary of 128,256, beside torch's linear_cross_entropy and the loss from all
logits at once. Each measurement has a process of its own, whose largest resident size, less that of a process that only
makes the inputs, is the memory. Attention: forward and backward pass of one layer beside litgpt's, with the same
weights; our masks, which the layers of a model share, are made for each pass. litgpt has no mask of documents; it is
given one of T x T, made for each pass too. A third contestant computes only the matrix products that no exact layer can
do without: the projections, and six of the scores that count (two forward, four backward; a layer that keeps no scores
needs a seventh). Rounds alternate between the contestants.
Time is the processor's, of all threads, because other processes change that least; the fastest round counts. Prints
JSON, then tables.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

LOSS_CASES = {
    # Without units for bfloat16 a CPU takes minutes for the full logits of a case as large as the float32 one.
    "float32": {"tokens": 2048, "width": 256, "chunk_tokens": 512},
    "bfloat16": {"tokens": 256, "width": 64, "chunk_tokens": 64},
}
VOCABULARY = 128_256
LLAMA = {"name": "Llama-3.2-1B", "n_embd": 512, "n_head": 8, "n_query_groups": 2, "head_size": 64}
GEMMA = {"name": "Gemma-3-1b-it", "n_embd": 256, "n_head": 4, "n_query_groups": 1, "head_size": 64}
ATTENTION_CASES = {
    "grouped queries, 2,048 tokens": {**LLAMA, "tokens": 2048},
    "the same, documents of 300 tokens masked": {**LLAMA, "tokens": 2048, "document_tokens": 300},
    "window of 512 (Gemma 3 1B), 4,096 tokens": {**GEMMA, "tokens": 4096},
    "the same, 8,192 tokens": {**GEMMA, "tokens": 8192},
    "window of 2,048, soft cap (Gemma 2), 4,096 tokens": {
        **{**GEMMA, "name": "Gemma-2-2b", "n_query_groups": 2, "tokens": 4096, "sliding_window_size": 2048}
    },
}


# --- loss -------------------------------------------------------------------------------------------------------------


def loss_contestants(chunk_tokens: int) -> dict:
    import torch
    import torch.nn.functional as F

    from pretraining.loss import next_token_loss

    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_tokens, chunking_method=None)
    return {
        "inputs": None,
        "full": lambda x, w, t: F.cross_entropy(F.linear(x, w).float(), t, reduction="sum"),
        "torch": lambda x, w, t: F.linear_cross_entropy(x, w, t, reduction="sum", options=options),
        "ours": lambda x, w, t: next_token_loss(x, w, None, t, chunk_tokens=chunk_tokens)[1],
    }


def measure_loss(contestant: str, dtype: str, threads: int) -> None:
    """In a process of its own."""
    import torch

    torch.set_num_threads(threads)
    case = LOSS_CASES[dtype]
    hidden = torch.randn(case["tokens"], case["width"]).to(getattr(torch, dtype)).requires_grad_()
    weight = (torch.randn(VOCABULARY, case["width"]) / case["width"] ** 0.5).to(hidden.dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (case["tokens"],))
    function = loss_contestants(case["chunk_tokens"])[contestant]
    fastest_s = float("inf")
    for _ in range(2 if function else 0):
        hidden.grad = weight.grad = None
        started = time.process_time()
        (function(hidden, weight, targets) / case["tokens"]).backward()
        fastest_s = min(fastest_s, time.process_time() - started)
    print(json.dumps(fastest_s))


def compare_losses(dtype: str, rounds: int, threads: int) -> dict:
    seconds: dict[str, list[float]] = {}
    peak_bytes: dict[str, list[int]] = {}
    names = list(loss_contestants(1))
    for _ in range(rounds):
        for name in names:
            process = subprocess.Popen(
                [sys.executable, __file__, "--contestant", name, "--dtype", dtype, "--threads", str(threads)],
                stdout=subprocess.PIPE,
                text=True,
            )
            output = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                raise RuntimeError(f"{name} failed")
            seconds.setdefault(name, []).append(json.loads(output))
            peak_bytes.setdefault(name, []).append(usage.ru_maxrss * 1024)
    inputs_bytes = min(peak_bytes["inputs"])
    return {
        name: {"seconds": min(seconds[name]), "memory_bytes": min(peak_bytes[name]) - inputs_bytes}
        for name in names
        if name != "inputs"
    }


# --- attention --------------------------------------------------------------------------------------------------------


def compare_attention(case: dict, rounds: int, threads: int) -> dict:
    import torch
    from litgpt.config import Config
    from litgpt.model import CausalSelfAttention, build_rope_cache

    from pretraining.attention import Attention, attention_patterns

    torch.set_num_threads(threads)
    case = dict(case)
    tokens, document_tokens = case.pop("tokens"), case.pop("document_tokens", None)
    config = Config.from_name(**case, n_layer=1, block_size=tokens, sliding_window_indices=[1], rope_indices=None)
    theirs, ours = CausalSelfAttention(config, 0), Attention(config, 0)
    ours.load_state_dict(theirs.state_dict())
    cos, sin = (table[None] for table in build_rope_cache(tokens, config.rope_n_elem))
    x = torch.randn(1, tokens, config.n_embd, requires_grad=True)
    positions, offsets = torch.arange(tokens), None
    if document_tokens:
        offsets = torch.tensor([*range(0, tokens, document_tokens), tokens], dtype=torch.int32)

    def their_mask() -> torch.Tensor | None:
        documents = positions // (document_tokens or tokens)
        same = documents[:, None] == documents
        return same & (positions <= positions[:, None]) if document_tokens else None

    seen = (positions % (document_tokens or tokens) + 1).clamp(max=config.sliding_window_size or tokens)
    products = necessary_products(config, tokens, round(seen.float().mean().item()))
    run = {
        "litgpt": lambda: theirs(x, cos, sin, their_mask()),
        "ours": lambda: ours(x, cos, sin, attention_patterns(config, x, offsets)[0]),
    }
    torch.testing.assert_close(run["ours"](), run["litgpt"](), rtol=1e-4, atol=1e-5)
    passes = {name: lambda layer=layer: layer().sum().backward() for name, layer in run.items()} | {
        "products": products
    }
    fastest_s = dict.fromkeys(passes, float("inf"))
    for _ in range(rounds):
        for name, one_pass in passes.items():
            started = time.process_time()
            one_pass()
            fastest_s[name] = min(fastest_s[name], time.process_time() - started)
    return {name: {"seconds": seconds} for name, seconds in fastest_s.items()}


def necessary_products(config, tokens: int, seen_keys: int) -> Callable[[], None]:
    """The matrix products of one forward and backward pass, with as many keys per query as it sees on average, cut as
    torch computes them fast: blocks of 256 tokens with all queries of a group one below the other."""
    import torch

    queries_per_key = config.n_head // config.n_query_groups
    blocks = config.n_query_groups * tokens // 256
    q = torch.randn(blocks, queries_per_key * 256, config.head_size)
    k = torch.randn(blocks, seen_keys, config.head_size)
    scores, dq, dk = torch.randn(*q.shape[:2], seen_keys), torch.empty_like(q), torch.empty_like(k)
    x = torch.randn(tokens, config.n_embd)
    widths = (config.head_size * (config.n_head + 2 * config.n_query_groups), config.head_size * config.n_head)
    projections = [
        (torch.randn(tokens, width), torch.randn(width, config.n_embd) / width**0.5, torch.empty(tokens, config.n_embd))
        for width in widths
    ]

    def compute() -> None:
        for y, weight, dx in projections:
            torch.mm(x, weight.T, out=y)
            torch.mm(y, weight, out=dx)
            y.T @ x
        for _ in range(2):  # scores, their gradient
            torch.bmm(q, k.mT, out=scores)
        for _ in range(2):  # the result; the gradient of q
            torch.bmm(scores, k, out=dq)
        for _ in range(2):  # the gradients of k and v
            torch.bmm(scores.mT, q, out=dk)

    return compute


# --- report -----------------------------------------------------------------------------------------------------------


def loss_table(results: dict[str, dict]) -> str:
    lines = ["| | seconds | ratio | memory | ratio |", "|---|---:|---:|---:|---:|"]
    ours = results["ours"]
    for name, label in {"full": "all logits", "torch": "torch linear_cross_entropy", "ours": "**ours**"}.items():
        row = results[name]
        lines.append(
            f"| {label} | {row['seconds']:.2f} | {row['seconds'] / ours['seconds']:.2f} x | "
            f"{row['memory_bytes'] / 1e6:,.0f} MB | {row['memory_bytes'] / ours['memory_bytes']:.2f} x |"
        )
    return "\n".join(lines)


def attention_table(cases: dict[str, dict]) -> str:
    lines = ["| | litgpt | ours | ratio | products alone | ratio |", "|---|---:|---:|---:|---:|---:|"]
    for name, row in cases.items():
        theirs, ours, products = (row[contestant]["seconds"] for contestant in ("litgpt", "ours", "products"))
        lines.append(
            f"| {name} | {theirs:.3f} s | {ours:.3f} s | {theirs / ours:.1f} x | "
            f"{products:.3f} s | {theirs / products:.1f} x |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="more spin while they wait, which counts as time")
    parser.add_argument("--parts", nargs="+", default=["loss", "attention"], choices=["loss", "attention"])
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        measure_loss(arguments.contestant, arguments.dtype, arguments.threads)
        return

    import torch

    report: dict = {
        "benchmark": "attention_and_loss",
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {"torch": torch.__version__, "litgpt": "0.5.13"},
        "threads": arguments.threads,
    }
    if "loss" in arguments.parts:
        report["loss"] = {dtype: compare_losses(dtype, arguments.rounds, arguments.threads) for dtype in LOSS_CASES}
    if "attention" in arguments.parts:
        report["attention"] = {
            name: compare_attention(case, arguments.rounds, arguments.threads) for name, case in ATTENTION_CASES.items()
        }
    print(json.dumps(report, indent=1))
    for dtype, results in report.get("loss", {}).items():
        print(f"\nLoss, {dtype}, {LOSS_CASES[dtype]}\n\n{loss_table(results)}")
    if "attention" in report:
        print(f"\nAttention, float32\n\n{attention_table(report['attention'])}")


if __name__ == "__main__":
    main()
