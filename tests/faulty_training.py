"""distributed_pretrain.py with one fault in rank 1, once: `python tests/faulty_training.py FAULT MARK FLAGS...`.

FAULT is "sleep" or "raise": what the thread does that reads the data, when it reads the positions of step 12;
"raise-always": the same each time; "validation": it sleeps in the second validation; or "slow": it computes
slowly, all the time. MARK is a file that says that it happened.
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
        import pretraining.trainer
        import pretraining.validation

        if fault == "slow" and dist.get_rank() == 1:
            schedule = pretraining.trainer.schedule_reductions  # called between two micro-batches

            def slow(*arguments, **options):
                time.sleep(0.1)
                schedule(*arguments, **options)

            pretraining.trainer.schedule_reductions = slow
        validate = pretraining.validation.Validation.run

        def validation_that_sleeps(self):
            if dist.get_rank() == 1 and not Path(mark).exists() and self.was_run:
                Path(mark).touch()
                time.sleep(1000)
            self.was_run = True
            return validate(self)

        if fault == "validation":
            pretraining.validation.Validation.was_run = False
            pretraining.validation.Validation.run = validation_that_sleeps
        read_micro_batch = pretraining.data.read_micro_batch
        first = STEP * job["settings"].train.global_batch_size

        def read(sequences, positions, *arguments):
            if (
                fault in ("sleep", "raise", "raise-always")
                and dist.get_rank() == 1
                and positions[0] >= first
                and not Path(mark).exists()
            ):
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
