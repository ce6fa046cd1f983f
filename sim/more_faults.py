"""Faults of data, messages, clients and the registry; and the draw of all faults of a world."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from baton.core.messages import StepMessage
from baton.core.request import Request
from baton.core.worker import Role
from baton.kv_transfer.transport import PROBE_LEASE, PullOrder
from baton.models.hash_model import VOCABULARY
from baton.sim.faults import (
    PAIRS,
    ClockJump,
    Congestion,
    Crash,
    CrashRouter,
    Drain,
    Fault,
    Freeze,
    FreezeRouter,
    Landing,
    Partition,
    Reset,
    Restart,
    Slow,
    busy,
    moment,
)
from baton.sim.transport import PullFault
from baton.sim.workload import Job

if TYPE_CHECKING:
    from baton.sim.world import World

MAX_FAULTS = 4


class BadPulls(Landing):
    """The next few pulls go wrong, each in the given way."""

    def __init__(self, kind: PullFault, num_pulls: int) -> None:
        super().__init__(f"pulls-{kind}")
        self._kind, self._num_pulls = kind, num_pulls

    async def inflict(self, world: World, rng: random.Random) -> None:
        mine: list[PullOrder] = []

        def rule(reader: str, lender: str, order: PullOrder) -> PullFault | None:
            if len(mine) >= self._num_pulls or order.lease_id == PROBE_LEASE:
                return None
            mine.append(order)
            return self._kind

        world.fabric.rules[self] = rule
        await moment(world, rng, lambda: mine)
        await asyncio.sleep(1.0)
        del world.fabric.rules[self]
        if mine:
            self.evidence = f"{len(mine)} pulls of {sum(len(o.source) for o in mine)} blocks were {self._kind}"


class RepeatedCalls(Landing):
    """Lease calls are delivered twice, the second time when the first has had its effect."""

    def __init__(self, num_calls: int) -> None:
        super().__init__("repeated-lease-calls")
        self._num_calls = num_calls

    async def inflict(self, world: World, rng: random.Random) -> None:
        hit: list[str] = []

        def rule(client: str, server: str, method: str) -> bool:
            if method != "lease" or len(hit) >= self._num_calls:
                return False
            hit.append(f"{client} to {server}")
            return True

        world.network.repeated_calls[self] = rule
        await moment(world, rng, lambda: hit)
        await asyncio.sleep(1.0)
        del world.network.repeated_calls[self]
        if hit:
            self.evidence = f"{len(hit)} lease calls came twice, the first from {hit[0]}"


class Replays(Landing):
    """A worker's stream brings old messages again: token chunks and KV events that the router has had."""

    def __init__(self, num_messages: int) -> None:
        super().__init__("replayed-messages")
        self._num_messages = num_messages

    async def inflict(self, world: World, rng: random.Random) -> None:
        hit: list[StepMessage] = []
        with_chunks: list[StepMessage] = []

        def rule(src: str, dst: str, frame: object) -> bool:
            assert isinstance(frame, StepMessage)
            if len(with_chunks) >= self._num_messages or frame.snapshot or not (frame.chunks or frame.kv_events):
                return False
            if frame.chunks:
                with_chunks.append(frame)
            hit.append(frame)
            return True

        world.network.replayed_frames[self] = rule
        await moment(world, rng, lambda: with_chunks)
        await asyncio.sleep(0.5)
        del world.network.replayed_frames[self]
        chunks = sum(len(m.chunks) for m in hit)
        if chunks:
            events = sum(len(m.kv_events) for m in hit)
            self.evidence = f"{chunks} token chunks and {events} KV events came again"


class Poison(Landing):
    """A request under which every worker crashes that computes it. It may have two."""

    def __init__(self) -> None:
        super().__init__("poison")

    async def inflict(self, world: World, rng: random.Random) -> None:
        if await moment(world, rng, lambda: busy(world, Role.DECODE)) is None:
            return
        name = f"poison-{rng.randrange(10**6)}"
        world.poison.add(name)
        prompt = tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(6, 20)))
        record = await world.client(Job(world.loop.now, Request(name, prompt), router=rng.random()))
        if record.crashes:
            self.evidence = f"{', '.join(record.crashes)} crashed, then it was refused: {record.error!r:.60}"


class VanishedClients(Landing):
    """Clients are switched off while they read: no word, no reset."""

    def __init__(self, num_clients: int) -> None:
        super().__init__("vanished-clients")
        self._num_clients = num_clients

    async def inflict(self, world: World, rng: random.Random) -> None:
        await moment(world, rng, world.reading_clients)
        found = world.reading_clients()
        gone = rng.sample(found, min(len(found), self._num_clients))
        for client in gone:
            world.vanish(client)
        if gone:
            self.evidence = f"{', '.join(gone)} vanished while reading"


class RegistryFault(Landing):
    """The registry is away, answers from a replica that is behind while a worker restarts, or loses all it had.
    Nobody may notice."""

    def __init__(self, kind: str, duration_s: float) -> None:
        super().__init__(f"registry-{kind}")
        self._kind, self._duration_s = kind, duration_s

    async def inflict(self, world: World, rng: random.Random) -> None:
        victim = await moment(world, rng, lambda: busy(world, Role.DECODE))
        if victim is None:
            return
        registry, work = world.registry, f"while {victim.worker_id} had work"
        refused, stale = registry.num_refused, registry.num_stale
        if self._kind == "outage":
            registry.outage = True
            await asyncio.sleep(self._duration_s)
            registry.outage = False
            if registry.num_refused > refused:
                self.evidence = f"{registry.num_refused - refused} calls refused {work}"
        elif self._kind == "stale":
            registry.fall_behind()
            world.kill(victim, silent=False)
            victim.start()
            await asyncio.sleep(self._duration_s)
            registry.catch_up()
            if registry.num_stale > stale:
                self.evidence = f"{registry.num_stale - stale} lists named the boot before the last {work}"
        else:
            self.evidence = f"{registry.forget()} entries lost {work}"


def draw_faults(seed: int) -> tuple[Fault, ...]:
    """One to four faults, each a draw of its own, so that leaving one out changes no other."""
    num_faults = random.Random(f"faults {seed}").choice((1, 1, 2, 2, 3, MAX_FAULTS))
    return tuple(_draw(random.Random(f"fault {seed} {i}")) for i in range(num_faults))


def _draw(rng: random.Random) -> Fault:
    role = rng.choice((Role.PREFILL, Role.DECODE))
    down_s = rng.uniform(0.3, 4.0)
    kinds: Sequence[Callable[[], Fault]] = (
        lambda: Crash(role, False, down_s),
        lambda: Crash(role, True, down_s),
        lambda: Crash(role, False, 0.0),
        lambda: CrashRouter(rng.random() < 0.4, down_s),
        lambda: Freeze(role, rng.uniform(0.1, 6.0)),
        lambda: FreezeRouter(rng.uniform(0.1, 6.0)),
        lambda: Slow(role, rng.uniform(5, 40), rng.uniform(0.5, 3.0)),
        lambda: ClockJump(rng.choice((-3600.0, 3600.0))),
        lambda: Reset(rng.random() < 0.6),
        lambda: Partition(rng.choice(sorted(PAIRS)), rng.random() < 0.5, rng.uniform(0.2, 6.0)),
        lambda: Partition(rng.choice(sorted(PAIRS)), rng.random() < 0.5, rng.uniform(0.2, 12.0)),
        lambda: Congestion(rng.uniform(0.02, 0.3), rng.uniform(0.05, 0.5), rng.uniform(0.5, 3.0)),
        lambda: BadPulls(rng.choice(list(PullFault)), rng.randint(1, 5)),
        lambda: BadPulls(rng.choice(list(PullFault)), rng.randint(1, 5)),
        lambda: RepeatedCalls(rng.randint(1, 8)),
        lambda: Replays(rng.randint(1, 8)),
        Poison,
        lambda: Restart(role, rng.choice((0.0, down_s))),
        lambda: Restart(role, rng.choice((0.0, down_s))),
        lambda: Drain(role, rng.uniform(0.5, 4.0)),
        lambda: VanishedClients(rng.randint(1, 3)),
        lambda: RegistryFault(rng.choice(("outage", "stale", "empty")), rng.uniform(1.0, 5.0)),
    )
    return rng.choice(kinds)()
