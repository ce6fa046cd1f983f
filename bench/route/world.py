"""A trace replayed on virtual time through production code: routers, prefill and decode workers, hand-off and all.

Owns the clients. Does not know what they ask (questions.py), what machines cost (setup.py) or how a policy chooses.

Life of a replay: workers start and routers learn of them -> each request of the trace is asked at its time -> all are
answered -> one `Cell`.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections import Counter
from collections.abc import Sequence

from baton.bench.load.traces import Traced
from baton.bench.route.cell import Cell, Seen
from baton.bench.route.machine import Machine
from baton.bench.route.questions import Question, questions
from baton.bench.route.setup import Setup
from baton.core.request import Request
from baton.core.worker import Role
from baton.router.link import WorkerState
from baton.sim.clocks import host_clocks
from baton.sim.loop import SimLoop, run
from baton.sim.machine import Site
from baton.sim.network import SimNetwork
from baton.sim.registry import SimRegistry
from baton.sim.router_host import RouterHost
from baton.sim.trace import Trace
from baton.sim.transport import Fabric

WARM_UP_S = 3.0
"""By then every router knows every worker, and decode workers have measured the ways to their peers."""


def replay(trace: Sequence[Traced], setup: Setup, load: float) -> Cell:
    """Raises RuntimeError when a worker or a router died of a bug."""
    found: list[Cell] = []

    async def main(loop: SimLoop) -> None:
        with host_clocks(loop):
            found.append(await _World(loop, setup).run(questions(trace, setup, load)))

    log, level = logging.getLogger("baton"), logging.getLogger("baton").level
    log.setLevel(logging.ERROR)
    threshold = gc.get_threshold()
    gc.set_threshold(50_000, *threshold[1:])  # a replay makes few cycles and many objects that stay
    try:
        run(setup.seed, main)
    finally:
        gc.set_threshold(*threshold)
        log.setLevel(level)
    return found[0]


class _World:
    def __init__(self, loop: SimLoop, setup: Setup) -> None:
        self._loop = loop
        self._setup = setup
        trace = Trace(lambda: loop.now)
        network = SimNetwork(loop, trace, setup.conditions)
        self._site = Site(
            loop, trace, network, Fabric(loop, trace, setup.speed), SimRegistry(network), failed=self._fail
        )
        self._broken: list[str] = []
        self._seen = Seen(setup.grain, setup.pace)

    async def run(self, asked: Sequence[Question]) -> Cell:
        setup = self._setup
        machines = [Machine(self._site, setup, f"prefill-{i}", Role.PREFILL) for i in range(setup.num_prefill)]
        machines += [Machine(self._site, setup, f"decode-{i}", Role.DECODE) for i in range(setup.num_decode)]
        routers = [
            RouterHost(self._site, setup.config(), f"router-{i}", lambda record: None)
            for i in range(setup.num_routers)
        ]
        for router in routers:
            router.start()
        await self._until_ready(routers, len(machines))
        began = self._loop.now
        await self._ask(asked, routers)
        cell = self._cell(asked, machines, routers, self._loop.now - began)
        for router in routers:
            await router.stop()
        for machine in machines:
            await machine.stop()
        return cell

    def _fail(self, message: str) -> None:
        self._broken.append(message)

    def _check_alive(self) -> None:
        if self._broken:
            raise RuntimeError(self._broken[0])

    async def _until_ready(self, routers: Sequence[RouterHost], num_workers: int) -> None:
        await asyncio.sleep(WARM_UP_S)
        self._check_alive()
        for router in routers:
            known = [w for w in router.fleet.workers() if w.state is WorkerState.READY] if router.fleet else []
            assert len(known) == num_workers, f"{router.name} knows {len(known)} of {num_workers} workers"

    # ---- clients -------------------------------------------------------------------------------------------------

    async def _ask(self, asked: Sequence[Question], routers: Sequence[RouterHost]) -> None:
        rng, began, clients = self._loop.fork("clients"), self._loop.now, set[asyncio.Task[None]]()
        for question in asked:
            await asyncio.sleep(max(0.0, began + question.at_s - self._loop.now))
            self._check_alive()
            router = rng.choice(routers)
            assert router.process is not None
            client = router.process.spawn(self._client(router, question.request))
            clients.add(client)
            client.add_done_callback(clients.discard)
        if clients:
            await asyncio.wait(clients)

    async def _client(self, router: RouterHost, request: Request) -> None:
        """In the router's process: the way from a client to its router is not what is measured."""
        assert router.dispatcher is not None
        answer = router.dispatcher.generate(request)
        await self._seen.read(self._loop.time(), (len(chunk.token_ids) async for chunk in answer))

    # ---- the result ----------------------------------------------------------------------------------------------

    def _cell(
        self, asked: Sequence[Question], machines: Sequence[Machine], routers: Sequence[RouterHost], took_s: float
    ) -> Cell:
        num_prompt_tokens = sum(len(question.request.prompt) for question in asked)
        computed = sum(m.runner.num_prompt_tokens for m in machines)
        busy_s = [m.runner.busy_s for m in machines if m.role is Role.PREFILL]
        counts = Counter[str]()
        for metrics in (m for router in routers for m in router.metrics):
            counts.update(dict(metrics.rendered()))
        return self._seen.cell(1 - computed / num_prompt_tokens, busy_s, took_s, counts)
