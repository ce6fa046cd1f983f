"""Processes of this machine, read from /proc: who belongs together, and who is gone."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_PROC = Path("/proc")


def machine_id() -> str:
    """Equal for two processes exactly if a pid means the same to both: this boot of the kernel, this pid namespace."""
    return (_PROC / "sys/kernel/random/boot_id").read_text().strip() + os.readlink(_PROC / "self/ns/pid")


def named_by(marker: str) -> set[int]:
    """Processes with `marker` in their command line. Never ourselves."""
    found = set()
    for pid in _others():
        with contextlib.suppress(OSError):
            if marker.encode() in (_PROC / str(pid) / "cmdline").read_bytes():
                found.add(pid)
    return found


def writers_to(directory: str) -> set[int]:
    """Processes of this user with a file of `directory` open for writing, even if it is deleted. Never ourselves.

    It finds those that say nothing in their command line and whose parents are dead; and nobody who merely reads.
    """
    found = set()
    for pid in _others():
        with contextlib.suppress(OSError):
            if any(_writes(pid, fd.name, directory + "/") for fd in (_PROC / str(pid) / "fd").iterdir()):
                found.add(pid)
    return found


def family_of(first: set[int]) -> set[int]:
    """These processes and all their descendants. Never ourselves."""
    parents, family = {}, set(first)
    for pid in _others():
        with contextlib.suppress(OSError):
            parents[pid] = int(_stat(str(pid))[1])
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


def _others() -> list[int]:
    return [int(e.name) for e in _PROC.iterdir() if e.name.isdigit() and int(e.name) != os.getpid()]


def _writes(pid: int, fd: str, prefix: str) -> bool:
    try:
        if not os.readlink(_PROC / str(pid) / "fd" / fd).startswith(prefix):
            return False
        flags = (_PROC / str(pid) / "fdinfo" / fd).read_text().partition("flags:")[2].split()[0]
        return int(flags, 8) & os.O_ACCMODE != os.O_RDONLY
    except OSError:  # closed meanwhile
        return False


def _stat(pid: str) -> list[str]:
    """Fields of /proc/PID/stat from the third on (state, parent, ...): the second may hold spaces and brackets."""
    return (_PROC / pid / "stat").read_text().rpartition(")")[2].split()
