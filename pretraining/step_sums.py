"""What all processes must agree on after each step, in one small all-reduce."""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist

from pretraining.bad_steps import Verdict
from pretraining.experts import routing_metrics

_LIMB_BITS = (0, 16, 32, 48)


@dataclasses.dataclass
class StepSums:
    """Of one process, or after `summed` of all of them."""

    entropy: torch.Tensor | float
    """Cross entropy of the step's tokens, summed, in nats."""
    digest: int
    """Of the tokens and their places in the global batch, modulo 2^64."""
    data_wait_s: float
    stop: bool
    poll_preemption: bool
    checkpoint_error: bool
    dataset_problem: bool
    seconds: list[float]
    """What the step before was spent on (slow_ranks.KINDS); summed: of all ranks, one after the other."""
    routing: dict[str, float] = dataclasses.field(default_factory=dict)
    """Only after `summed`: how evenly tokens spread over experts, see experts.routing_metrics; empty without any."""

    def summed(self, norm: torch.Tensor, routing: torch.Tensor | None = None) -> tuple[StepSums, float]:
        """Entropy, digest and wait for data added up, flags raised that are raised anywhere; equal on all processes.

        This is where a step waits for its device, and the only place: `entropy` comes back as a number.

        Args:
            norm: a scalar that is equal on all processes already, on the device.
            routing: of this process, see experts.RoutingSums.take; on the device.

        Returns:
            The sums, and the norm as a number.
        """
        limbs = [self.digest >> bits & 0xFFFF for bits in _LIMB_BITS]  # exact in float64 when summed
        flags = [self.stop, self.poll_preemption, self.checkpoint_error, self.dataset_problem]
        # Each rank adds its seconds to the zeros of all others.
        rank, num_seconds = dist.get_rank(), len(self.seconds)
        seconds = [0.0] * (num_seconds * dist.get_world_size())
        seconds[rank * num_seconds : (rank + 1) * num_seconds] = self.seconds
        values = [0.0, self.data_wait_s, *limbs, *flags, *seconds]
        # From page-locked memory: an ordinary copy to a GPU would wait for it once more.
        sums = torch.tensor(values, dtype=torch.float64, pin_memory=norm.is_cuda).to(norm.device, non_blocking=True)
        sums[0] = self.entropy
        if routing is not None:
            sums = torch.cat([sums, routing.flatten()])
        dist.all_reduce(sums)
        metrics = {} if routing is None else routing_metrics(sums[len(values) :].view_as(routing))
        scalars = torch.stack([norm.double(), *metrics.values()])
        numbers = torch.cat([scalars, sums[: len(values)]]).tolist()
        norm_value, metric_values, numbers = numbers[0], numbers[1 : len(scalars)], numbers[len(scalars) :]
        entropy, data_wait_s, *rest = numbers
        digest = sum(int(limb) << bits for limb, bits in zip(rest, _LIMB_BITS)) % 2**64
        num_flags = len(_LIMB_BITS) + len(flags)
        flags = (flag > 0 for flag in rest[len(_LIMB_BITS) : num_flags])
        metrics = dict(zip(metrics, metric_values))
        return StepSums(entropy, digest, data_wait_s, *flags, rest[num_flags:], metrics), norm_value


@dataclasses.dataclass
class StepResult:
    """One optimizer step, equal on all processes."""

    loss: float
    """Mean cross entropy in nats per token, over the global batch."""
    grad_norm: float
    verdict: Verdict | None
    """What is wrong with it, if anything: then nothing was changed."""
    sums: StepSums
