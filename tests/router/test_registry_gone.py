"""Placement without the registry: that says where workers are, and nothing that a choice is made of."""

from __future__ import annotations

import asyncio

import pytest

from baton.core.block_hash import HashScope, block_hashes
from baton.core.errors import PeerLost
from baton.core.worker import Role, Route
from tests.router.fake_fleet import BLOCK, ScriptedFleet, ScriptedWorker, capability, request, simulate

NUM_REQUESTS, NUM_KINDS = 60, 6
AWAY_S = 60.0
"""Longer than an entry of the registry lives."""


def prompt(number: int) -> tuple[int, ...]:
    """Conversations of several kinds, each longer whenever it comes again."""
    return (number % NUM_KINDS, *range(10, 20 + number // 3))


def named(route: Route) -> tuple[str, ...]:
    """Who decodes, who computes, who lends, and the spares; prices differ in their last bits, as the times do."""
    others = (route.prefill, route.holder, *route.spares)
    return (route.decode, *(other.worker_id if other else "" for other in others))


async def routes(trouble: str) -> list[tuple[str, ...]]:
    """Of the same requests in the same state: a minute after the registry got into trouble, if it did."""
    workers = [ScriptedWorker(f"{role}{i}", role) for role in (Role.PREFILL, Role.DECODE) for i in range(3)]
    async with ScriptedFleet(*workers, local_prefill_max_tokens=0) as fleet:
        for number, worker in enumerate(workers):
            worker.store(*block_hashes(HashScope.of(capability()), prompt(number), BLOCK))
        fleet.registry_empty = trouble == "is empty"
        fleet.registry_fails = PeerLost("the registry is gone") if trouble == "fails" else None
        await asyncio.sleep(AWAY_S)
        for number in range(NUM_REQUESTS):
            await fleet.answer(request(f"r{number}", prompt(number), 3))
        return [named(r.route) for r in reversed(fleet.dispatcher.traces.recent()) if r.route is not None]


@pytest.mark.parametrize("trouble", ["fails", "is empty"])
def test_with_the_registry_gone_the_same_requests_get_the_same_routes(trouble: str) -> None:
    async def main() -> None:
        calm = await routes("none")
        assert len(calm) == NUM_REQUESTS
        assert len(set(calm)) > 3, "or there was nothing to choose"
        assert await routes(trouble) == calm

    simulate(main, range(3))
