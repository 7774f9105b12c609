"""Does this toolkit do on a GPU what it does on a CPU, and how fast? One H100, ten minutes, offline, without Ray.

    python benchmarks/gpu_acceptance.py [--output gpu_acceptance.json]

Every row runs in a process of its own, and what it finds is in the JSON file at once, so a crash costs the rest of that
row alone. A table follows at the end; the exit code is 1 if anything failed. It needs Python 3.12 and torch 2.11 or
newer, lightning, litgpt, litdata and jsonargparse. Without a GPU the rows run in small (--device=cpu is then chosen by
itself): what a CPU can answer is checked, and the rest says "needs CUDA".

What one GPU cannot show: NCCL between nodes, overlap of communication, gloo between nodes, restarts of many ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import glob
import json
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness

TINY = {
    "name": "tiny", "block_size": 128, "n_layer": 2, "n_embd": 128, "n_head": 2, "n_query_groups": 1,
    "vocab_size": 512, "padded_vocab_size": 512, "intermediate_size": 256, "rotary_percentage": 1.0,
    "parallel_residual": False, "bias": False, "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP",
}  # fmt: skip
MIDDLE = {**TINY, "name": "middle", "block_size": 1024, "n_layer": 16, "n_embd": 1024, "n_head": 16,
          "intermediate_size": 4096, "vocab_size": 32000, "padded_vocab_size": 32000}  # fmt: skip
CONFIGS = harness.ROOT / "config_hub"


@dataclasses.dataclass
class Job:
    """What a row's process gets."""

    device: str
    work_dir: Path
    limits: dict[str, float]
    send: Callable[[dict[str, Any]], None]

    @property
    def small(self) -> bool:
        return self.device == "cpu"

    def report(self, name: str, value: Any) -> None:
        """A figure that nothing is demanded of."""
        self.send({"check": name, "outcome": "report", "value": value})

    def check(self, name: str, value: float | bool, limit: str | None = None, most: bool = True) -> None:
        """A figure that must not be above its limit (`most`), or not below it; or a truth value that must be true."""
        bound = None if limit is None else self.limits[limit]
        good = value is True if bound is None else (value <= bound if most else value >= bound)
        self.send({"check": name, "outcome": "pass" if good else "fail", "value": value, "limit": bound})

    def needs_cuda(self, *names: str) -> None:
        for name in names:
            self.send({"check": name, "outcome": "needs CUDA", "value": None})

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """An error in the block fails the check `name`, and the row goes on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            first_line = (str(error).strip().splitlines() or [""])[0]
            self.send({"check": name, "outcome": "fail", "value": f"{type(error).__name__}: {first_line}"})


# --- software ---------------------------------------------------------------------------------------------------------


def software(job: Job) -> None:
    import torch

    job.report("torch", torch.__version__)
    job.report("CUDA of torch", torch.version.cuda)
    job.report("gcc", shutil.which(os.environ.get("CC", "gcc")))
    job.report("Python.h", (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file())
    if job.small:
        job.needs_cuda("driver", "cuDNN", "NCCL", "clocks")
        return
    query = "name,driver_version,clocks.sm,clocks.max.sm,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()[0]
    found = dict(zip(query.split(","), said.split(", ")))
    job.check("driver", float(found["driver_version"].partition(".")[0]), "min_driver", most=False)
    job.report("GPU, clocks in MHz, watts, degrees", found)
    job.report("cuDNN", torch.backends.cudnn.version())
    job.report("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    job.report("bfloat16", torch.cuda.is_bf16_supported())


# --- results ----------------------------------------------------------------------------------------------------------


def make_settings(job: Job, config: dict, directory: Path | None = None, train=(), **changes):
    from pretraining.settings import EvalSettings, Settings, TrainSettings

    values = {"global_batch_size": 4, "micro_batch_size": 2, "max_steps": 8, "save_interval": None, **dict(train)}
    return Settings(
        dataset_path=str(directory / "data") if directory else None,
        out_dir=str(directory / "out") if directory else "unused",
        model_config=config,
        num_devices=1,
        accelerator=job.device,
        train=TrainSettings(**values),
        eval=EvalSettings(interval=None, initial_validation=False, final_validation=False),
        **{"precision": "32-true" if job.small else "bf16-mixed", **changes},
    )


def join_process_group(device: str, backend: str | None = None) -> None:
    """As a worker of Ray Train does: in a thread, after `set_device`, without a device id."""
    import torch
    import torch.distributed as dist

    os.environ.update(harness.rank_environment(0, 1, harness.free_port()))
    if device == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group(backend or ("nccl" if device == "cuda" else "gloo"))


def losses_of(settings, config: dict, device: str, steps: int, sharded: bool) -> list[float]:
    """Losses of some steps of AdamW on random tokens: sharded and set up as in training, or the plain model."""
    import torch

    from pretraining.model import build_model, initialise
    from pretraining.optimizer import make_optimizers
    from pretraining.parallelism import device_mesh, shard_model

    context = config["block_size"]
    model = build_model(config, settings, context, device="meta" if sharded else device)
    if sharded:
        shard_model(model, device_mesh(settings, device, 1, 1), settings)
        model.to_empty(device=device)
        model.reset_parameters()
    initialise(model, model.config, 1)
    (optimizer,) = make_optimizers(model, settings.optimizer)
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(steps):
        tokens = torch.randint(config["vocab_size"], (2, context + 1), generator=generator).to(device)
        entropy, objective = model(tokens[:, :-1], tokens[:, 1:])
        (objective / (2 * context)).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(entropy.item() / (2 * context))
    return found


def results(job: Job) -> None:
    """The modes in which the trainer computes, each beside the plain model on a CPU in float32."""
    import torch

    from pretraining.model import build_model
    from pretraining.settings import ParallelSettings

    join_process_group(job.device)
    steps = 3 if job.small else 20
    modes: dict[str, tuple[dict, dict, dict]] = {  # changes of the model, of train, of parallel
        "plain": ({}, {}, {}),
        "recompute selective": ({}, {}, {"activation_checkpointing": "selective"}),
        "recompute full": ({}, {}, {"activation_checkpointing": "full"}),
        "loss in chunks of 48": ({}, {}, {"loss_chunk_tokens": 48}),
        "z-loss": ({}, {"z_loss": 1e-3}, {}),
        "tied embeddings": ({}, {"tie_embeddings": True}, {}),
        "logits capped": ({"final_logit_softcapping": 10.0}, {}, {}),
        "as many keys as queries": ({"n_query_groups": 2}, {}, {}),
        "norm of queries and keys": ({"norm_qk": True}, {}, {}),
        "scores capped": ({"attention_logit_softcapping": 20.0}, {}, {}),
        "window of 32": ({"sliding_window_size": 32, "sliding_window_indices": [1, 0]}, {}, {}),
        "compiled": ({}, {}, {"compile": True}),
        "compiled, recompute selective": ({}, {}, {"compile": True, "activation_checkpointing": "selective"}),
    }
    if job.small:  # compiling takes a CPU half a minute; the row of the 8B model compiles
        modes = {name: mode for name, mode in modes.items() if not mode[2].get("compile")}
    references: dict[str, list[float]] = {}
    for precision, limit in (("32-true", "max_float32_difference"), ("bf16-mixed", "max_bfloat16_difference")):
        for name, (model, train, parallel) in modes.items():
            if job.small and precision == "bf16-mixed" and name not in ("plain", "recompute selective", "window of 32"):
                continue  # a CPU is slow in bfloat16
            with job.part(f"{precision}, {name}"):
                config = {**TINY, **model}
                key = json.dumps([model, train])
                if key not in references:
                    plain = make_settings(job, config, train=train, precision="32-true")
                    references[key] = losses_of(plain, config, "cpu", steps, sharded=False)
                settings = make_settings(
                    job, config, train=train, precision=precision, parallel=ParallelSettings(**parallel)
                )
                found = losses_of(settings, config, job.device, steps, sharded=True)
                worst = max(abs(a - b) for a, b in zip(found, references[key]))
                job.check(f"{precision}, {name}: largest difference of the loss in {steps} steps", worst, limit)
    with job.part("rotary positions"):
        from pretraining.parallelism import device_mesh, shard_model

        config = {**TINY, "block_size": 8192}
        settings = make_settings(job, config, precision="bf16-mixed")
        model = build_model(config, settings, 8192)
        shard_model(model, device_mesh(settings, job.device, 1, 1), settings)
        model.to_empty(device=job.device)
        model.reset_parameters()
        job.check("the rotary table is float32", model.cos.dtype == model.sin.dtype == torch.float32)
        reference = build_model(config, settings, 8192, device="cpu")
        worst = max((getattr(model, n)[8191].cpu() - getattr(reference, n)[8191]).abs().max() for n in ("cos", "sin"))
        job.check("rotary position 8,191: largest difference", float(worst), "max_float32_difference")


# --- save, resume, stop, NaN ------------------------------------------------------------------------------------------


def make_trainer(settings, at_step: dict[int, Callable] | None = None):
    """The real one. `at_step`: what happens to the embedded tokens in some steps, by the number of steps before."""
    from pretraining.plan import make_plan
    from pretraining.trainer import Trainer

    Path(settings.out_dir).mkdir(parents=True, exist_ok=True)
    trainer = Trainer(settings, make_plan(settings))
    trainer.resume_or_initialise()
    changes = at_step or {}
    trainer.model.transformer.wte.register_forward_hook(
        lambda module, inputs, output: changes.get(trainer.state.step, lambda x: None)(output)
    )
    return trainer


def state_of(trainer) -> list:
    from pretraining.parallelism import local_shard

    tensors = [*trainer.model.parameters()]
    for optimizer in trainer.optimizers:
        tensors += [value for state in optimizer.state.values() for value in state.values()]
    return [local_shard(tensor).clone() for tensor in tensors]


def equal(first: list, second: list) -> bool:
    import torch

    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second))


def saving(job: Job) -> None:
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # before CUDA starts; deterministic algorithms ask for it
    import torch

    from pretraining.settings import STOP_NAME
    from utils.metrics_file import read_metrics

    join_process_group(job.device)
    harness.write_dataset(job.work_dir / "data", 40_000, TINY["vocab_size"])

    def train(name: str, at_step: dict[int, Callable] | None = None):
        directory = job.work_dir / name
        directory.mkdir(exist_ok=True)
        settings = make_settings(job, TINY, job.work_dir, train={"save_interval": 3})
        trainer = make_trainer(dataclasses.replace(settings, out_dir=str(directory)), at_step)
        trainer.run()
        return trainer

    first = state_of(train("default-1"))
    job.report("the same run twice is equal, bit for bit", equal(first, state_of(train("default-2"))))
    torch.use_deterministic_algorithms(True)
    with job.part("deterministic algorithms"):
        straight = state_of(train("straight"))
        job.check("twice with deterministic algorithms: equal", equal(straight, state_of(train("again"))))
    with job.part("stop file and resume"):
        stop = job.work_dir / "stopped" / STOP_NAME
        stopped = train("stopped", {4: lambda _: stop.touch()})
        job.check("the stop file ends the run after its step", stopped.state.step == 5)
        stop.unlink()
        resumed = train("stopped")
        job.check("stopped and resumed: weights and optimizer equal", equal(straight, state_of(resumed)))
    with job.part("NaN"):
        hurt = train("nan", {2: lambda output: output * float("nan")})
        records = read_metrics(hurt.out_dir)
        job.check("a step with NaN is counted", [record["nonfinite_steps"] for record in records] == [0, 0, *[1] * 6])
        whole = all(bool(tensor.isfinite().all()) for tensor in state_of(hurt))
        job.check("a step with NaN changes nothing", whole and hurt.state.step == 8)


# --- attention --------------------------------------------------------------------------------------------------------


def attention(job: Job) -> None:
    import torch
    from litgpt.config import Config

    from pretraining.attention import attention_patterns

    heads, tokens, size, dtype = (4, 512, 64, torch.float32) if job.small else (32, 8192, 128, torch.bfloat16)
    offsets = torch.arange(0, tokens + 1, tokens // 8, dtype=torch.int32, device=job.device)

    def make(count: int, groups: int, length: int, window: int | None, documents):
        config = Config(
            n_layer=1, n_head=count, n_query_groups=groups, head_size=size, n_embd=count * size, block_size=length,
            sliding_window_size=window, sliding_window_indices=[1] if window else None,
        )  # fmt: skip
        x = torch.empty(1, length, count * size, dtype=dtype, device=job.device)
        shapes = [(1, number, length, size) for number in (count, groups, groups)]
        qkv = [torch.randn(shape, dtype=dtype, device=job.device, requires_grad=True) for shape in shapes]
        return attention_patterns(config, x, documents)[0], qkv

    cases = {
        "causal": (heads, None, None),
        "grouped queries": (heads // 4, None, None),
        "documents": (heads // 4, None, offsets),
        "window": (heads // 4, tokens // 8, None),
        "documents and window": (heads // 4, tokens // 16, offsets),
    }
    for name, (groups, window, documents) in cases.items():
        with job.part(name):
            pattern, (q, k, v) = make(heads, groups, tokens, window, documents)

            def forward(pattern=pattern, q=q, k=k, v=v):
                return pattern.attend(q, k, v, size**-0.5, None)

            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                y = forward()
            operators = sorted(
                {event.key for event in profile.key_averages() if re.search(r"attention_|_attn|attention$", event.key)}
            )
            job.report(f"{name}: operators", operators)
            fused = any(re.search("flash|cudnn|efficient|varlen", operator) for operator in operators)
            if job.small and name not in ("causal", "grouped queries"):
                job.needs_cuda(f"{name}: a fused operator")  # a CPU has none for masks
            else:
                job.check(f"{name}: a fused operator", fused)
            few = torch.tensor([0, 100, 164, 512], dtype=torch.int32, device=job.device)
            beginnings = few if documents is not None else None
            short_window = 48 if window else None
            pattern, qkv = make(4, 4 * groups // heads, 512, short_window, beginnings)
            found = pattern.attend(*qkv, size**-0.5, None).float().cpu()
            expected = from_all_scores(*qkv, short_window, beginnings)
            worst = float((found - expected).abs().max().detach())
            limit = "max_float32_difference" if job.small else "max_bfloat16_difference"
            job.check(f"{name}: largest difference from all scores in float32, 512 tokens", worst, limit)
            forward_s = seconds_of(job, forward)
            both_s = seconds_of(job, lambda forward=forward, y=y: forward().backward(torch.ones_like(y)))
            flops = 4 * heads * tokens**2 * size / 2
            job.report(f"{name}: forward, forward and backward in ms", [forward_s * 1e3, both_s * 1e3])
            if name == "causal" and not job.small:
                job.check("causal: forward TFLOP/s", flops / forward_s / 1e12, "min_attention_tflop_s", most=False)
            elif name == "causal":
                job.report("causal: forward TFLOP/s", flops / forward_s / 1e12)
                job.needs_cuda("causal: forward TFLOP/s as an H100 should reach")


def from_all_scores(q, k, v, window: int | None, offsets):
    """Attention by its definition, on the CPU in float32."""
    import torch

    q, k, v = (part.detach().float().cpu() for part in (q, k, v))
    k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
    at = torch.arange(q.shape[2])
    visible = at <= at[:, None]
    if window:
        visible &= at > at[:, None] - window
    if offsets is not None:
        document = torch.searchsorted(offsets.cpu().long(), at, right=True)
        visible &= document == document[:, None]
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~visible, float("-inf"))
    return scores.softmax(-1) @ v


def seconds_of(job: Job, work: Callable) -> float:

    repeats = 3 if job.small else 20
    for _ in range(3):
        work()
    synchronize(job)
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize(job)
    return (time.perf_counter() - started) / repeats


def synchronize(job: Job) -> None:
    import torch

    if not job.small:
        torch.cuda.synchronize()


# --- asynchronous save ------------------------------------------------------------------------------------------------


def asynchronous_save(job: Job) -> None:
    import torch

    from pretraining.settings import CheckpointSettings

    join_process_group(job.device)
    config = TINY if job.small else MIDDLE
    harness.write_dataset(job.work_dir / "data", 400_000, config["vocab_size"])
    calls = []
    for owner, name in (
        (torch.cuda, "synchronize"),
        (torch.cuda.Stream, "synchronize"),
        (torch.cuda.Event, "synchronize"),
        (torch.cuda.Stream, "wait_stream"),
    ):
        original = getattr(owner, name)

        def counted(*args, original=original, name=name, **kwargs):
            if threading.current_thread().name == "checkpoint":
                calls.append(name)
            return original(*args, **kwargs)

        setattr(owner, name, counted)
    steps = 12 if job.small else 60
    settings = make_settings(
        job, config, job.work_dir, checkpoint=CheckpointSettings(keep_last=1),
        train={"max_steps": steps, "save_interval": steps // 3, "global_batch_size": 8, "micro_batch_size": 4},
    )  # fmt: skip
    trainer = make_trainer(settings)
    during, quiet = [], []
    write, stalls, save = trainer.metrics.write, [], trainer.writer.save

    def note_step(record: dict) -> None:
        writing = any(thread.name == "checkpoint" for thread in threading.enumerate())
        if record["step"] > 5:
            (during if writing else quiet).append(record["step_s"])
        write(record)

    def note_save(*args) -> float:
        stalls.append(save(*args))
        return stalls[-1]

    trainer.metrics.write, trainer.writer.save = note_step, note_save
    trainer.run()
    job.check("every save became a checkpoint", trainer.writer.error is None and len(stalls) == 3)
    job.report("steps measured while a save was written", len(during))
    job.report("a checkpoint in bytes", trainer.writer.state_bytes())
    job.report("stalls by saves in s; the first allocates", stalls)
    slowdown = statistics.median(during) / statistics.median(quiet) - 1 if during else None
    if job.small:
        job.needs_cuda("steps are slower by, while a save is written")
        job.needs_cuda("no synchronization in the writing thread", "staging copy in GB/s")
        return
    job.check("no synchronization in the writing thread", not calls)
    if slowdown is None:
        job.report("steps are slower by, while a save is written", "no step ended while one was written")
    else:
        job.check("steps are slower by, while a save is written", slowdown, "max_save_slowdown")
    bandwidth = trainer.writer.state_bytes() / stalls[1] / 1e9  # the second copies into page-locked memory that exists
    job.check("staging copy in GB/s", bandwidth, "min_staging_gb_s", most=False)


# --- 8B on a fake process group ---------------------------------------------------------------------------------------


def compute_only(job: Job) -> None:
    """Rank 0 of the run's processes, whose collectives cost nothing: what computation alone can reach."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from pretraining.settings import ParallelSettings
    from utils.cli import parse_settings

    if job.small:
        world_size, local_size = 4, 2
        base = make_settings(job, TINY, precision="bf16-mixed", train={"global_batch_size": 16})
    else:
        from pretraining.settings import Settings

        world_size, local_size = 32, 8
        flags = [f"--config={CONFIGS / 'llama3-8b.yaml'}", "--dataset_path=none", "--precision=bf16-mixed"]
        base = parse_settings(Settings, "", [*flags, "--accelerator=cuda"])
        torch.cuda.set_device(0)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    for recomputation in ["selective"] if job.small else ["selective", "none"]:
        with job.part(recomputation):
            parallel: ParallelSettings = dataclasses.replace(
                base.parallel, activation_checkpointing=recomputation, compile=True, reduce_every_micro_batch=True
            )
            train = dataclasses.replace(base.train, micro_batch_size=1)
            settings = dataclasses.replace(base, parallel=parallel, train=train)
            train_alone(job, settings, world_size, local_size, recomputation)
        gc.collect()


def train_alone(job: Job, settings, world_size: int, local_size: int, name: str) -> None:
    import torch
    from torch._dynamo.utils import counters

    from pretraining.memory import plan_memory
    from pretraining.model import build_model, count_parameters, training_flops_per_token
    from pretraining.model_config import resolve_model_config
    from pretraining.optimizer import make_optimizers
    from pretraining.parallelism import device_mesh, local_shard, shard_model
    from pretraining.throughput import PEAK_FLOPS

    torch._dynamo.reset()
    counters.clear()
    config = dataclasses.asdict(resolve_model_config(settings))
    context = settings.train.max_seq_length or config["block_size"]
    if not job.small:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = build_model(config, settings, context)
    num_parameters = count_parameters(model)
    shard_model(model, device_mesh(settings, job.device, world_size, local_size), settings)
    model.to_empty(device=job.device)
    model.reset_parameters()
    with torch.no_grad():
        for parameter in model.parameters():
            local_shard(parameter).normal_(std=0.02)
    optimizers = make_optimizers(model, settings.optimizer)
    tokens = torch.randint(config["vocab_size"], (settings.train.micro_batch_size, context + 1), device=job.device)

    def micro_batch() -> None:
        _, objective = model(tokens[:, :-1], tokens[:, 1:])
        (objective / tokens.numel()).backward()

    for _ in range(2):  # the first compiles
        micro_batch()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    job.check(f"{name}: one compiled graph for all blocks", counters["stats"]["unique_graphs"] == 1)
    job.check(f"{name}: no graph break", not counters["graph_break"])
    micro_s = seconds_of(job, micro_batch)
    job.report(f"{name}: a micro-batch of {tokens.numel() - len(tokens)} tokens in s", micro_s)
    plan = types.SimpleNamespace(model_config=config, context_tokens=context)
    memory = plan_memory(settings, plan, world_size, local_size)
    planned = memory.total - getattr(memory, "overhead", 0)  # CUDA's context and NCCL's buffers are not torch's
    job.report(f"{name}: planned memory in bytes", planned)
    if job.small:
        job.needs_cuda(f"{name}: peak memory beside the plan", f"{name}: MFU of computation alone")
        return
    peak = torch.cuda.max_memory_allocated()
    job.report(f"{name}: peak memory in bytes, allocated", peak)
    job.check(f"{name}: peak memory differs from the plan by", abs(peak / planned - 1), "max_plan_error")
    flops = training_flops_per_token(model.config, num_parameters, context, settings.train.tie_embeddings)
    device = torch.cuda.get_device_name()
    peak_flops = next((value for key, value in PEAK_FLOPS.items() if key in device), PEAK_FLOPS["H100"])
    mfu = flops * settings.train.micro_batch_size * context / micro_s / peak_flops
    job.check(f"{name}: MFU of computation alone", mfu, "min_mfu", most=False)


# --- 1B, and its trace ------------------------------------------------------------------------------------------------


def real_trainer(job: Job) -> None:
    import torch

    from pretraining.settings import Settings
    from utils.cli import parse_settings
    from utils.metrics_file import read_metrics

    join_process_group(job.device)
    steps = 10 if job.small else 20
    if job.small:
        harness.write_dataset(job.work_dir / "data", 40_000, TINY["vocab_size"])
        settings = make_settings(job, TINY, job.work_dir, train={"max_steps": steps}, profile_steps=2)
    else:
        harness.write_dataset(job.work_dir / "data", 20_000_000, 128_000)
        flags = [
            f"--config={CONFIGS / 'llama3.2-1b.yaml'}", f"--dataset_path={job.work_dir / 'data'}",
            f"--out_dir={job.work_dir / 'out'}", "--num_nodes=1", "--num_devices=1", "--accelerator=cuda",
            "--precision=bf16-mixed", "--train.global_batch_size=8", "--train.micro_batch_size=2",
            f"--train.max_steps={steps}", "--train.max_tokens=null", "--train.save_interval=null",
            "--eval.initial_validation=false", "--eval.final_validation=false", "--profile_steps=3",
            "--parallel.compile=true", "--train.log_interval=1", "--tokenizer_dir=null",
        ]  # fmt: skip
        settings = parse_settings(Settings, "", flags)
    trainer = make_trainer(settings)
    trainer.writer.save = lambda *_: 0.0
    trainer.run()
    records = read_metrics(trainer.out_dir)
    late = records[steps // 2 :]  # after compilation and the trace
    step_s = statistics.median(record["step_s"] for record in late)
    job.report("tokens/s", trainer.plan.tokens_per_step / step_s)
    job.check("the loss is finite", all(record["nonfinite_steps"] == 0 for record in records))
    wait = statistics.median(record["data_wait_s"] for record in late) / step_s
    if job.small:
        job.report("share of a step that waits for data", wait)
        job.needs_cuda("MFU", "share of the time in which the GPU is idle")
    else:
        job.report("MFU", statistics.median(record["mfu"] for record in late))
        job.check("share of a step that waits for data", wait, "max_idle")
        (job.work_dir / "memory.json").write_text(
            json.dumps([torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()])
        )
        job.check("share of the time in which the GPU is idle", 1 - busy_share(trace_of(job)), "max_idle")


def trace_of(job: Job) -> list[dict[str, Any]]:
    events = json.loads((job.work_dir / "out" / "profile" / "trace.json").read_bytes())["traceEvents"]
    return [event for event in events if event.get("ph") == "X"]


def busy_share(events: list[dict[str, Any]]) -> float:
    """The share of the time between the first and the last kernel in which one runs."""
    categories = ("kernel", "gpu_memcpy", "gpu_memset")
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event.get("cat") in categories)
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy / (end - spans[0][0])


def trace(job: Job) -> None:
    """What the row before left behind."""
    events = trace_of(job)
    wanted = "cpu_op" if job.small else "kernel"
    times: dict[str, float] = {}
    for event in events:
        if event.get("cat") == wanted:
            times[event["name"][:80]] = times.get(event["name"][:80], 0.0) + event["dur"]
    job.check("the trace holds what ran", bool(times))
    top = sorted(times.items(), key=lambda item: -item[1])[:10]
    job.report(f"most time, by {wanted}, in ms", {name: round(value / 1e3, 2) for name, value in top})
    if job.small:
        job.needs_cuda("reserved and allocated memory")
        return
    reserved, allocated = json.loads((job.work_dir / "memory.json").read_text())
    job.report("reserved and allocated memory at their peaks, in bytes", [reserved, allocated])
    job.report("reserved over allocated", reserved / allocated)


# --- the kit ----------------------------------------------------------------------------------------------------------

ROWS: dict[str, tuple[Callable[[Job], None], float]] = {  # and the seconds after which a row is given up on a GPU
    "software": (software, 60),
    "results": (results, 180),
    "saving": (saving, 120),
    "attention": (attention, 120),
    "asynchronous_save": (asynchronous_save, 180),
    "compute_only": (compute_only, 360),
    "real_trainer": (real_trainer, 240),
    "trace": (trace, 60),
}
LIMITS = {
    "min_driver": (580, "oldest driver"),
    "max_float32_difference": (1e-4, "of losses, between GPU and CPU"),
    "max_bfloat16_difference": (0.05, "of losses, between bfloat16 and float32 on a CPU"),
    "min_attention_tflop_s": (450, "of causal attention, forward"),
    "max_save_slowdown": (0.05, "of a step while a checkpoint is written"),
    "min_staging_gb_s": (20, "of the copy to main memory"),
    "max_plan_error": (0.1, "of the memory plan"),
    "min_mfu": (0.5, "of the 8B model, computation alone"),
    "max_idle": (0.02, "share of a step in which the GPU is idle, or waits for data"),
}


def child(row: str, device: str, directory: str, limits: dict[str, float], connection) -> None:
    """A row's process; its checks go through `connection` one by one."""
    job = Job(device, Path(directory), limits, connection.send)

    def work() -> None:
        with job.part("the row"):
            ROWS[row][0](job)

    if device == "cpu":
        import torch

        torch.set_num_threads(1)
    thread = threading.Thread(target=work)  # where Ray Train runs a worker's function
    thread.start()
    thread.join()
    connection.close()
    os._exit(0)  # whatever a library still has running; everything that counts has been sent


def run_row(
    row: str, device: str, directory: Path, limits: dict[str, float], note: Callable[[dict], None], start: str
) -> None:
    context = multiprocessing.get_context(start)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(row, device, str(directory), limits, sender))
    process.start()
    sender.close()
    deadline = time.monotonic() + ROWS[row][1]
    ended = False
    while not ended and receiver.poll(max(0.0, deadline - time.monotonic())):
        try:
            note(receiver.recv())
        except EOFError:
            ended = True
    if not ended:
        process.kill()
        note({"check": "the row", "outcome": "fail", "value": f"no end within {ROWS[row][1]:.0f} s"})
    process.join()
    if ended and process.exitcode != 0:
        note({"check": "the row", "outcome": "fail", "value": f"its process ended with {process.exitcode}"})


def outcome_of(checks: list[dict[str, Any]]) -> str:
    found = {check["outcome"] for check in checks}
    return next((one for one in ("fail", "pass", "report") if one in found), "needs CUDA")


def print_table(rows: list[dict[str, Any]]) -> None:
    def shown(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4g}"
        if isinstance(value, list | dict):
            parts = value.items() if isinstance(value, dict) else enumerate(value)
            return ", ".join(shown(one) if isinstance(value, list) else f"{key} {shown(one)}" for key, one in parts)
        return "-" if value is None else str(value)

    cells = [
        (row["row"], check["check"], shown(check["value"]), shown(check.get("limit")), check["outcome"])
        for row in rows
        for check in row["checks"]
    ]
    print(harness.table(["row", "check", "found", "limit", "outcome"], cells))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--output", type=Path, default=Path("gpu_acceptance.json"))
    parser.add_argument(
        "--start_method",
        choices=["fork", "spawn"],
        help="fork shares the imports, but CUDA may not survive it (default: spawn on cuda, fork on cpu)",
    )
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    for name, (default, words) in LIMITS.items():
        parser.add_argument(f"--{name}", type=float, default=default, help=f"{words} (default: {default})")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "auto":  # asked of the system, not of torch: this process must not touch CUDA
        device = "cuda" if glob.glob("/dev/nvidia[0-9]*") else "cpu"
    from utils.files import write_json

    start = arguments.start_method or ("fork" if device == "cpu" else "spawn")
    if start == "fork":
        import pretraining.memory
        import pretraining.trainer  # noqa: F401  once, for all rows, which are forked

    found = {
        "benchmark": "gpu_acceptance",
        **harness.environment("torch", "lightning", "litgpt", "litdata", "jsonargparse"),
        "device": device,
        "rows": [],
    }
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        for name in arguments.rows:
            row: dict[str, Any] = {"row": name, "outcome": "running", "checks": []}
            found["rows"].append(row)

            def note(check: dict[str, Any], row=row) -> None:
                row["checks"].append(check)
                write_json(arguments.output, found)

            row_started = time.monotonic()
            # The last row reads what the one before it wrote.
            work_dir = Path(directory) / ("real_trainer" if name == "trace" else name)
            work_dir.mkdir(exist_ok=True)
            run_row(name, device, work_dir, {key: getattr(arguments, key) for key in LIMITS}, note, start)
            row["seconds"] = round(time.monotonic() - row_started, 1)
            row["outcome"] = outcome_of(row["checks"])
            write_json(arguments.output, found)
            print(f"{name}: {row['outcome']} ({row['seconds']} s)", file=sys.stderr, flush=True)
    print_table(found["rows"])
    failed = [row["row"] for row in found["rows"] if row["outcome"] == "fail"]
    print(
        f"\n{device}, {time.monotonic() - started:.0f} s: " + (f"FAILED: {', '.join(failed)}" if failed else "passed")
    )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
