"""Joining a running Ray cluster, or starting a local one and ending it again."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

from utils.errors import UserError


@contextlib.contextmanager
def ray_session(address: str | None, num_cpus: int | None = None) -> Iterator[None]:
    """Connect to Ray for the length of the block; what was started here is stopped at its end.

    Args:
        address: of a running cluster ("auto", "HOST:6379"); None: RAY_ADDRESS or the cluster that runs on
            this machine, else a local one of this process's own.
        num_cpus: size of the local one; None: all cores.
    """
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    # Without these a local cluster phones home and shows a banner; neither belongs to a batch step.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    options = {"logging_level": logging.WARNING, "log_to_driver": True, "include_dashboard": False}
    try:
        if address in (None, "") and not os.environ.get("RAY_ADDRESS") and not _local_cluster_runs():
            ray.init(address="local", num_cpus=num_cpus, **options)
        else:
            ray.init(address=address or "auto", logging_level=logging.WARNING, log_to_driver=True)
    except (ConnectionError, ValueError) as error:
        raise UserError(
            f"--address={address}: no Ray cluster answers there ({error}). Start one with `ray start --head`, give "
            "its HOST:PORT, or leave --address out to run on this machine alone."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _local_cluster_runs() -> bool:
    from ray._private.services import find_gcs_addresses

    return bool(find_gcs_addresses())
