"""Whose CPU was used: the client's, the server's with its children, and everybody else's."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.bench.load.host import Ticks, Watch, family, listener, look, used

pytestmark = pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs Linux' /proc")

BURNT_S = 0.3
BURN = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE) if len(
    sys.argv) > 1 else None
while time.process_time() < {BURNT_S}:
    pass
if child:
    child.stdout.readline()
print("burnt", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def busy() -> Iterator[int]:
    """A process, with a child, each of which has used BURNT_S of CPU; its pid."""
    command = [sys.executable, "-c", BURN, BURN]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "burnt\n"
        yield process.pid
        process.communicate()


def test_what_neither_client_nor_server_used_is_others() -> None:
    before, after = Ticks(10.0, 100.0, 5.0, 20.0), Ticks(12.0, 103.0, 5.5, 21.0)
    seen = used(before, after, server_known=True)
    assert (seen.client, seen.server, seen.others) == (0.25, 0.5, 0.75)
    unknown = used(Ticks(10.0, 100.0, 5.0, 0.0), Ticks(12.0, 103.0, 5.5, 0.0), server_known=False)
    assert (unknown.server, unknown.others) == (None, 1.25)
    assert used(before, Ticks(12.0, 100.9, 5.5, 20.5), server_known=True).others == 0, "clocks tick at their own times"


def test_a_server_is_its_process_and_all_of_its_children(busy: int) -> None:
    assert len(family(frozenset({busy}))) == 2
    assert look(0.0, family(frozenset({busy}))).server >= 2 * BURNT_S - 0.1
    assert look(0.0, frozenset()).server == 0
    assert look(0.0, frozenset({1 << 30})).server == 0


def test_a_server_that_begins_under_a_watch_is_not_others() -> None:
    async def main() -> float:
        began_s = asyncio.get_running_loop().time()
        async with Watch(frozenset()) as watch:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", BURN, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert process.stdout is not None
            await process.stdout.readline()
            watch.add_servers(frozenset({process.pid}))
        took_s = asyncio.get_running_loop().time() - began_s
        await process.communicate(b"")
        assert watch.mean is not None
        assert watch.mean.server is not None
        return watch.mean.server * took_s

    assert asyncio.run(main()) >= BURNT_S - 0.1


def test_a_child_that_ended_is_the_clients() -> None:
    before = look(0.0, frozenset()).client
    subprocess.run([sys.executable, "-c", BURN], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
    assert look(0.0, frozenset()).client - before >= BURNT_S - 0.1


def test_the_client_is_not_its_own_server(busy: int) -> None:
    assert family(frozenset({os.getpid()})) == frozenset()
    assert not family(frozenset({os.getppid()})) & {os.getpid(), busy}
    assert look(0.0, frozenset()).client > 0


def test_who_listens_at_an_address_is_found() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        found = listener("127.0.0.1", s.getsockname()[1])
        ancestors = {os.getpid()}
        pid = os.getpid()
        while pid > 1:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            ancestors.add(pid)
        assert len(found) == 1
        assert found <= ancestors
        assert listener("192.0.2.1", s.getsockname()[1]) == frozenset(), "another machine's"
    assert listener("127.0.0.1", 1) == frozenset()


def test_a_watch_that_is_over_has_a_mean() -> None:
    async def main() -> Watch:
        async with Watch(frozenset()) as watch:
            pass
        return watch

    mean = asyncio.run(main()).mean
    assert mean is not None
    assert mean.server is None
    assert mean.others >= 0
