"""How fast training sequences are read, compared with what a node of 8 H100 consumes (about 100,000 tokens/s).

    python benchmarks/pretrain_data.py [--dataset_path DATA]

One process, one thread: order of the data, random access, conversion to int64, digest; beside litdata's own
StreamingDataset, by index and by iteration. Without DATA: 100 million made-up tokens of a vocabulary of 128,256. The
dataset's files are in the page cache, for all alike. Prints JSON.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import harness

DEMAND_TOKENS_PER_S = 100_000


def rate(read, num_sequences: int, context_tokens: int) -> float:
    """Tokens per second; the best of three rounds, because other processes only ever slow a round down."""
    best = 0.0
    for _ in range(3):
        started = time.perf_counter()
        read(num_sequences)
        best = max(best, num_sequences * context_tokens / (time.perf_counter() - started))
    return best


def measure(train: Path, context: int) -> dict:
    import numpy as np
    from litdata import StreamingDataset, TokensLoader

    from pretraining.data import Sequences, read_micro_batch

    sequences = Sequences([train], None, context + 1, seed=1)
    random_access = StreamingDataset(str(train), item_loader=TokensLoader(context + 1))
    iterated = StreamingDataset(str(train), item_loader=TokensLoader(context + 1), shuffle=True)
    count = min(sequences.num_blocks[0], 4000)
    chosen = np.random.default_rng(0).permutation(sequences.num_blocks[0])[:count].tolist()

    def ours(n):
        for first in range(0, n, 4):
            read_micro_batch(sequences, np.arange(first, first + 4), pin_memory=False)

    def by_index(n):
        for block in chosen[:n]:
            random_access[block].long()

    def by_iteration(n):
        for _, tokens in zip(range(n), iterated, strict=False):
            tokens.long()

    row = {"context_tokens": context, "sequences": count}
    for name, read in (("ours", ours), ("litdata_by_index", by_index), ("litdata_iterated", by_iteration)):
        row[f"{name}_tokens_per_s"] = round(rate(read, count, context))
    return {**row, "times_the_demand_of_a_node": round(row["ours_tokens_per_s"] / DEMAND_TOKENS_PER_S, 1)}


def main() -> None:
    parser = harness.make_parser(__doc__)
    parser.add_argument("--dataset_path", type=Path, help="directory with train/")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 2048, 8192], help="tokens per sequence")
    arguments = parser.parse_args()

    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="pretrain-data-") as made:
        if arguments.dataset_path is None:
            harness.write_dataset(Path(made), num_tokens=100_000_000, vocab_size=128_256)
        train = (arguments.dataset_path or Path(made)) / "train"
        results = [measure(train, context) for context in arguments.contexts]
    report = {"benchmark": "pretrain_data", **harness.environment("torch", "litdata"), "results": results}
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
