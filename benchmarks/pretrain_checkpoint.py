"""For how long saving a checkpoint holds up training, asynchronous beside synchronous, and how long a resume takes.

    python benchmarks/pretrain_checkpoint.py [--directory DIR] [--processes 2]

FSDP2 processes over gloo, a model of 41 million parameters (490 MB of weights and AdamW state). Saves alternate between the two
ways, with a training step in between, after one save of each to warm up.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

MODEL = {
    "name": "bench-41M", "block_size": 256, "vocab_size": 16384, "padded_vocab_size": 16384, "n_layer": 8, "n_embd": 512,
    "n_head": 8, "n_query_groups": 4, "intermediate_size": 1408, "rotary_percentage": 1.0, "parallel_residual": False,
    "bias": False, "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP",
}  # fmt: skip
NUM_SAVES = 5


def worker(directory: Path) -> None:
    from pretraining.plan import make_plan
    from pretraining.settings import CheckpointSettings, EvalSettings, ParallelSettings, Settings, TrainSettings
    from pretraining.trainer import Trainer

    processes = int(os.environ["WORLD_SIZE"])
    settings = Settings(
        dataset_path=str(directory / "data"),
        out_dir=str(directory / "out"),
        model_config=MODEL,
        num_devices=processes,
        accelerator="cpu",
        precision="32-true",
        train=TrainSettings(global_batch_size=processes, micro_batch_size=1, max_steps=1, save_interval=None),
        eval=EvalSettings(initial_validation=False, final_validation=False),
        checkpoint=CheckpointSettings(keep_last=2),
        parallel=ParallelSettings(cpu_threads=1),
    )
    trainer = Trainer(settings, make_plan(settings))
    trainer.resume_or_initialise()
    trainer.run()  # one step, and the synchronous final checkpoint: AdamW's state exists now
    stalls: dict[bool, list[float]] = {True: [], False: []}
    for number in range(2 * (NUM_SAVES + 1)):
        asynchronous = number % 2 == 0
        trainer.step = 2 + number
        stalls[asynchronous].append(trainer.writer.save(f"step-{trainer.step:08d}", _state(trainer), asynchronous))
        trainer.writer.wait()
        if trainer.writer.error:
            raise RuntimeError(trainer.writer.error)
    resume_s = measure_resume(trainer)
    if trainer.rank == 0:
        synchronous, held_up = (statistics.median(stalls[key][1:]) for key in (False, True))
        checkpoint = trainer.writer.last_good
        size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
        print(
            json.dumps(
                {
                    "benchmark": "pretrain_checkpoint",
                    "date": time.strftime("%Y-%m-%d"),
                    "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
                    "processes": processes,
                    "checkpoint_bytes": size,
                    "synchronous_s": round(synchronous, 3),
                    "asynchronous_stall_s": round(held_up, 3),
                    "ratio": round(held_up / synchronous, 3),
                    "resume_s": round(resume_s, 3),
                    "all_synchronous_s": [round(value, 3) for value in stalls[False][1:]],
                    "all_asynchronous_stall_s": [round(value, 3) for value in stalls[True][1:]],
                },
                indent=1,
            )
        )


def measure_resume(trainer) -> float:
    """Seconds to find and verify the newest checkpoint, load it, and read the first batch, 10^12 sequences into the data."""
    import numpy as np

    from pretraining.data import prefetch

    started = time.perf_counter()
    trainer.resume_or_initialise()
    batches = prefetch(trainer.sequences, iter([np.arange(10**12, 10**12 + 8)]), pin_memory=False)
    next(batches)
    elapsed = time.perf_counter() - started
    batches.close()
    return elapsed


def _state(trainer) -> dict:
    return {
        "step": trainer.step, "tokens": 0, "position": trainer.step, "seed": 42,
        "nonfinite_steps": 0, "nonfinite_in_a_row": 0, "val_loss": None,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", help="on the file system to measure (default: a temporary one)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(Path(arguments.worker))
        return
    directory = Path(tempfile.mkdtemp(prefix="pretrain-checkpoint-", dir=arguments.directory))
    try:
        from benchmarks.synthetic_tokens import write_synthetic_dataset

        write_synthetic_dataset(directory / "data", num_tokens=200_000, vocab_size=16384)
        (directory / "out").mkdir()
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--worker", str(directory)],
                env={
                    **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(arguments.processes),
                    "LOCAL_WORLD_SIZE": str(arguments.processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611",
                    "OMP_NUM_THREADS": "1",
                },
            )
            for rank in range(arguments.processes)
        ]  # fmt: skip
        if any([process.wait() for process in processes]):
            sys.exit(1)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
