"""What is NIXL's own: several peers behind one agent, and a fence that costs only its own peer."""

from __future__ import annotations

import asyncio

import pytest

from baton.core.errors import DeadlineExceeded
from tests.kv_transfer.pair import Lender, reader, until

pytest.importorskip("nixl_cu13")

BIG = 1 << 20


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


@pytest.mark.slow
def test_fencing_one_frozen_peer_re_queues_the_pulls_of_its_agents_other_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both peers are frozen half-way on the only agent; one is fenced, the other thawed: its pull ends as if nothing
    had been, on the new agent."""
    monkeypatch.setenv("NIXL_LOG_LEVEL", "ERROR")
    monkeypatch.setenv("UCX_TLS", "tcp")
    monkeypatch.setattr("baton.kv_transfer.nixl.MAX_AGENTS", 1)
    peers = [Lender(("nixl",), num_blocks=64, block_bytes=BIG, worker_id=f"p{i}") for i in range(2)]

    async def main() -> None:
        async with reader(("nixl",), num_blocks=128, block_bytes=BIG, pull_timeout_s=30) as r:
            pulls, destinations = [], []
            for peer in peers:
                await r.puller.connect(peer.info)
            for peer in peers:
                lease, blocks = peer.lend(64)
                destination = r.take(64)
                pulls.append(asyncio.create_task(r.puller.pull(peer.info, lease, blocks, destination)))
                await until(lambda d=destination: r.arrived(d) > 0)
                peer.freeze()
                destinations.append(destination)
            await asyncio.sleep(0.3)  # what had left the lenders is in
            assert all(0 < r.arrived(d) < 64 for d in destinations), "a freeze missed its transfer"
            await r.transports["nixl"].fence("p0")
            assert "fenced" in str((await asyncio.gather(pulls[0], return_exceptions=True))[0])
            assert not pulls[1].done()
            peers[1].thaw()
            await pulls[1]
            assert r.metrics.value("baton_verified_bytes_total") == 64 * BIG

    try:
        asyncio.run(main())
    except DeadlineExceeded:
        pytest.fail("the other peer's pull was lost with the agent")
    finally:
        for peer in peers:
            peer.close()
