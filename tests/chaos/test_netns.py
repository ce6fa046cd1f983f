"""Hosts as namespaces: what is cut is cut, in the direction that was asked, and what is mended works again."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable

import pytest

from baton.chaos.netns import PREFIX, Namespaces, namespaces_of, open_namespaces, sweep
from baton.chaos.tools import run_tool
from baton.core.errors import SetupError

pytestmark = pytest.mark.usefixtures("namespaces")

LISTEN = """
import socket, sys
me = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
me.bind((sys.argv[1], 7002))
me.settimeout(float(sys.argv[2]))
print("ready", flush=True)
try:
    me.recv(10)
    print("heard")
except TimeoutError:
    print("silence")
"""
SEND = """
import socket, sys, time
me = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for _ in range(5):
    try:
        me.sendto(b"x" * 1000, (sys.argv[1], 7002))
    except OSError:
        pass
"""


def on_hosts(names: tuple[str, ...], story: Callable[[Namespaces], Awaitable[None]]) -> None:
    async def main() -> None:
        net = await open_namespaces(names)
        try:
            await story(net)
        finally:
            await net.close()
        assert await namespaces_of(os.getpid()) == []

    asyncio.run(main())


async def hears(net: Namespaces, receiver: str, sender: str, wait_s: float = 2.0) -> bool:
    host = net.hosts[receiver]
    listener = await asyncio.create_subprocess_exec(
        *host.command_prefix, "python3", "-c", LISTEN, host.address, str(wait_s), stdout=asyncio.subprocess.PIPE)
    assert listener.stdout is not None
    await listener.stdout.readline()
    await run_tool(*net.hosts[sender].command_prefix, "python3", "-c", SEND, host.address)
    said = await listener.stdout.read()
    await listener.wait()
    return said.strip() == b"heard"


def test_a_cut_is_one_way_between_two_hosts_and_counts_what_it_drops() -> None:
    async def story(net: Namespaces) -> None:
        cut = await net.cut("a", "b")
        assert await net.dropped("b", cut) == 0
        assert not await hears(net, "b", "a", 0.5)
        assert await net.dropped("b", cut) == 5
        assert await hears(net, "a", "b")
        assert await hears(net, "b", "c")
        other = await net.cut("c", "b")
        await net.mend("b", cut)
        assert await hears(net, "b", "a")
        assert not await hears(net, "b", "c", 0.5), "the other cut stays"
        await net.mend("b", other)

    on_hosts(("a", "b", "c"), story)


def test_a_cable_that_is_down_carries_nothing_either_way() -> None:
    async def story(net: Namespaces) -> None:
        assert await net.cable_is_up("a")
        await net.set_cable("a", False)
        assert not await net.cable_is_up("a")
        assert not await hears(net, "b", "a", 0.3)
        assert not await hears(net, "a", "b", 0.3)
        await net.set_cable("a", True)
        async with asyncio.timeout(10):
            while not await net.cable_is_up("a"):
                await asyncio.sleep(0.05)
        assert await hears(net, "b", "a")

    on_hosts(("a", "b"), story)


def test_a_limited_host_waits_to_send() -> None:
    async def story(net: Namespaces) -> None:
        await net.limit("a", 16_000)
        for _ in range(2):
            await run_tool(*net.hosts["a"].command_prefix, "python3", "-c", SEND, net.hosts["b"].address)
        waited, waiting_bytes = await net.limited("a")
        assert waited > 0
        assert waiting_bytes > 0
        await net.unlimit("a")
        with pytest.raises(ValueError, match="not enough values"):
            await net.limited("a")

    on_hosts(("a", "b"), story)


def test_namespaces_of_a_run_that_was_killed_are_swept() -> None:
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    dead = int(done.stdout)

    async def main() -> None:
        names = [f"{PREFIX}-{dead}-x", f"{PREFIX}-{os.getpid()}-x"]
        for name in names:
            await run_tool("ip", "netns", "add", name)
        try:
            await sweep()
            assert await namespaces_of(dead) == []
            assert await namespaces_of(os.getpid()) == names[1:]
        finally:
            await run_tool("ip", "netns", "del", names[1])

    asyncio.run(main())


def test_a_network_that_cannot_be_built_leaves_nothing() -> None:
    async def main() -> None:
        with pytest.raises(SetupError, match="ip"):
            await open_namespaces(("a", "a/b"))
        assert await namespaces_of(os.getpid()) == []

    asyncio.run(main())
