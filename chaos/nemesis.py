"""Who decides what goes wrong when: a deck of faults, drawn from the seed, a few at once, for as long as the run lasts.

Two rules keep a run fair. There is always a healthy way: at any time a router and a decode worker that no fault touches
(prefill workers may all be gone: decode workers prefill for themselves). And no request meets two kills of workers: one
aboard two crashes is refused by design, because it may be what crashes them.

Life of a fault: drawn, its hosts reserved -> waits until its victim is at work -> strikes -> is held -> proves that it
landed -> heals -> every victim is ready again, which has a deadline -> its hosts are free again.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from baton.chaos.faults import (
    POLL_S,
    REGISTRY,
    CableDown,
    CutOneWay,
    Fault,
    Freeze,
    Kill,
    Limit,
    Lossy,
    MidPull,
    Registry,
    Scene,
    Slow,
    Stop,
    bad_line,
)
from baton.chaos.lossy import Conditions
from baton.core.worker import Role

WORK_TIMEOUT_S = 6.0
LONGER_S = 3.0
RECOVERY_S = 20.0
REDIAL_S = 3.0
"""gRPC waits up to 2 s between two dials."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A fault, whom it disturbs, and for how long."""

    kind: str
    fault: Fault
    hosts: tuple[str, ...]
    hold_s: float
    kills_worker: bool = False


@dataclass(slots=True)
class Landed:
    """A fault that struck. Times are the loop's."""

    kind: str
    hosts: tuple[str, ...]
    at_s: float
    healed_s: float | None = None
    recovered_s: float | None = None
    """None at the end of a run: its victims were not ready again in time."""
    proof: str = ""
    """Empty: it missed."""
    open_requests: tuple[str, ...] = ()


@dataclass(slots=True)
class Nemesis:
    scene: Scene
    rng: random.Random
    landed: list[Landed] = field(default_factory=list)
    num_idle: dict[str, int] = field(default_factory=dict)
    """Faults that found nothing to disturb in time, by kind."""
    _busy: set[str] = field(default_factory=set)
    _deck: list[str] = field(default_factory=list)
    _exposed: set[str] = field(default_factory=set)
    """Requests that were open at some time between the kill of a worker and its return."""
    _killing: bool = False
    """A worker was killed and is not back: a router that does not know yet may send to it."""

    def disturbed(self, name: str, since_s: float) -> bool:
        """A fault was on this host at some time since then, or is; a client's channel to it may not know yet that it is
        over."""
        return any(
            name in f.hosts and (f.recovered_s is None or f.recovered_s + REDIAL_S >= since_s) for f in self.landed
        )

    async def run(self, until_s: float) -> None:
        async with asyncio.TaskGroup() as tasks:
            for lane in range(self.scene.stack.plan.lanes):
                tasks.create_task(self._lane(until_s), name=f"nemesis {lane}")

    async def _lane(self, until_s: float) -> None:
        loop = asyncio.get_running_loop()
        while loop.time() < until_s:
            drawn = self._draw()
            if drawn is None:
                await asyncio.sleep(0.1)
                continue
            self._busy.update(drawn.hosts)
            try:
                await self._play(drawn)
            finally:
                self._busy.difference_update(drawn.hosts)
            await asyncio.sleep(self.rng.uniform(0.0, 0.5))

    async def _play(self, drawn: Drawn) -> None:
        async with AsyncExitStack() as held:
            held.push_async_callback(drawn.fault.heal)
            if not await self._at_work(drawn):
                self.num_idle[drawn.kind] = self.num_idle.get(drawn.kind, 0) + 1
            elif drawn.kills_worker:
                self._killing = True  # nothing was awaited since it was found fair
                await self._strike(drawn, held)
                self._exposed |= self.scene.clients.in_flight.keys()
                self._killing = False
            else:
                await self._strike(drawn, held)

    async def _strike(self, drawn: Drawn, held: AsyncExitStack) -> None:
        """Until its victims are back, or late."""
        loop = asyncio.get_running_loop()
        await drawn.fault.strike()
        struck = Landed(drawn.kind, drawn.hosts, loop.time(), open_requests=tuple(self.scene.clients.in_flight))
        self.landed.append(struck)
        await asyncio.sleep(drawn.hold_s)
        struck.proof = await self._proof(drawn.fault)
        await held.aclose()
        struck.healed_s = loop.time()
        if await self._recovered(drawn):
            struck.recovered_s = loop.time()

    async def _at_work(self, drawn: Drawn) -> bool:
        """Returns the very moment its victim is in the middle of something."""
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + WORK_TIMEOUT_S
        while loop.time() < give_up_s:
            if await drawn.fault.work() and not (drawn.kills_worker and self._kills_are_unfair()):
                return True
            await asyncio.sleep(POLL_S)
        return False

    def _kills_are_unfair(self) -> bool:
        return self._killing or bool(self._exposed & self.scene.clients.in_flight.keys())

    async def _proof(self, fault: Fault) -> str:
        """A fault that has met nothing yet, a cut that nobody sent anything across, is held a little longer."""
        for _ in range(int(LONGER_S / 0.25)):
            if proof := await fault.proof():
                return proof
            await asyncio.sleep(0.25)
        return ""

    async def _recovered(self, drawn: Drawn) -> bool:
        stack = self.scene.stack
        names = [name for name in drawn.hosts if name in stack.kept]
        ready = [stack.until_ready(name, lambda: set(stack.kept) - self._busy, RECOVERY_S) for name in names]
        return all(await asyncio.gather(*ready))

    # ---- drawing -------------------------------------------------------------------------------------------------

    def _draw(self) -> Drawn | None:
        """The next kind of the deck that is fair now; kinds that are not wait their turn."""
        makers = self._makers()
        if not any(kind in makers for kind in self._deck):
            self._deck = sorted(makers)
            self.rng.shuffle(self._deck)
        for at, kind in enumerate(self._deck):
            drawn = makers[kind]() if kind in makers else None
            if drawn is not None and self._is_fair(drawn):
                del self._deck[at]
                return drawn
        return None

    def _is_fair(self, drawn: Drawn) -> bool:
        plan, busy = self.scene.stack.plan, self._busy | set(drawn.hosts)
        if self._busy & set(drawn.hosts):
            return False
        if REGISTRY in busy and busy & set(plan.routers):  # a router that starts while Redis is gone knows nobody
            return False
        return bool(set(plan.routers) - busy) and bool(set(plan.decodes) - busy)

    def _makers(self) -> dict[str, Callable[[], Drawn]]:
        """By kind, what draws a fault of it."""
        found = dict(self._of_processes())
        if self.scene.stack.net is not None:
            found |= dict(self._of_the_network())
        wanted = self.scene.stack.plan.faults
        return {kind: maker for kind, maker in found.items() if not wanted or kind in wanted}

    def _of_processes(self) -> Iterator[tuple[str, Callable[[], Drawn]]]:
        scene, plan, rng = self.scene, self.scene.stack.plan, self.rng
        for role, names in (("router", plan.routers), (Role.PREFILL, plan.prefills), (Role.DECODE, plan.decodes)):
            def kill(kind: str = f"kill {role}", names: tuple[str, ...] = names) -> Drawn:
                victim = rng.choice(names)
                return Drawn(kind, Kill(scene, victim), (victim,), 0.2, names is not plan.routers)

            def freeze(kind: str = f"freeze {role}", names: tuple[str, ...] = names) -> Drawn:
                victim = rng.choice(names)
                return Drawn(kind, Freeze(scene, victim), (victim,), rng.choice((1.0, 2.5, 5.0)))

            def slow(kind: str = f"slow {role}", names: tuple[str, ...] = names) -> Drawn:
                victim = rng.choice(names)
                return Drawn(kind, Slow(scene, victim), (victim,), rng.uniform(2.0, 4.0))

            def stop(kind: str = f"stop {role}", names: tuple[str, ...] = names) -> Drawn:
                victim = rng.choice(names)
                return Drawn(kind, Stop(scene, victim), (victim,), 0.0)

            yield f"kill {role}", kill
            yield f"freeze {role}", freeze
            if role != "router":
                yield f"slow {role}", slow
                yield f"stop {role}", stop
        yield "kill registry", lambda: Drawn("kill registry", Registry(scene, True), (REGISTRY,), 0.5)
        yield "freeze registry", lambda: Drawn(
            "freeze registry", Registry(scene, False), (REGISTRY,), rng.uniform(2.0, 5.0))

    def _of_the_network(self) -> Iterator[tuple[str, Callable[[], Drawn]]]:
        scene, plan, rng, net = self.scene, self.scene.stack.plan, self.rng, self.scene.stack.net
        assert net is not None

        def one_way(kind: str, senders: tuple[str, ...], receivers: tuple[str, ...]) -> Callable[[], Drawn]:
            def make() -> Drawn:
                pair = (rng.choice(senders), rng.choice(receivers))
                hosts = tuple(name for name in pair if name not in plan.routers)
                return Drawn(kind, CutOneWay(scene, net, *pair), _lent_out(hosts, plan.prefills), rng.uniform(1.0, 5.0))

            return make

        for kind, senders, receivers in (
            ("cut router>decode", plan.routers, plan.decodes), ("cut decode>router", plan.decodes, plan.routers),
            ("cut prefill>decode", plan.prefills, plan.decodes), ("cut decode>prefill", plan.decodes, plan.prefills),
        ):
            yield kind, one_way(kind, senders, receivers)
        for kind, names in (("cable prefill", plan.prefills), ("cable decode", plan.decodes)):
            def down(kind: str = kind, names: tuple[str, ...] = names) -> Drawn:
                victim = rng.choice(names)
                return Drawn(kind, CableDown(scene, net, victim), (victim,), rng.uniform(0.5, 5.0))

            yield kind, down
        for kind, names, rates in (
            ("limit prefill", plan.prefills, (2_000_000, 8_000_000)),  # blocks
            ("limit decode", plan.decodes, (30_000, 60_000)),  # tokens
        ):
            def limit(
                kind: str = kind, names: tuple[str, ...] = names, rates: tuple[int, ...] = rates
            ) -> Drawn:
                victim, rate = rng.choice(names), rng.choice(rates)
                return Drawn(kind, Limit(scene, net, victim, rate), (victim,), rng.uniform(2.0, 5.0))

            yield kind, limit
        yield "kill mid-pull", lambda: self._mid_pull("kill mid-pull", Kill(scene, rng.choice(plan.prefills)), 0.2)
        yield "freeze mid-pull", lambda: self._mid_pull(
            "freeze mid-pull", Freeze(scene, rng.choice(plan.prefills)), rng.uniform(2.0, 7.0))
        if scene.stack.lossy is not None:
            yield "lossy router-decode", lambda: self._lossy("lossy router-decode", plan.routers, plan.decodes)
            yield "lossy prefill-decode", lambda: self._lossy("lossy prefill-decode", plan.prefills, plan.decodes)

    def _mid_pull(self, kind: str, inner: Kill | Freeze, hold_s: float) -> Drawn:
        net = self.scene.stack.net
        assert net is not None
        return Drawn(kind, MidPull(net, inner), (inner.victim,), hold_s, isinstance(inner, Kill))

    def _lossy(self, kind: str, ones: tuple[str, ...], others: tuple[str, ...]) -> Drawn:
        rng, net, plan = self.rng, self.scene.stack.net, self.scene.stack.plan
        assert net is not None
        a, b = rng.choice(ones), rng.choice(others)
        there, back = bad_line(rng), bad_line(rng)
        if rng.random() < 0.2:
            there = Conditions(cut=True)
        hosts = _lent_out(tuple(name for name in (a, b) if name not in plan.routers), plan.prefills)
        return Drawn(kind, Lossy(self.scene, net, a, b, there, back), hosts, rng.uniform(2.0, 5.0))


def _lent_out(hosts: tuple[str, ...], prefills: tuple[str, ...]) -> tuple[str, ...]:
    """Whom a fault between two hosts takes out: of a lender and its reader the lender, for the reader can do without;
    of a router and a worker the worker."""
    return tuple(h for h in hosts if h in prefills) or hosts
