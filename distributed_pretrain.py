"""Pretrain a language model (step 3): token chunks in, sharded checkpoints out.

Ray Train starts one process per GPU (or CPU processes); Lightning Fabric and FSDP2 shard litgpt's model over them.

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

import dataclasses
import os
import sys
from pathlib import Path
from shlex import quote
from typing import Any

from utils import cli, console  # first: it says how to install the packages if they are missing

# isort: split
from export.hf_config import export_problems
from pretraining.checkpoint import (
    FINAL_NAME,
    WEIGHTS_NAME,
    Checkpoint,
    find_newest_good,
    list_checkpoints,
    rename_final_to_its_step,
)
from pretraining.evaluation_plan import task_columns
from pretraining.failures import EXIT_FAILED, TrainingEnded
from pretraining.follower import Follower
from pretraining.left_out import read_left_out, set_aside_checkpoints
from pretraining.loggers import make_logger, progress_line, sample_line
from pretraining.metrics_writer import rewind_metrics, samples_of
from pretraining.model_config import litgpt_config_module, model_names
from pretraining.plan import Plan, make_plan
from pretraining.process_layout import computed_by, micro_batches_per_step, shard_size
from pretraining.run_identity import check_same_run, result_settings
from pretraining.settings import STOP_NAME, Settings
from utils.errors import UserError
from utils.files import held_lock
from utils.metrics_file import read_metrics
from utils.ray_cluster import find_cluster, ray_session


def main(settings: Settings) -> None:
    if settings.model_name == "list":
        console.result("\n".join(model_names()))
        return
    as_given = settings
    settings = with_absolute_paths(settings)
    plan = make_plan(settings)
    warn_if_not_exportable(plan)
    if settings.dry_run:
        from pretraining.dry_run import print_dry_run

        print_dry_run(settings, plan)
        return
    out_dir = Path(settings.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    with held_lock(out_dir) as mine:
        if not mine:
            raise UserError(
                f"--out_dir={out_dir}: another distributed_pretrain.py trains there. Wait for it, or give another "
                f"directory. To end it with a checkpoint: touch {out_dir / STOP_NAME}"
            )
        newest = newest_checkpoint(settings, plan)
        if newest is not None and newest.step >= plan.total_steps:
            console.say(f"nothing to do: {newest.path} is at step {newest.step} of {plan.total_steps}.")
            print_next_commands(as_given)
            return
        (out_dir / STOP_NAME).unlink(missing_ok=True)
        newest = rename_final_to_its_step(out_dir, newest)
        try:
            train(settings, plan, newest)
        except TrainingEnded as error:
            console.error(f"{error}\n  {console.this_command()}")
            sys.exit(EXIT_FAILED)
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
    if settings.eval.tasks is not None:
        tasks = {name: os.path.abspath(path) for name, path in settings.eval.tasks.items()}
        changes["eval"] = dataclasses.replace(settings.eval, tasks=tasks)
    return dataclasses.replace(settings, **changes)


def warn_if_not_exportable(plan: Plan) -> None:
    for reason in export_problems(litgpt_config_module().Config(**plan.model_config)):
        console.warn(
            f"this model cannot be exported to Hugging Face when it is trained: {reason}. litgpt will load it; for "
            "transformers and lm-eval choose another model."
        )


def newest_checkpoint(settings: Settings, plan: Plan) -> Checkpoint | None:
    """The newest checkpoint whose files have the right sizes; the workers compare checksums before they load."""
    set_aside_checkpoints(Path(settings.out_dir), read_left_out(Path(settings.out_dir)))
    newest, skipped = find_newest_good(settings.out_dir, checksums=False)
    for line in skipped:
        console.warn(f"skipped checkpoint {line}")
    if newest is not None:
        changes = check_same_run(newest.manifest["settings"], result_settings(settings, plan), settings.out_dir)
        for change in changes:
            console.say(f"resume with another {change}")
    return newest


def train(settings: Settings, plan: Plan, newest: Checkpoint | None) -> None:
    """Train on every process of the cluster, and pass the records on to the terminal and the logger."""
    wandb_key = os.environ.pop("WANDB_API_KEY", None)  # before Ray starts: what Ray starts inherits this environment
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # it prints each line of a worker twice
    from pretraining.cluster import check_training_nodes, fit, stop_on_sigterm, with_cluster

    out_dir = Path(settings.out_dir)
    with ray_session(find_cluster(settings.address)):
        settings = with_cluster(settings)
        nodes = check_training_nodes(settings, plan)
        if settings.checks_hardware():
            from pretraining.node_facts import check_nodes_for_training  # torch takes seconds

            check_nodes_for_training(
                nodes, settings.accelerator, settings.num_devices, settings.out_dir, settings.parallel.compile
            )
        world_size = settings.num_nodes * settings.num_devices
        accumulation = micro_batches_per_step(settings, world_size)
        shard_size(settings, world_size, settings.num_devices)
        console.say(
            f"training {plan.model_config['name']} on {world_size} {settings.accelerator} processes: steps "
            f"{newest.step if newest else 0} to {plan.total_steps}, {console.human_count(plan.tokens_per_step)} tokens "
            f"per step ({accumulation} x {settings.train.micro_batch_size} sequences of {plan.context_tokens} per "
            f"{computed_by(settings)})"
        )
        # Steps after the checkpoint will be done again: drop their records, so that nobody takes them for new ones. The
        # workers do the same once they have compared checksums.
        last_step = newest.step if newest else -1
        dropped = len(read_metrics(out_dir))
        earlier = rewind_metrics(out_dir, last_step)
        dropped -= len(earlier)
        if newest:
            again = f"; {dropped} later records are dropped and made again" if dropped else ""
            console.say(f"resume: from {newest.path}{again}")
        logger = make_logger(
            settings.logger_name,
            out_dir,
            earlier,
            result_settings(settings, plan),
            settings.log,
            wandb_key,
            task_columns(settings),
        )

        def consume(record: dict[str, Any]) -> None:
            console.say(progress_line(record, plan.total_steps))
            if settings.eval.prompts and "val_loss" in record:
                for sample in samples_of(out_dir, record["step"]):
                    console.say(sample_line(sample))
            logger.log(record)

        console.say("starting the workers; the first step follows in about half a minute, later if --parallel.compile")
        with stop_on_sigterm(out_dir), Follower(out_dir, last_step, consume, logger):
            fit(settings, plan)
        for line in logger.close():
            console.say(line)


def report(settings: Settings, plan: Plan, as_given: Settings) -> None:
    out_dir = Path(settings.out_dir)
    checkpoints, _ = list_checkpoints(out_dir)
    newest = checkpoints[0] if checkpoints else None
    if newest is None or newest.step < plan.total_steps:
        at = "no checkpoint was due yet"
        if newest:
            at = f"step {newest.step} of {plan.total_steps}, saved in {newest.path}"
        console.result(f"stopped early: {at}")
        console.next_command(console.this_command(), "to go on")
        return
    validated = [record["val_loss"] for record in read_metrics(out_dir) if record.get("val_loss") is not None]
    console.result(f"finished: {newest.step} steps, {console.human_count(newest.manifest['content']['tokens'])} tokens")
    if validated:
        console.result(f"validation loss: {validated[0]:.4f} -> {validated[-1]:.4f}")
    console.result(f"checkpoint: {newest.path}\nmetrics: {out_dir / 'metrics.jsonl'}")
    print_next_commands(as_given)


def print_next_commands(as_given: Settings) -> None:
    run = as_given.out_dir.rstrip("/")
    final = f"{run}/{FINAL_NAME}"
    console.next_command(f"python -m tools.plot_curves {quote(run)}", "to draw its curves")
    console.next_command(
        f"python convert_pretrained_checkpoint.py {quote(final)} {quote(f'{run}-export')}", "to export it"
    )
    console.next_command(
        f"python -m lightning.pytorch.utilities.consolidate_checkpoint {quote(f'{final}/{WEIGHTS_NAME}')}",
        "only where another tool needs one file (docs/export.md says what to do with it)",
    )


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
