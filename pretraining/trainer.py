"""The training loop of one process: forward, backward, reduce, clip, update, validate, log, save.

Loss, gradient norm and every decision (skip this update, save, stop) are the same on all processes, because they are
made from sums over all of them: one small all-reduce per step carries the loss, the flags and a digest of the tokens.
"""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pretraining.attention import fastest_kernels
from pretraining.checkpoint import FINAL_NAME, step_name
from pretraining.checkpoint_content import checkpoint_manifest, write_configs
from pretraining.checkpoint_loading import agree_on_checkpoint, load_initial_weights, load_training_state
from pretraining.checkpoint_writer import CheckpointWriter
from pretraining.data import MicroBatch, plan_sequences, prefetch, rank_micro_batches
from pretraining.dataset_check import DatasetCheck, Reading
from pretraining.evaluations import Evaluations
from pretraining.events import record_event
from pretraining.heartbeat import Heartbeat
from pretraining.left_out import LeftOut, leave_out, read_left_out, set_aside_checkpoints
from pretraining.metrics_writer import MetricsFile, rewind_metrics
from pretraining.model import build_model, count_parameters, initialise, training_flops_per_token
from pretraining.optimizer import (
    apply_gradients,
    drop_gradients,
    global_gradient_norm,
    make_optimizers,
    make_schedule,
    set_learning_rate,
    update_scales,
)
from pretraining.parallelism import launch_fabric, schedule_reductions
from pretraining.plan import Plan
from pretraining.process_layout import micro_batches_per_step
from pretraining.profiling import garbage_collected, profiled
from pretraining.replicas import check_replicas
from pretraining.run_state import RunState
from pretraining.settings import Settings
from pretraining.slow_ranks import SlowRanks
from pretraining.step_sums import StepResult, StepSums
from pretraining.stopping import Stopping
from pretraining.throughput import Throughput
from utils import console
from utils.errors import UserError
from utils.files import remove_temporaries


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
        self.dataset_check = DatasetCheck(settings, plan)
        self.model = build_model(plan.model_config, settings, plan.context_tokens)
        self.num_parameters = count_parameters(self.model)
        self.fabric = launch_fabric(settings)
        self.rank, self.world_size, self.device = self.fabric.global_rank, self.fabric.world_size, self.fabric.device
        self.accumulation = micro_batches_per_step(settings, self.world_size)
        self.wrapped = self.fabric.setup_module(self.model, move_to_device=False)
        self.optimizers = make_optimizers(self.model, settings.optimizer)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.learning_rate = make_schedule(settings, plan)
        self.slow_ranks = SlowRanks(self.model, self.device, self.heartbeat.place, self.out_dir)

        self.sequences = plan_sequences(plan, plan.train_directories, settings.seed)
        self.evaluations = Evaluations(self.wrapped, settings, plan, self.device)
        flops_per_token = training_flops_per_token(
            self.model.config, self.num_parameters, plan.context_tokens, settings.train.tie_embeddings
        )
        self.throughput = Throughput(plan.tokens_per_step, flops_per_token, self.world_size, self.device)
        self.stopping = Stopping(self.out_dir, self.rank == 0, settings.train.max_time, preempted_nodes)
        self.writer = CheckpointWriter(
            self.out_dir, self.model, self.optimizers, self._write_extras, self._make_manifest, settings.checkpoint
        )
        self.metrics: MetricsFile | None = None
        self.state = RunState(settings, plan.tokens_per_step, LeftOut())
        self.returns: collections.Counter[int] = collections.Counter()

    # --- start --------------------------------------------------------------------------------------------------------

    def resume_or_initialise(self) -> None:
        """Take up the newest good checkpoint; without one, draw or load the first weights."""
        left_out = LeftOut()
        if self.rank == 0:
            remove_temporaries(self.out_dir)
            left_out = read_left_out(self.out_dir)
            for path in set_aside_checkpoints(self.out_dir, left_out):
                console.warn(f"a checkpoint has read text that is left out since: it is {path} now")
        newest = agree_on_checkpoint(self.out_dir, self.settings.checkpoint.verify, self.heartbeat.again)
        if self.rank == 0:
            rewind_metrics(self.out_dir, newest.step if newest else -1)
            self.metrics = MetricsFile(self.out_dir)
        self.writer.check_space()
        left_out = self.fabric.broadcast(left_out)
        self.state = RunState(self.settings, self.plan.tokens_per_step, left_out)
        self.writer.last_good = newest.path if newest else None
        if newest is not None:
            self.state.restore(load_training_state(newest.path, self.model, self.optimizers))
        elif self.settings.initial_checkpoint_dir is not None:
            load_initial_weights(self.settings.initial_checkpoint_dir, self.model)
        else:
            initialise(self.model, self.model.config, self.settings.seed)
        update_scales(self.model, self.settings)

    # --- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the plan's last step, or until something asks to stop; goes back as often as spikes ask for it."""
        while self._run_until_spikes():
            self._go_back()
        self.heartbeat.beat("ending")
        self.writer.wait_and_report(final=self.state.step == self.plan.total_steps)

    def _run_until_spikes(self) -> bool:
        """Train from `step` on; returns whether it must go back."""
        train, evaluation = self.settings.train, self.settings.eval
        steps = range(self.state.step, self.plan.total_steps)
        group = self.model.context_group
        numbers = rank_micro_batches(steps, train, group.index, group.count)
        positions = map(self.state.left_out.positions, numbers)
        batches = prefetch(self.sequences, positions, pin_memory=self.device.type == "cuda", group=group)
        profiler = profiled(self.settings, self.out_dir / "profile", self.rank, self.heartbeat)
        with (
            fastest_kernels(self.device),
            contextlib.closing(batches),
            garbage_collected() as collect_garbage,
            profiler as step_profiler,
        ):
            if self.state.step == 0 and evaluation.initial_validation:
                self._log({"step": 0, "tokens": 0, **self._validate()})
            while self.state.step < self.plan.total_steps:
                started = time.perf_counter()
                result = self._train_step(batches)
                step_profiler()
                collect_garbage()
                wait_s = result.sums.data_wait_s / self.world_size
                self.throughput.add_step(result.loss, time.perf_counter() - started, wait_s)
                self.state.step += 1
                self.heartbeat.step_done(self.state.step)
                self.slow_ranks.add(result.sums.seconds, self.state.step)
                last = self.state.step == self.plan.total_steps
                if last or result.sums.dataset_problem:
                    self.heartbeat.beat("ending")
                    self.dataset_check.wait(self.heartbeat.again)
                    self.dataset_check.raise_if_damaged(self._reading(), self.out_dir)
                stop = result.sums.stop or (result.sums.poll_preemption and self.stopping.poll())
                self.state.bad_steps.count(result.verdict, result.loss, result.grad_norm)
                if result.verdict and self.rank == 0:
                    step, reason = self.state.step, result.verdict.reason
                    record_event(self.out_dir, "skipped step", f"step {step} updates nothing: {reason}", step=step)
                if self.state.bad_steps.must_go_back:
                    return True
                check_replicas(self.parameters, self.optimizers, self.state.step, self.settings)

                record = None
                give_up = self.state.bad_steps.must_give_up
                if last or stop or give_up or self.state.step % train.log_interval == 0:
                    record = self._record(result)
                if give_up:
                    self._log(record)
                    self.writer.wait()
                    raise self.state.bad_steps.error(self.state.step, self.writer.last_good)
                due = evaluation.interval and self.state.step % evaluation.interval == 0
                if due or (last and evaluation.final_validation):
                    record = {**(record or {"step": self.state.step, "tokens": self.state.tokens}), **self._validate()}
                if record is not None:
                    self._log(record)

                if last or stop or (train.save_interval and self.state.step % train.save_interval == 0):
                    self.throughput.add_checkpoint_stall(self._save(last))
                elif result.sums.checkpoint_error:
                    self.writer.wait_and_report()
                if stop:
                    break
        return False

    def _train_step(self, batches: Iterator[MicroBatch]) -> StepResult:
        set_learning_rate(self.optimizers, self.learning_rate(self.state.step))
        # FSDP2 averages gradients over processes; the mean over the tokens of the global batch is wanted.
        scale = self.world_size / self.plan.tokens_per_step
        entropy = torch.zeros((), device=self.device)
        digest, next_batch = 0, self.slow_ranks.clock.begin(batches)
        for micro_step in range(self.accumulation):
            self.heartbeat.beat("reading data")
            batch = next_batch()
            self.heartbeat.beat("forward and backward pass")
            digest += batch.digest
            schedule_reductions(self.model, self.settings, last=micro_step + 1 == self.accumulation)
            micro_entropy, objective = self.wrapped(*batch.to(self.device))
            self.fabric.backward(objective * scale)
            entropy += micro_entropy
        self.slow_ranks.clock.end()
        return self._update(entropy, digest)

    def _update(self, entropy: torch.Tensor, digest: int) -> StepResult:
        """Sum over processes, clip, and update unless something is not finite."""
        self.heartbeat.beat("reduction and update")
        stop, poll = self.stopping.wanted(), self.stopping.poll_is_due()
        failed, damaged = self.writer.error is not None, self.dataset_check.problem is not None
        clock = self.slow_ranks.clock
        sums = StepSums(entropy, digest, clock.data_wait_s, stop, poll, failed, damaged, clock.seconds_before)
        norm = global_gradient_norm(self.parameters)
        sums, grad_norm = sums.summed(norm, self.model.routing.take())
        loss = sums.entropy / self.plan.tokens_per_step
        verdict = self.state.bad_steps.judge(loss, grad_norm)
        if verdict is None:
            apply_gradients(self.optimizers, norm, self.settings.train.max_norm)
            update_scales(self.model, self.settings)
        drop_gradients(self.optimizers)
        return StepResult(loss, grad_norm, verdict, sums)

    def _validate(self) -> dict[str, float]:
        self.heartbeat.beat("validation")
        values = self.evaluations.run(self.state.step)
        self.state.val_loss = values["val_loss"]
        return values

    def _go_back(self) -> None:
        """Leave out what the bad steps read, and take up the newest checkpoint from before them."""
        self.heartbeat.beat("start")
        self.writer.wait()
        numbers = self.state.sequences_of_last(self.state.bad_steps.in_a_row)
        problem = None
        if self.rank == 0:
            problem = leave_out(self.out_dir, self.state.left_out, numbers, self.state.step, self.returns)
        if problem := self.fabric.broadcast(problem):
            raise UserError(problem)
        for optimizer in self.optimizers:
            optimizer.state.clear()  # where there is no checkpoint yet, the run starts again
        self.throughput.start_again()
        self.resume_or_initialise()

    # --- records and checkpoints --------------------------------------------------------------------------------------

    def _epoch_of(self, number: int) -> int:
        """How often the text was read to its end before the sequence of this number."""
        return int(self.sequences.order.locate(self.state.left_out.positions(np.array([number]))).epoch[0])

    def _reading(self) -> Reading:
        block_tokens, size = self.plan.context_tokens + 1, self.settings.train.global_batch_size
        return Reading(self.sequences.order, self.state.left_out.positions, block_tokens, size, self.state.step)

    def _record(self, result: StepResult) -> dict[str, Any]:
        speed = self.throughput.record(steps_left=self.plan.total_steps - self.state.step)
        return {
            "step": self.state.step,
            "epoch": self._epoch_of(self.state.num_sequences - 1),
            "tokens": self.state.tokens,
            "loss": speed.pop("loss"),
            "lr": self.optimizers[0].param_groups[0]["lr"],
            "grad_norm": result.grad_norm,
            **self.state.bad_steps.record(),
            "batch_digest": f"{result.sums.digest:016x}",
            **result.sums.routing,
            **speed,
            **self.slow_ranks.record(),
        }

    def _log(self, record: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.write(record)

    def _save(self, last: bool) -> float:
        """Returns the seconds for which training was held up."""
        started = time.perf_counter()
        self.heartbeat.beat("ending" if last else "save", self.writer.longest_s)
        self.writer.wait_and_report()  # the save before this one
        name = FINAL_NAME if last else step_name(self.state.step)
        self.writer.save(name, self.state.primitives(), self.settings.checkpoint.asynchronous and not last)
        return time.perf_counter() - started

    def _write_extras(self, directory: Path) -> None:
        self.metrics.sync()  # a checkpoint must not be newer than the records that lead to it
        write_configs(directory, self.model.config, self.settings)

    def _make_manifest(self, files: list[dict[str, Any]], state: dict[str, Any]) -> dict[str, Any]:
        epoch = self._epoch_of(state["step"] * self.settings.train.global_batch_size)
        return checkpoint_manifest(self.settings, self.plan, self.num_parameters, epoch, state, files)
