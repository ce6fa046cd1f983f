"""Simulated hosts: their clocks, their registry, their routers, and the marks on their blocks."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from baton.core.errors import PeerLost
from baton.core.layout import Capability
from baton.core.worker import Role, WorkerInfo
from baton.engine.block_pool import BlockPool
from baton.models.hash_model import layout
from baton.sim.clocks import EPOCH_S, host_clocks
from baton.sim.loop import SimLoop, SimProcess, run
from baton.sim.network import Conditions, SimNetwork
from baton.sim.provenance import Mark, Provenance
from baton.sim.registry import EXPIRE_S, HOST, SimRegistry
from baton.sim.trace import Trace


def info(worker_id: str, boot: int) -> WorkerInfo:
    return WorkerInfo(worker_id, f"{worker_id}.{boot}", Role.DECODE, worker_id, Capability("m", "f", layout(2), 8, 8))


# ---- clocks ----------------------------------------------------------------------------------------------------------


def test_hosts_count_from_different_times_and_timers_do_not_care() -> None:
    async def main(loop: SimLoop) -> list[tuple[float, float]]:
        seen = []

        async def wait() -> None:
            began = loop.time()
            async with asyncio.timeout(100.0):
                await asyncio.sleep(0.1)
            loop.call_at(loop.time() + 0.25, lambda: seen.append((loop.now, loop.time() - began)))

        for origin_s in (0, 7, 2**21):
            SimProcess(loop, f"host-{origin_s}", origin_s).spawn(wait())
        await asyncio.sleep(1.0)
        return seen

    seen = run(1, main)
    assert len(seen) == 3
    for now, elapsed in seen:
        assert now == pytest.approx(0.35, abs=1e-8)
        assert 0.35 <= elapsed < 0.35 + 1e-8, "never early, as on a real clock"


def test_a_wall_clock_jumps_on_its_host_alone_and_the_monotonic_one_never_does() -> None:
    async def main(loop: SimLoop) -> None:
        calm, set_back = SimProcess(loop, "calm", 5), SimProcess(loop, "set back", 9)

        async def read() -> tuple[float, float, int]:
            return time.time(), time.monotonic() - loop.time(), time.time_ns()

        with host_clocks(loop):
            await asyncio.sleep(2.0)
            set_back.wall_jump_s = -3600.0
            assert await calm.spawn(read()) == (EPOCH_S + 2, 0.0, int((EPOCH_S + 2) * 1e9))
            assert (await set_back.spawn(read()))[:2] == (EPOCH_S + 2 - 3600, 0.0)
            elsewhere: list[float] = []
            thread = threading.Thread(target=lambda: elsewhere.append(time.time()))
            thread.start()
            thread.join()
            assert abs(elsewhere[0] - EPOCH_S) > 60, "other threads have the machine's clock"

    real = time.time
    run(1, main)
    assert time.time is real


# ---- the registry ----------------------------------------------------------------------------------------------------


def with_registry(act: Callable[[SimNetwork, SimRegistry], Coroutine[Any, Any, None]]) -> None:
    async def main(loop: SimLoop) -> None:
        network = SimNetwork(loop, Trace(loop.time), Conditions(loss=0.0))
        await act(network, SimRegistry(network))

    run(1, main)


def test_the_registry_answers_and_entries_expire_when_they_are_not_refreshed() -> None:
    async def act(network: SimNetwork, registry: SimRegistry) -> None:
        here = registry.at("w")
        await here.register(info("w", 1))
        await asyncio.sleep(EXPIRE_S / 2)
        await here.register(info("v", 1))
        assert await here.list() == (info("v", 1), info("w", 1))
        await asyncio.sleep(EXPIRE_S / 2 + 1)
        assert await here.list() == (info("v", 1),)
        await here.deregister("v", "v.0")
        assert await here.list() == (info("v", 1),), "an older boot's word is not its successor's"
        await here.deregister("v", "v.1")
        assert await here.list() == ()

    with_registry(act)


@pytest.mark.parametrize("cut", [("w", HOST), (HOST, "w")])
def test_a_registry_beyond_a_cut_link_does_not_answer(cut: tuple[str, str]) -> None:
    async def act(network: SimNetwork, registry: SimRegistry) -> None:
        network.cut(*cut)
        with pytest.raises(PeerLost):
            await registry.at("w").register(info("w", 1))
        await registry.at("v").register(info("v", 1))
        network.heal(*cut)
        assert await registry.at("w").list() == (info("v", 1),)
        assert registry.num_refused == 1

    with_registry(act)


def test_a_replica_that_is_behind_names_a_boot_that_has_a_successor() -> None:
    async def act(network: SimNetwork, registry: SimRegistry) -> None:
        here = registry.at("w")
        await here.register(info("w", 1))
        registry.fall_behind()
        await here.register(info("w", 2))
        assert await here.list() == (info("w", 1),)
        assert registry.num_stale == 1
        registry.catch_up()
        assert await here.list() == (info("w", 2),)
        assert registry.forget() == 1
        assert await here.list() == ()

    with_registry(act)


# ---- marks on blocks -------------------------------------------------------------------------------------------------


class Worker:
    """A pool whose blocks are marked, and what its marks complained of."""

    def __init__(self) -> None:
        self.pool = BlockPool(4, 2)
        self.said: list[str] = []
        self.marks = Provenance("w", self.pool, self.said.append)
        (self.block,) = self.pool.allocate(1) or ()

    def compute(self, tenant: str) -> None:
        self.marks.wrote(self.block, self.marks.begins_writing(self.block), tenant)

    def new_owner(self) -> None:
        """The same block, given back and taken again."""
        self.pool.release([self.block])
        assert self.pool.allocate(1) == [self.block]


def test_what_a_sequence_wrote_it_may_read_and_nobody_after_it() -> None:
    w = Worker()
    w.compute("acme")
    w.marks.reads(w.block, "acme")
    assert w.said == []
    w.marks.reads(w.block, "umbra")
    assert "of tenant 'acme'" in w.said.pop()
    w.new_owner()
    w.marks.reads(w.block, "acme")
    assert "nobody wrote" in w.said.pop()


def test_a_step_may_write_only_where_one_sequence_holds_and_nobody_reads() -> None:
    w = Worker()
    w.pool.lend(w.block)
    w.marks.begins_writing(w.block)
    assert "a step writes to block" in w.said.pop()
    w.pool.unlend(w.block)
    generation = w.marks.begins_writing(w.block)
    w.pool.lend(w.block)
    w.marks.wrote(w.block, generation, "")
    assert w.said == [], "its first layers are lent while the last are computed"
    w.pool.unlend(w.block)
    w.new_owner()
    w.marks.wrote(w.block, generation, "")
    assert "taken away under it" in w.said.pop()


def test_a_pull_may_land_in_its_own_block_also_in_quarantine_and_nowhere_else() -> None:
    w = Worker()
    (generation,) = w.marks.generations([w.block])
    w.marks.lands(w.block, generation, Mark(7, "acme"))
    w.pool.quarantine(w.block)
    w.pool.release([w.block])
    w.marks.lands(w.block, generation, Mark(7, "acme"))
    assert w.said == []
    w.pool.unquarantine(w.block)
    w.marks.lands(w.block, generation, None)
    assert "(0, 0, False)" in w.said.pop()
    assert w.pool.allocate(1) == [w.block]
    w.marks.lands(w.block, generation, None)
    assert "another owner" in w.said.pop()


def test_what_was_pulled_belongs_to_the_tenant_it_was_lent_by() -> None:
    w = Worker()
    w.marks.lands(w.block, w.pool.generation(w.block), Mark(7, "acme"))
    w.marks.reads(w.block, "acme")
    assert w.said == []
    w.marks.reads(w.block, "")
    assert w.said
