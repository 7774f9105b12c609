"""A directory that appears whole or not at all, under its final name."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from utils import console
from utils.errors import UserError
from utils.files import TEMPORARY_PREFIX, fsync_directory, held_lock, temporary_sibling


def remove_interrupted(final: Path, flag: str) -> None:
    """Delete what a killed process left of `publishing(final)`; raises UserError while another process fills it."""
    # Exactly its own: what belongs to EXPORT must not match EXPORT-bf16's.
    for left in final.parent.glob(f"{TEMPORARY_PREFIX}{glob.escape(final.name)}-{'[0-9a-f]' * 12}"):
        with held_lock(left) as is_free:
            if not is_free:
                raise UserError(f"{flag}={final}: another process is making it in {left}. Wait for it.")
            console.say(f"removing {left}, left by an interrupted run", verbosity=2)
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def publishing(final: Path, flag: str) -> Iterator[Path]:
    """A new directory to fill, which takes the name `final` when the block ends without an error.

    Raises:
        UserError: `final` is not empty, or another process is filling it.
    """
    if final.is_dir() and any(final.iterdir()):
        raise UserError(f"{flag}={final}: is not empty. Give a directory that is new or empty.")
    final.parent.mkdir(parents=True, exist_ok=True)
    remove_interrupted(final, flag)
    temporary = temporary_sibling(final)
    temporary.mkdir()
    try:
        with held_lock(temporary):
            yield temporary
            for root, _, names in os.walk(temporary):
                for name in names:
                    with open(os.path.join(root, name), "rb") as file:
                        os.fsync(file.fileno())
                fsync_directory(root)
            if final.is_dir():
                final.rmdir()  # fails, as it should, unless it is empty
            os.rename(temporary, final)
            fsync_directory(final.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
