"""The training loop of one process: forward, backward, reduce, clip, update, validate, log, save.

Loss, gradient norm and every decision (skip this update, save, stop) are the same on all processes, because they are
made from sums over all of them: one small all-reduce per step carries the loss, the flags and a digest of the tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pretraining.checkpoint import FINAL_NAME, step_name
from pretraining.checkpoint_content import checkpoint_manifest, write_configs
from pretraining.checkpoint_loading import agree_on_checkpoint, load_initial_weights, load_training_state
from pretraining.checkpoint_writer import CheckpointWriter
from pretraining.data import MicroBatch, Sequences, prefetch, rank_micro_batches
from pretraining.heartbeat import Heartbeat
from pretraining.metrics_writer import MetricsFile, rewind_metrics
from pretraining.model import build_model, count_parameters, initialise, training_flops_per_token
from pretraining.optimizer import (
    global_gradient_norm,
    make_optimizers,
    make_schedule,
    scale_gradients,
    set_learning_rate,
)
from pretraining.parallelism import launch_fabric
from pretraining.plan import Plan
from pretraining.process_layout import micro_batches_per_step
from pretraining.settings import Settings
from pretraining.stopping import Stopping, nonfinite_error
from pretraining.throughput import Throughput, profiled
from pretraining.validation import Validation
from utils.files import remove_temporaries
from utils.machine import available_cpus


@dataclasses.dataclass
class StepResult:
    """One optimizer step, equal on all processes."""

    loss: float
    """Mean cross entropy in nats per token, over the global batch."""
    grad_norm: float
    updated: bool
    """False: the loss or the norm was not finite, and nothing was changed."""
    digest: str
    """Of the tokens and their places in the global batch, 16 hexadecimal digits."""
    stop: bool
    poll_preemption: bool
    checkpoint_error: bool
    data_wait_s: float
    """Mean over processes."""


class Trainer:
    """Sets up the process, the model and the data; `run` trains to the end.

    Args:
        settings: accelerator, num_devices and precision are settled.
        preempted_nodes: see stopping.Stopping.
        heartbeat: where this process says what it does (None: nowhere).
    """

    def __init__(
        self,
        settings: Settings,
        plan: Plan,
        preempted_nodes: Callable[[], list[str] | None] = lambda: None,
        heartbeat: Heartbeat | None = None,
    ):
        self.settings, self.plan, self.out_dir = settings, plan, Path(settings.out_dir)
        self.heartbeat = heartbeat or Heartbeat()
        if settings.accelerator == "cpu":
            # It misses CUDA when the model is compiled for a CPU.
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
            threads = max(1, available_cpus() // int(os.environ["LOCAL_WORLD_SIZE"]))
            torch.set_num_threads(settings.parallel.cpu_threads or threads)

        self.model = build_model(plan.model_config, settings, plan.context_tokens)
        self.num_parameters = count_parameters(self.model)
        self.fabric = launch_fabric(settings)
        self.rank, self.world_size, self.device = self.fabric.global_rank, self.fabric.world_size, self.fabric.device
        self.accumulation = micro_batches_per_step(settings, self.world_size)
        self.wrapped = self.fabric.setup_module(self.model, move_to_device=False)
        self.optimizers = make_optimizers(self.model, settings.optimizer)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.learning_rate = make_schedule(settings, plan)

        directories = [Path(path) for path in plan.train_directories]
        self.sequences = Sequences(directories, plan.weights, plan.context_tokens + 1, settings.seed)
        self.validation = Validation(self.wrapped, settings, plan, self.device)
        flops_per_token = training_flops_per_token(
            self.model.config, self.num_parameters, plan.context_tokens, settings.train.tie_embeddings
        )
        self.throughput = Throughput(plan.tokens_per_step, flops_per_token, self.world_size, self.device)
        self.stopping = Stopping(self.out_dir, self.rank == 0, settings.train.max_time, preempted_nodes)
        self.writer = CheckpointWriter(
            self.out_dir, self.model, self.optimizers, self._write_extras, self._make_manifest, settings.checkpoint
        )
        self.metrics: MetricsFile | None = None
        self.step = 0
        self.nonfinite_steps = 0
        self.nonfinite_in_a_row = 0
        self.val_loss: float | None = None

    # --- start --------------------------------------------------------------------------------------------------------

    def resume_or_initialise(self) -> None:
        """Take up the newest good checkpoint; without one, draw or load the first weights."""
        if self.rank == 0:
            remove_temporaries(self.out_dir)
        checksums = self.settings.checkpoint.verify == "checksums"
        newest = agree_on_checkpoint(self.out_dir, checksums, lambda: self.heartbeat.beat("start"))
        if self.rank == 0:
            rewind_metrics(self.out_dir, newest.step if newest else -1)
            self.metrics = MetricsFile(self.out_dir)
        self.writer.check_space()
        if newest is not None:
            state = load_training_state(newest.path, self.model, self.optimizers)
            for name in ("step", "nonfinite_steps", "nonfinite_in_a_row", "val_loss"):
                setattr(self, name, state[name])
            self.writer.last_good = newest.path
        elif self.settings.initial_checkpoint_dir is not None:
            load_initial_weights(self.settings.initial_checkpoint_dir, self.model)
        else:
            initialise(self.model, self.model.config, self.settings.seed)

    # --- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train from `step` to the plan's last step, or until something asks to stop."""
        train, evaluation = self.settings.train, self.settings.eval
        if self.step == 0 and evaluation.initial_validation:
            self._log({"step": 0, "tokens": 0, **self._validate()})
        positions = rank_micro_batches(range(self.step, self.plan.total_steps), train, self.rank, self.world_size)
        batches = prefetch(self.sequences, positions, pin_memory=self.device.type == "cuda")
        profile_steps = self.settings.profile_steps if self.rank == 0 else 0
        with contextlib.closing(batches), profiled(profile_steps, self.out_dir / "profile") as step_profiler:
            while self.step < self.plan.total_steps:
                started = time.perf_counter()
                result = self._train_step(batches)
                step_profiler()
                self.throughput.add_step(result.loss, time.perf_counter() - started, result.data_wait_s)
                self.step += 1
                self.heartbeat.step_done(self.step)
                last = self.step == self.plan.total_steps
                stop = result.stop or (result.poll_preemption and self.stopping.poll())
                give_up = self._count_nonfinite(result)

                record = None
                if last or stop or give_up or self.step % train.log_interval == 0:
                    record = self._record(result)
                if give_up:
                    self._log(record)
                    self.writer.wait()
                    raise nonfinite_error(self.nonfinite_in_a_row, self.step, self.writer.last_good)
                due = evaluation.interval and self.step % evaluation.interval == 0
                if due or (last and evaluation.final_validation):
                    record = {**(record or {"step": self.step, "tokens": self._tokens_seen()}), **self._validate()}
                if record is not None:
                    self._log(record)

                if last or stop or (train.save_interval and self.step % train.save_interval == 0):
                    self.throughput.add_checkpoint_stall(self._save(last))
                elif result.checkpoint_error:
                    self.heartbeat.beat("save")
                    self.writer.wait_and_report()
                if stop:
                    break
        self.heartbeat.beat("save")
        self.writer.wait_and_report(final=self.step == self.plan.total_steps)

    def _train_step(self, batches: Iterator[MicroBatch]) -> StepResult:
        set_learning_rate(self.optimizers, self.learning_rate(self.step))
        # FSDP2 averages gradients over processes; the mean over the tokens of the global batch is wanted.
        scale = self.world_size / self.plan.tokens_per_step
        entropy = torch.zeros((), device=self.device)
        wait_s, digest = 0.0, 0
        for micro_step in range(self.accumulation):
            waited = time.perf_counter()
            self.heartbeat.beat("reading data")
            batch = next(batches)
            wait_s += time.perf_counter() - waited
            self.heartbeat.beat("forward and backward pass")
            digest += batch.digest
            tokens = batch.tokens.to(self.device, non_blocking=True)
            accumulate = micro_step + 1 < self.accumulation and not self.settings.parallel.reduce_every_micro_batch
            with self.fabric.no_backward_sync(self.wrapped, enabled=accumulate):
                micro_entropy, objective = self.wrapped(tokens[:, :-1], tokens[:, 1:])
                self.fabric.backward(objective * scale)
            entropy += micro_entropy
        return self._update(entropy, digest, wait_s)

    def _update(self, entropy: torch.Tensor, digest: int, wait_s: float) -> StepResult:
        """Sum over processes, clip, and update unless something is not finite."""
        self.heartbeat.beat("reduction and update")
        limbs = [digest >> bits & 0xFFFF for bits in (0, 16, 32, 48)]  # exact in float64 when summed
        flags = [self.stopping.wanted(), self.stopping.poll_is_due(), self.writer.error is not None]
        sums = torch.tensor([0.0, *flags, wait_s, *limbs], dtype=torch.float64, device=self.device)
        sums[0] = entropy.double()
        dist.all_reduce(sums)
        norm = global_gradient_norm(self.parameters)
        loss_sum, stop, poll, checkpoint_error, wait_s, *limbs = sums.tolist()
        loss, grad_norm = loss_sum / self.plan.tokens_per_step, norm.item()
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite:
            if self.settings.train.max_norm is not None:
                scale_gradients(self.parameters, norm, self.settings.train.max_norm)
            for optimizer in self.optimizers:
                optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return StepResult(
            loss=loss,
            grad_norm=grad_norm,
            updated=finite,
            digest=f"{sum(int(limb) << bits for limb, bits in zip(limbs, (0, 16, 32, 48))) % 2**64:016x}",
            stop=stop > 0,
            poll_preemption=poll > 0,
            checkpoint_error=checkpoint_error > 0,
            data_wait_s=wait_s / self.world_size,
        )

    def _validate(self) -> dict[str, float]:
        self.heartbeat.beat("validation")
        values = self.validation.run()
        self.val_loss = values["val_loss"]
        return values

    def _count_nonfinite(self, result: StepResult) -> bool:
        """Whether there were so many steps without an update in a row that the run must end."""
        self.nonfinite_steps += not result.updated
        self.nonfinite_in_a_row = 0 if result.updated else self.nonfinite_in_a_row + 1
        return self.nonfinite_in_a_row >= self.settings.train.max_nonfinite_steps

    # --- records and checkpoints --------------------------------------------------------------------------------------

    def _tokens_seen(self) -> int:
        return self.step * self.plan.tokens_per_step

    def _epoch_of(self, position: int) -> int:
        return int(self.sequences.order.locate(np.array([position])).epoch[0])

    def _record(self, result: StepResult) -> dict[str, Any]:
        speed = self.throughput.record(steps_left=self.plan.total_steps - self.step)
        return {
            "step": self.step,
            "epoch": self._epoch_of(self.step * self.settings.train.global_batch_size - 1),
            "tokens": self._tokens_seen(),
            "loss": speed.pop("loss"),
            "lr": self.optimizers[0].param_groups[0]["lr"],
            "grad_norm": result.grad_norm,
            "nonfinite_steps": self.nonfinite_steps,
            "batch_digest": result.digest,
            **speed,
        }

    def _log(self, record: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.write(record)

    def _save(self, last: bool) -> float:
        """Returns the seconds for which training was held up."""
        started = time.perf_counter()
        self.heartbeat.beat("save")
        self.writer.wait_and_report()  # the save before this one
        state = {
            "step": self.step,
            "tokens": self._tokens_seen(),
            "position": self.step * self.settings.train.global_batch_size,
            "seed": self.settings.seed,
            "nonfinite_steps": self.nonfinite_steps,
            "nonfinite_in_a_row": self.nonfinite_in_a_row,
            "val_loss": self.val_loss,
        }
        name = FINAL_NAME if last else step_name(self.step)
        self.writer.save(name, state, self.settings.checkpoint.asynchronous and not last)
        return time.perf_counter() - started

    def _write_extras(self, directory: Path) -> None:
        self.metrics.sync()  # a checkpoint must not be newer than the records that lead to it
        write_configs(directory, self.model.config, self.settings)

    def _make_manifest(self, files: list[dict[str, Any]], state: dict[str, Any]) -> dict[str, Any]:
        epoch = self._epoch_of(state["position"])
        return checkpoint_manifest(self.settings, self.plan, self.num_parameters, epoch, state, files)
