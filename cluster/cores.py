"""How many cores this process may use, and how many of them each worker of a host gets."""

from __future__ import annotations

import os
from pathlib import Path

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
"""A container's quota, where cgroups are of version 2: microseconds of computing per period, or `max`."""


def usable_cores(cpu_max: Path = CPU_MAX) -> int:
    """Those that the scheduler lets us run on, and no more than the container's quota; at least 1."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota_us, period_us = cpu_max.read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota_us == "max" else max(1, min(cores, int(quota_us) // int(period_us)))


def threads_per_worker(asked: int | None, num_workers: int, cores: int) -> int:
    """As asked, else an equal share of the cores: more threads than cores wait for each other, and are slower."""
    return asked or max(1, cores // max(1, num_workers))
