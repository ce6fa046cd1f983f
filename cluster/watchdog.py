"""A process that does not outlive its parent, and one that cleans up after a child: standard library only.

    python -I -S watchdog.py PARENT_PID DIRECTORY COMMAND...

runs COMMAND, ends it with SIGTERM, then SIGKILL, when the parent dies or asks this process to end, and removes
DIRECTORY. So a server that keeps files (a socket, a log) leaves none, even if its owner was killed.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys

_PR_SET_PDEATHSIG = 1
_STOP_GRACE_S = 3.0


def die_with_parent(parent_pid: int, signum: int) -> None:
    """From now on the kernel sends us `signum` when the parent *thread* that started us ends. Exits if it is gone."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent_pid:
        sys.exit(1)


def _watch(parent_pid: int, directory: str, command: list[str]) -> int:
    ends = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def stop(signum: int, frame: object) -> None:
        for end in ends:
            signal.signal(end, signal.SIG_IGN)  # Once is enough: cleaning up is not interrupted.
        raise SystemExit(128 + signum)

    child = None
    try:
        for end in ends:
            signal.signal(end, stop)
        die_with_parent(parent_pid, signal.SIGTERM)
        me = os.getpid()
        # This process has one thread: code between fork and exec is safe here.
        child = subprocess.Popen(command, preexec_fn=lambda: die_with_parent(me, signal.SIGKILL))
        return child.wait()
    finally:
        if child is not None and child.poll() is None:
            child.terminate()
            try:
                child.wait(_STOP_GRACE_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(_watch(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
