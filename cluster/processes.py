"""Processes of this machine, read from /proc: who belongs together, and who is gone."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_PROC = Path("/proc")


def machine_id() -> str:
    """Equal for two processes exactly if a pid means the same to both: this boot of the kernel, this pid namespace."""
    return (_PROC / "sys/kernel/random/boot_id").read_text().strip() + os.readlink(_PROC / "self/ns/pid")


def family_of(marker: str) -> set[int]:
    """Processes with `marker` in their command line, and all their descendants. Never ourselves."""
    parents, family = {}, set()
    for entry in _PROC.iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            parents[int(entry.name)] = int(_stat(entry.name)[1])
            if marker.encode() in (entry / "cmdline").read_bytes():
                family.add(int(entry.name))
    grown = True
    while grown:
        children = {pid for pid, parent in parents.items() if parent in family}
        grown = not children <= family
        family |= children
    return family


def gone(pid: int) -> bool:
    """No such process, or only its entry is left (a zombie)."""
    try:
        return _stat(str(pid))[0] in ("Z", "X")
    except OSError:
        return True


def _stat(pid: str) -> list[str]:
    """Fields of /proc/PID/stat from the third on (state, parent, ...): the second may hold spaces and brackets."""
    return (_PROC / pid / "stat").read_text().rpartition(")")[2].split()
