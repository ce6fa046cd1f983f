"""A router starts again beside another that goes on: it serves at once, and soon knows what every worker holds."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from baton.router.index import PrefixIndex
from baton.sim.workload import Job
from tests.sim.scene import Scene, plan, play, request, right

INDEX_S = 10.0
SERVES_S = 1.0
WARM = range(12)
"""So many prompts are in the workers' caches."""


def prompt(number: int) -> list[int]:
    """No two share a block."""
    return [number, *range(1, 20)]


def equals_the_workers(index: PrefixIndex, s: Scene) -> bool:
    """Not one block more, not one less, of anybody."""
    held = {name: set(m.node.parts.pool.snapshot().hashes) for name, m in s.machines.items() if m.node is not None}
    blocks = set().union(*held.values())
    return all(index.num_held(name) == len(hashes) for name, hashes in held.items()) and all(
        set(index.match([block])) == {name for name, hashes in held.items() if block in hashes} for block in blocks
    )


async def ask_on(s: Scene) -> None:
    """Others at the other router: what the workers hold goes on changing."""
    other = [*s.routers.values()][1]
    for number in itertools.count(100):
        await s.ask(request(f"other-{number}", prompt(number), 2), router=other)


@pytest.mark.parametrize("seed", range(3))
def test_a_restarted_router_serves_at_once_and_has_its_index_back_within_ten_seconds(seed: int) -> None:
    async def story(s: Scene) -> None:
        router = s.router
        for number in WARM:
            await s.ask(request(f"warm-{number}", prompt(number), 2))
        others = asyncio.ensure_future(ask_on(s))
        router.kill(silent=False)
        router.start()
        started = s.loop.now
        r = request("first", prompt(50), 4)
        record = await s.client(Job(s.loop.now, r), router)
        assert [t.token_id for t in record.choices[0].tokens] == right(r)
        assert s.loop.now - started < SERVES_S
        assert router.fleet is not None
        while not equals_the_workers(router.fleet.index, s):
            assert s.loop.now - started < INDEX_S, "the index is not what the workers hold"
            await asyncio.sleep(0.001)
        assert router.fleet.index.num_entries >= 5 * len(WARM), "and that is much"
        others.cancel()
        await asyncio.wait([others])

    play(seed, plan(num_prefill=3, num_decode=2, num_routers=2), story)


@pytest.mark.parametrize("seed", range(3))
def test_a_router_that_starts_again_while_the_registry_is_away_serves_when_that_is_back(seed: int) -> None:
    async def story(s: Scene) -> None:
        s.registry.outage = True
        s.router.kill(silent=False)
        s.router.start()
        await asyncio.sleep(3.0)
        assert s.registry.num_refused
        s.registry.outage = False
        back = s.loop.now
        record = await s.client(Job(s.loop.now, request("first", prompt(1), 4)), s.router)
        assert record.is_answered
        assert s.loop.now - back < INDEX_S

    play(seed, plan(), story)
