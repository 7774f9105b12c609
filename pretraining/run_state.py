"""Where a run stands: what its checkpoints keep in meta.pt, beside weights and optimizer state."""

from __future__ import annotations

from typing import Any

from pretraining.bad_steps import BadSteps
from pretraining.left_out import LeftOut
from pretraining.settings import Settings


class RunState:
    """Equal on all processes.

    Args:
        tokens_per_step: tokens of the global batch.
    """

    def __init__(self, settings: Settings, tokens_per_step: int, left_out: LeftOut):
        self._settings, self._tokens_per_step = settings, tokens_per_step
        self.left_out = left_out
        self.step = 0
        """Optimizer steps done."""
        self.val_loss: float | None = None
        self.bad_steps = BadSteps(settings.train)

    @property
    def tokens(self) -> int:
        """Trained on so far."""
        return self.step * self._tokens_per_step

    @property
    def num_sequences(self) -> int:
        """Read so far."""
        return self.step * self._settings.train.global_batch_size

    def sequences_of_last(self, num_steps: int) -> range:
        """The numbers of the sequences that the last steps have read."""
        return range(self.num_sequences - num_steps * self._settings.train.global_batch_size, self.num_sequences)

    def primitives(self) -> dict[str, Any]:
        """For meta.pt: numbers, strings, and lists and dictionaries of them."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "position": self.left_out.end_of(self.num_sequences),
            "left_out": [list(pair) for pair in self.left_out.ranges],
            "seed": self._settings.seed,
            "val_loss": self.val_loss,
            **self.bad_steps.state(),
        }

    def restore(self, primitives: dict[str, Any]) -> None:
        """Take up what `primitives` gave, or an earlier version of it."""
        self.step, self.val_loss = primitives["step"], primitives["val_loss"]
        self.bad_steps.restore(primitives)
