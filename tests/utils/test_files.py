"""Free space is that of the disk that a directory will lie on, and errors name the file that they are of."""

from __future__ import annotations

import errno
import shutil

import pytest

from utils.files import atomic_write, free_bytes


def test_free_space_is_known_before_the_directory_exists(small_disk):
    assert free_bytes(small_disk / "not" / "yet") == shutil.disk_usage(small_disk).free <= 256 * 1024


@pytest.mark.parametrize("number, names", [(errno.ENOSPC, True), (errno.EIO, False), (errno.EISDIR, False)])
def test_only_a_lack_of_room_is_the_target_s(tmp_path, number, names):
    """What is read while the target is open can fail too."""
    with pytest.raises(OSError) as raised, atomic_write(tmp_path / "target"):
        raise OSError(number, "it failed")
    assert raised.value.filename == (str(tmp_path / "target") if names else None)
    assert not list(tmp_path.iterdir())
