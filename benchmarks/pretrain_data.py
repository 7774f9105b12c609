"""How fast training sequences are read, against what a node of 8 H100 consumes (about 100,000 tokens/s).

    python benchmarks/pretrain_data.py [--dataset_path DATA]

One process, one thread: order of the data, random access, conversion to int64, digest; beside litdata's own StreamingDataset,
by index and by iteration. Without DATA: 100 million made-up tokens of a vocabulary of 128,256. The dataset's files are in the page cache, for all alike.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
DEMAND_TOKENS_PER_S = 100_000


def rate(read, num_sequences: int, context_tokens: int) -> float:
    """Tokens a second; the best of three rounds, because other processes only ever slow a round down."""
    best = 0.0
    for _ in range(3):
        started = time.perf_counter()
        read(num_sequences)
        best = max(best, num_sequences * context_tokens / (time.perf_counter() - started))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_path", type=Path, help="directory with train/")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 2048, 8192])
    arguments = parser.parse_args()
    if arguments.dataset_path is not None:
        measure(arguments.dataset_path / "train", arguments.contexts)
        return
    from benchmarks.synthetic_tokens import write_synthetic_dataset

    with tempfile.TemporaryDirectory(prefix="pretrain-data-") as directory:
        write_synthetic_dataset(Path(directory), num_tokens=100_000_000, vocab_size=128_256)
        measure(Path(directory) / "train", arguments.contexts)


def measure(train: Path, contexts: list[int]) -> None:
    import litdata
    import numpy as np
    import torch
    from litdata import StreamingDataset, TokensLoader

    from pretraining.data import Sequences, read_micro_batch

    torch.set_num_threads(1)
    results = []
    for context in contexts:
        sequences = Sequences([train], None, context + 1, seed=1)
        random_access = StreamingDataset(str(train), item_loader=TokensLoader(context + 1))
        iterated = StreamingDataset(str(train), item_loader=TokensLoader(context + 1), shuffle=True)
        count = min(sequences.num_blocks[0], 4000)
        chosen = np.random.default_rng(0).permutation(sequences.num_blocks[0])[:count].tolist()

        def ours(n, sequences=sequences):
            for first in range(0, n, 4):
                read_micro_batch(sequences, np.arange(first, first + 4), pin_memory=False)

        def by_index(n, dataset=random_access, chosen=chosen):
            for block in chosen[:n]:
                dataset[block].long()

        def by_iteration(n, dataset=iterated):
            for _, tokens in zip(range(n), dataset, strict=False):
                tokens.long()

        row = {"context_tokens": context, "sequences": count}
        for name, read in (("ours", ours), ("litdata_by_index", by_index), ("litdata_iterated", by_iteration)):
            row[f"{name}_tokens_per_s"] = round(rate(read, count, context))
        row["times_the_demand_of_a_node"] = round(row["ours_tokens_per_s"] / DEMAND_TOKENS_PER_S, 1)
        results.append(row)
    print(
        json.dumps(
            {
                "benchmark": "pretrain_data",
                "date": time.strftime("%Y-%m-%d"),
                "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
                "versions": {"torch": torch.__version__, "litdata": litdata.__version__},
                "results": results,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
