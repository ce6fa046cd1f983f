"""A client that goes away while converted blocks are on their way costs nobody else his."""

from __future__ import annotations

import asyncio

from baton.core.config import HandoffConfig
from baton.core.handoff import LentBlock
from baton.core.layout import KVLayout
from baton.core.metrics import Metrics
from baton.kv_transfer.digest import digest
from baton.kv_transfer.landing import LANDING_BLOCKS, Landing
from baton.kv_transfer.memory import KVMemory
from baton.sim.loop import SimLoop, run
from tests.kv_transfer.pair import info_of
from tests.kv_transfer.scripted import ScriptedTransport

LAYOUT = KVLayout(num_layers=1, num_kv_heads=1, head_dim=1, block_size=16, dtype="bf16")
SIZE = LAYOUT.block_bytes


def test_a_cancelled_pull_that_fills_the_landing_fences_no_lender() -> None:
    async def main(_: SimLoop) -> None:
        config, metrics = HandoffConfig(probe_bytes=SIZE * 8), Metrics()
        memory, theirs = KVMemory(LANDING_BLOCKS, SIZE, shared=False), KVMemory(LANDING_BLOCKS, SIZE, shared=False)
        transport = ScriptedTransport("slow", memory, {"p0": theirs})
        landing = Landing(LAYOUT, memory, {"slow": transport}, config, metrics)
        timer = asyncio.create_task(landing.puller.run())
        peer = info_of("p0", "b1", LANDING_BLOCKS, [("slow", b"x")])
        await landing.puller.connect(peer)

        async def pull(*blocks: int) -> None:
            lent = [LentBlock(i, b, 1, digest(theirs.block(b)), 16) for i, b in enumerate(blocks)]
            await landing.puller.pull(peer, "lease", lent, await landing.take(len(blocks)))

        leaves, stays = asyncio.create_task(pull(*range(40))), asyncio.create_task(pull(*range(40, 60)))
        await asyncio.sleep(0.02)
        leaves.cancel()
        await asyncio.sleep(1.0)  # some polls long
        for _, moving in list(transport.moving):
            transport.land(moving)
        await asyncio.wait([leaves, stays])
        assert leaves.cancelled()
        assert stays.exception() is None
        assert metrics.value("baton_fences_total") == 0
        timer.cancel()
        await asyncio.wait([timer])
        await landing.close()

    run(0, main)
