"""What all processes must agree on after each step, in one small all-reduce."""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist

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

    def summed(self, device: torch.device) -> StepSums:
        """Entropy, digest and seconds added up, flags raised that are raised on any process; equal on all of them.

        It waits for the device: `entropy` comes back as a number.
        """
        limbs = [self.digest >> bits & 0xFFFF for bits in _LIMB_BITS]  # exact in float64 when summed
        flags = [self.stop, self.poll_preemption, self.checkpoint_error, self.dataset_problem]
        sums = torch.tensor([0.0, self.data_wait_s, *limbs, *flags], dtype=torch.float64, device=device)
        sums[0] = self.entropy
        dist.all_reduce(sums)
        entropy, data_wait_s, *rest = sums.tolist()
        digest = sum(int(limb) << bits for limb, bits in zip(rest, _LIMB_BITS)) % 2**64
        return StepSums(entropy, digest, data_wait_s, *(flag > 0 for flag in rest[len(_LIMB_BITS) :]))
