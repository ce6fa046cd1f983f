"""What goes wrong in a world, and the proof that it went wrong in the middle of work.

Owns the moments of the faults: each waits until there is work for it to hit, strikes, heals, and keeps as `evidence`
what it hit. A fault that found nothing to hit has not landed, and the world sends more clients until it has.

Here are the faults of hosts and links; sim/more_faults.py has those of data, messages and the registry.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from baton.core.errors import BatonError
from baton.core.worker import Role
from baton.kv_transfer.transport import PROBE_LEASE
from baton.sim.registry import HOST as REGISTRY

if TYPE_CHECKING:
    from baton.sim.machine import Machine
    from baton.sim.router_host import RouterHost
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

    async def inflict(self, world: World, rng: random.Random) -> None:
        """Wait for the moment, strike, heal. Returns when the world is as it was; called again if it has not landed."""
        ...


class Landing:
    """The part that all faults have in common: a name, and the evidence."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.evidence = ""

    @property
    def landed(self) -> bool:
        return bool(self.evidence)


# ---- hosts -----------------------------------------------------------------------------------------------------------


class Crash(Landing):
    """A worker dies under work and starts again under its name and address, with a new boot id: after `down_s`, or (0)
    before anybody has noticed. `silent`: its whole machine is off, nobody resets anything."""

    def __init__(self, role: Role, silent: bool, down_s: float) -> None:
        how = "restart" if down_s == 0 else "power-off" if silent else "kill"
        super().__init__(f"{how}-{role}")
        self._role, self._silent, self._down_s = role, silent, down_s

    async def inflict(self, world: World, rng: random.Random) -> None:
        victim = await moment(world, rng, lambda: busy(world, self._role))
        if victim is None:
            return
        pulls = sum(victim.worker_id in (m.lender, m.reader) for m in world.fabric.moving)
        self.evidence = f"{victim.worker_id} had {work_of(world, victim)}, {pulls} pulls moving"
        world.kill(victim, self._silent)
        if self._down_s:
            await asyncio.sleep(self._down_s)
        victim.start()


class CrashRouter(Landing):
    """A router dies with requests on board: its clients get a connection error, and the workers work for nobody."""

    def __init__(self, silent: bool, down_s: float) -> None:
        super().__init__("power-off-router" if silent else "kill-router")
        self._silent, self._down_s = silent, down_s

    async def inflict(self, world: World, rng: random.Random) -> None:
        victim = await moment(world, rng, lambda: busy_routers(world))
        if victim is None:
            return
        on = [m.worker_id for m in world.of(Role.DECODE) if m.num_requests]
        self.evidence = f"{victim.name} had {victim.num_requests} requests, work was on {', '.join(on) or 'no worker'}"
        victim.kill(self._silent)
        await asyncio.sleep(self._down_s)
        victim.start()


class Freeze(Landing):
    """SIGSTOP, and SIGCONT later: everything that piled up, late bytes included, comes at once."""

    def __init__(self, role: Role, frozen_s: float) -> None:
        super().__init__(f"freeze-{role}")
        self._role, self._frozen_s = role, frozen_s

    async def inflict(self, world: World, rng: random.Random) -> None:
        victim = await moment(world, rng, lambda: busy(world, self._role))
        if victim is None:
            return
        work, steps, process = work_of(world, victim), victim.steps, victim.process
        assert process is not None
        victim.freeze()
        await asyncio.sleep(self._frozen_s)
        if not process.dead:
            if victim.steps == steps:
                self.evidence = f"{victim.worker_id} had {work} and did nothing for {self._frozen_s:.2f} s"
            victim.thaw()


class FreezeRouter(Landing):
    """SIGSTOP of a router: the workers' heartbeats pile up, its clients wait, and its timers are all late at once."""

    def __init__(self, frozen_s: float) -> None:
        super().__init__("freeze-router")
        self._frozen_s = frozen_s

    async def inflict(self, world: World, rng: random.Random) -> None:
        victim = await moment(world, rng, lambda: busy_routers(world))
        if victim is None:
            return
        requests, process = victim.num_requests, victim.process
        assert process is not None
        victim.freeze()
        await asyncio.sleep(self._frozen_s)
        if not process.dead:
            held = sum(world.network.num_unread(m.worker_id, victim.name) for m in world.machines.values())
            if held:
                self.evidence = f"{victim.name} had {requests} requests, and {held} messages piled up"
            victim.thaw()


class Restart(Landing):
    """A planned restart: the worker is told to stop under work, moves away what runs on it, and comes back. Clients
    must not notice."""

    def __init__(self, role: Role, down_s: float) -> None:
        super().__init__(f"planned-restart-{role}")
        self._role, self._down_s = role, down_s

    async def inflict(self, world: World, rng: random.Random) -> None:
        victim = await moment(world, rng, lambda: busy(world, self._role))
        if victim is None:
            return
        self.evidence = f"{victim.worker_id} was told to stop with {work_of(world, victim)}"
        if await victim.stop():
            await asyncio.sleep(self._down_s)
            if not victim.alive:  # two may have told it to stop
                victim.start()


class Drain(Landing):
    """An operator drains a worker under work, and after a while takes it back."""

    def __init__(self, role: Role, duration_s: float) -> None:
        super().__init__(f"drain-{role}")
        self._role, self._duration_s = role, duration_s

    async def inflict(self, world: World, rng: random.Random) -> None:
        victim = await moment(world, rng, lambda: busy(world, self._role))
        if victim is None or victim.node is None:
            return
        work, worker = work_of(world, victim), world.network.dial("operator")(victim.node.info)
        with contextlib.suppress(BatonError):
            await worker.drain(True, 2.0)
            self.evidence = f"{victim.worker_id} was drained with {work}"
            await asyncio.sleep(self._duration_s)
        while victim.node is not None and victim.node.load().draining:
            with contextlib.suppress(BatonError):
                await worker.drain(False, 2.0)
            await asyncio.sleep(0.1)


class Slow(Landing):
    """A worker computes many times slower for a while (a neighbour, heat, swap)."""

    def __init__(self, role: Role, factor: float, duration_s: float) -> None:
        super().__init__(f"slow-{role}")
        self._role, self._factor, self._duration_s = role, factor, duration_s

    async def inflict(self, world: World, rng: random.Random) -> None:
        victim = await moment(world, rng, lambda: busy(world, self._role))
        if victim is None or victim.runner is None:
            return
        runner, steps = victim.runner, victim.runner.num_steps
        runner.slowness = self._factor
        await asyncio.sleep(self._duration_s)
        runner.slowness = 1.0
        if runner.num_steps > steps:
            self.evidence = f"{victim.worker_id} did {runner.num_steps - steps} steps {self._factor:.0f} times slower"


class ClockJump(Landing):
    """Somebody sets the wall clock of a host with work by an hour or so. Nobody may notice."""

    def __init__(self, jump_s: float) -> None:
        super().__init__("clock-jump")
        self._jump_s = jump_s

    async def inflict(self, world: World, rng: random.Random) -> None:
        def hosts() -> list[Machine | RouterHost]:
            return [*busy(world, Role.PREFILL), *busy(world, Role.DECODE), *busy_routers(world)]

        victim = await moment(world, rng, hosts)
        if victim is None or victim.process is None:
            return
        victim.process.wall_jump_s += self._jump_s
        self.evidence = f"{victim.name}'s clock was set by {self._jump_s:+.0f} s under {victim.num_requests} requests"


# ---- links -----------------------------------------------------------------------------------------------------------


class Reset(Landing):
    """Connections between two hosts are reset, control and data."""

    def __init__(self, between_workers: bool) -> None:
        super().__init__("reset-workers" if between_workers else "reset-router")
        self._ends = "workers" if between_workers else "router"

    async def inflict(self, world: World, rng: random.Random) -> None:
        pair = await moment(world, rng, lambda: talking(world, self._ends))
        if pair is None:
            return
        pulls = world.fabric.reset(*pair)
        self.evidence = f"{world.network.reset(*pair)} calls and {pulls} pulls between {pair[0]} and {pair[1]}"


class Partition(Landing):
    """Frames between two hosts are held, in one direction or both, and nobody is told. `ends`: a key of PAIRS."""

    def __init__(self, ends: str, both_ways: bool, duration_s: float) -> None:
        super().__init__(f"partition-{ends}-{'both' if both_ways else 'one'}-way")
        self._ends, self._both_ways, self._duration_s = ends, both_ways, duration_s

    async def inflict(self, world: World, rng: random.Random) -> None:
        pair = await moment(world, rng, lambda: talking(world, self._ends))
        if pair is None:
            return
        a, b = pair if rng.random() < 0.5 else (pair[1], pair[0])
        cuts = [(a, b), (b, a)] if self._both_ways else [(a, b)]
        refused = world.registry.num_refused
        for cut in cuts:
            world.network.cut(*cut)
        deadline, held = world.loop.now + self._duration_s, 0
        while world.loop.now < deadline:
            await asyncio.sleep(0.05)
            held = max(held, *(world.network.num_travelling(*cut) for cut in cuts))
        for cut in cuts:
            world.network.heal(*cut)
        if REGISTRY in pair:
            held = world.registry.num_refused - refused
        if held:
            self.evidence = f"{held} frames held between {a} and {b} for {self._duration_s:.2f} s"


class Congestion(Landing):
    """Every link is slow and loses frames for a while: what came side by side now comes in another order."""

    def __init__(self, delay_s: float, jitter_s: float, duration_s: float) -> None:
        super().__init__("congestion")
        self._delay_s, self._jitter_s, self._duration_s = delay_s, jitter_s, duration_s

    async def inflict(self, world: World, rng: random.Random) -> None:
        victim = await moment(world, rng, lambda: busy(world, Role.DECODE))
        if victim is None:
            return
        frames = world.network.num_sent
        with world.network.congested(self._delay_s, self._jitter_s):
            await asyncio.sleep(self._duration_s)
        self.evidence = f"{world.network.num_sent - frames} frames took {self._delay_s:.2f} s and more"


# ---- moments ---------------------------------------------------------------------------------------------------------


async def moment(world: World, rng: random.Random, candidates: Callable[[], Sequence[T]]) -> T | None:
    """One of the candidates, as soon as there are any. None when no moment came."""
    deadline = world.loop.now + PATIENCE_S
    while not (found := candidates()):
        if world.loop.now >= deadline or world.over:
            return None
        await asyncio.sleep(POLL_S)
    return rng.choice(found)


def busy(world: World, role: Role) -> list[Machine]:
    """Workers that, if they failed now, would fail in the middle of something."""
    lending = {m.lender for m in world.fabric.moving if m.pull.order.lease_id != PROBE_LEASE}
    return [m for m in world.of(role) if m.num_requests or m.worker_id in lending]


def busy_routers(world: World) -> list[RouterHost]:
    return [r for r in world.running_routers() if r.num_requests]


def work_of(world: World, machine: Machine) -> str:
    calls = world.network.open_calls(machine.worker_id, method="prefill")
    return f"{machine.num_requests} sequences, {calls} prefill calls"


def talking(world: World, ends: str) -> list[tuple[str, str]]:
    """Pairs of hosts of that kind that have something under way between them."""
    return PAIRS[ends](world)


def _router_decode(world: World) -> list[tuple[str, str]]:
    return [(r.name, m.worker_id) for r in busy_routers(world) for m in world.of(Role.DECODE) if m.num_requests]


def _router_prefill(world: World) -> list[tuple[str, str]]:
    return [(r.name, m.worker_id) for r in busy_routers(world) for m in world.of(Role.PREFILL) if m.num_requests]


def _workers(world: World) -> list[tuple[str, str]]:
    pairs = [(d.worker_id, p.worker_id) for d in world.of(Role.DECODE) for p in world.of(Role.PREFILL)]
    return [pair for pair in pairs if world.network.open_calls(*pair, method="prefill")]


def _registry(world: World) -> list[tuple[str, str]]:
    hosts = [r.name for r in busy_routers(world)] + [m.worker_id for role in Role for m in busy(world, role)]
    return [(host, REGISTRY) for host in hosts]


PAIRS: dict[str, Callable[[World], list[tuple[str, str]]]] = {
    "router": _router_decode,
    "router-prefill": _router_prefill,
    "workers": _workers,
    "registry": _registry,
}
