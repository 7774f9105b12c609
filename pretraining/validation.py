"""Validation: the mean loss over the same blocks every time, whatever the number of processes."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.distributed as dist

from pretraining.data import even_batches, plan_sequences, read_micro_batch
from pretraining.loss import IGNORED_TARGET
from pretraining.plan import Plan
from pretraining.settings import Settings


class Validation:
    """Every process makes one and calls `run` at the same steps.

    Args:
        model: returns (cross entropy summed, objective), as Fabric has set it up.
        device: where its inputs go.
    """

    def __init__(self, model: torch.nn.Module, settings: Settings, plan: Plan, device: torch.device):
        self._model, self._device, self._bits_per_nat = model, device, plan.bits_per_nat
        self._sequences = plan_sequences(plan, plan.val_directories, seed=0)
        count = min(plan.val_blocks, settings.eval.max_iters * settings.train.global_batch_size)
        self._batch_size = settings.train.micro_batch_size
        self._group = group = model.context_group
        self._micro_batches = even_batches(count, self._batch_size, group.index, group.count)

    @torch.no_grad()
    def run(self) -> dict[str, float]:
        """The loss in nats per token, its perplexity, and bits per byte where the bytes are known."""
        self._model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)  # cross entropy, tokens
        for positions in self._micro_batches:
            # Always of the same shape: for another one compiled blocks would be compiled once more. What fills it up
            # is read but not counted.
            filled = np.resize(positions if len(positions) else np.zeros(1, np.int64), self._batch_size)
            batch = read_micro_batch(self._sequences, filled, pin_memory=False, group=self._group)
            inputs, targets, offsets = batch.to(self._device)
            targets = targets.clone()
            targets[len(positions) :] = IGNORED_TARGET
            entropy, _ = self._model(inputs, targets, offsets)
            sums += torch.stack([entropy.double(), torch.full_like(sums[0], targets[: len(positions)].numel())])
        dist.all_reduce(sums)
        self._model.train()
        loss = (sums[0] / sums[1]).item()
        values = {"val_loss": loss, "val_perplexity": math.exp(min(loss, 700))}
        if self._bits_per_nat is not None:
            values["val_bits_per_byte"] = loss * self._bits_per_nat
        return values
