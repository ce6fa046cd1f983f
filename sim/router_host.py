"""One simulated router: production dispatcher and fleet in a process that can be killed, frozen and started again.

Owns what `router/server.py` owns on a real host, less text and HTTP: clients call `generate` over the simulated
network, and a client that closes its call is gone, as one that closes its connection.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable

from baton.core.config import Config
from baton.core.messages import TokenChunk
from baton.core.metrics import Metrics
from baton.core.request import Request
from baton.router.choose import make_policy
from baton.router.dice import Dice
from baton.router.dispatch import Dispatcher
from baton.router.fleet import Fleet
from baton.router.trace import TraceLog, TraceRecord
from baton.sim.loop import SimProcess
from baton.sim.machine import STOP_POLL_S, Site, clock_origin, leaf


class RouterHost:
    """`name` is its host name. `told` hears of every request that ended here, as the router's own log has it."""

    def __init__(self, site: Site, config: Config, name: str, told: Callable[[TraceRecord], None]) -> None:
        self.name = name
        self.boots = 0
        self.process: SimProcess | None = None
        self.dispatcher: Dispatcher | None = None
        self.fleet: Fleet | None = None
        self.metrics: list[Metrics] = []
        """One per boot."""
        self.troubles: list[tuple[float, float]] = []
        """(from, until) of each time in which clients could not be served: frozen, or gone without a word."""
        self._froze_s = 0.0
        self._site = site
        self._config = config
        self._told = told
        self._main: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        return self.process is not None and not self.process.dead

    @property
    def num_requests(self) -> int:
        return self.dispatcher.num_inflight if self.alive and self.dispatcher is not None else 0

    def start(self) -> None:
        assert not self.alive, f"{self.name} is running"
        self.boots += 1
        site = self._site
        self.process = SimProcess(site.loop, self.name, clock_origin(site.loop, self.name, self.boots))
        site.trace.note(self.name, "start", self.boots)
        self._main = self.process.spawn(self._run(self.process), f"{self.name} boot {self.boots}")
        self._main.add_done_callback(self._on_end)

    def kill(self, silent: bool) -> None:
        """kill -9, or (`silent`) the whole host is off."""
        assert self.process is not None
        self.process.kill()
        self.dispatcher = self.fleet = None
        if silent:
            now = self._site.loop.now
            self.troubles.append((now, now + self._site.network.conditions.keepalive_s))
        self._site.network.crash(self.name, silent)

    def freeze(self) -> None:
        assert self.process is not None
        self.process.freeze()
        self._froze_s = self._site.loop.now
        self._site.trace.note(self.name, "freezes")

    def thaw(self) -> None:
        assert self.process is not None
        self.process.thaw()
        self.troubles.append((self._froze_s, self._site.loop.now))

    async def stop(self) -> None:
        """SIGTERM. Afterwards no task of it may be left."""
        assert self._main is not None, f"{self.name} was never started"
        assert self.process is not None, f"{self.name} was never started"
        self._main.cancel()
        await asyncio.wait([self._main])
        await asyncio.sleep(STOP_POLL_S)
        if left := [t.get_name() for t in self.process.tasks()]:
            self._site.failed(f"{self.name} stopped in order and left {left}")

    def trouble_between(self, start: float, end: float) -> float:
        """Seconds of trouble in that time."""
        return sum(max(0.0, min(end, until) - max(start, since)) for since, until in self.troubles)

    def _on_end(self, main: asyncio.Task[None]) -> None:
        if not main.cancelled() and (error := main.exception()) is not None:
            self._site.failed(f"{self.name} died of a bug: {leaf(error)!r}")

    async def _run(self, process: SimProcess) -> None:
        site, config, metrics = self._site, self._config, Metrics()
        self.metrics.append(metrics)
        self.fleet = Fleet(
            site.registry.at(self.name).list, site.network.dial(self.name), config, metrics,
            f"{self.name}.{self.boots}",
        )
        dice = Dice(random.Random(f"policy {site.loop.seed} {self.name} {self.boots}").getrandbits(64))
        traces = _ToldTraces(self._told)
        self.dispatcher = Dispatcher(self.fleet, make_policy(config.router, dice), config, metrics, traces, dice)
        site.network.listen(self.name, _Door(self.dispatcher), process)
        try:
            await self.fleet.run()
        finally:
            await site.network.close(self.name)


class _Door:
    """What clients may call."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    def generate(self, request: Request, last_seen: str | None) -> AsyncIterator[TokenChunk]:
        return self._dispatcher.generate(request, last_seen)


class _ToldTraces(TraceLog):
    """The router's log of finished requests, which also says each one aloud."""

    def __init__(self, told: Callable[[TraceRecord], None]) -> None:
        super().__init__()
        self._say = told

    def add(self, record: TraceRecord) -> None:
        super().add(record)
        self._say(record)
