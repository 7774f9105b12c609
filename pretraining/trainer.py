"""The training loop of one process: forward, backward, reduce, clip, update, validate, log, save.

Loss, gradient norm and every decision (skip this update, save, stop) are the same on all processes, because they are made
from sums over all of them: one small all-reduce a step carries the loss, the flags and a digest of the tokens.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist

from pretraining.checkpoint import (
    FINAL_NAME,
    find_newest_good,
    load_initial_weights,
    load_training_state,
    step_name,
)
from pretraining.checkpoint_writer import CheckpointWriter, shortage
from pretraining.data import Prefetcher, Sequences, rank_positions
from pretraining.model import build_model, count_parameters, initialise, training_flops_per_token
from pretraining.optimizer import (
    global_gradient_norm,
    learning_rate,
    make_optimizers,
    scale_gradients,
    set_learning_rate,
)
from pretraining.parallelism import device_mesh, shard_model
from pretraining.plan import Plan
from pretraining.process_layout import micro_batches_per_step
from pretraining.run_identity import provenance, result_settings
from pretraining.settings import STOP_NAME, Settings
from utils import console
from utils.errors import UserError
from utils.files import remove_temporaries
from utils.machine import available_cpus
from utils.manifest import made_by
from utils.metrics_file import MetricsFile, rewind_metrics

_PREEMPTION_POLL_S = 10.0

# Dense bfloat16 FLOP/s of one device, from the makers' data sheets; the first name that occurs in the device's counts.
PEAK_FLOPS = {
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
}


@dataclasses.dataclass
class StepResult:
    """One optimizer step, equal on all processes."""

    loss: float
    """Mean cross entropy in nats a token, over the global batch."""
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

    The environment holds RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT (Ray Train and torchrun
    set them).
    """

    def __init__(self, settings: Settings, plan: Plan):
        import lightning as L
        from lightning.fabric.plugins.environments import TorchElasticEnvironment
        from lightning.fabric.strategies import ModelParallelStrategy

        self.settings, self.plan = settings, plan
        self.out_dir = Path(settings.out_dir)
        world_size, local_size = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
        if settings.accelerator == "cpu":
            # It misses CUDA when the model is compiled for a CPU.
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
            torch.set_num_threads(settings.parallel.cpu_threads or max(1, available_cpus() // local_size))

        config = plan.model_config
        self.model = build_model(config, settings, plan.context_tokens)
        self.num_parameters = count_parameters(self.model)
        self.fabric = L.Fabric(
            accelerator=settings.accelerator,
            devices=local_size,
            num_nodes=settings.num_nodes,
            strategy=ModelParallelStrategy(
                parallelize_fn=self._parallelize,
                data_parallel_size=world_size,
                tensor_parallel_size=1,
            ),
            plugins=[TorchElasticEnvironment()],  # otherwise SLURM variables of the node would win
        )
        self.fabric.launch()
        self.rank, self.world_size, self.device = self.fabric.global_rank, world_size, self.fabric.device
        self.accumulation = micro_batches_per_step(settings, world_size)
        self._local_size = local_size
        self.wrapped = self.fabric.setup_module(self.model, move_to_device=False)
        self.optimizers = make_optimizers(self.model, settings.optimizer)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

        block_tokens = plan.context_tokens + 1
        self.sequences = Sequences(
            [Path(path) for path in plan.train_directories], plan.weights, block_tokens, settings.seed
        )
        self.val_sequences = Sequences(
            [Path(path) for path in plan.val_directories], plan.weights, block_tokens, seed=0
        )
        self.flops_per_token = training_flops_per_token(
            self.model.config, self.num_parameters, plan.context_tokens, settings.train.tie_embeddings
        )
        self.peak_flops = None
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
            self.peak_flops = next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)

        self.writer = CheckpointWriter(
            self.out_dir,
            self.model,
            self.optimizers,
            self._write_extras,
            self._make_manifest,
            settings.checkpoint.keep_last,
            settings.checkpoint.keep_every_steps,
        )
        self.step = 0
        self.nonfinite_steps = 0
        self.nonfinite_in_a_row = 0
        self.val_loss: float | None = None
        self._started = time.monotonic()
        self._last_poll = time.monotonic()
        self.metrics: MetricsFile | None = None

    def _parallelize(self, model: torch.nn.Module, _) -> torch.nn.Module:
        """Fabric calls it with its own mesh, which has no dimension for replicas; ours has."""
        device_type = self.fabric.device.type
        mesh = device_mesh(
            self.settings, device_type, int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
        )
        shard_model(model, mesh, self.settings)
        model.to_empty(device=self.fabric.device)
        model.reset_parameters()  # the table of rotary positions is no parameter, and empty too
        return model

    # --- start --------------------------------------------------------------------------------------------------------

    def resume_or_initialise(self) -> None:
        """Take up the newest good checkpoint; without one, draw or load the first weights."""
        newest = None
        if self.rank == 0:
            remove_temporaries(self.out_dir)
            newest, skipped = find_newest_good(self.out_dir, self.settings.checkpoint.verify == "checksums")
            for line in skipped:
                console.warn(f"skipped checkpoint {line}")
            rewind_metrics(self.out_dir, newest.step if newest else -1)
            self.metrics = MetricsFile(self.out_dir)
        self._check_space()
        path = self.fabric.broadcast(newest.path if newest else None)
        if path is not None:
            state = load_training_state(path, self.model, self.optimizers)
            self.step = state["step"]
            self.nonfinite_steps = state["nonfinite_steps"]
            self.nonfinite_in_a_row = state["nonfinite_in_a_row"]
            self.val_loss = state["val_loss"]
            self.writer.last_good = path
        elif self.settings.initial_checkpoint_dir is not None:
            load_initial_weights(self.settings.initial_checkpoint_dir, self.model)
        else:
            initialise(self.model, self.model.config, self.settings.seed)

    def _check_space(self) -> None:
        """Raises UserError on every process when not even one checkpoint fits."""
        missing = self.fabric.broadcast(shortage(self.out_dir, self.writer.state_bytes()) if self.rank == 0 else None)
        if missing:
            raise UserError(f"--out_dir={self.out_dir}: {missing}. Free space, or use another directory.")

    # --- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train from `step` to the plan's last step, or until something asks to stop."""
        settings, plan = self.settings, self.plan
        train, evaluation = settings.train, settings.eval
        if self.step == 0 and evaluation.initial_validation:
            self._log({"step": 0, "tokens": 0, **self._validate()})
        batches = Prefetcher(self.sequences, self._positions(), pin_memory=self.device.type == "cuda")
        window = _Window()
        profiler = self._start_profiler()
        try:
            if profiler is not None:
                profiler.start()
            while self.step < plan.total_steps:
                started = time.perf_counter()
                result = self._train_step(batches)
                if profiler is not None:
                    profiler.step()
                window.add(result, time.perf_counter() - started)
                self.step += 1
                last = self.step == plan.total_steps
                stop = result.stop or (result.poll_preemption and self._preempted())
                given_up = self._count_nonfinite(result)

                record = None
                if last or stop or given_up or self.step % train.log_interval == 0:
                    record = self._record(result, window)
                    window = _Window()
                if given_up:
                    self._log(record)
                    self._give_up()
                if (evaluation.interval and self.step % evaluation.interval == 0) or (
                    last and evaluation.final_validation
                ):
                    record = {**(record or {"step": self.step, "tokens": self._tokens_seen()}), **self._validate()}
                if record is not None:
                    self._log(record)

                if last or stop or (train.save_interval and self.step % train.save_interval == 0):
                    window.checkpoint_stall_s += self._save(last)
                elif result.checkpoint_error:
                    self._act_on_checkpoint_error(True)
                if stop:
                    break
        finally:
            if profiler is not None:
                profiler.stop()
            batches.close()
        self.writer.wait()
        self._act_on_checkpoint_error(self.writer.error is not None, final=self.step == plan.total_steps)

    def _positions(self) -> Iterator[np.ndarray]:
        """The positions of this process's micro-batches, from the current step on."""
        batch, size = self.settings.train.global_batch_size, self.settings.train.micro_batch_size
        for step in range(self.step, self.plan.total_steps):
            mine = rank_positions(step * batch, batch, self.rank, self.world_size)
            for start in range(0, len(mine), size):
                yield mine[start : start + size]

    def _train_step(self, batches: Prefetcher) -> StepResult:
        train = self.settings.train
        rate = learning_rate(
            self.step,
            peak=self.settings.optimizer.lr,
            minimum=train.min_lr,
            total_steps=self.plan.total_steps,
            warmup_steps=self.plan.warmup_steps,
            schedule=train.lr_schedule,
            decay_steps=self.plan.decay_steps,
        )
        set_learning_rate(self.optimizers, rate)
        # FSDP2 averages gradients over processes; the mean over the tokens of the global batch is wanted.
        scale = self.world_size / self.plan.tokens_per_step
        entropy = torch.zeros((), device=self.device)
        wait_s, digest = 0.0, 0
        for micro_step in range(self.accumulation):
            waited = time.perf_counter()
            batch = next(batches)
            wait_s += time.perf_counter() - waited
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
        now = time.monotonic()
        poll = self.rank == 0 and now - self._last_poll > _PREEMPTION_POLL_S
        out_of_time = self.settings.train.max_time is not None and now - self._started > self.settings.train.max_time
        stop = self.rank == 0 and (out_of_time or (self.out_dir / STOP_NAME).exists())
        limbs = [digest >> bits & 0xFFFF for bits in (0, 16, 32, 48)]  # exact in float64 when summed
        sums = torch.tensor(
            [0.0, stop, poll, self.writer.error is not None, wait_s, *limbs], dtype=torch.float64, device=self.device
        )
        sums[0] = entropy.double()
        dist.all_reduce(sums)
        norm = global_gradient_norm(self.parameters)
        values = sums.tolist()
        loss, grad_norm = values[0] / self.plan.tokens_per_step, norm.item()
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite:
            if self.settings.train.max_norm is not None:
                scale_gradients(self.parameters, norm, self.settings.train.max_norm)
            for optimizer in self.optimizers:
                optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        if values[2]:
            self._last_poll = now
        total_digest = sum(int(limb) << bits for limb, bits in zip(values[5:9], (0, 16, 32, 48))) % 2**64
        return StepResult(
            loss=loss,
            grad_norm=grad_norm,
            updated=finite,
            digest=f"{total_digest:016x}",
            stop=values[1] > 0,
            poll_preemption=values[2] > 0,
            checkpoint_error=values[3] > 0,
            data_wait_s=values[4] / self.world_size,
        )

    def _count_nonfinite(self, result: StepResult) -> bool:
        """Whether there were so many steps without an update in a row that the run must end."""
        if result.updated:
            self.nonfinite_in_a_row = 0
            return False
        self.nonfinite_steps += 1
        self.nonfinite_in_a_row += 1
        return self.nonfinite_in_a_row >= self.settings.train.max_nonfinite_steps

    def _give_up(self) -> NoReturn:
        self.writer.wait()
        raise UserError(
            f"the loss or the gradient norm was not finite for {self.nonfinite_in_a_row} steps in a row, up to step {self.step} "
            f"(--train.max_nonfinite_steps). Last good checkpoint: {self.writer.last_good or 'none'}. Lower --optimizer.lr or "
            "look at the data, then start again."
        )

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Mean loss over the same blocks every time, whatever the number of processes."""
        self.wrapped.eval()
        size = self.settings.train.micro_batch_size
        count = min(self.plan.val_blocks, self.settings.eval.max_iters * self.settings.train.global_batch_size)
        mine = rank_positions(0, count, self.rank, self.world_size)
        # Everyone must make the same number of forward passes: they gather weights together.
        rounds = math.ceil(math.ceil(count / self.world_size) / size)
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for i in range(rounds):
            positions = mine[i * size : (i + 1) * size]
            weight = float(len(positions) > 0)
            tokens = self.val_sequences.read(positions if len(positions) else np.zeros(1, np.int64)).to(self.device)
            entropy, _ = self.wrapped(tokens[:, :-1], tokens[:, 1:])
            sums += weight * torch.stack([entropy.double(), torch.full_like(sums[0], tokens[:, 1:].numel())])
        dist.all_reduce(sums)
        self.wrapped.train()
        self.val_loss = (sums[0] / sums[1]).item()
        values = {"val_loss": self.val_loss, "val_perplexity": math.exp(min(self.val_loss, 700))}
        if self.plan.bits_per_nat is not None:
            values["val_bits_per_byte"] = self.val_loss * self.plan.bits_per_nat
        return values

    # --- stopping -----------------------------------------------------------------------------------------------------

    def _preempted(self) -> bool:
        """Whether Ray was told that a node will be taken away; every process asks at the same step."""
        import ray

        if not ray.is_initialized():
            return False
        import ray.train

        info = ray.train.get_preemption_info()
        if info is not None and self.rank == 0:
            console.warn(
                f"a node will be taken away (nodes {info.preempted_node_ids}): saving a checkpoint, then ending"
            )
            (self.out_dir / STOP_NAME).touch()
        return info is not None

    def _act_on_checkpoint_error(self, failed: bool, final: bool = False) -> None:
        """`failed` is the same on all processes. Without a final checkpoint a run has not succeeded, whatever on_error says."""
        if not failed:
            return
        self.writer.wait()
        error, self.writer.error = self.writer.error, None
        message = f"checkpoint: {error}. Older checkpoints are whole; the newest is {self.writer.last_good or 'none'}."
        if self.settings.checkpoint.on_error == "stop" or final:
            raise UserError(
                f"{message} Free space or mend the directory and run the same command; --checkpoint.on_error=continue trains on."
            )
        if self.rank == 0:
            console.warn(f"{message} Training goes on (--checkpoint.on_error=continue).")

    # --- records and checkpoints --------------------------------------------------------------------------------------

    def _tokens_seen(self) -> int:
        return self.step * self.plan.tokens_per_step

    def _record(self, result: StepResult, window: _Window) -> dict[str, Any]:
        tokens_per_s = window.steps * self.plan.tokens_per_step / window.step_s
        per_device = tokens_per_s / self.world_size
        position = np.array([self.step * self.settings.train.global_batch_size - 1])
        return {
            "step": self.step,
            "epoch": int(self.sequences.order.locate(position).epoch[0]),
            "tokens": self._tokens_seen(),
            "loss": window.loss_sum / window.steps,
            "lr": self.optimizers[0].param_groups[0]["lr"],
            "grad_norm": result.grad_norm,
            "nonfinite_steps": self.nonfinite_steps,
            "batch_digest": result.digest,
            "tokens_per_s": tokens_per_s,
            "tokens_per_s_per_device": per_device,
            "mfu": self.flops_per_token * per_device / self.peak_flops if self.peak_flops else None,
            "step_s": window.step_s / window.steps,
            "data_wait_s": window.data_wait_s / window.steps,
            "checkpoint_stall_s": window.checkpoint_stall_s,
            "memory_peak_bytes": self._memory_peak_bytes(),
            "eta_s": window.step_s / window.steps * (self.plan.total_steps - self.step),
        }

    def _memory_peak_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _log(self, record: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.write(record)

    def _save(self, last: bool) -> float:
        """Returns the seconds for which training was held up."""
        started = time.perf_counter()
        self.writer.wait()  # the save before this one; all processes know its outcome now
        self._act_on_checkpoint_error(self.writer.error is not None)
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
        import yaml
        from litgpt.utils import save_config

        from utils.tokenizer import copy_tokenizer_files

        self.metrics.sync()
        save_config(self.model.config, directory)
        hyperparameters = dataclasses.asdict(dataclasses.replace(self.settings, address=None))
        hyperparameters["optimizer"]["betas"] = list(hyperparameters["optimizer"]["betas"])
        (directory / "hyperparameters.yaml").write_text(yaml.safe_dump(hyperparameters, sort_keys=False))
        if self.settings.tokenizer_dir is not None:
            copy_tokenizer_files(self.settings.tokenizer_dir, directory)

    def _make_manifest(self, files: list[dict[str, Any]], state: dict[str, Any]) -> dict[str, Any]:
        bits = (
            None
            if state["val_loss"] is None or self.plan.bits_per_nat is None
            else state["val_loss"] * self.plan.bits_per_nat
        )
        located = self.sequences.order.locate(np.array([state["position"]]))
        return {
            "kind": "checkpoint",
            "made_by": made_by("distributed_pretrain.py", "torch", "lightning", "litgpt", "litdata", "ray"),
            "settings": result_settings(self.settings, self.plan),
            "tokenizer": self.plan.tokenizer,
            "content": {
                "parameters": self.num_parameters,
                "step": state["step"],
                "tokens": state["tokens"],
                "position": state["position"],
                "epoch": int(located.epoch[0]),
                "sequences_per_epoch": self.plan.train_blocks,
                "val_loss": state["val_loss"],
                "val_bits_per_byte": bits,
            },
            "files": files,
            "inputs": provenance(self.plan),
        }

    def _start_profiler(self) -> Any:
        """A profiler for the steps that --profile_steps asks for, or None."""
        if not self.settings.profile_steps or self.rank != 0:
            return None
        directory = self.out_dir / "profile"
        directory.mkdir(exist_ok=True)
        return torch.profiler.profile(
            # Two steps of warm-up: the first ones allocate, compile and tune.
            schedule=torch.profiler.schedule(wait=1, warmup=1, active=self.settings.profile_steps, repeat=1),
            on_trace_ready=lambda profile: profile.export_chrome_trace(str(directory / "trace.json")),
            record_shapes=True,
        )


@dataclasses.dataclass
class _Window:
    """Sums since the last record."""

    steps: int = 0
    loss_sum: float = 0.0
    step_s: float = 0.0
    data_wait_s: float = 0.0
    checkpoint_stall_s: float = 0.0

    def add(self, result: StepResult, step_s: float) -> None:
        self.steps += 1
        self.loss_sum += result.loss
        self.step_s += step_s
        self.data_wait_s += result.data_wait_s
