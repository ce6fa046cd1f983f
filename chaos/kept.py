"""A process kept alive, as a supervisor in production would: when it ends, however, the next one starts.

Owns the process, its log and the count of its restarts. A fault kills or freezes through it, so that an end which
nobody here caused is known as what it is: a crash.

Life of an incarnation: spawned on its host, in a process group of its own -> says one line when it serves -> ends ->
what is left of its group is killed -> the next one, a moment later.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from baton.chaos.netns import Host
from baton.core.config import child_env
from baton.core.errors import SetupError

RESTART_S = 0.2
STOP_GRACE_S = 18.0
"""A worker that was told to stop may still keep what a killed router had begun (router.orphan_window_s), and then what
it lends to a killed reader (handoff.lease_ttl_s)."""
_TAIL_BYTES = 2000


@dataclass(frozen=True, slots=True)
class Program:
    """What to run. Where `words` has {fd}, the number of a descriptor goes into which it writes its line; if nowhere,
    the line comes on its stdout."""

    words: tuple[str, ...]
    stdin: bytes = b""


@dataclass(slots=True)
class Kept:
    name: str
    host: Host
    program: Program
    log_path: Path
    restarts: int = 0
    crashes: list[str] = field(default_factory=list)
    """Ends that no fault caused, each with the log's last words."""
    serving: asyncio.Event = field(default_factory=asyncio.Event)
    """The current incarnation has said its line."""
    started_s: float = 0.0
    """When the current incarnation was spawned."""
    _process: asyncio.subprocess.Process | None = None
    _keeper: asyncio.Task[None] | None = None
    _ended_by_us: int | None = None
    """pid that a fault has killed, or told to end."""
    _codes: dict[int, int] = field(default_factory=dict)
    """Exit codes by pid."""

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def start(self, timeout_s: float) -> None:
        """Returns when it serves. Raises SetupError with its last words if it does not."""
        self._keeper = asyncio.create_task(self._keep(), name=f"keep {self.name}")
        try:
            async with asyncio.timeout(timeout_s):
                await self.serving.wait()
        except TimeoutError:
            raise SetupError(f"{self.name} did not serve within {timeout_s:g} s: {self.tail()}") from None

    def signal(self, number: signal.Signals) -> int:
        """To the current process, which must be there. Returns its pid."""
        pid = self.pid
        assert pid is not None, f"{self.name} is not running"
        if number in (signal.SIGKILL, signal.SIGTERM):
            self._ended_by_us = pid
        os.kill(pid, number)
        return pid

    def exit_code(self, pid: int) -> int | None:
        """Of an earlier process; None: it runs."""
        return self._codes.get(pid)

    def tracebacks(self) -> list[str]:
        """Each different one in its log, with how often it is there: a bug, whatever the world has done."""
        with contextlib.suppress(OSError):
            blocks = self.log_path.read_text(errors="replace").split("Traceback (most recent call last):\n")[1:]
            ends = [re.search(r"^(?! )\S.*", block, re.MULTILINE) for block in blocks]
            counted = Counter(end[0] if end else "?" for end in ends)
            return [f"{n}x {end}" for end, n in counted.items()]
        return []

    @property
    def state(self) -> str:
        """R, S, D, T (stopped) ... of the current process as the kernel has it; X if there is none."""
        with contextlib.suppress(OSError):
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        return "X"

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL if it does not end. Safe to call twice."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        process = self._process
        if process is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), STOP_GRACE_S)
            if process.returncode is None:
                self.crashes.append(f"did not end {STOP_GRACE_S:g} s after SIGTERM: {self.tail()}")
        _kill_group(process.pid)
        await process.wait()

    def tail(self) -> str:
        with contextlib.suppress(OSError):
            return self.log_path.read_bytes()[-_TAIL_BYTES:].decode(errors="replace").strip() or "(it said nothing)"
        return "(no log)"

    async def _keep(self) -> None:
        while True:
            process = await self._spawn()
            code = await process.wait()
            _kill_group(process.pid)
            self.serving = asyncio.Event()
            self.restarts += 1
            self._codes[process.pid] = code
            if self._ended_by_us != process.pid:
                self.crashes.append(f"ended by itself with code {code}: {self.tail()}")
            await asyncio.sleep(RESTART_S)

    async def _spawn(self) -> asyncio.subprocess.Process:
        read_fd, write_fd = os.pipe()
        own_fd = any("{fd}" in word for word in self.program.words)
        try:
            with self.log_path.open("ab") as log:
                self._process = process = await asyncio.create_subprocess_exec(
                    *self.host.command_prefix, *(word.replace("{fd}", str(write_fd)) for word in self.program.words),
                    stdin=asyncio.subprocess.PIPE, stdout=log if own_fd else write_fd, stderr=log,
                    pass_fds=(write_fd,), env=child_env(1), start_new_session=True)
        except BaseException:
            os.close(read_fd)
            raise
        finally:
            os.close(write_fd)
        self.started_s = asyncio.get_running_loop().time()
        self._when_said(read_fd)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            process.stdin.write(self.program.stdin)
            await process.stdin.drain()
        process.stdin.close()
        return process

    def _when_said(self, read_fd: int) -> None:
        """Watch its pipe to the end: whoever writes a line in two pieces must not find it closed after the first."""
        loop, serving = asyncio.get_running_loop(), self.serving

        def readable() -> None:
            said = os.read(read_fd, 4096)
            if b"\n" in said:
                serving.set()
            elif not said:
                loop.remove_reader(read_fd)
                os.close(read_fd)

        loop.add_reader(read_fd, readable)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
