"""Joining a running Ray cluster, or starting a local one and ending it again."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

from utils.errors import UserError


@contextlib.contextmanager
def ray_session(address: str | None) -> Iterator[None]:
    """Connect to Ray for the length of the block; what was started here is stopped at its end.

    Args:
        address: of a running cluster ("auto", "HOST:6379"); None: RAY_ADDRESS or the one that `ray start` started on
            this machine, else a local one of this process's own, on all cores.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a local cluster would phone home
    # Ray starts its workers at niceness 15, behind its own agents and whatever else a busy machine does.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    # Says at every start that tokens guard the cluster, as they should.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    try:
        # Without an address Ray itself takes RAY_ADDRESS, or what `ray start` started here, or starts a local cluster.
        ray.init(address=address or None, include_dashboard=False, logging_level=logging.WARNING)
    except (ConnectionError, ValueError) as error:
        where = f"--address={address}" if address else f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}"
        if isinstance(error.__cause__, ray.exceptions.AuthenticationError):
            raise UserError(
                f"{where}: the cluster wants a token, and this process shows none or another. Set RAY_AUTH_MODE=token, and "
                "have the head node's ~/.ray/auth_token here or its content in RAY_AUTH_TOKEN."
            ) from error
        raise UserError(
            f"{where}: no Ray cluster answers there ({error}). Start one with `ray start --head`, give "
            "its HOST:PORT, or leave --address out and RAY_ADDRESS unset to run on this machine alone."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()
