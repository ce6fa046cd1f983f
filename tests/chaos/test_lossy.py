"""The lossy link does to packets what it is told, the same in every run, and counts it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from baton.chaos.lossy import Conditions, Direction, LossyControl
from baton.chaos.netns import Namespaces, open_namespaces
from baton.chaos.tools import run_tool

PACKET = bytes(range(200))
HEADER = 20


def direction(**conditions: float | bool) -> Direction:
    return Direction(random.Random(3), Conditions(**conditions))  # type: ignore[arg-type]


def test_a_good_line_changes_nothing() -> None:
    line = direction()
    assert [line.fates(PACKET) for _ in range(100)] == [[(0.0, PACKET)]] * 100


def test_the_same_seed_gives_each_packet_the_same_fate() -> None:
    conditions = {"loss": 0.2, "duplicate": 0.1, "corrupt": 0.1, "jitter_s": 0.01}
    one, other = direction(**conditions), direction(**conditions)
    assert [one.fates(PACKET) for _ in range(200)] == [other.fates(PACKET) for _ in range(200)]


def test_a_packets_fate_does_not_depend_on_what_conditions_those_before_it_met() -> None:
    calm, harsh = direction(), direction(loss=1.0)
    for _ in range(50):
        calm.fates(PACKET)
        harsh.fates(PACKET)
    calm.conditions = harsh.conditions = Conditions(loss=0.5, jitter_s=1.0)
    assert [calm.fates(PACKET) for _ in range(50)] == [harsh.fates(PACKET) for _ in range(50)]


def test_losses_and_doubles_come_as_often_as_asked_and_are_counted() -> None:
    line = direction(loss=0.3, duplicate=0.2)
    arrived = [len(line.fates(PACKET)) for _ in range(5000)]
    assert arrived.count(0) == line.counters["lost"] == pytest.approx(1500, rel=0.1)
    assert arrived.count(2) == line.counters["duplicated"] == pytest.approx(700, rel=0.15)
    assert line.counters["packets"] == 5000


def test_a_corrupted_packet_has_one_wrong_bit_behind_its_ip_header() -> None:
    line, seen = direction(corrupt=1.0), set()
    for _ in range(2000):
        ((_, packet),) = line.fates(PACKET)
        changed = [(i, a ^ b) for i, (a, b) in enumerate(zip(packet, PACKET, strict=True)) if a != b]
        ((at, bits),) = changed
        assert at >= HEADER
        assert bits.bit_count() == 1
        seen.add(at)
    assert min(seen) == HEADER
    assert max(seen) == len(PACKET) - 1


def test_a_cut_line_carries_nothing_and_jitter_reorders() -> None:
    assert not any(direction(cut=True).fates(PACKET) for _ in range(100))
    line = direction(delay_s=0.01, jitter_s=0.02)
    delays = [line.fates(PACKET)[0][0] for _ in range(100)]
    assert 0.01 <= min(delays) < max(delays) <= 0.03
    assert delays != sorted(delays)


# ---- between real hosts ----------------------------------------------------------------------------------------------

SERVER = """
import hashlib, socket, sys
listener = socket.create_server((sys.argv[1], 7000))
print("listening", flush=True)
listener.settimeout(20)
connection, _ = listener.accept()
connection.settimeout(20)
digest = hashlib.sha256()
while data := connection.recv(65536):
    digest.update(data)
connection.sendall(digest.digest())
"""
CLIENT = """
import hashlib, random, socket, sys
data = random.Random(1).randbytes(400_000)
connection = socket.create_connection((sys.argv[1], 7000), timeout=20)
connection.sendall(data)
connection.shutdown(socket.SHUT_WR)
answer = connection.recv(32)
print("equal" if answer == hashlib.sha256(data).digest() else "different")
"""


def on_two_hosts(story: Callable[[Namespaces, LossyControl], Awaitable[None]]) -> None:
    async def main() -> None:
        net = await open_namespaces(("a", "b"))
        try:
            hosts = {h.address: h.namespace or "" for h in net.hosts.values()}
            lossy = await LossyControl.start(1, hosts)
            try:
                await story(net, lossy)
            finally:
                await lossy.close()
        finally:
            await net.close()

    asyncio.run(main())


@pytest.mark.usefixtures("namespaces")
def test_tcp_brings_every_byte_over_a_bad_line() -> None:
    async def story(net: Namespaces, lossy: LossyControl) -> None:
        a, b = net.hosts["a"], net.hosts["b"]
        bad = Conditions(delay_s=0.001, jitter_s=0.002, loss=0.02, duplicate=0.02, corrupt=0.02)
        await lossy.set(a.address, b.address, bad)
        await lossy.set(b.address, a.address, bad)
        await net.use_lossy("a", "b", True)
        server = await asyncio.create_subprocess_exec(
            *b.command_prefix, "python3", "-c", SERVER, b.address, stdout=asyncio.subprocess.PIPE)
        assert server.stdout is not None
        await server.stdout.readline()
        try:
            said = await run_tool(*a.command_prefix, "python3", "-c", CLIENT, b.address)
        finally:
            if server.returncode is None:
                server.kill()
            await server.wait()
        counters = await lossy.counters(a.address, b.address)
        assert said.strip() == "equal"
        assert min(counters["lost"], counters["duplicated"], counters["corrupted"]) > 0, counters
        await net.use_lossy("a", "b", False)

    on_two_hosts(story)


SEND_AND_WAIT = """
import socket, sys
me = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
me.bind((sys.argv[1], 7001))
me.settimeout(0.1)
heard = set()
for _ in range(15):
    me.sendto(b"x", (sys.argv[2], 7001))
    try:
        heard.add(me.recv(10).decode())
    except TimeoutError:
        pass
print(*heard or {"silence"})
"""


async def both_send(net: Namespaces) -> tuple[str, str]:
    """What a and b hear of each other."""
    a, b = net.hosts["a"], net.hosts["b"]
    said = await asyncio.gather(*(
        run_tool(*one.command_prefix, "python3", "-c", SEND_AND_WAIT, one.address, other.address)
        for one, other in ((a, b), (b, a))
    ))
    return said[0].strip(), said[1].strip()


@pytest.mark.usefixtures("namespaces")
def test_the_link_can_be_cut_one_way() -> None:
    async def story(net: Namespaces, lossy: LossyControl) -> None:
        a, b = net.hosts["a"], net.hosts["b"]
        await lossy.set(a.address, b.address, Conditions(cut=True))
        await net.use_lossy("a", "b", True)
        heard_by_a, heard_by_b = await both_send(net)
        assert heard_by_b == "silence"
        assert heard_by_a == "x"
        assert (await lossy.counters(a.address, b.address))["cut"] >= 3
        await net.use_lossy("a", "b", False)

    on_two_hosts(story)
