"""distributed_pretrain.py with one fault in rank 1, once: `python tests/faulty_training.py FAULT MARK FLAGS...`.

FAULT is "sleep" or "raise": what the thread does that reads the data, when it reads the positions of step 12; or
"raise-always": the same each time. MARK is a file that says that it happened.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import distributed_pretrain  # noqa: E402
import pretraining.cluster  # noqa: E402
from pretraining.settings import Settings  # noqa: E402
from utils import cli  # noqa: E402

STEP = 12


def faulty(start_worker, fault: str, mark: str):
    def start(job) -> None:
        import time

        import torch.distributed as dist

        import pretraining.data

        read_micro_batch = pretraining.data.read_micro_batch
        first = STEP * job["settings"].train.global_batch_size

        def read(sequences, positions, *arguments):
            if dist.get_rank() == 1 and positions[0] >= first and not Path(mark).exists():
                if fault != "raise-always":
                    Path(mark).touch()
                if fault == "sleep":
                    time.sleep(1000)
                raise RuntimeError("the reader found a dragon")
            return read_micro_batch(sequences, positions, *arguments)

        pretraining.data.read_micro_batch = read
        start_worker(job)

    return start


if __name__ == "__main__":
    fault, mark = sys.argv[1:3]
    del sys.argv[1:3]
    pretraining.cluster._start_worker = faulty(pretraining.cluster._start_worker, fault, mark)
    cli.run(distributed_pretrain.main, Settings, "")
