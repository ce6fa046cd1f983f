"""What is NIXL's own: several peers behind one agent, and a fence that costs only its own peer."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from baton.core.errors import Incompatible, InternalError, PeerLost
from baton.kv_transfer.framing import pack_advert
from baton.kv_transfer.memory import KVMemory
from baton.kv_transfer.transport import Pull, PullOrder, PullState
from tests.kv_transfer.pair import Lender, info_of, reader, until

pytest.importorskip("nixl_cu13")

from baton.kv_transfer.nixl import MAX_AGENTS, NixlTransport, _machine
from baton.kv_transfer.nixl_agent import Agent, AgentThread

BIG = 1 << 20
MANY = 64


def test_blocks_move_by_nixl_between_two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIXL_LOG_LEVEL", "ERROR")
    there = Lender(("nixl",))

    async def main() -> None:
        async with reader(("nixl",)) as r:
            lease, blocks = there.lend(5)
            await r.puller.pull(there.info, lease, blocks, r.take(5))
            assert r.metrics.value("baton_verified_bytes_total") == 5 * 4096

    try:
        asyncio.run(main())
    finally:
        there.close()


def test_a_lender_that_cannot_be_read_one_sidedly_is_left_to_other_transports(monkeypatch: pytest.MonkeyPatch) -> None:
    """UCX would emulate the READ with the lender's help, and a fence would then abort the lender."""
    monkeypatch.setenv("NIXL_LOG_LEVEL", "ERROR")
    there, bystander = Lender(("nixl", "tcp")), Lender(("tcp",))

    async def main() -> None:
        async with reader(("nixl", "tcp"), strict=True) as r:
            (name, advert), tcp = there.info.capability.transports
            # What a pid of another namespace looks like from here: a process, but not that one.
            fields = json.loads(advert) | {"pid": bystander.process.pid}
            elsewhere = info_of("prefill-0", "boot1", 16, [(name, json.dumps(fields).encode()), tcp])
            assert await r.puller.connect(elsewhere) == "tcp"
            assert [f.transport for f in r.puller.links()[0].figures] == ["tcp"]
            with pytest.raises(Incompatible, match="one-sidedly"):
                await r.transports["nixl"].connect(elsewhere)

    try:
        asyncio.run(main())
    finally:
        there.close()
        bystander.close()


def test_an_agent_that_outlives_its_loop_ends_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connect that was cancelled only begins to destroy its agent: the thread may have nobody left to tell."""
    monkeypatch.setenv("NIXL_LOG_LEVEL", "ERROR")
    complaints: list[object] = []
    monkeypatch.setattr(threading, "excepthook", complaints.append)
    memory = KVMemory(4, 4096, shared=True)

    async def main() -> AgentThread:
        agent = AgentThread("orphan", memory, lambda pull, error: None, Agent.progress)
        agent.stop()
        return agent

    orphan = asyncio.run(main())
    orphan._thread.join(60)
    assert not orphan._thread.is_alive()
    assert not complaints
    memory.close()


@pytest.mark.slow
def test_while_a_peer_is_fenced_the_pulls_of_its_agents_other_peers_wait_for_the_new_agent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NIXL_LOG_LEVEL", "ERROR")
    monkeypatch.setenv("UCX_TLS", "tcp")
    monkeypatch.setattr("baton.kv_transfer.nixl.MAX_AGENTS", 1)
    frozen, other = (Lender(("nixl",), num_blocks=MANY, block_bytes=BIG, worker_id=f"p{i}") for i in range(2))

    async def main() -> None:
        async with reader(("nixl",), num_blocks=2 * MANY, block_bytes=BIG, pull_timeout_s=60) as r:
            await r.puller.connect(frozen.info)
            await r.puller.connect(other.info)
            lease, blocks = frozen.lend(MANY)
            destination = r.take(MANY)
            cut = asyncio.create_task(r.puller.pull(frozen.info, lease, blocks, destination))
            await until(lambda: r.arrived(destination) > 0)
            frozen.freeze()
            lease, blocks = other.lend(MANY)
            fencing = asyncio.create_task(r.transports["nixl"].fence("p0"))
            assert "fenced" in str((await asyncio.gather(cut, return_exceptions=True))[0])
            assert not fencing.done(), "the new agent is being made"
            kept = asyncio.create_task(r.puller.pull(other.info, lease, blocks, r.take(MANY)))
            await until(lambda: len(r.puller.in_flight_blocks()) == MANY)
            assert not fencing.done()
            await fencing
            await kept
            assert r.metrics.value("baton_verified_bytes_total") == MANY * BIG

    try:
        asyncio.run(main())
    finally:
        frozen.close()
        other.close()


@pytest.mark.slow
def test_an_agent_that_cannot_be_destroyed_keeps_its_pulls_until_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIXL_LOG_LEVEL", "ERROR")
    monkeypatch.setenv("UCX_TLS", "tcp")
    monkeypatch.setattr("baton.kv_transfer.nixl.MAX_AGENTS", 1)
    frozen, other = (Lender(("nixl",), num_blocks=MANY, block_bytes=BIG, worker_id=f"p{i}") for i in range(2))

    async def main() -> None:
        async with reader(("nixl",), num_blocks=2 * MANY, block_bytes=BIG, pull_timeout_s=60) as r:
            await r.puller.connect(frozen.info)
            await r.puller.connect(other.info)
            lease, blocks = frozen.lend(MANY)
            destination = r.take(MANY)
            cut = asyncio.create_task(r.puller.pull(frozen.info, lease, blocks, destination))
            await until(lambda: r.arrived(destination) > 0)
            frozen.freeze()
            nixl = r.transports["nixl"]
            (slot,) = nixl._slots  # type: ignore[attr-defined]
            held = [await slot.thread.run(lambda agent: agent._agent.agent)]  # somebody else's reference
            for _ in range(2):
                with pytest.raises(InternalError, match="still referenced"):
                    await nixl.fence("p0")
                assert not cut.done(), "bytes may still land"
            lease, blocks = other.lend(4)
            with pytest.raises(PeerLost):
                await r.puller.pull(other.info, lease, blocks, r.take(4))
            held.clear()
            await nixl.fence("p0")
            assert "fenced" in str((await asyncio.gather(cut, return_exceptions=True))[0])
            await r.puller.pull(other.info, lease, blocks, r.take(4))

    try:
        asyncio.run(main())
    finally:
        frozen.close()
        other.close()


class ScriptedAgents:
    """In place of NIXL's agents: a transfer moves until the test ends it, or its agent is destroyed."""

    def __init__(self) -> None:
        self.alive: list[ScriptedAgents.Thread] = []

    class Thread:
        def __init__(self, agents: ScriptedAgents, ended: Callable[[Pull, str | None], None]) -> None:
            self.agents, self.ended = agents, ended
            self.peers: list[str] = []
            self.started: list[tuple[str, Pull]] = []
            agents.alive.append(self)

        async def ready(self) -> None:
            await asyncio.sleep(0)

        async def run(self, job: Callable[[Any], object]) -> object:
            await asyncio.sleep(0)
            return job(self)

        def post(self, job: Callable[[Any], object]) -> None:
            job(self)

        async def destroy(self) -> None:
            await asyncio.sleep(0)
            self.agents.alive.remove(self)

        def add_peer(self, peer_id: str, *_: object) -> None:
            self.peers.append(peer_id)

        def start(self, peer_id: str, pull: Pull, _: object) -> None:
            assert peer_id in self.peers, f"{peer_id} is not known to this agent"
            self.started.append((peer_id, pull))


def test_a_fence_posts_the_unfinished_pulls_of_its_agents_other_peers_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a real UCX the other lender might abort under it, so the agents are scripted here."""
    agents = ScriptedAgents()
    monkeypatch.setattr("baton.kv_transfer.nixl.MAX_AGENTS", 1)
    monkeypatch.setattr(
        "baton.kv_transfer.nixl.AgentThread", lambda name, memory, ended, turn: ScriptedAgents.Thread(agents, ended)
    )
    memory = KVMemory(16, 4096, shared=False)
    advert = pack_advert(
        metadata="", address=memory.address, total_blocks=memory.total_blocks, block_bytes=4096,
        probe_block=memory.probe_block, machine=_machine(), pid=os.getpid(), rdma=0,
    )

    async def main() -> None:
        nixl = NixlTransport("d0", memory)
        for peer_id in ("p0", "p1", "p2"):
            await nixl.connect(info_of(peer_id, "boot1", 16, [("nixl", advert)]))
        frozen, other = (nixl.pull(p, PullOrder("lease", (1,), (b,))) for p, b in (("p0", 2), ("p1", 3)))
        (first,) = agents.alive
        await nixl.fence("p0")
        assert frozen.state is PullState.FAILED
        (second,) = agents.alive
        assert second is not first
        assert second.peers == ["p1", "p2"]
        assert second.started == [("p1", other)], "the other peer's pull goes on with the new agent"
        assert other.state is PullState.MOVING
        second.ended(other, None)
        assert await other.wait() is PullState.DONE
        assert nixl.pull("p0", PullOrder("lease", (1,), (2,))).state is PullState.FAILED
        await nixl.close()
        assert agents.alive == []

    asyncio.run(main())


@pytest.mark.slow
def test_peers_are_spread_over_at_most_eight_agents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIXL_LOG_LEVEL", "ERROR")
    there = Lender(("nixl",))

    async def main() -> None:
        async with reader(("nixl",)) as r:
            nixl = r.transports["nixl"]
            adverts = list(there.info.capability.transports)
            for i in range(MAX_AGENTS + 3):
                await nixl.connect(info_of(f"p{i}", "boot1", 16, adverts))
            per_agent = sorted(len(slot.peers) for slot in nixl._slots)  # type: ignore[attr-defined]
            assert per_agent == [1] * 5 + [2] * 3

    try:
        asyncio.run(main())
    finally:
        there.close()
