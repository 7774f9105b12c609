"""Steps that must not change the weights: not finite, or with a loss or gradient norm far above those before them.

Such a step updates nothing, on any process: every process sees the same loss and norm, and so decides the same. After
too many in a row the run gives up, or goes back to a checkpoint from before them and reads other text (left_out.py).
"""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics
from typing import Any

from pretraining.settings import TrainSettings
from utils.errors import UserError

WINDOW_STEPS = 128
"""Good steps that a new one is compared with."""
MIN_STEPS = 32
"""Good steps before anything is called a spike: the first ones of a run say little of the next."""
MIN_RELATIVE_SIGMA = 0.01
"""Of the mean. Where the loss hardly moves, a step that is a little worse is no spike, whatever the deviation says."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What is wrong with a step."""

    finite: bool
    reason: str


class BadSteps:
    """Judges every step, and counts.

    Its state belongs into the checkpoint: a run that resumes judges as one that was never interrupted.

    Args:
        settings: spike_sigma, max_spikes and max_nonfinite_steps.
    """

    def __init__(self, settings: TrainSettings):
        self._settings = settings
        self._losses: collections.deque[float] = collections.deque(maxlen=WINDOW_STEPS)
        self._norms: collections.deque[float] = collections.deque(maxlen=WINDOW_STEPS)
        self.nonfinite_steps = 0
        """In the whole run."""
        self.nonfinite_in_a_row = 0
        self.spike_steps = 0
        """In the whole run, without those that are not finite."""
        self.in_a_row = 0
        """Bad steps of either kind since the last good one."""

    def record(self) -> dict[str, int]:
        """What is logged."""
        return {"nonfinite_steps": self.nonfinite_steps, "spike_steps": self.spike_steps}

    def judge(self, loss: float, grad_norm: float) -> Verdict | None:
        """None for a good step; changes nothing.

        Args:
            loss: nats per token.
            grad_norm: before clipping.
        """
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return Verdict(False, f"loss {loss:.4g}, gradient norm {grad_norm:.4g}")
        if self._settings.spike_sigma is None or len(self._losses) < MIN_STEPS:
            return None
        for name, value, before in (("loss", loss, self._losses), ("gradient norm", grad_norm, self._norms)):
            mean = statistics.fmean(before)
            # The same as statistics.pstdev, whose fractions take five times as long.
            deviation = math.sqrt(math.fsum((one - mean) ** 2 for one in before) / len(before))
            sigma = max(deviation, MIN_RELATIVE_SIGMA * abs(mean))
            if value > mean + self._settings.spike_sigma * sigma:
                return Verdict(True, f"{name} {value:.4g}, {(value - mean) / sigma:.1f} sigma above {mean:.4g}")
        return None

    def count(self, verdict: Verdict | None, loss: float, grad_norm: float) -> None:
        """Take a step into account, which `judge` has judged."""
        if verdict is None:
            self._losses.append(loss)
            self._norms.append(grad_norm)
            self.in_a_row = self.nonfinite_in_a_row = 0
            return
        self.in_a_row += 1
        self.spike_steps += verdict.finite
        self.nonfinite_steps += not verdict.finite
        self.nonfinite_in_a_row = 0 if verdict.finite else self.nonfinite_in_a_row + 1

    @property
    def must_go_back(self) -> bool:
        """Whether the last `in_a_row` steps are to be undone, and their text left out."""
        return self._settings.max_spikes is not None and self.in_a_row >= self._settings.max_spikes

    @property
    def must_give_up(self) -> bool:
        return self.nonfinite_in_a_row >= self._settings.max_nonfinite_steps

    def state(self) -> dict[str, Any]:
        """For meta.pt: primitives only."""
        return {
            "nonfinite_steps": self.nonfinite_steps,
            "nonfinite_in_a_row": self.nonfinite_in_a_row,
            "spike_steps": self.spike_steps,
            "bad_in_a_row": self.in_a_row,
            "good_losses": list(self._losses),
            "good_grad_norms": list(self._norms),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave; older checkpoints have only the steps that were not finite."""
        self.nonfinite_steps, self.nonfinite_in_a_row = state["nonfinite_steps"], state["nonfinite_in_a_row"]
        self.spike_steps = state.get("spike_steps", 0)
        self.in_a_row = state.get("bad_in_a_row", self.nonfinite_in_a_row)
        self._losses = collections.deque(state.get("good_losses", ()), maxlen=WINDOW_STEPS)
        self._norms = collections.deque(state.get("good_grad_norms", ()), maxlen=WINDOW_STEPS)

    def error(self, step: int, last_good: Any) -> UserError:
        """That of a run that gives up at `step`."""
        return UserError(
            f"the loss or the gradient norm was not finite for {self.nonfinite_in_a_row} steps in a row, up to step "
            f"{step} (--train.max_nonfinite_steps). Last good checkpoint: {last_good or 'none'}. "
            "Lower --optimizer.lr or look at the data, then start again."
        )
