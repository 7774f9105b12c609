"""Learning-rate schedules: the factor of the peak rate at a step, a pure function of the step."""

from __future__ import annotations

import math


def learning_rate(
    step: int,
    *,
    peak: float,
    minimum: float,
    total_steps: int,
    warmup_steps: int,
    schedule: str,
    decay_steps: int,
) -> float:
    """The rate of the update that takes step `step` to `step + 1`.

    It rises linearly to `peak` over the first `warmup_steps` updates (update number warmup_steps has the peak), then:
    cosine: half a cosine down to `minimum` at the last step (Loshchilov and Hutter, arXiv:1608.03983);
    linear: a straight line down to `minimum`;
    wsd: stays at `peak`, then a straight line to `minimum` over the last `decay_steps` (arXiv:2404.06395);
    constant: stays at `peak`.

    Args:
        step: updates done so far, from 0.
        total_steps: updates of the whole run.
        decay_steps: only used by wsd.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    start = max(warmup_steps, total_steps - decay_steps) if schedule == "wsd" else warmup_steps
    if step < start:
        return peak
    fraction = min(1.0, (step + 1 - start) / max(1, total_steps - start))
    down = 0.5 * (1.0 + math.cos(math.pi * fraction)) if schedule == "cosine" else 1.0 - fraction
    return minimum + down * (peak - minimum)
