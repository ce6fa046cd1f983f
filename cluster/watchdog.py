"""A process that does not outlive its parent, and one that cleans up after others: standard library only.

    python -I -S watchdog.py PARENT_PID DIRECTORY run COMMAND...
    python -I -S watchdog.py PARENT_PID DIRECTORY kill PID...

Both wait until the parent dies or asks this process to end (SIGTERM). Then the first ends COMMAND, which it has been
running, with SIGTERM and then SIGKILL; the second kills those PIDs, the very processes that had them when it began.
Last, both remove DIRECTORY. So servers that keep files leave none, even if their owner was killed. If COMMAND ends by
itself, so does the first, and leaves DIRECTORY to the parent, which may start it there again.
"""

from __future__ import annotations

import contextlib
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


def _watch(parent_pid: int, directory: str, what: str, words: list[str]) -> int:
    ends = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def stop(signum: int, frame: object) -> None:
        for end in ends:
            signal.signal(end, signal.SIG_IGN)  # Once is enough: cleaning up is not interrupted.
        raise SystemExit(128 + signum)

    child, others, by_itself = None, list[int](), False
    try:
        for end in ends:
            signal.signal(end, stop)
        die_with_parent(parent_pid, signal.SIGTERM)
        if what == "kill":
            others = [fd for pid in map(int, words) if (fd := _open_process(pid)) is not None]
            while True:
                signal.pause()
        me = os.getpid()
        # This process has one thread: code between fork and exec is safe here.
        child = subprocess.Popen(words, preexec_fn=lambda: die_with_parent(me, signal.SIGKILL))
        code = child.wait()
        by_itself = True
        return code
    finally:
        for fd in others:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
        if child is not None and child.poll() is None:
            child.terminate()
            try:
                child.wait(_STOP_GRACE_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        if not by_itself:
            shutil.rmtree(directory, ignore_errors=True)


def _open_process(pid: int) -> int | None:
    """A handle on this process and no later one with its number."""
    with contextlib.suppress(ProcessLookupError):
        return os.pidfd_open(pid)
    return None


if __name__ == "__main__":
    sys.exit(_watch(int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]))
