"""For how long saving a checkpoint holds up training, asynchronous beside synchronous, and how long a resume takes.

    python benchmarks/pretrain_checkpoint.py [--directory DIR] [--processes 2]

FSDP2 processes over gloo, a model of 41 million parameters (490 MB of weights and AdamW state). Saves alternate between
the two ways, after one save of each to warm up. Prints JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import harness

MODEL = {
    "name": "bench-41M", "block_size": 256, "vocab_size": 16384, "padded_vocab_size": 16384, "n_layer": 8,
    "n_embd": 512, "n_head": 8, "n_query_groups": 4, "intermediate_size": 1408, "rotary_percentage": 1.0,
    "parallel_residual": False, "bias": False, "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP",
}  # fmt: skip
NUM_SAVES = 5


def measure(directory: Path) -> dict:
    """One rank of the run."""
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
    stalls_s: dict[bool, list[float]] = {True: [], False: []}
    for number in range(2 * (NUM_SAVES + 1)):
        asynchronous = number % 2 == 0
        trainer.state.step = 2 + number
        stalls_s[asynchronous].append(
            trainer.writer.save(f"step-{trainer.state.step:08d}", _state(trainer), asynchronous)
        )
        trainer.writer.wait()
        if trainer.writer.error:
            raise RuntimeError(trainer.writer.error)
    resume_s = measure_resume(trainer)
    synchronous, held_up = (statistics.median(stalls_s[key][1:]) for key in (False, True))
    return {
        "processes": processes,
        "checkpoint_bytes": harness.directory_bytes(trainer.writer.last_good),
        "synchronous_s": round(synchronous, 3),
        "asynchronous_stall_s": round(held_up, 3),
        "ratio": round(held_up / synchronous, 3),
        "resume_s": round(resume_s, 3),
        "all_synchronous_s": [round(value, 3) for value in stalls_s[False][1:]],
        "all_asynchronous_stall_s": [round(value, 3) for value in stalls_s[True][1:]],
    }


def measure_resume(trainer) -> float:
    """Seconds to find and verify the newest checkpoint, load it, and read a batch, 10^12 sequences into the data."""
    import numpy as np

    from pretraining.data import prefetch

    started = time.perf_counter()
    trainer.resume_or_initialise()
    batches = prefetch(trainer.sequences, iter([np.arange(10**12, 10**12 + 8)]), pin_memory=False)
    next(batches)
    elapsed_s = time.perf_counter() - started
    batches.close()
    return elapsed_s


def _state(trainer) -> dict:
    return {
        "step": trainer.state.step, "tokens": 0, "position": trainer.state.step, "seed": 42,
        "nonfinite_steps": 0, "nonfinite_in_a_row": 0, "val_loss": None,
    }  # fmt: skip


def main() -> None:
    parser = harness.make_parser(__doc__)
    parser.add_argument("--directory", help="on the file system to measure (default: a temporary one)")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(Path(arguments.worker["directory"]))))
        return
    with tempfile.TemporaryDirectory(prefix="pretrain-checkpoint-", dir=arguments.directory) as directory:
        harness.write_dataset(Path(directory) / "data", num_tokens=200_000, vocab_size=16384)
        (Path(directory) / "out").mkdir()
        figures = harness.run_ranks(__file__, {"directory": directory}, arguments.processes)
    report = {"benchmark": "pretrain_checkpoint", **harness.environment("torch", "lightning"), **figures}
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
