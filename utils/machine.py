"""What this machine lets this process use: cores, open files, and threads."""

from __future__ import annotations

import math
import os
import resource
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def available_cpus() -> int:
    """Cores that this process may keep busy: those it may run on, and no more than its container's quota allows."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Microseconds per period; "max" or -1: no quota.
    for quota_and_period in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # cgroup v2, and v1
        try:
            quota, period = " ".join((_CGROUPS / name).read_text() for name in quota_and_period).split()
            if int(quota) > 0:
                return max(1, min(cores, math.ceil(int(quota) / int(period))))
        except (OSError, ValueError):
            continue
    return cores


def raise_open_file_limit(wanted: int) -> int:
    """Raise the soft limit of open files to `wanted`, as far as the hard one allows; returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard if hard != resource.RLIM_INFINITY else wanted, wanted)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return soft
