"""Workers as plain child processes of this one. No other machine, no other software.

Life of a member's process: spawned in a process group of its own, its output in a log file -> says `ready` on a pipe
-> ends -> what is left of its group is killed -> the next one, after a back-off. The kernel kills it if we die.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import shutil
import signal
import sys
from pathlib import Path

from baton.cluster.pool import MemberState, PoolMember, WorkerSpec
from baton.cluster.scratch import private_dir
from baton.core.config import Config, child_env
from baton.core.errors import NotFound, SetupError

log = logging.getLogger("baton.cluster")

CLOSE_GRACE_S = 5.0
_FIRST_BACKOFF_S = 0.1
_MAX_BACKOFF_S = 5.0
_TAIL_BYTES = 2000


class LocalPool:
    """Start it on the event loop of the thread whose end should end the workers too: the main thread."""

    def __init__(self, log_dir: Path | None = None) -> None:
        """`log_dir` gets <worker_id>.log files and keeps them; default: a private directory that goes with the pool."""
        self._own_log_dir = log_dir is None
        self._log_dir = log_dir or private_dir("log")
        self._log_dir.mkdir(parents=True, exist_ok=True)
        self._children: dict[str, _Child] = {}

    async def start(self, spec: WorkerSpec) -> None:
        if spec.worker_id in self._children:
            raise SetupError(f"there is a worker {spec.worker_id} already.")
        timeout_s = Config.model_validate_json(spec.config_json).cluster.start_timeout_s
        child = _Child(spec, self._log_dir / f"{spec.worker_id}.log")
        self._children[spec.worker_id] = child
        try:
            await child.come_up(timeout_s)
        except BaseException:
            await self._end(child, 0.0)
            raise

    async def stop(self, worker_id: str, grace_s: float) -> None:
        child = self._children.get(worker_id)
        if child is None:
            raise NotFound(f"there is no worker {worker_id} in this pool.")
        await self._end(child, grace_s)

    async def members(self) -> tuple[PoolMember, ...]:
        return tuple(self._children[name].member() for name in sorted(self._children))

    async def close(self) -> None:
        await asyncio.gather(*(self._end(child, CLOSE_GRACE_S) for child in list(self._children.values())))
        if self._own_log_dir:
            shutil.rmtree(self._log_dir, ignore_errors=True)

    async def _end(self, child: _Child, grace_s: float) -> None:
        """It stays a member until its process is gone: nobody may start another under its name before."""
        await child.stop(grace_s)
        if self._children.get(child.worker_id) is child:
            del self._children[child.worker_id]


class _Child:
    """One worker: the current process, and the task that replaces it when it ends."""

    def __init__(self, spec: WorkerSpec, log_path: Path) -> None:
        self.worker_id = spec.worker_id
        self._spec = spec
        self._log_path = log_path
        self._process: asyncio.subprocess.Process | None = None
        self._ready = asyncio.Event()
        self._restarts = 0
        self._keeper: asyncio.Task[None] | None = None
        self._stopping = False

    def member(self) -> PoolMember:
        pid = self._process.pid if self._process is not None else None
        return PoolMember(self.worker_id, self._spec.role, pid, self._restarts, self._state())

    def _state(self) -> MemberState:
        if self._stopping:
            return MemberState.STOPPING
        if self._process is None:
            return MemberState.RESTARTING
        return MemberState.RUNNING if self._ready.is_set() else MemberState.STARTING

    async def come_up(self, timeout_s: float) -> None:
        """The first process. After that the keeper has it."""
        process = await self._spawn()
        waits = [asyncio.ensure_future(self._ready.wait()), asyncio.ensure_future(process.wait())]
        try:
            await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        if not self._ready.is_set():
            what = f"did not register within {timeout_s:g} s" if process.returncode is None else _ended(process)
            raise SetupError(f"worker {self._spec.worker_id} {what}. Its last words:\n{self._tail()}")
        self._keeper = asyncio.create_task(self._keep(), name=f"keep {self._spec.worker_id}")

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, and SIGKILL `grace_s` later. Returns when the process and its group are gone. A second SIGTERM ends
        the drain that the first began."""
        self._stopping = True
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        process = self._process
        if process is None:
            return
        if process.returncode is None and grace_s > 0:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), grace_s)
        _kill_group(process.pid)
        await process.wait()
        self._process = None

    async def _keep(self) -> None:
        """For ever: wait for the process to end, then start the next. Ends by being cancelled in `stop`."""
        backoff_s = _FIRST_BACKOFF_S
        while True:
            process = self._process
            assert process is not None
            await process.wait()
            _kill_group(process.pid)
            backoff_s = _FIRST_BACKOFF_S if self._ready.is_set() else min(2 * backoff_s, _MAX_BACKOFF_S)
            self._process = None
            self._restarts += 1
            log.warning("worker %s %s; starting it again in %g s", self._spec.worker_id, _ended(process), backoff_s)
            while self._process is None:
                await asyncio.sleep(backoff_s)
                try:
                    await self._spawn()
                except OSError as e:  # no memory, no file handle: that passes
                    backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)
                    log.warning("worker %s cannot be started (%s); again in %g s", self._spec.worker_id, e, backoff_s)

    async def _spawn(self) -> asyncio.subprocess.Process:
        self._ready = ready = asyncio.Event()
        read_fd, write_fd = os.pipe()
        try:
            with self._log_path.open("ab") as output:
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "baton.cluster.local_child", str(os.getpid()), str(write_fd),
                    stdin=asyncio.subprocess.PIPE, stdout=output, stderr=output, pass_fds=(write_fd,),
                    env=child_env(self._spec.threads), start_new_session=True)
        except BaseException:
            os.close(read_fd)
            raise
        finally:
            os.close(write_fd)
        self._process = process
        _when_written(read_fd, ready)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # It has ended: its waiter sees to that.
            process.stdin.write(json.dumps(dataclasses.asdict(self._spec)).encode())
            await process.stdin.drain()
        process.stdin.close()
        return process

    def _tail(self) -> str:
        with contextlib.suppress(OSError):
            return self._log_path.read_bytes()[-_TAIL_BYTES:].decode(errors="replace").strip() or "(it said nothing)"
        return "(no log)"


def _when_written(read_fd: int, ready: asyncio.Event) -> None:
    """Set `ready` if something is written into the pipe before its other end closes; then close ours."""
    loop = asyncio.get_running_loop()

    def readable() -> None:
        if os.read(read_fd, 100):
            ready.set()
        loop.remove_reader(read_fd)
        os.close(read_fd)

    loop.add_reader(read_fd, readable)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _ended(process: asyncio.subprocess.Process) -> str:
    code = process.returncode
    assert code is not None
    return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
