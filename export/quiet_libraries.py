"""Warnings of libraries about each other, which nobody who sees them can do anything about."""

from __future__ import annotations

import logging


def quiet_torchao() -> None:
    """Say nothing of how torchao, an extra that transformers imports where it is installed, registers its classes."""
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
