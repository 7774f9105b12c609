"""The driver's side of Ray: what the cluster has, starting the training processes on it, and waiting for them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from pretraining.failures import Failure, Restarts, TrainingEnded, UnevenPlacement, failure_of
from pretraining.plan import Plan
from pretraining.process_layout import group_timeout
from pretraining.ray_output import hide_crash_reports
from pretraining.settings import STOP_NAME, Settings
from pretraining.user_error_note import RAY_NAME, note_path, read_note
from pretraining.watchdog import Watchdog, Watchers
from pretraining.worker_environment import ChooseInterface, worker_environment
from utils import console
from utils.errors import UserError
from utils.node_check import check_nodes, probe_in

CHECKED_PACKAGES = ("torch", "lightning", "litgpt", "litdata", "ray", "numpy", "xxhash")


def resource_of(accelerator: str) -> str:
    """Ray's word for what one process takes."""
    return "GPU" if accelerator == "cuda" else "CPU"


def with_cluster(settings: Settings) -> Settings:
    """Settle accelerator, processes and precision by what the cluster has.

    Raises:
        UserError: it has too little.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    accelerator = settings.accelerator
    if accelerator == "auto":
        accelerator = "cuda" if any(int(resources.get("GPU", 0)) for resources in nodes) else "cpu"
    resource = resource_of(accelerator)
    room = sorted((int(resources.get(resource, 0)) for resources in nodes), reverse=True)
    num_devices = settings.num_devices or (room[0] if accelerator == "cuda" else 1)
    fitting = sum(count >= num_devices > 0 for count in room)
    if accelerator == "cuda" and not any(room):
        raise UserError("--accelerator=cuda: no node of the cluster has a GPU. Give --accelerator=cpu, or GPU nodes.")
    if fitting < settings.num_nodes:
        raise UserError(
            f"--num_nodes={settings.num_nodes} with --num_devices={num_devices}: the cluster has {fitting} nodes with "
            f"so many {resource}s (per node: {room}). Start more, ask for less, or give --address=local for a cluster "
            "of this machine's own."
        )
    precision = settings.precision or ("bf16-mixed" if accelerator == "cuda" else "32-true")
    return dataclasses.replace(settings, accelerator=accelerator, num_devices=num_devices, precision=precision)


def check_training_nodes(settings: Settings, plan: Plan) -> list[dict[str, str]]:
    """Check that the nodes that can take part run this software, and see the data and out_dir.

    Returns:
        Those nodes, as `check_nodes` does.

    Raises:
        UserError: with all nodes that do not.
    """
    resource = resource_of(settings.accelerator)
    able = {node["NodeID"] for node in ray.nodes() if node["Resources"].get(resource, 0) >= settings.num_devices}
    paths = {"--dataset_path": plan.train_directories + plan.val_directories}
    for flag in ("tokenizer_dir", "initial_checkpoint_dir"):
        if getattr(settings, flag) is not None:
            paths[f"--{flag}"] = [getattr(settings, flag)]
    with probe_in(settings.out_dir) as probe:
        return check_nodes({**paths, "--out_dir": [probe]}, CHECKED_PACKAGES, node_ids=able)


class _Trainer(TorchTrainer):
    # Ray's handler ends the process in silence. Ctrl-C means here what it means in the other scripts.
    def _register_sigint_handler(self, controller):
        pass

    # Ray's cleaner is a detached actor that asks the dashboard every second whether the run still lives; without a
    # dashboard it complains every second, and outlives a killed driver. Ray frees a dead driver's resources anyway.
    def _create_default_callbacks(self):
        callbacks = super()._create_default_callbacks()
        kept = [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]
        return [*kept, ChooseInterface()]


def _start_worker(job: dict[str, Any]) -> None:
    # Imported by the workers alone: litgpt and Lightning take ten seconds, and the driver needs neither.
    from pretraining.worker import train_worker

    train_worker(**job)


def placement_of(num_nodes: int, num_devices: int, room: list[int]) -> str:
    """Ray's placement strategy. SPREAD would deal one process at a time over spare nodes too, and fill none of them.

    Args:
        room: processes that each node of the cluster can take.
    """
    return "PACK" if num_nodes == 1 or max(room) == num_devices else "SPREAD"


def fit(settings: Settings, plan: Plan) -> None:
    """Start the workers by Ray Train, wait for them, and start them again after a failure as often as allowed.

    Ray Train's own restarts (FailureConfig) are not used: it counts every failure of a run, however far it got between
    them, and says nothing.

    Raises:
        UserError: what a worker raised, or the cluster is gone.
        TrainingEnded: they failed too often.
    """
    out_dir = Path(settings.out_dir)
    note_path(out_dir).unlink(missing_ok=True)  # of a driver that was killed
    if sum(node["Alive"] for node in ray.nodes()) == 1:
        # The driver is on the only node: it would go with it. SIGTERM is the notice then.
        os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    if console.VERBOSITY < 2:
        hide_crash_reports()
    restarts, watchers = Restarts(out_dir, settings.max_failures), Watchers()
    try:
        while True:
            token = secrets.token_hex(8)
            watchers.start()
            with Watchdog(watchers, token, settings) as watchdog:
                error = fit_once(settings, plan, token)
            user_error = user_error_of(error)
            if problems := read_note(out_dir):
                raise UserError(problems)
            if user_error is not None and not isinstance(user_error, UnevenPlacement):
                raise user_error
            if error is None:
                return
            try:
                restarts.add(watchdog.hang or failure_seen(error, watchers, token, out_dir))
            except TrainingEnded:
                if user_error is not None:
                    raise user_error from None
                raise
            watchers.forget(token)
    except ray.exceptions.RayTaskError:
        raise
    except ray.exceptions.RayError as error:
        first_line = str(error).strip().splitlines()[0]
        raise UserError(
            f"the Ray cluster went away, or the node of the driver did ({type(error).__name__}: {first_line}). See "
            f"`ray status`. What is finished is kept; the same command goes on:\n  {console.this_command()}"
        ) from error
    finally:
        shutil.rmtree(out_dir / RAY_NAME, ignore_errors=True)
        with contextlib.suppress(ray.exceptions.RayError):
            watchers.forget(token)
            watchers.close()


def fit_once(settings: Settings, plan: Plan, token: str) -> Exception | None:
    """Start the workers once; returns what ended them, or None when they came to their end."""
    resource = resource_of(settings.accelerator)
    room = [int(node["Resources"].get(resource, 0)) for node in ray.nodes() if node["Alive"]]
    environment = worker_environment(os.environ, settings.accelerator)
    trainer = _Trainer(
        _start_worker,
        train_loop_config={"settings": settings, "plan": plan, "verbosity": console.VERBOSITY, "token": token},
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.num_nodes * settings.num_devices,
            use_gpu=settings.accelerator == "cuda",
            resources_per_worker={resource: 1},
            placement_strategy=placement_of(settings.num_nodes, settings.num_devices, room),
        ),
        torch_config=TorchConfig(timeout_s=int(group_timeout(settings).total_seconds())),
        run_config=ray.train.RunConfig(
            name="ray_train",
            storage_path=str(Path(settings.out_dir) / RAY_NAME),
            failure_config=ray.train.FailureConfig(max_failures=0, max_preemption_failures=0),
            worker_runtime_env={"env_vars": environment} if environment else None,
            logging_config=ray.train.LoggingConfig(log_level="INFO" if console.VERBOSITY >= 2 else "CRITICAL"),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        return error
    return None


def failure_seen(error: Exception, watchers: Watchers, token: str, out_dir: Path) -> Failure:
    """What ended a start of the workers, with what is left of them on their nodes."""
    seen = watchers.look(token)
    ranks = [one.rank for one in seen if one.rank in getattr(error, "worker_failures", {})]
    errors = {rank: found for rank in ranks if (found := watchers.error(token, rank))}
    return failure_of(error, seen, errors, lambda rank: watchers.log(token, rank), out_dir)


def user_error_of(error: Exception | None) -> UserError | None:
    """The UserError that a worker raised, if one did."""
    failures = getattr(error, "worker_failures", {}).values()
    return next((failure for failure in failures if isinstance(failure, UserError)), None)


@contextlib.contextmanager
def stop_on_sigterm(out_dir: Path) -> Iterator[None]:
    """SIGTERM asks the workers, through a file that they look for, to save and end."""

    def ask(signum, frame) -> None:
        console.warn("SIGTERM: saving a checkpoint, then ending")
        (out_dir / STOP_NAME).touch()

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
