"""Finding a running Ray cluster, joining it, or starting a local one and ending it again."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from utils import console
from utils.errors import UserError

_CONNECT_TIMEOUT_S = 5.0


def find_cluster(address: str | None) -> str | None:
    """The Ray cluster to use, as `ray.init` takes it, or None if none runs here and none was asked for.

    Args:
        address: "HOST:PORT", "auto" or "local" (no cluster), as the user gave it; None: RAY_ADDRESS, else what
            `ray start` started on this machine.

    Raises:
        UserError: nothing answers at an address that the user gave.
    """
    given = address or os.environ.get("RAY_ADDRESS")
    flag = f"--address={address}" if address else f"RAY_ADDRESS={given}"
    if given == "local":
        return None
    if given and "://" in given:
        raise UserError(
            f"{flag}: Ray's client has no checkout of this project on its server. Run the script on a node of the "
            "cluster, with HOST:PORT, or submit it with `ray job submit`."
        )
    if given and given != "auto":
        if not _answers(given):
            raise UserError(
                f"{flag}: no Ray cluster answers at {given}. Start one with `ray start --head`, give its HOST:PORT, or "
                "leave --address out and RAY_ADDRESS unset to run on this machine alone."
            )
        return given
    found = _started_here()
    if found is not None and not _answers(found):  # Ray itself would try for minutes
        gone = f"the Ray cluster that was started here at {found} is gone"
        if given:
            raise UserError(f"{flag}: {gone}. Start one with `ray start --head`.")
        console.warn(f"{gone} (`ray stop` clears it); going on without")
        return None
    # Not its address: Ray reads ~/.ray/auth_token by itself only where it finds the cluster by itself.
    return "auto" if given or found else None


def _started_here() -> str | None:
    """The address in the file that `ray start` leaves; read here because importing ray takes half a second."""
    temporary = os.environ.get("RAY_TMPDIR") or (sys.platform == "linux" and os.environ.get("TMPDIR")) or "/tmp"
    try:
        return (Path(temporary) / "ray" / "ray_current_cluster").read_text().strip() or None
    except OSError:
        return None


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT_S):
            return True
    except (OSError, ValueError, OverflowError):
        return False


@contextlib.contextmanager
def ray_session(cluster: str | None) -> Iterator[None]:
    """Connect to Ray for the length of the block; a cluster that was started here is stopped at its end.

    Args:
        cluster: what `find_cluster` gave; None starts a local cluster for this process alone, on all cores.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a local cluster would phone home
    # Ray starts its workers at niceness 15, behind its own agents and whatever else a busy machine does.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # of the workers' lines
    import ray

    # It announces at every start that tokens guard the cluster, as they should.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    try:
        ray.init(address=cluster or "local", include_dashboard=False, logging_level=logging.WARNING)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.AuthenticationError) as error:
        found = f"the Ray cluster at {os.environ.get('RAY_ADDRESS') or 'this machine'}"
        where = found if cluster == "auto" else f"--address={cluster}"
        # Ray passes on what its server said only as text.
        if isinstance(error, ray.exceptions.AuthenticationError) or "RAY_AUTH_TOKEN" in f"{error} {error.__cause__}":
            raise UserError(
                f"{where}: the cluster wants a token, and this process has none or the wrong one. Set "
                "RAY_AUTH_MODE=token, and put the head node's ~/.ray/auth_token here or its content in RAY_AUTH_TOKEN."
            ) from error
        raise UserError(f"{where}: no Ray cluster that this Ray can join ({error}).") from error
    if cluster is not None:
        hint = "; --address=local for this machine alone" if cluster == "auto" else ""
        console.say(f"Ray: joined the cluster at {ray.get_runtime_context().gcs_address}{hint}")
    try:
        yield
    finally:
        ray.shutdown()
