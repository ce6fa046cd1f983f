"""What Baton promises, each in a world made to break it: leases of the dead, corruption, partitions, clocks, poison,
routers that die."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import random

import pytest

from baton.core.config import load
from baton.core.errors import IntegrityError, PeerLost, RequestQuarantined
from baton.core.handoff import LentBlock
from baton.core.layout import Capability
from baton.core.metrics import Metrics
from baton.core.worker import Role, WorkerInfo
from baton.engine.block_pool import BlockPool
from baton.kv_transfer.digest import digest
from baton.kv_transfer.memory import KVMemory
from baton.kv_transfer.puller import Puller
from baton.kv_transfer.transport import PullOrder
from baton.models.hash_model import layout
from baton.sim.faults import Fault, Landing, busy, busy_routers, moment
from baton.sim.loop import SimLoop, SimProcess, run
from baton.sim.more_faults import BadPulls
from baton.sim.network import Conditions
from baton.sim.plan import draw_plan
from baton.sim.simulate import Report, simulate
from baton.sim.trace import Trace
from baton.sim.transport import Fabric, Lender, PullFault, SimTransport, WireSpeed
from baton.sim.workload import Job
from baton.sim.world import World
from tests.sim.scene import Scene, play, request, right
from tests.sim.scene import plan as quiet

pytestmark = pytest.mark.usefixtures("quiet")


# ---- the dead hold nothing -------------------------------------------------------------------------------------------


def test_what_a_dead_reader_leased_is_free_a_lease_later_with_all_blocks_lent_and_no_traffic() -> None:
    """Its whole machine is off: nobody resets anything, nobody comes to make room for."""
    plan = quiet(bytes_per_s=2e3, lease_ttl_s=3.0)
    terms = dataclasses.replace(plan.terms, num_blocks={Role.PREFILL: 12, Role.DECODE: 60})
    plan = dataclasses.replace(plan, terms=terms)

    async def story(s: Scene) -> None:
        lender, reader = s.machine(Role.PREFILL), s.machine(Role.DECODE)
        assert lender.node is not None
        client = asyncio.create_task(s.ask(request("r", range(46), 2)))
        pool = lender.node.parts.pool
        while pool.ledger().lent < pool.num_blocks or lender.num_requests:
            assert not client.done()
            await asyncio.sleep(0.001)
        s.kill(reader, silent=True)
        await asyncio.sleep(3.0 + 1.0)
        assert (pool.ledger().lent, pool.ledger().active, pool.num_available) == (0, 0, pool.num_blocks)
        assert lender.node.parts.metrics.value("baton_leases_total", end="expired") == 1
        reader.start()
        await client

    play(1, plan, story)


@pytest.mark.parametrize("silent", [False, True])
def test_a_router_that_dies_costs_its_own_clients_their_connection_and_workers_nothing(silent: bool) -> None:
    keepalive_s = Conditions().keepalive_s

    async def story(s: Scene) -> None:
        doomed, other = s.routers.values()
        rng = random.Random(1)
        jobs = [
            Job(s.loop.now, request(f"r{i}", [rng.randrange(60) for _ in range(20)], 40)) for i in range(8)
        ]
        clients = [asyncio.create_task(s.client(job, (doomed, other)[i % 2])) for i, job in enumerate(jobs)]
        while sum(m.num_requests for m in s.of(Role.DECODE)) < 3:
            await asyncio.sleep(0.001)
        assert doomed.num_requests
        began = s.loop.now
        doomed.kill(silent)
        records = await asyncio.gather(*clients)
        for record in records[0::2]:
            assert isinstance(record.error, PeerLost), record
            assert record.ended_s is not None
            assert record.ended_s - began < (keepalive_s + 1.0 if silent else 0.5)
        assert all(record.is_answered for record in records[1::2])
        await asyncio.sleep(max(0.0, began + (keepalive_s if silent else 0.0) + 1.0 - s.loop.now))
        for machine in s.machines.values():
            assert machine.node is not None
            assert machine.num_requests == 0, "nobody works for its clients"
            assert machine.node.parts.pool.num_available == machine.node.parts.pool.num_blocks
        doomed.start()
        await asyncio.sleep(2.0)
        r = request("again", range(20))
        assert (await s.ask(r, router=doomed)).tokens == right(r)

    play(2, quiet(num_prefill=2, num_decode=2, num_routers=2), story)


# ---- wrong bytes -----------------------------------------------------------------------------------------------------


class Wire:
    """A lender and a puller, and a wire that flips a bit in one block of a thousand."""

    BLOCKS, ORDER = 256, 64

    def __init__(self, loop: SimLoop) -> None:
        shape = layout(4)
        self.fabric = Fabric(loop, Trace(loop.time), WireSpeed(bytes_per_s=1e9, latency_s=1e-4))
        self.lent = KVMemory(self.BLOCKS, shape.block_bytes, shared=False)
        self.lent.buffer[:] = random.Random(1).randbytes(len(self.lent.buffer))
        capability = Capability("m", "f", shape, 48, self.BLOCKS, transports=(("sim", b"p"),))
        self.info = WorkerInfo("p", "p.1", Role.PREFILL, "p", capability)
        self.fabric.attach(Lender(self.info, self.lent, lambda lease, blocks: True, SimProcess(loop, "p")))
        self.mine = KVMemory(self.BLOCKS, shape.block_bytes, shared=False)
        transport = SimTransport(self.fabric, "d", self.mine)
        config = load({}, ["handoff.probe_bytes=256"]).handoff
        self.puller = Puller(self.mine, {"sim": transport}, BlockPool(self.BLOCKS, 4), config, Metrics())
        self.rng = random.Random(2)
        self.num_flipped = 0
        self.fabric.rules["test"] = self._rule

    def _rule(self, reader: str, lender: str, order: PullOrder) -> PullFault | None:
        if len(order.source) < self.ORDER or self.rng.random() >= 1e-3 * self.ORDER:
            return None
        self.num_flipped += 1
        return PullFault.CORRUPT


@pytest.mark.slow
def test_in_a_hundred_thousand_blocks_every_flipped_bit_is_caught_and_no_right_block_refused() -> None:
    async def main(loop: SimLoop) -> None:
        w, num_blocks, num_refused = Wire(loop), 0, 0
        destination = list(range(w.ORDER))
        while num_blocks < 100_000:
            source = w.rng.sample(range(w.BLOCKS), w.ORDER)
            blocks = [LentBlock(i, b, 1, digest(w.lent.block(b)), 4) for i, b in enumerate(source)]
            before = w.num_flipped
            try:
                await w.puller.pull(w.info, "lease", blocks, destination)
            except IntegrityError:
                num_refused += 1
                assert w.num_flipped == before + 1, "a false alarm"
            else:
                assert w.num_flipped == before, "a wrong block was accepted"
                for b, d in zip(source, destination, strict=True):
                    assert w.lent.block(b) == w.mine.block(d)
            num_blocks += w.ORDER
        assert num_refused == w.num_flipped > 50
        await w.puller.close()

    run(1, main)


@pytest.mark.parametrize("kind", [
    PullFault.CORRUPT, *(pytest.param(k, marks=pytest.mark.slow) for k in (PullFault.MISPLACED, PullFault.SHORT))
])
def test_whatever_the_wire_does_to_blocks_clients_get_right_tokens_and_alarms_are_true(kind: PullFault) -> None:
    plan = dataclasses.replace(draw_plan(12), faults=(BadPulls(kind, 12),), num_jobs=40)
    report = simulate(12, plan=plan)
    assert report.ok, report
    assert dict(report.counters)['baton_integrity_failures_total{reason="digest"}'] > 0
    # Without losses: what is lost in a row holds a renewal up for longer than the lease lives, and then it has ended.
    lossless = dataclasses.replace(plan.terms, conditions=dataclasses.replace(plan.terms.conditions, loss=0.0))
    clean = simulate(12, plan=dataclasses.replace(plan, terms=lossless, faults=(BadPulls(PullFault.SLOW, 1),)))
    assert clean.ok, clean
    assert not any("integrity" in name for name, _ in clean.counters)


# ---- partitions ------------------------------------------------------------------------------------------------------

LINKS = {
    "R-P": ("router-0", "prefill-0"),
    "R-D": ("router-0", "decode-0"),
    "P-D": ("prefill-0", "decode-0"),
    "D-redis": ("decode-0", "registry"),
    "R-redis": ("router-0", "registry"),
}
SUBSETS = [s for n in range(1, len(LINKS) + 1) for s in itertools.combinations(LINKS, n)]


class Cuts(Landing):
    """These links at once, while the hosts at their ends have work."""

    def __init__(self, links: tuple[str, ...], both_ways: bool) -> None:
        super().__init__("cuts")
        self._pairs = [LINKS[link] for link in links]
        self._both_ways = both_ways

    async def inflict(self, world: World, rng: random.Random) -> None:
        working = await moment(world, rng, lambda: busy(world, Role.DECODE) and busy_routers(world))
        if working is None:
            return
        pairs = [pair if rng.random() < 0.5 else pair[::-1] for pair in self._pairs]
        cuts = pairs + [pair[::-1] for pair in pairs] if self._both_ways else pairs
        refused, held = world.registry.num_refused, 0
        for cut in cuts:
            world.network.cut(*cut)
        for _ in range(50):
            await asyncio.sleep(0.1)
            held = max(held, sum(world.network.num_travelling(*cut) for cut in cuts))
        for cut in cuts:
            world.network.heal(*cut)
        held += world.registry.num_refused - refused
        self.evidence = f"{held} messages held" if held else ""


def partitioned(links: tuple[str, ...], both_ways: bool) -> Report:
    plan = dataclasses.replace(draw_plan(5), faults=(Cuts(links, both_ways),), num_jobs=40, num_routers=2)
    shape = dataclasses.replace(plan.shape, mean_gap_s=0.1, p_hurried=0.0)
    return simulate(5, plan=dataclasses.replace(plan, shape=shape))


PARTITIONS = [
    pytest.param(s, both, id=f"{'+'.join(s)}, {'both ways' if both else 'one way'}",
                 marks=() if len(s) == len(LINKS) else pytest.mark.slow)
    for s in SUBSETS for both in (False, True)
]
"""All 62 of one host each; `make quick` has the two that cut everything."""


@pytest.mark.parametrize(("links", "both_ways"), PARTITIONS)
def test_no_partition_that_leaves_a_way_fails_a_request(links: tuple[str, ...], both_ways: bool) -> None:
    report = partitioned(links, both_ways)
    assert report.ok, report
    assert report.faults[0][1], "it held something"
    assert {outcome for outcome, _ in report.outcomes} <= {"answered", "left"}, report


# ---- clocks ----------------------------------------------------------------------------------------------------------


class Jump(Landing):
    """The wall clock of a host under work is set; by 0 s, nothing happens."""

    def __init__(self, host: str, jump_s: float) -> None:
        super().__init__("jump")
        self._host, self._jump_s = host, jump_s

    async def inflict(self, world: World, rng: random.Random) -> None:
        hosts = {**world.machines, **world.routers}
        host = await moment(world, rng, lambda: [h for h in (hosts[self._host],) if h.num_requests])
        if host is None or host.process is None:
            return
        host.process.wall_jump_s += self._jump_s
        self.evidence = f"{self._host} had work"


@pytest.mark.parametrize("host", [
    "decode-0", *(pytest.param(h, marks=pytest.mark.slow) for h in ("prefill-0", "router-0"))
])
def test_a_clock_that_jumps_by_an_hour_changes_nothing_at_all(host: str) -> None:
    def digest_of(jump_s: float, companion: Fault) -> str:
        plan = dataclasses.replace(draw_plan(8), faults=(Jump(host, jump_s), companion), num_routers=1)
        report = simulate(8, plan=plan)
        assert report.ok, report
        assert report.faults[0][1]
        return report.digest

    calm, ahead, back = (digest_of(jump_s, BadPulls(PullFault.LATE, 3)) for jump_s in (0.0, 3600.0, -3600.0))
    assert calm == ahead == back


# ---- poison ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 8))])
def test_a_request_that_crashes_workers_crashes_two_and_its_like_none(seed: int) -> None:
    async def story(s: Scene) -> None:
        s.poison |= {"poison", "again"}
        deadly = request("poison", [9] * 20, 4)
        got = await s.ask(deadly)
        assert isinstance(got.error, RequestQuarantined), got
        crashed = [m.worker_id for m in s.machines.values() if m.boots > 1 or not m.alive]
        assert len(crashed) == 2, crashed
        again = await s.ask(dataclasses.replace(deadly, request_id="again", sampling=deadly.sampling))
        assert isinstance(again.error, RequestQuarantined), again
        assert again.took_s < 0.01
        await asyncio.sleep(3.0)
        assert sum(m.boots for m in s.machines.values()) == len(s.machines) + 2
        r = request("good", range(20))
        assert (await s.ask(r)).tokens == right(r)

    play(seed, quiet(num_prefill=3, num_decode=5), story)
