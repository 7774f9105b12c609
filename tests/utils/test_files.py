"""Free space is that of the disk that a directory will lie on."""

from __future__ import annotations

import shutil

from utils.files import free_bytes


def test_free_space_is_known_before_the_directory_exists(small_disk):
    assert free_bytes(small_disk / "not" / "yet") == shutil.disk_usage(small_disk).free <= 256 * 1024
