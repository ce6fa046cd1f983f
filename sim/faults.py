"""What goes wrong in a world, and the proof that it went wrong in the middle of work.

Owns the faults' moments: each waits until there is work for it to hit, strikes, heals, and keeps as `evidence` what it
hit. A fault that found nothing to hit has not landed, and the world sends more clients until it has.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from baton.core.worker import Role
from baton.kv_transfer.transport import PROBE_LEASE, PullOrder
from baton.sim.transport import PullFault

if TYPE_CHECKING:
    from baton.sim.machine import Machine
    from baton.sim.world import World

T = TypeVar("T")

POLL_S = 0.002
PATIENCE_S = 240.0
"""Longest wait for a moment; the world has sent all its waves long before."""


class Fault(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def evidence(self) -> str:
        """What it hit, in words; empty until it has."""
        ...

    @property
    def landed(self) -> bool:
        """Whether it has hit work."""
        ...

    async def inflict(self, world: World) -> None:
        """Wait for the moment, strike, heal. Returns when the world is as it was; called again if it has not landed."""
        ...


class _Landing:
    """The part that all faults have in common: a name, and the evidence."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.evidence = ""

    @property
    def landed(self) -> bool:
        return bool(self.evidence)


class Crash(_Landing):
    """A worker dies under work and starts again with a new boot id. `silent`: its whole machine is off, nobody resets
    anything."""

    def __init__(self, role: Role, silent: bool, down_s: float) -> None:
        super().__init__(f"{'power-off' if silent else 'kill'}-{role}")
        self._role, self._silent, self._down_s = role, silent, down_s

    async def inflict(self, world: World) -> None:
        victim = await _moment(world, lambda: _busy(world, self._role))
        if victim is None:
            return
        pulls = sum(m.lender == victim.worker_id or m.reader == victim.worker_id for m in world.fabric.moving)
        self.evidence = f"{victim.worker_id} had {_work_of(world, victim)}, {pulls} pulls moving"
        victim.kill(self._silent)
        await asyncio.sleep(self._down_s)
        victim.start()


class Freeze(_Landing):
    """SIGSTOP, and SIGCONT later: everything that piled up, late bytes included, comes at once."""

    def __init__(self, role: Role, frozen_s: float) -> None:
        super().__init__(f"freeze-{role}")
        self._role, self._frozen_s = role, frozen_s

    async def inflict(self, world: World) -> None:
        victim = await _moment(world, lambda: _busy(world, self._role))
        if victim is None or victim.process is None:
            return
        work = _work_of(world, victim)
        steps = victim.steps
        victim.process.freeze()
        world.trace.note("fault", "freezes", victim.worker_id)
        await asyncio.sleep(self._frozen_s)
        if victim.steps == steps:
            self.evidence = f"{victim.worker_id} had {work} and did nothing for {self._frozen_s:.2f} s"
        victim.process.thaw()


class FreezeRouter(_Landing):
    """SIGSTOP of the router (and its clients): the workers' heartbeats pile up, and its timers are all late at once."""

    def __init__(self, frozen_s: float) -> None:
        super().__init__("freeze-router")
        self._frozen_s = frozen_s

    async def inflict(self, world: World) -> None:
        busy = await _moment(world, lambda: _busy(world, Role.DECODE) if world.router.running else [])
        if busy is None:
            return
        world.router.freeze()
        world.oracle.grace_s += self._frozen_s
        await asyncio.sleep(self._frozen_s)
        held = sum(world.network.num_unread(m.worker_id, world.router.name) for m in world.of(Role.DECODE))
        world.router.thaw()
        if held:
            self.evidence = f"{held} messages piled up while {busy.worker_id} had work"


class Slow(_Landing):
    """A worker computes many times slower for a while (a neighbour, heat, swap)."""

    def __init__(self, role: Role, factor: float, duration_s: float) -> None:
        super().__init__(f"slow-{role}")
        self._role, self._factor, self._duration_s = role, factor, duration_s

    async def inflict(self, world: World) -> None:
        victim = await _moment(world, lambda: _busy(world, self._role))
        if victim is None or victim.runner is None:
            return
        runner, steps = victim.runner, victim.runner.num_steps
        runner.slowness = self._factor
        await asyncio.sleep(self._duration_s)
        runner.slowness = 1.0
        if runner.num_steps > steps:
            self.evidence = f"{victim.worker_id} did {runner.num_steps - steps} steps {self._factor:.0f} times slower"


class Reset(_Landing):
    """Connections between two hosts are reset, control and data."""

    def __init__(self, between_workers: bool) -> None:
        super().__init__("reset-workers" if between_workers else "reset-router")
        self._between_workers = between_workers

    async def inflict(self, world: World) -> None:
        pair = await _moment(world, lambda: _talking(world, self._between_workers))
        if pair is None:
            return
        pulls = world.fabric.reset(*pair)
        self.evidence = f"{world.network.reset(*pair)} calls and {pulls} pulls between {pair[0]} and {pair[1]}"


class Partition(_Landing):
    """Frames between two hosts are held, in one direction or both, and nobody is told."""

    def __init__(self, between_workers: bool, both_ways: bool, duration_s: float) -> None:
        super().__init__(f"partition-{'workers' if between_workers else 'router'}-{'both' if both_ways else 'one'}-way")
        self._between_workers, self._both_ways, self._duration_s = between_workers, both_ways, duration_s

    async def inflict(self, world: World) -> None:
        pair = await _moment(world, lambda: _talking(world, self._between_workers))
        if pair is None:
            return
        a, b = pair if world.rng.random() < 0.5 else (pair[1], pair[0])
        cuts = [(a, b), (b, a)] if self._both_ways else [(a, b)]
        held = 0
        for src, dst in cuts:
            world.network.cut(src, dst)
        deadline = world.loop.time() + self._duration_s
        while world.loop.time() < deadline:
            await asyncio.sleep(0.02)
            held = max(held, *(world.network.num_travelling(*cut) for cut in cuts))
        for src, dst in cuts:
            world.network.heal(src, dst)
        if held:
            self.evidence = f"{held} frames held between {a} and {b} for {self._duration_s:.2f} s"


class BadPulls(_Landing):
    """The next few pulls go wrong, each in the given way."""

    def __init__(self, kind: PullFault, num_pulls: int) -> None:
        super().__init__(f"pulls-{kind}")
        self._kind, self._num_pulls = kind, num_pulls

    async def inflict(self, world: World) -> None:
        mine: list[PullOrder] = []

        def rule(reader: str, lender: str, order: PullOrder) -> PullFault | None:
            if len(mine) >= self._num_pulls or order.lease_id == PROBE_LEASE:
                return None
            mine.append(order)
            return self._kind

        world.fabric.rules[self] = rule
        await _moment(world, lambda: mine)
        await asyncio.sleep(1.0)
        del world.fabric.rules[self]
        if mine:
            self.evidence = f"{len(mine)} pulls of {sum(len(o.source) for o in mine)} blocks were {self._kind}"


class RegistryOutage(_Landing):
    """The registry fails every call for a while: nobody may notice."""

    def __init__(self, duration_s: float) -> None:
        super().__init__("registry-outage")
        self._duration_s = duration_s

    async def inflict(self, world: World) -> None:
        victim = await _moment(world, lambda: _busy(world, Role.DECODE))
        if victim is None:
            return
        refused = world.registry.num_refused
        world.registry.outage = True
        await asyncio.sleep(self._duration_s)
        world.registry.outage = False
        if world.registry.num_refused > refused:
            self.evidence = f"{world.registry.num_refused - refused} calls refused while {victim.worker_id} had work"


def draw_faults(rng: random.Random) -> tuple[Fault, ...]:
    """One fault, or sometimes two at once."""
    return tuple(_draw(rng) for _ in range(2 if rng.random() < 0.3 else 1))


def _draw(rng: random.Random) -> Fault:
    role = rng.choice((Role.PREFILL, Role.DECODE))
    workers, down_s = rng.random() < 0.6, rng.uniform(0.3, 4.0)
    kinds: Sequence[Callable[[], Fault]] = (
        lambda: Crash(role, False, down_s),
        lambda: Crash(role, True, down_s),
        lambda: Freeze(role, rng.uniform(0.1, 6.0)),
        lambda: FreezeRouter(rng.uniform(0.1, 6.0)),
        lambda: Slow(role, rng.uniform(5, 40), rng.uniform(0.5, 3.0)),
        lambda: Reset(workers),
        lambda: Partition(workers, rng.random() < 0.5, rng.uniform(0.2, 6.0)),
        lambda: BadPulls(rng.choice(list(PullFault)), rng.randint(1, 5)),
        lambda: BadPulls(rng.choice(list(PullFault)), rng.randint(1, 5)),
        lambda: RegistryOutage(rng.uniform(1.0, 4.0)),
    )
    return rng.choice(kinds)()


async def _moment(world: World, candidates: Callable[[], Sequence[T]]) -> T | None:
    """One of the candidates, as soon as there are any. None when no moment came."""
    deadline = world.loop.time() + PATIENCE_S
    while not (found := candidates()):
        if world.loop.time() >= deadline or world.over:
            return None
        await asyncio.sleep(POLL_S)
    return world.rng.choice(found)


def _busy(world: World, role: Role) -> list[Machine]:
    """Workers that, if they failed now, would fail in the middle of something."""
    lending = {m.lender for m in world.fabric.moving if m.pull.order.lease_id != PROBE_LEASE}
    return [m for m in world.of(role) if m.num_requests or m.worker_id in lending]


def _work_of(world: World, machine: Machine) -> str:
    calls = world.network.open_calls(machine.worker_id, method="prefill")
    return f"{machine.num_requests} sequences, {calls} prefill calls"


def _talking(world: World, between_workers: bool) -> list[tuple[str, str]]:
    """Pairs of hosts that have requests under way between them."""
    if not between_workers:
        return [(world.router.name, m.worker_id) for m in world.of(Role.DECODE) if m.num_requests]
    pairs = [(d.worker_id, p.worker_id) for d in world.of(Role.DECODE) for p in world.of(Role.PREFILL)]
    return [pair for pair in pairs if world.network.open_calls(*pair, method="prefill")]
