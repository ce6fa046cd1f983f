"""A trace replayed on virtual time through production code: routers, prefill and decode workers, hand-off and all.

Owns the clients: who asks what, when, and how long the first token took. Does not know what machines cost (setup.py)
or how a policy chooses.

Life of a replay: workers start and routers learn of them -> each request of the trace is asked at its time -> all are
answered -> one `Cell`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import itertools
import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from baton.bench.load.traces import Traced
from baton.bench.route.machine import Machine
from baton.bench.route.setup import FOREVER_S, PREFILL_TOKENS_PER_S, Setup
from baton.core.request import Request, SamplingParams
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


@dataclass(frozen=True, slots=True)
class Cell:
    """What one policy did with one trace."""

    num_requests: int
    num_failed: int
    hit: float
    """Prompt tokens that no worker computed, over all prompt tokens."""
    mean_ttft_s: float
    p50_ttft_s: float
    p99_ttft_s: float
    imbalance: float
    """Busy seconds of the busiest prefill worker over the mean."""
    util: float
    """Mean share of the replay in which prefill workers computed."""
    mean_tpot_s: float
    """Of requests with more than one token of output."""
    virtual_s: float
    failure: str = ""
    """What the first request that failed was told."""


@dataclass(slots=True)
class _Tally:
    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def replay(trace: Sequence[Traced], setup: Setup, load: float) -> Cell:
    """Raises RuntimeError when a worker or a router died of a bug."""
    found: list[Cell] = []

    async def main(loop: SimLoop) -> None:
        with host_clocks(loop):
            found.append(await _World(loop, setup).run(timed(trace, setup, load)))

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


def timed(trace: Sequence[Traced], setup: Setup, load: float) -> list[Traced]:
    """The trace with its time stretched so that its prompts, computed whole, would keep the prefill workers busy for
    `load` of it."""
    offered_s = sum(r.prompt_tokens for r in trace) / (PREFILL_TOKENS_PER_S * setup.num_prefill)
    span_s = trace[-1].at_s - trace[0].at_s
    stretch = offered_s / load / span_s if span_s else 0.0
    return [dataclasses.replace(r, at_s=(r.at_s - trace[0].at_s) * stretch) for r in trace]


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
        self._tally = _Tally()
        self._fresh = itertools.count(1 << 22)
        """Names of blocks that the trace does not name."""

    async def run(self, requests: Sequence[Traced]) -> Cell:
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
        await self._ask(requests, routers)
        cell = self._cell(requests, machines, self._loop.now - began)
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

    async def _ask(self, requests: Sequence[Traced], routers: Sequence[RouterHost]) -> None:
        rng, began, asked = self._loop.fork("clients"), self._loop.now, set[asyncio.Task[None]]()
        for number, traced in enumerate(requests):
            await asyncio.sleep(max(0.0, began + traced.at_s - self._loop.now))
            self._check_alive()
            router = rng.choice(routers)
            assert router.process is not None
            client = router.process.spawn(self._client(router, self._request(number, traced)))
            asked.add(client)
            client.add_done_callback(asked.discard)
        if asked:
            await asyncio.wait(asked)

    async def _client(self, router: RouterHost, request: Request) -> None:
        """In the router's process: the way from a client to its router is not what is measured."""
        assert router.dispatcher is not None
        asked = self._loop.now
        first = last = None
        num_tokens = 0
        try:
            async for chunk in router.dispatcher.generate(request):
                if chunk.token_ids:
                    first, last = first or self._loop.now, self._loop.now
                    num_tokens += len(chunk.token_ids)
        except Exception as e:
            self._tally.errors.append(repr(e))
            return
        assert first is not None, f"{request.request_id} ended without a token"
        assert last is not None, f"{request.request_id} ended without a token"
        self._tally.ttft_s.append(first - asked)
        if num_tokens > 1:
            self._tally.tpot_s.append((last - first) / ((num_tokens - 1) * self._setup.grain))

    def _request(self, number: int, traced: Traced) -> Request:
        """With a prompt of its own tokens for each block that the trace names: equal names, equal tokens."""
        grain, size = self._setup.grain, self._setup.block_tokens
        length, tokens = max(1, traced.prompt_tokens // grain), list[int]()
        names = iter(traced.blocks)
        while len(tokens) < length:
            name = next(names, None)
            first = (next(self._fresh) if name is None else name) * size
            tokens.extend(range(first, first + size))
        output = 1 if self._setup.mode == "fcfs" else max(1, round(traced.output_tokens / grain))
        sampling = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
        return Request(f"r{number}", tuple(tokens[:length]), sampling, deadline_s=FOREVER_S)

    # ---- the result ----------------------------------------------------------------------------------------------

    def _cell(self, requests: Sequence[Traced], machines: Sequence[Machine], virtual_s: float) -> Cell:
        setup, tally = self._setup, self._tally
        asked = sum(max(1, r.prompt_tokens // setup.grain) for r in requests)
        computed = sum(m.runner.num_prompt_tokens for m in machines)
        busy = [m.runner.busy_s for m in machines if m.role is Role.PREFILL]
        ttft_s = sorted(tally.ttft_s) or [float("nan")]
        return Cell(
            len(requests), len(tally.errors), 1 - computed / asked, statistics.fmean(ttft_s), at(ttft_s, 0.5),
            at(ttft_s, 0.99), max(busy) / statistics.fmean(busy) if any(busy) else 1.0,
            statistics.fmean(busy) / virtual_s, statistics.fmean(tally.tpot_s) if tally.tpot_s else 0.0, virtual_s,
            next(iter(tally.errors), ""),
        )


def at(values: Sequence[float], share: float) -> float:
    """The value that `share` of the sorted ones are below."""
    return values[min(len(values) - 1, int(share * len(values)))]
