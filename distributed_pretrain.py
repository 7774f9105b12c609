"""Pretrain a language model (step 3): token chunks in, sharded checkpoints out.

Ray Train starts one process a GPU (or CPU process), Lightning Fabric and FSDP2 spread litgpt's model over them.

  The main run, on a Ray cluster of 4 nodes with 8 H100 each:
    python distributed_pretrain.py --config config_hub/llama3-8b.yaml --model_name Meta-Llama-3-8B \\
        --dataset_path data/fineweb --tokenizer_dir checkpoints/meta-llama/Meta-Llama-3-8B \\
        --num_nodes 4 --out_dir out/llama3-8b

  On a laptop, two CPU processes and a small model:
    python distributed_pretrain.py --config config_hub/demo-cpu.yaml --dataset_path demo/dataset --out_dir demo/run

  What it would need, without a GPU:
    python distributed_pretrain.py --config config_hub/llama3-8b.yaml --dataset_path data/fineweb --dry_run

The same command goes on after a crash, bit for bit, from the newest whole checkpoint in --out_dir. SIGTERM, or a file
named 'stop' in --out_dir, ends a run early with a checkpoint. Each YAML key is also a flag: --train.max_steps=100.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretraining.checkpoint import (
    FINAL_NAME,
    WEIGHTS_NAME,
    find_newest_good,
    list_checkpoints,
    rename_final_to_its_step,
)
from pretraining.loggers import Follower, make_logger, progress_line
from pretraining.plan import Plan, make_plan
from pretraining.process_layout import micro_batches_per_step, shard_size
from pretraining.run_identity import check_same_run, result_settings
from pretraining.settings import STOP_NAME, Settings
from utils import cli, console
from utils.errors import UserError
from utils.files import held_lock, write_json
from utils.metrics_file import read_metrics, rewind_metrics

CHECKED_PACKAGES = ("torch", "lightning", "litgpt", "litdata", "ray", "numpy", "xxhash")
RAY_NAME = ".ray"  # in out_dir: what Ray Train and its workers leave for the driver while a run lasts


def main(settings: Settings) -> None:
    if settings.model_name == "list":
        from pretraining.model_config import model_names

        console.result("\n".join(model_names()))
        return
    as_given = settings
    settings = with_absolute_paths(settings)
    plan = make_plan(settings)
    if settings.dry_run:
        from pretraining.memory import print_dry_run

        print_dry_run(settings, plan)
        return
    out_dir = Path(settings.out_dir)
    newest = newest_checkpoint(settings, plan)
    if newest is not None and newest.step >= plan.total_steps:
        console.say(f"nothing to do: {newest.path} is at step {newest.step} of {plan.total_steps}.")
        print_next_commands(as_given)
        return
    out_dir.mkdir(parents=True, exist_ok=True)
    with held_lock(out_dir) as mine:
        if not mine:
            raise UserError(
                f"--out_dir={out_dir}: another distributed_pretrain.py trains there. Wait for it, or give another directory. "
                f"To end it with a checkpoint: touch {out_dir / STOP_NAME}"
            )
        (out_dir / STOP_NAME).unlink(missing_ok=True)
        rename_final_to_its_step(out_dir)
        try:
            train_on_ray(settings, plan)
        finally:
            (out_dir / STOP_NAME).unlink(missing_ok=True)
    report(settings, plan, as_given)


def with_absolute_paths(settings: Settings) -> Settings:
    """Workers run in other directories."""
    paths = ("dataset_path", "out_dir", "tokenizer_dir", "initial_checkpoint_dir")
    changes: dict[str, Any] = {
        name: os.path.abspath(getattr(settings, name)) for name in paths if getattr(settings, name) is not None
    }
    if settings.data_mixture is not None:
        changes["data_mixture"] = {os.path.abspath(path): weight for path, weight in settings.data_mixture.items()}
    return dataclasses.replace(settings, **changes)


def newest_checkpoint(settings: Settings, plan: Plan):
    """The newest checkpoint whose files have the right sizes; the workers compare checksums before they load."""
    newest, skipped = find_newest_good(settings.out_dir, checksums=False)
    for line in skipped:
        console.warn(f"skipped checkpoint {line}")
    if newest is not None:
        changes = check_same_run(newest.manifest["settings"], result_settings(settings, plan), settings.out_dir)
        for change in changes:
            console.say(f"resume with another {change}")
    return newest


# --- the driver: starts the workers, shows their progress -------------------------------------------------------------


def train_on_ray(settings: Settings, plan: Plan) -> None:
    """Run `train_worker` on every process of the cluster, and pass its records on to the terminal and the logger."""
    wandb_key = os.environ.pop("WANDB_API_KEY", None)  # before Ray starts: what Ray starts inherits this environment
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    from utils.ray_cluster import find_cluster, ray_session

    out_dir = Path(settings.out_dir)
    with ray_session(find_cluster(settings.address)):
        settings = with_cluster(settings)
        check_training_nodes(settings, plan)
        world_size = settings.num_nodes * settings.num_devices
        accumulation = micro_batches_per_step(settings, world_size)
        shard_size(settings, world_size, settings.num_devices)
        newest, _ = find_newest_good(out_dir, checksums=False)
        first_step = newest.step if newest else 0
        console.say(
            f"training {plan.model_config['name']} on {world_size} {settings.accelerator} processes: steps {first_step} to "
            f"{plan.total_steps}, {console.human_count(plan.tokens_per_step)} tokens a step ({accumulation} x "
            f"{settings.train.micro_batch_size} sequences of {plan.context_tokens} a process)"
        )
        # The records of what will be done again: nobody is to take them for new ones. The workers do the same once they
        # have compared checksums.
        dropped = len(read_metrics(out_dir))
        earlier = rewind_metrics(out_dir, first_step if newest else -1)
        dropped -= len(earlier)
        if newest:
            console.say(
                f"resume: from {newest.path}"
                + (f"; {dropped} later records are dropped and made again" if dropped else "")
            )
        logger = make_logger(
            settings.logger_name, out_dir, earlier, result_settings(settings, plan), settings.log, wandb_key
        )

        def consume(record: dict[str, Any]) -> None:
            console.say(progress_line(record, plan.total_steps))
            logger.log(record)

        console.say("starting the workers; the first step follows in about half a minute, later if --parallel.compile")
        with stop_on_sigterm(out_dir), Follower(out_dir, first_step if newest else -1, consume):
            fit(settings, plan)
        for line in logger.close():
            console.say(line)


def resource_of(accelerator: str) -> str:
    """Ray's word for what one process takes."""
    return "GPU" if accelerator == "cuda" else "CPU"


def with_cluster(settings: Settings) -> Settings:
    """Settle accelerator, processes and precision by what the cluster has.

    Raises:
        UserError: it has too little.
    """
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    gpus = sorted((int(node["Resources"].get("GPU", 0)) for node in nodes), reverse=True)
    accelerator = settings.accelerator
    if accelerator == "auto":
        accelerator = "cuda" if gpus and gpus[0] > 0 else "cpu"
    resource = resource_of(accelerator)
    room = sorted((int(node["Resources"].get(resource, 0)) for node in nodes), reverse=True)
    num_devices = settings.num_devices or (room[0] if accelerator == "cuda" else 1)
    fitting = sum(1 for count in room if count >= num_devices > 0)
    if fitting < settings.num_nodes:
        raise UserError(
            f"--num_nodes={settings.num_nodes} with --num_devices={num_devices}: the cluster has {fitting} nodes with so many "
            f"{resource}s (per node: {room}). Start more, ask for less, or give --address=local for a cluster of this machine's own."
        )
    precision = settings.precision or ("bf16-mixed" if accelerator == "cuda" else "32-true")
    return dataclasses.replace(settings, accelerator=accelerator, num_devices=num_devices, precision=precision)


def check_training_nodes(settings: Settings, plan: Plan) -> None:
    """Do the nodes that can take part run this software, and see the data and out_dir? Raises UserError with all that do not."""
    import ray

    from utils.node_check import check_nodes, probe_in

    resource = resource_of(settings.accelerator)
    able = {node["NodeID"] for node in ray.nodes() if node["Resources"].get(resource, 0) >= settings.num_devices}
    paths = {"--dataset_path": plan.train_directories + plan.val_directories}
    for flag in ("tokenizer_dir", "initial_checkpoint_dir"):
        if getattr(settings, flag) is not None:
            paths[f"--{flag}"] = [getattr(settings, flag)]
    with probe_in(settings.out_dir) as probe:
        check_nodes({**paths, "--out_dir": [probe]}, CHECKED_PACKAGES, node_ids=able)


def fit(settings: Settings, plan: Plan) -> None:
    """Ray Train: start the workers, wait for them, start them again after a failure as often as allowed."""
    import ray.train
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    class Trainer(TorchTrainer):
        # Ray's handler ends the process in silence. Ctrl-C means here what it means in the other scripts.
        def _register_sigint_handler(self, controller):
            pass

        # Ray's cleaner is a detached actor that asks the dashboard every second whether the run still lives; without a
        # dashboard it complains every second, and outlives a killed driver. Ray frees a dead driver's resources anyway.
        def _create_default_callbacks(self):
            return [
                callback
                for callback in super()._create_default_callbacks()
                if not isinstance(callback, PlacementGroupCleanerCallback)
            ]

    problems_file(settings).unlink(missing_ok=True)  # of a driver that was killed
    if sum(node["Alive"] for node in ray.nodes()) == 1:
        # The driver is on the only node: it would go with it. SIGTERM is the notice then.
        os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    resource = resource_of(settings.accelerator)
    trainer = Trainer(
        train_worker,
        train_loop_config={"settings": settings, "plan": plan, "verbosity": console.VERBOSITY},
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.num_nodes * settings.num_devices,
            use_gpu=settings.accelerator == "cuda",
            resources_per_worker={resource: 1},
            placement_strategy="PACK" if settings.num_nodes == 1 else "SPREAD",
        ),
        run_config=ray.train.RunConfig(
            name="ray_train",
            storage_path=str(Path(settings.out_dir) / RAY_NAME),
            failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
            logging_config=ray.train.LoggingConfig(log_level="INFO" if console.VERBOSITY >= 2 else "ERROR"),
        ),
    )
    try:
        trainer.fit()
        if problems := reported_problems(settings):
            raise UserError(problems)
    except ray.train.WorkerGroupError as error:
        raise_user_error_of(error)
        raise
    except ray.exceptions.RayTaskError:
        raise
    except ray.exceptions.RayError as error:
        first_line = str(error).strip().splitlines()[0]
        raise UserError(
            f"the Ray cluster went away, or the node of the driver did ({type(error).__name__}: {first_line}). See `ray status`. What "
            f"is finished is kept; the same command goes on:\n  {console.this_command()}"
        ) from error
    finally:
        import shutil

        shutil.rmtree(Path(settings.out_dir) / RAY_NAME, ignore_errors=True)


def raise_user_error_of(error: Exception) -> None:
    """Raise the UserError that a worker raised, if that is what ended the run."""
    for failure in error.worker_failures.values():
        seen: BaseException | None = failure
        while seen is not None:
            for candidate in (seen, getattr(seen, "cause", None), getattr(seen, "_base_exc", None)):
                if isinstance(candidate, UserError):
                    raise candidate from None
            seen = seen.__cause__


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


def report(settings: Settings, plan: Plan, as_given: Settings) -> None:
    out_dir = Path(settings.out_dir)
    checkpoints, _ = list_checkpoints(out_dir)
    newest = checkpoints[0] if checkpoints else None
    if newest is None or newest.step < plan.total_steps:
        at = (
            f"step {newest.step} of {plan.total_steps}, saved in {newest.path}"
            if newest
            else "no checkpoint was due yet"
        )
        console.result(f"stopped early: {at}")
        console.next_command(console.this_command(), "to go on")
        return
    records = read_metrics(out_dir)
    validated = [record["val_loss"] for record in records if record.get("val_loss") is not None]
    console.result(f"finished: {newest.step} steps, {console.human_count(newest.manifest['content']['tokens'])} tokens")
    if validated:
        console.result(f"validation loss: {validated[0]:.4f} -> {validated[-1]:.4f}")
    console.result(f"checkpoint: {newest.path}\nmetrics: {out_dir / 'metrics.jsonl'}")
    print_next_commands(as_given)


def print_next_commands(as_given: Settings) -> None:
    run = as_given.out_dir.rstrip("/")
    final = f"{run}/{FINAL_NAME}"
    console.next_command(f"python -m tools.plot_curves {run}", "to draw its curves")
    console.next_command(f"python convert_pretrained_checkpoint.py {final} {run}-export", "to export it")
    console.next_command(
        f"python -m lightning.pytorch.utilities.consolidate_checkpoint {final}/{WEIGHTS_NAME}",
        "or, to merge it into one file first",
    )


# --- the worker: one process of the training --------------------------------------------------------------------------


def train_worker(job: dict[str, Any]) -> None:
    """Train from the newest good checkpoint to the last step; runs in every process, started by Ray Train."""
    settings: Settings = job["settings"]
    plan: Plan = job["plan"]
    console.VERBOSITY = job["verbosity"]

    from pretraining.trainer import Trainer

    if failed_before(settings):
        return
    settle_local_ranks(settings)  # not noted: with the next start the nodes may be whole again
    try:
        trainer = Trainer(settings, plan)
        trainer.resume_or_initialise()
        trainer.run()
    except UserError as error:
        report_problems(settings, error)
        raise


# Ray Train starts the workers again after any error (--max_failures), and the user's would come again each time. So the
# failing worker leaves a note, and the next workers end at once: the driver then says what the note holds.


def problems_file(settings: Settings) -> Path:
    return Path(settings.out_dir) / RAY_NAME / "user_error.json"


def report_problems(settings: Settings, error: UserError) -> None:
    with contextlib.suppress(OSError):  # a full disk may be the very problem
        path = problems_file(settings)
        path.parent.mkdir(exist_ok=True)
        write_json(path, error.problems)


def reported_problems(settings: Settings) -> list[str] | None:
    try:
        return json.loads(problems_file(settings).read_bytes())
    except (OSError, ValueError):
        return None


def failed_before(settings: Settings) -> bool:
    """Whether a worker has left a note; all processes take rank 0's word, for a network file system may be late."""
    import torch.distributed as dist

    noted = [dist.get_rank() == 0 and reported_problems(settings) is not None]
    dist.broadcast_object_list(noted)
    return noted[0]


def settle_local_ranks(settings: Settings) -> None:
    """Number the processes of each node by Ray's node ids; Ray Train goes by addresses, which two nodes may share."""
    import ray
    import torch.distributed as dist

    nodes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(nodes, ray.get_runtime_context().get_node_id())
    rank = dist.get_rank()
    starts = range(0, len(nodes), settings.num_devices)
    whole = all(len(set(nodes[start : start + settings.num_devices])) == 1 for start in starts)
    if not whole or len(set(nodes)) != settings.num_nodes:
        counts = sorted((nodes.count(node) for node in set(nodes)), reverse=True)
        raise UserError(
            f"--num_nodes={settings.num_nodes} with --num_devices={settings.num_devices}: Ray placed {counts} processes on its "
            "nodes. Give it nodes of one size, without other work."
        )
    os.environ["LOCAL_RANK"] = str(rank % settings.num_devices)
    os.environ["LOCAL_WORLD_SIZE"] = str(settings.num_devices)


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
