"""What people do now: litdata.optimize over parquet files with litgpt's Tokenizer.

    python benchmarks/litdata_baseline.py INPUT_DIR TOKENIZER_DIR OUTPUT_DIR NUM_WORKERS TIMES.jsonl

It follows litgpt/data/prepare_starcoder.py: a worker takes a file, reads batches of rows, and yields the ids of one
text at a time. How long each file took goes to TIMES.jsonl, so that start-up can be left out.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
from litdata import TokensLoader, optimize
from litgpt.tokenizer import Tokenizer


def tokenize(path: str, tokenizer: Tokenizer, times: str):
    begin, cpu_begin, num_tokens = time.perf_counter(), time.process_time(), 0
    for batch in pq.ParquetFile(path).iter_batches(batch_size=8192, columns=["text"]):
        for text in batch.to_pandas()["text"]:
            ids = tokenizer.encode(text)
            num_tokens += len(ids)
            yield ids
    took = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu_begin}
    with open(times, "a") as file:
        file.write(json.dumps({"path": path, "tokens": num_tokens, **took}) + "\n")


if __name__ == "__main__":
    input_dir, tokenizer_dir, output_dir, num_workers, times = sys.argv[1:]
    optimize(
        fn=partial(tokenize, tokenizer=Tokenizer(tokenizer_dir), times=times),
        inputs=sorted(str(path) for path in Path(input_dir).rglob("*.parquet")),
        output_dir=output_dir,
        chunk_size=2049 * 8012,
        item_loader=TokensLoader(),
        num_workers=int(num_workers),
    )
