"""Training speed and peak memory: ours beside litgpt's own `pretrain` and beside a bare PyTorch loop, in one run.

    python benchmarks/pretrain_speed.py [--steps 30] [--rounds 3] [--cases small large_vocabulary watching]

Same model, batch, float32, AdamW, number of threads, and the same dataset (the bare loop takes random tokens from
memory, without FSDP, logging or checks). Tokens per second are those of the fastest step after the first five, of all
rounds, because whatever else runs on the machine only ever slows a step down; rounds alternate between the contestants.
litgpt's steps are those that it prints, without its time to load data; it always compiles the model. Memory is the
largest resident size of the process, which holds the libraries too: "imports" is a process that only imports torch,
lightning and litgpt. Prints JSON, then a table.

The case "watching" is another one: what a step spends on heartbeats, sums over the processes, judging bad steps and
slow processes, each timed by itself in two processes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import harness

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
WATCHING = "watching"


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


def run_ours(case: dict, directory: Path, steps: int, threads: int, compile: bool = False) -> dict:
    """One rank."""
    from pretraining.plan import make_plan
    from pretraining.trainer import Trainer
    from utils.metrics_file import read_metrics

    settings = settings_for(case, directory, steps, int(os.environ["WORLD_SIZE"]), threads, compile)
    Path(settings.out_dir).mkdir(exist_ok=True)
    trainer = Trainer(settings, make_plan(settings))
    trainer.resume_or_initialise()
    trainer.writer.save = lambda *_: 0.0  # training is measured here, saving elsewhere
    trainer.run()
    if trainer.rank != 0:
        return {}
    records = read_metrics(directory / "out")
    step_s, wait_s = ([record[key] for record in records][WARM_UP_STEPS:] for key in ("step_s", "data_wait_s"))
    return {"tokens_per_s": trainer.plan.tokens_per_step / min(step_s), "data_wait_s": statistics.median(wait_s)}


def run_watching(case: dict, directory: Path, steps: int, threads: int) -> dict:
    """One rank: microseconds per step of what watches over a run, each part by itself."""
    import dataclasses

    import torch
    import torch.distributed as dist

    from pretraining.bad_steps import WINDOW_STEPS
    from pretraining.plan import make_plan
    from pretraining.step_sums import StepSums
    from pretraining.trainer import Trainer

    settings = settings_for(case, directory, 3, int(os.environ["WORLD_SIZE"]), threads, False)
    settings.train.global_batch_size *= 2  # two micro-batches
    settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, spike_sigma=6.0))
    Path(settings.out_dir).mkdir(exist_ok=True)
    trainer = Trainer(settings, make_plan(settings))
    trainer.resume_or_initialise()
    trainer.writer.save = lambda *_: 0.0
    trainer.run()
    clock, bad_steps, heartbeat = trainer.slow_ranks.clock, trainer.state.bad_steps, trainer.heartbeat
    for i in range(WINDOW_STEPS):
        bad_steps.count(None, 5 + i / 1000, 1 + i / 1000)
    num_waits = len(clock._sections)
    nothing = clock._timed("wait", lambda: None)
    norm, entropy = torch.ones(()), torch.ones((), dtype=torch.float64)
    values = StepSums(entropy, 2**63, 0.0, False, False, False, False, [0.1, 0.01, 0.001])

    def beat() -> None:
        for _ in range(trainer.accumulation):
            heartbeat.beat("reading data")
            heartbeat.beat("forward and backward pass")
        heartbeat.beat("reduction and update")
        heartbeat.step_done(1)

    def measure_times() -> None:
        next_batch = clock.begin(iter([None] * trainer.accumulation))
        for _ in range(trainer.accumulation):
            next_batch()
        for _ in range(num_waits - trainer.accumulation):
            nothing()
        clock.end()

    def judge() -> None:
        bad_steps.count(bad_steps.judge(5.0, 1.0), 5.0, 1.0)

    def sum_one_number() -> None:
        dist.all_reduce(entropy)
        entropy.item()

    parts = {
        "heartbeats": beat,
        "judging bad steps": judge,
        "timing waits": measure_times,
        "slow processes": lambda: trainer.slow_ranks.add([0.1, 0.01, 0.001, 0.1, 0.01, 0.001], 1),
        "sums over the processes": lambda: values.summed(norm),
        "of these, the all-reduce of one number": sum_one_number,
    }
    found = {}
    for name, part in parts.items():
        durations, processor_s = [], time.thread_time()
        for _ in range(20 * steps):
            started = time.perf_counter()
            part()
            durations.append(time.perf_counter() - started)
        processor_s = (time.thread_time() - processor_s) / len(durations)
        # As for steps: whatever else runs on the machine only ever makes it slower.
        clock_s = statistics.quantiles(durations, n=10)[0]
        found[name] = {"processor_us": round(1e6 * processor_s, 1), "clock_us": round(1e6 * clock_s, 1)}
    together = {
        kind: round(sum(times[kind] for name, times in found.items() if not name.startswith("of these")), 1)
        for kind in ("processor_us", "clock_us")
    }
    return {"waits": num_waits, "parts": found, "together": together}


def run_bare(case: dict, directory: Path, steps: int, threads: int) -> dict:
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
    return {"tokens_per_s": size * context / min(durations[WARM_UP_STEPS:])}


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
            "max_seq_length": context, "save_interval": 10**6, "max_norm": 1.0, "lr_warmup_steps": 10,
            "log_interval": 1,
        },
        "eval": {"interval": 10**6, "initial_validation": False, "final_validation": False, "max_iters": 1},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 4e-4, "weight_decay": 0.1}},
        "devices": 1, "logger_name": "csv",
    }  # fmt: skip
    (directory / "litgpt.yaml").write_text(yaml.safe_dump(config))
    usage = harness.run(
        Path(sys.executable).parent / "litgpt", "pretrain", "--config", directory / "litgpt.yaml",
        cwd=directory, env={"OMP_NUM_THREADS": str(threads)},
    )  # fmt: skip
    durations = [float(found) / 1000 for found in re.findall(r"iter time: ([\d.]+) ms", usage.output)]
    if len(durations) < steps - 1:
        raise RuntimeError(f"litgpt pretrain printed {len(durations)} steps:\n{usage.output[-3000:]}")
    shutil.rmtree(directory / "litgpt", ignore_errors=True)
    return {"tokens_per_s": size * context / min(durations[WARM_UP_STEPS:]), "memory_bytes": usage.peak_bytes}


def run_imports(*_) -> dict:
    import lightning  # noqa: F401
    import litgpt.model  # noqa: F401

    return {"tokens_per_s": 0}


CONTESTANTS = {
    "imports": run_imports,
    "bare": run_bare,
    "ours": run_ours,
    "ours_compiled": lambda *args: run_ours(*args, compile=True),
}


def in_processes(contestant: str, case: str, directory: Path, steps: int, threads: int, processes: int = 1) -> dict:
    shutil.rmtree(directory / "out", ignore_errors=True)
    job = {"contestant": contestant, "case": case, "directory": str(directory), "steps": steps, "threads": threads}
    return harness.run_ranks(__file__, job, processes, threads)


def work(contestant: str, case: str, directory: str, steps: int, threads: int) -> None:
    """One rank of a contestant; its figures are the last line that it prints."""
    measure = run_watching if contestant == WATCHING else CONTESTANTS[contestant]
    print(json.dumps(measure(CASES[case], Path(directory), steps, threads)))


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
    cells = []
    for key, label in {
        "litgpt": "litgpt pretrain",
        "ours": "**distributed_pretrain.py**",
        "ours_compiled": "**the same, --parallel.compile=true**",
        "bare": "bare PyTorch loop",
        "imports": "imports alone",
    }.items():
        speed, memory = rows[key]["tokens_per_s"], rows[key]["memory_bytes"]
        speeds = (f"{speed:,}", f"{speed / litgpt['tokens_per_s']:.2f} x") if speed else ("-", "-")
        cells.append((label, *speeds, f"{memory / 1e6:,.0f} MB", f"{100 * memory / litgpt['memory_bytes']:.0f}%"))
    one, two = (rows[f"ours_{n}_processes_of_1_thread"]["tokens_per_s"] for n in (1, 2))
    overhead = 100 * (1 - rows["ours"]["tokens_per_s"] / rows["bare"]["tokens_per_s"])
    return (
        harness.table(["", "tokens/s", "ratio", "peak memory", "ratio"], cells)
        + f"\n\nOver the bare loop: {overhead:.1f}%. Two processes of one thread over one: {two / one:.2f} x."
    )


def measure_case(name: str, steps: int, rounds: int, threads: int) -> dict:
    case = CASES[name]
    results: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory(prefix="pretrain-speed-", ignore_cleanup_errors=True) as made:
        directory = Path(made)
        harness.write_dataset(directory / "data", num_tokens=2_000_000, vocab_size=case["vocab"])
        for _ in range(rounds):
            for contestant in CONTESTANTS:
                outcome = in_processes(contestant, name, directory, steps, threads)
                results.setdefault(contestant, []).append(outcome)
            results.setdefault("litgpt", []).append(run_litgpt(case, directory, steps, threads))
            for processes in (1, 2):
                outcome = in_processes("ours", name, directory, steps, 1, processes)
                results.setdefault(f"ours_{processes}_processes_of_1_thread", []).append(outcome)
    return {**case, **{key: best(values) for key, values in results.items()}}


def measure_watching(steps: int) -> dict:
    with tempfile.TemporaryDirectory(prefix="pretrain-speed-", ignore_cleanup_errors=True) as made:
        directory = Path(made)
        harness.write_dataset(directory / "data", num_tokens=200_000, vocab_size=CASES["small"]["vocab"])
        return in_processes(WATCHING, "small", directory, steps, 1, 2)


def watching_table(found: dict) -> str:
    parts = {**found["parts"], "together": found["together"]}
    rows = [(name, *(f"{times[kind]:,.0f}" for kind in ("processor_us", "clock_us"))) for name, times in parts.items()]
    rows.append(
        ("of a step of 50 ms", *(f"{found['together'][kind] / 500:.2f}%" for kind in ("processor_us", "clock_us")))
    )
    return harness.table(["", "microseconds of processor time", "by the clock"], rows)


def main() -> None:
    parser = harness.make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=[*CASES, WATCHING])
    arguments = parser.parse_args()
    if arguments.worker:
        work(**arguments.worker)
        return
    cases = {
        name: measure_watching(arguments.steps)
        if name == WATCHING
        else measure_case(name, arguments.steps, arguments.rounds, arguments.threads)
        for name in arguments.cases
    }
    versions = harness.environment("torch", "litgpt", "lightning")
    report = {"benchmark": "pretrain_speed", **versions, "threads": arguments.threads, "cases": cases}
    print(json.dumps(report, indent=1))
    for name, rows in cases.items():
        print(f"\n{name}\n\n{watching_table(rows) if name == WATCHING else table(rows)}")


if __name__ == "__main__":
    main()
