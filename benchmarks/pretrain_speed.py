"""Training speed and peak memory: ours beside litgpt's own `pretrain` and beside a bare PyTorch loop, in one run.

    python benchmarks/pretrain_speed.py [--steps 30] [--rounds 3] [--cases small large_vocabulary]

Same model, batch, float32, AdamW, number of threads, and the same dataset (the bare loop takes random tokens from memory, without
FSDP, logging or checks). Tokens a second are taken from the fastest step after the first five, of all rounds, because what else
runs on the machine only ever slows a step down; rounds alternate between the contestants. litgpt's steps are those that it
prints, without its time to load data; it always compiles the model. Memory is the largest resident size of the process, which
holds the libraries too: "imports" is a process that only imports torch, lightning and litgpt. Prints JSON, then a table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

LLAMA = {
    "rotary_percentage": 1.0, "parallel_residual": False, "bias": False, "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP", "n_embd": 256, "n_head": 4, "n_query_groups": 2, "intermediate_size": 688,
}  # fmt: skip
CASES = {
    # The demo's model, and the same width with the vocabulary of Llama 3.
    "small": {"vocab": 8192, "context": 256, "micro_batch": 8, "n_layer": 4},
    "large_vocabulary": {"vocab": 128256, "context": 512, "micro_batch": 4, "n_layer": 4},
}
WARM_UP_STEPS = 5


def model_config(case: dict) -> dict:
    return {
        **LLAMA, "name": "bench", "block_size": case["context"], "vocab_size": case["vocab"],
        "padded_vocab_size": case["vocab"], "n_layer": case["n_layer"],
    }  # fmt: skip


def settings_for(case: dict, directory: Path, steps: int, processes: int, threads: int, compile: bool):
    from pretraining.settings import CheckpointSettings, EvalSettings, ParallelSettings, Settings, TrainSettings

    return Settings(
        dataset_path=str(directory / "data"),
        out_dir=str(directory / "out"),
        model_config=model_config(case),
        num_devices=processes,
        accelerator="cpu",
        precision="32-true",
        train=TrainSettings(
            global_batch_size=case["micro_batch"] * processes,
            micro_batch_size=case["micro_batch"],
            max_steps=steps,
            save_interval=None,
        ),
        eval=EvalSettings(interval=None, initial_validation=False, final_validation=False),
        checkpoint=CheckpointSettings(keep_last=1),
        parallel=ParallelSettings(cpu_threads=threads, compile=compile),
    )


def run_ours(case: dict, directory: Path, steps: int, threads: int, compile: bool = False) -> None:
    """One rank; prints its result on rank 0."""
    from pretraining.plan import make_plan
    from pretraining.trainer import Trainer

    settings = settings_for(case, directory, steps, int(os.environ["WORLD_SIZE"]), threads, compile)
    Path(settings.out_dir).mkdir(exist_ok=True)
    trainer = Trainer(settings, make_plan(settings))
    trainer.resume_or_initialise()
    trainer.writer.save = lambda *_: 0.0  # training is measured here, saving elsewhere
    trainer.run()
    if trainer.rank == 0:
        records = [json.loads(line) for line in (directory / "out" / "metrics.jsonl").read_text().splitlines()]
        durations = [record["step_s"] for record in records][WARM_UP_STEPS:]
        waits = [record["data_wait_s"] for record in records][WARM_UP_STEPS:]
        tokens = trainer.plan.tokens_per_step
        print(json.dumps({"tokens_per_s": tokens / min(durations), "data_wait_s": statistics.median(waits)}))


def run_bare(case: dict, directory: Path, steps: int, threads: int) -> None:
    import torch

    from pretraining.model import build_model, initialise
    from pretraining.optimizer import make_optimizers, scale_gradients

    torch.set_num_threads(threads)
    settings = settings_for(case, directory, steps, 1, threads, False)
    model = build_model(model_config(case), settings, case["context"], device="cpu")
    initialise(model, model.config, 42)
    (optimizer,) = make_optimizers(model, settings.optimizer)
    parameters = list(model.parameters())
    size, context = case["micro_batch"], case["context"]
    durations = []
    for _ in range(steps):
        tokens = torch.randint(0, case["vocab"], (size, context + 1))
        started = time.perf_counter()
        _, objective = model(tokens[:, :-1], tokens[:, 1:])
        (objective / (size * context)).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        scale_gradients(parameters, norm, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        norm.item()
        durations.append(time.perf_counter() - started)
    print(json.dumps({"tokens_per_s": size * context / min(durations[WARM_UP_STEPS:])}))


def run_litgpt(case: dict, directory: Path, steps: int, threads: int) -> dict:
    """`litgpt pretrain`, the command; steps are timed by itself."""
    import yaml

    size, context = case["micro_batch"], case["context"]
    config = {
        "model_name": "pythia-14m",
        "model_config": {**model_config(case)},
        "out_dir": str(directory / "litgpt"),
        "precision": "32-true",
        "data": {
            "class_path": "litgpt.data.LitData",
            "init_args": {"data_path": str(directory / "data"), "split_names": ["train", "val"], "num_workers": 1},
        },
        "train": {
            "global_batch_size": size, "micro_batch_size": size, "max_tokens": steps * size * context,
            "max_seq_length": context, "save_interval": 10**6, "max_norm": 1.0, "lr_warmup_steps": 10, "log_interval": 1,
        },
        "eval": {"interval": 10**6, "initial_validation": False, "final_validation": False, "max_iters": 1},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 4e-4, "weight_decay": 0.1}},
        "devices": 1, "logger_name": "csv",
    }  # fmt: skip
    (directory / "litgpt.yaml").write_text(yaml.safe_dump(config))
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / "litgpt"), "pretrain", "--config", str(directory / "litgpt.yaml")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    durations, output = [], []
    for line in process.stdout:
        output.append(line)
        if found := re.search(r"iter time: ([\d.]+) ms", line):
            durations.append(float(found[1]) / 1000)
    _, status, usage = os.wait4(process.pid, 0)
    if len(durations) < steps - 1:
        raise RuntimeError(f"litgpt pretrain left with {status}:\n{''.join(output)[-3000:]}")
    shutil.rmtree(directory / "litgpt", ignore_errors=True)
    return {"tokens_per_s": size * context / min(durations[WARM_UP_STEPS:]), "memory_bytes": usage.ru_maxrss * 1024}


def run_imports(*_) -> None:
    import lightning  # noqa: F401
    import litgpt.model  # noqa: F401

    print(json.dumps({"tokens_per_s": 0}))


def in_processes(name: str, case_name: str, directory: Path, steps: int, threads: int, processes: int = 1) -> dict:
    """Run a contestant of this file in processes of its own."""
    shutil.rmtree(directory / "out", ignore_errors=True)
    started = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", name, "--case", case_name, "--directory", str(directory),
             "--steps", str(steps), "--threads", str(threads)],
            stdout=subprocess.PIPE, text=True,
            env={
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29617",
                "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT),
            },
        )
        for rank in range(processes)
    ]  # fmt: skip
    output = started[0].stdout.read()
    ends = [os.wait4(process.pid, 0) for process in started]
    if any(status for _, status, _ in ends):
        raise RuntimeError(f"{name} failed")
    result = json.loads(output.strip().splitlines()[-1])
    return {**result, "memory_bytes": max(usage.ru_maxrss for _, _, usage in ends) * 1024}


def best(results: list[dict]) -> dict:
    fastest = max(results, key=lambda result: result["tokens_per_s"])
    return {
        **fastest,
        "tokens_per_s": round(fastest["tokens_per_s"]),
        "all": [round(r["tokens_per_s"]) for r in results],
    }


def table(rows: dict[str, dict]) -> str:
    """The contestants beside litgpt, and two processes beside one, in Markdown."""
    litgpt = rows["litgpt"]
    lines = ["| | tokens/s | ratio | peak memory | ratio |", "|---|---:|---:|---:|---:|"]
    for key, label in {
        "litgpt": "litgpt pretrain",
        "ours": "**distributed_pretrain.py**",
        "ours_compiled": "**the same, --parallel.compile=true**",
        "bare": "bare PyTorch loop",
        "imports": "imports alone",
    }.items():
        row = rows[key]
        speed, speed_ratio = f"{row['tokens_per_s']:,}", f"{row['tokens_per_s'] / litgpt['tokens_per_s']:.2f} x"
        lines.append(
            f"| {label} | {speed if row['tokens_per_s'] else '-'} | {speed_ratio if row['tokens_per_s'] else '-'} | "
            f"{row['memory_bytes'] / 1e6:,.0f} MB | {100 * row['memory_bytes'] / litgpt['memory_bytes']:.0f}% |"
        )
    one, two = (rows[f"ours_{n}_processes_of_1_thread"]["tokens_per_s"] for n in (1, 2))
    overhead = 100 * (1 - rows["ours"]["tokens_per_s"] / rows["bare"]["tokens_per_s"])
    lines.append(f"\nOver the bare loop: {overhead:.1f}%. Two processes of one thread over one: {two / one:.2f} x.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        contestants = {
            "ours": run_ours,
            "ours_compiled": lambda *args: run_ours(*args, compile=True),
            "bare": run_bare,
            "imports": run_imports,
        }
        contestants[arguments.worker](
            CASES[arguments.case], Path(arguments.directory), arguments.steps, arguments.threads
        )
        return

    import litgpt  # noqa: F401 - into the page cache, for all alike
    import torch

    from benchmarks.synthetic_tokens import write_synthetic_dataset

    report = {
        "benchmark": "pretrain_speed",
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {"torch": torch.__version__, "litgpt": "0.5.13"},
        "threads": arguments.threads,
        "cases": {},
    }
    for name in arguments.cases:
        case = CASES[name]
        directory = Path(tempfile.mkdtemp(prefix="pretrain-speed-"))
        try:
            write_synthetic_dataset(directory / "data", num_tokens=2_000_000, vocab_size=case["vocab"])
            results: dict[str, list[dict]] = {}
            for _ in range(arguments.rounds):
                for contestant in ("imports", "bare", "ours", "ours_compiled"):
                    outcome = in_processes(contestant, name, directory, arguments.steps, arguments.threads)
                    results.setdefault(contestant, []).append(outcome)
                results.setdefault("litgpt", []).append(run_litgpt(case, directory, arguments.steps, arguments.threads))
                for processes in (1, 2):
                    key = f"ours_{processes}_processes_of_1_thread"
                    outcome = in_processes("ours", name, directory, arguments.steps, 1, processes)
                    results.setdefault(key, []).append(outcome)
            report["cases"][name] = {**case, **{key: best(values) for key, values in results.items()}}
        finally:
            shutil.rmtree(directory, ignore_errors=True)
    print(json.dumps(report, indent=1))
    for name, rows in report["cases"].items():
        print(f"\n{name}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
