"""Find the fastest settings for a model on this cluster: ten real steps with each combination that fits the memory.

  On the nodes that will train, with the command line of distributed_pretrain.py (a dataset is not needed):
    python -m tools.find_fastest --config config_hub/llama3-8b.yaml --num_nodes 4 --out_dir out/llama3-8b

  Only some values:
    python -m tools.find_fastest --config config_hub/demo-cpu.yaml --out_dir demo/fastest \\
        --search.micro_batch_size='[2,4]' --search.compile='[false]'

Each combination of micro-batch, recomputation, sharding and compilation runs on made-up tokens in fresh processes, so
that one that runs out of memory or crashes is a row of the table, not the end. What is known to be slower without
trying (more recomputation than the memory asks for) is left out. Rows go to find_fastest.jsonl in --out_dir; the same
command goes on after the last of them. The best combination is printed as YAML.

All settings of distributed_pretrain.py are flags and keys here too; its --help says what they mean.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pretraining import settings as training_settings
from pretraining.model_config import resolve_model_config
from pretraining.plan import Plan, make_plan
from pretraining.settings import Settings as TrainingSettings
from tools.trials import (
    RESULTS_NAME,
    Combination,
    Results,
    combinations,
    for_trial,
    identity,
    worth_trying,
    write_made_up_dataset,
)
from utils import cli, console
from utils.errors import UserError
from utils.files import held_lock, remove_temporaries, temporary_sibling

# jsonargparse looks for the types of inherited fields, the sections of the settings, in this module.
globals().update(
    {name: kind for name, kind in vars(training_settings).items() if name.endswith("Settings") and name != "Settings"}
)

# A plan is an estimate, and what a device's allocator cannot use is not in it.
_USABLE_SHARE = 0.95


@dataclass
class SearchSettings:
    """What is tried. A list: each of its values; null: a choice by what the cluster has."""

    micro_batch_size: list[int] | None = None
    """Values of train.micro_batch_size (null: the config's, and powers of two up to 65,536 tokens)."""
    activation_checkpointing: list[Literal["none", "selective", "full"]] | None = None
    """Values of parallel.activation_checkpointing (null: the least recomputation that fits)."""
    sharding: list[Literal["full", "hybrid", "replicate"]] | None = None
    """Values of parallel.sharding (null: full and replicate, on several nodes hybrid too)."""
    reduce_every_micro_batch: list[bool] | None = None
    """Values of parallel.reduce_every_micro_batch (null: false where it fits, else true)."""
    loss_chunk_tokens: list[int] | None = None
    """Values of parallel.loss_chunk_tokens (null: the config's)."""
    compile: list[bool] | None = None
    """Values of parallel.compile (null: true on GPUs, the config's on CPUs)."""
    steps: int = 10
    """Steps that are measured, after three of warm-up; then as many without communication."""
    timeout_s: float = 900
    """After this many seconds without an end a combination is given up."""


@dataclass
class Settings(TrainingSettings):
    """The settings of distributed_pretrain.py, and what is tried instead of some of them."""

    search: SearchSettings = field(default_factory=SearchSettings)


def main(settings: Settings, prepare: Callable[[TrainingSettings], None] | None = None) -> None:
    """`prepare` is for tests: called in each process of each trial with the trial's settings."""
    os.environ.pop("WANDB_API_KEY", None)  # before Ray starts: what Ray starts inherits this environment
    check_search(settings.search)
    out_dir = Path(settings.out_dir).absolute()
    out_dir.mkdir(parents=True, exist_ok=True)
    from utils.ray_cluster import find_cluster, ray_session

    with held_lock(out_dir) as mine:
        if not mine:
            raise UserError(
                f"--out_dir={out_dir}: another process works there. Wait for it, or give another directory."
            )
        remove_temporaries(out_dir)
        directory = temporary_sibling(out_dir / "find_fastest")
        try:
            plan = plan_on_made_up_data(settings, directory)
            with ray_session(find_cluster(settings.address)):
                Search(settings, plan, directory, out_dir, prepare).run()
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def plan_on_made_up_data(settings: Settings, directory: Path) -> Plan:
    """Write the tokens of the trials into `directory`; returns the plan of a run on them. Raises UserError."""
    config = resolve_model_config(settings)
    context_tokens = settings.train.max_seq_length or config.block_size
    write_made_up_dataset(directory, config.padded_vocab_size, context_tokens + 1)
    train = dataclasses.replace(settings.train, max_steps=1, max_tokens=None, epochs=None)
    settings = dataclasses.replace(settings, num_devices=settings.num_devices or 1)  # settled by the cluster later
    return make_plan(dataclasses.replace(for_trial(settings, directory), train=train))


def check_search(search: SearchSettings) -> None:
    problems = []
    for name in ("micro_batch_size", "loss_chunk_tokens"):
        if any(value < 1 for value in getattr(search, name) or []):
            problems.append(f"--search.{name}={getattr(search, name)}: each value must be at least 1.")
    for field_ in dataclasses.fields(search):
        if getattr(search, field_.name) == []:
            problems.append(f"--search.{field_.name}=[]: give at least one value, or null.")
    if search.steps < 1:
        problems.append(f"--search.steps={search.steps}: must be at least 1.")
    if search.timeout_s <= 0:
        problems.append(f"--search.timeout_s={search.timeout_s}: must be above 0.")
    if problems:
        raise UserError(problems)


class Search:
    """One invocation; Ray is connected.

    Raises:
        UserError: a setting is wrong, the cluster has too little, or no combination runs.
    """

    def __init__(self, settings: Settings, plan: Plan, directory: Path, out_dir: Path, prepare: Callable | None):
        from pretraining.cluster import CHECKED_PACKAGES, with_cluster
        from pretraining.node_facts import check_nodes_for_training
        from tools.check_cluster import choose_nodes
        from tools.trial_processes import device_of
        from utils.node_check import check_nodes, probe_in

        self.search, self.plan, self.directory, self.prepare = settings.search, plan, directory, prepare
        fields = {item.name: getattr(settings, item.name) for item in dataclasses.fields(TrainingSettings)}
        self.settings = with_cluster(TrainingSettings(**fields))
        with probe_in(str(out_dir)) as probe:
            self.nodes = check_nodes({"--out_dir": [probe]}, CHECKED_PACKAGES, choose_nodes(self.settings)[2])
        compiles = True in (
            self.search.compile or [self.settings.accelerator == "cuda" or self.settings.parallel.compile]
        )
        facts = check_nodes_for_training(
            self.nodes, self.settings.accelerator, self.settings.num_devices, None, compiles
        )
        self.device, memory_bytes = device_of(self.nodes, self.settings.accelerator)
        if memory_bytes is None:
            memory_bytes = min(node.free_memory_bytes for node in facts) // self.settings.num_devices
        self.memory_bytes = int(_USABLE_SHARE * memory_bytes)
        self.results = Results(out_dir / RESULTS_NAME)
        self.key = {
            "device": self.device,
            "steps": self.search.steps,
            "torch": importlib.metadata.version("torch"),
        }

    def run(self) -> None:
        from pretraining.memory import plan_memory as plan_memory_of
        from tools.trial_processes import OUT_OF_MEMORY

        tried = combinations(self.settings, self.search, self.plan.context_tokens)
        world_size = self.settings.num_nodes * self.settings.num_devices
        plan_memory = functools.cache(
            lambda one: plan_memory_of(one.apply(self.settings), self.plan, world_size, self.settings.num_devices)
        )
        self.plan_memory = plan_memory
        rows: dict[Combination, dict[str, Any]] = {}
        for one in tried:
            row = self.results.find(self._key_of(one))
            if row is not None and row["final"]:
                rows[one] = row

        def fits(one: Combination) -> bool:
            ran_out = one in rows and rows[one]["outcome"] == OUT_OF_MEMORY
            return not ran_out and plan_memory(one).total <= self.memory_bytes

        console.say(
            f"{console.counted(len(tried), 'combination')} on {world_size} x {self.device} with "
            f"{console.human_bytes(self.memory_bytes)} each: planning their memory"
        )
        num_known = len(rows)
        started, num_run = time.monotonic(), 0
        while True:
            todo = worth_trying(tried, fits, self.search)
            waiting = [one for one in todo if one not in rows]
            if num_run == 0:
                console.say(
                    f"{len(todo)} to try, {len(todo) - len(waiting)} of them in {self.results.path.name} already; the "
                    "others do not fit, or are certainly slower"
                )
                self._check_any_fits(todo, num_known, tried)
            if not waiting or self.settings.dry_run:
                break
            rows[waiting[0]] = self._try(waiting[0])
            num_run += 1
            left_s = (time.monotonic() - started) / num_run * (len(waiting) - 1)
            print_progress(rows[waiting[0]], len(rows), len(rows) + len(waiting) - 1, left_s)
        if self.settings.dry_run:
            rows = {one: rows.get(one) or self._row(one) for one in todo}
        self._report(rows)

    def _check_any_fits(self, todo: list[Combination], num_known: int, tried: list[Combination]) -> None:
        if todo or num_known:
            return
        least = min(self.plan_memory(one).total for one in tried)
        raise UserError(
            f"--train.micro_batch_size={self.settings.train.micro_batch_size}: every combination needs more than the "
            f"{console.human_bytes(self.memory_bytes)} that a {self.device} has for it; the smallest "
            f"{console.human_bytes(least)}. Use more processes, or a shorter --train.max_seq_length."
        )

    def _key_of(self, one: Combination) -> dict[str, Any]:
        return {"settings": identity(one.apply(self.settings), self.plan), **self.key}

    def _row(self, one: Combination, **found: Any) -> dict[str, Any]:
        return {**self._key_of(one), "memory_planned_bytes": self.plan_memory(one).total, **found}

    def _try(self, one: Combination) -> dict[str, Any]:
        from tools.trial_processes import OUT_OF_MEMORY, run_trial

        trial = for_trial(one.apply(self.settings), self.directory)
        plan = dataclasses.replace(
            self.plan,
            tokens_per_step=trial.train.global_batch_size * self.plan.context_tokens,
            total_steps=trial.train.max_steps,
        )
        started = time.monotonic()
        outcome = run_trial(trial, plan, self.search.steps, self.nodes, self.search.timeout_s, self.prepare)
        row = self._row(
            one,
            outcome=outcome.failure or "ok",
            error=outcome.detail,
            final=outcome.failure in (None, OUT_OF_MEMORY),  # what else goes wrong may go well another time
            trial_sequences_per_step=trial.train.global_batch_size,
            seconds=round(time.monotonic() - started, 1),
            date=datetime.date.today().isoformat(),
        )
        if outcome.figures is not None:
            first = outcome.figures[0]
            alone_s = first.pop("step_s_alone")
            row |= first
            row["memory_peak_bytes"] = max(process["memory_peak_bytes"] for process in outcome.figures)
            row["communication_share"] = 0.0 if alone_s is None else max(0.0, 1 - alone_s / first["step_s"])
            row["data_share"] = row.pop("data_wait_s") / first["step_s"]
        return self.results.add(row)

    def _report(self, rows: dict[Combination, dict[str, Any]]) -> None:
        from tools.fastest_report import print_published, print_rows

        num_parameters = self.plan_memory(next(iter(rows))).num_parameters
        print_rows(rows, self.plan, self.device)
        print_published(num_parameters)
        if self.settings.dry_run:
            return
        good = {one: row for one, row in rows.items() if row["outcome"] == "ok"}
        if not good:
            raise UserError(
                f"no combination ran to its end; the first said: {next(iter(rows.values()))['error']}. -v shows what "
                f"the processes print; all of it is in {self.results.path}."
            )
        best = max(good, key=lambda one: good[one]["tokens_per_s_per_device"])
        console.result(f"\nfastest: {good[best]['tokens_per_s_per_device']:,.0f} tokens/s per device, with\n")
        console.result(best.as_yaml())
        console.say(f"\nall figures: {os.path.relpath(self.results.path)}")


def print_progress(row: dict[str, Any], number: int, total: int, left_s: float) -> None:
    parallel = row["settings"]["parallel"]
    what = (
        f"micro-batch {row['settings']['train']['micro_batch_size']}, recompute "
        f"{parallel['activation_checkpointing']}, {parallel['sharding']}{', compiled' * parallel['compile']}"
    )
    good = row["outcome"] == "ok"
    found = f"{row['tokens_per_s_per_device']:,.0f} tokens/s per device" if good else row["error"]
    left = f"; about {console.human_seconds(left_s)} left" if number < total else ""
    console.say(f"{number} of {total}: {what}: {found} ({console.human_seconds(row['seconds'])}{left})")


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
