"""Run the trainer in real processes over gloo without Ray, whose start would cost each test half a minute.

Each rank is forked from a process that has done the imports, which would cost every rank eight seconds of a core. It
trains each run of a job, one after the other.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing.forkserver
import os
import socket
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FORKS = multiprocessing.get_context("forkserver")
SLOW_S = 0.1
"""By which the rank that SLOW_RANK names is slower, per micro-batch."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def settings_of(config: Path, dataset: Path, out_dir: Path, num_devices: int, **changes):
    """Settings as the command line would make them; `changes` are flags with '.' written as '__'."""
    from pretraining.settings import Settings
    from utils.cli import parse_settings

    flags = [f"--{name.replace('__', '.')}={value}" for name, value in changes.items()]
    settings = parse_settings(
        Settings,
        "",
        [
            f"--config={config}",
            f"--dataset_path={dataset}",
            f"--out_dir={out_dir}",
            f"--num_devices={num_devices}",
            "--accelerator=cpu",
            *([] if "precision" in changes else ["--precision=32-true"]),
            *flags,
        ],
    )
    return settings


def start_fork_server() -> None:
    """Once per process of pytest."""
    import pytest

    FORKS.set_forkserver_preload([__name__, "pretraining.trainer"])
    # Read when libraries are loaded: where they are; and one thread, because a fork has no other.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
        patch.setenv("OMP_NUM_THREADS", "1")
        multiprocessing.forkserver.ensure_running()


def start_ranks(runs: list, num_ranks: int, directory: Path, env: dict | None = None) -> list[BaseProcess]:
    """Start `num_ranks` processes that train every one of `runs` (Settings); what they print is in rank-N.log."""
    from pretraining.plan import make_plan

    start_fork_server()
    directory.mkdir(parents=True, exist_ok=True)
    job = [(settings, make_plan(settings)) for settings in runs]
    for settings in runs:
        Path(settings.out_dir).mkdir(parents=True, exist_ok=True)
    port = free_port()
    processes = []
    for rank in range(num_ranks):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            **(env or {}),
        }
        processes.append(FORKS.Process(target=be_rank, args=(job, directory / f"rank-{rank}.log", environment)))
        processes[-1].start()
    return processes


def run_ranks(runs: list, num_ranks: int, directory: Path, env: dict | None = None, check: bool = True) -> list[int]:
    """Start them and wait; returns the exit codes."""
    processes = start_ranks(runs, num_ranks, directory, env)
    deadline = time.monotonic() + 240
    for process in processes:
        process.join(deadline - time.monotonic())
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()  # one that hangs
    if check and any(code != 0 for code in codes):
        logs = "\n".join(
            f"--- {path.name}\n{path.read_text()[-4000:]}" for path in sorted(directory.glob("rank-*.log"))
        )
        raise AssertionError(f"exit codes {codes}\n{logs}")
    return codes


def kill_when(processes: list[BaseProcess], condition: Callable[[], object]) -> None:
    """SIGKILL all processes at the moment when `condition()` holds."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline and all(process.is_alive() for process in processes)
        time.sleep(0.001)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def metrics_of(out_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (Path(out_dir) / "metrics.jsonl").read_text().splitlines()]


def losses_of(out_dir: Path) -> list[float]:
    return [record["loss"] for record in metrics_of(out_dir) if "loss" in record]


def digests_of(out_dir: Path) -> list[str]:
    return [record["batch_digest"] for record in metrics_of(out_dir) if "batch_digest" in record]


def weights_of(checkpoint: Path) -> dict:
    """Full tensors by name, as Lightning's consolidation reads them."""
    from lightning.fabric.utilities.load import _load_distributed_checkpoint

    return _load_distributed_checkpoint(checkpoint / "lit_model.pth")


def be_rank(job: list, log: Path, environment: dict[str, str]) -> None:
    """The process of one rank."""
    import resource

    import torch

    import pretraining.slow_ranks
    from pretraining.trainer import Trainer

    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    if "TORCH_LOGS" in environment:
        torch._logging._internal._init_logs()  # as at its import
    if "SLOW_RANK" in environment:  # a test has not the time for 50
        pretraining.slow_ranks.SLOW_STEPS = 6
    if limit := environment.get("LIMIT_FILE_BYTES"):  # writing beyond it fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    for settings, plan in job:
        trainer = Trainer(settings, plan)
        if environment.get("PRINT_TIMEOUTS"):
            mesh = trainer.parameters[0].device_mesh
            for group in (torch.distributed.group.WORLD, *mesh.get_all_groups()):
                print("timeout_s", group._get_backend(torch.device("cpu")).options._timeout.total_seconds())
        if environment.get("SLOW_RANK") == str(trainer.rank):
            trainer.model.transformer.h[0].register_forward_pre_hook(lambda *_: time.sleep(SLOW_S))
        trainer.resume_or_initialise()
        trainer.run()
        if settings.log.run == "measure memory":
            measure_memory(trainer)
    with contextlib.suppress(Exception):
        torch.distributed.destroy_process_group()


def measure_memory(trainer) -> None:
    """Write what this process really holds, in bytes, to out_dir/allocated-RANK.json."""
    import torch

    from pretraining.memory import tensors_saved_for_backward

    def held(tensors) -> int:
        """Bytes of the distinct storages: FSDP2 reduces the gradients of a block into one."""
        local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
        return sum(
            {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in local}.values()
        )

    size, context = trainer.settings.train.micro_batch_size, trainer.plan.context_tokens
    tokens = torch.zeros(size, context, dtype=torch.int64)
    trainer.optimizers[0].zero_grad()
    with trainer.fabric.no_backward_sync(trainer.wrapped, enabled=False):
        with tensors_saved_for_backward(trainer.model) as kept:
            _, objective = trainer.wrapped(tokens, tokens)
        activations = sum(kept.values())
        trainer.fabric.backward(objective)
    allocated = {
        "parameters": held(trainer.parameters),
        "gradients": held([p.grad for p in trainer.parameters]),
        "optimizer": held(
            [value for o in trainer.optimizers for state in o.state.values() for value in state.values()]
        ),
        "activations": activations,
    }
    (trainer.out_dir / f"allocated-{trainer.rank}.json").write_text(json.dumps(allocated))
