"""A router dies, a stream breaks: whoever reads on has the undisturbed answer, and nothing was computed twice."""

from __future__ import annotations

import asyncio

import pytest

from baton.core.worker import Role
from baton.sim.workload import Job
from tests.sim.scene import Scene, plan, play, request, right

T12_S = 2.0


async def under_way(s: Scene) -> None:
    while not any(m.num_requests for m in s.of(Role.DECODE)):
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("restarted", [False, True], ids=["another router", "the same, restarted"])
@pytest.mark.parametrize("seed", range(3))
def test_a_client_whose_router_is_killed_has_the_rest_soon_and_it_is_computed_once(seed: int, restarted: bool) -> None:
    async def story(s: Scene) -> None:
        router = s.router
        r = request("mine", range(20), 14)
        reading = asyncio.ensure_future(s.client(Job(s.loop.now, r, resumes=True), router))
        while not (record := s.oracle.records.get("mine")) or record.num_tokens < 3:
            await asyncio.sleep(0.001)
        killed_at = s.loop.now
        router.kill(silent=False)
        if restarted:
            router.start()
        record = await reading
        assert record.router_lost
        assert record.is_answered
        assert s.loop.now - killed_at < T12_S
        assert [t.token_id for t in record.choices[0].tokens] == right(r)
        computed = sum(n for name, n in s.site.num_computed.items() if name.startswith("mine@"))
        assert computed <= len(r.prompt) + 14
        if not restarted:
            router.start()

    play(seed, plan(num_routers=1 if restarted else 2), story)


@pytest.mark.parametrize("seed", range(3))
def test_a_broken_stream_costs_no_attempt(seed: int) -> None:
    async def story(s: Scene) -> None:
        r = request("mine", range(20), 14)
        reading = asyncio.ensure_future(s.ask(r))
        await under_way(s)
        s.network.reset(s.router.name, s.machine(Role.DECODE).worker_id)
        got = await reading
        assert got.tokens == right(r)
        metrics = s.router.metrics[-1]
        assert metrics.value("baton_resumed_requests_total", lost="stream") == 1
        assert metrics.value("baton_dispatch_retries_total") == 0

    play(seed, plan(), story)
