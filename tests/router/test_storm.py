"""Everything at once: workers drain, break, freeze, refuse and come back while requests of several choices run. Each
token still exactly once, and afterwards nothing is held anywhere."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace
from random import Random

import pytest

from baton.core.errors import BatonError
from baton.core.messages import Submit
from baton.core.request import Choice, Request
from baton.core.worker import Role
from baton.router.link import WorkerState
from tests.router.fake_fleet import Act, ScriptedFleet, ScriptedWorker, expected, mute, refuse, request, simulate
from tests.router.relay import Point, Relay, movers

NUM_REQUESTS = 24
STORM_S = 6.0


def vanish(submit: Submit) -> Iterator[Act]:
    yield 1000.0


def later_lost(submit: Submit) -> Iterator[Act]:
    yield 0.7
    yield from refuse("peer_lost", "the source is gone")(submit)


FAILURES = (refuse("overloaded"), refuse("not_found"), later_lost, mute, vanish)


async def weather(fleet: ScriptedFleet, relay: Relay, rng: Random) -> None:
    """One blow after the other; in the end all is well again."""
    workers = list(fleet.workers.values())
    until = asyncio.get_running_loop().time() + STORM_S
    while asyncio.get_running_loop().time() < until:
        await asyncio.sleep(rng.uniform(0.01, 0.4))
        worker = rng.choice(workers)
        match rng.randrange(6):
            case 0 | 1:
                await worker.drain(not worker.load.draining, 1.0)
            case 2:
                worker.break_streams()
            case 3:
                asyncio.get_running_loop().call_later(rng.uniform(0.1, 5.0), setattr, worker, "frozen", False)
                worker.frozen = True
            case 4:
                relay.at[rng.choice(list(Point)[:3])] = rng.choice(FAILURES)
            case 5:
                worker.load = replace(worker.load, available_blocks=rng.choice((0, 1000)))
    relay.at.clear()
    for worker in workers:
        worker.frozen = False
        worker.load = replace(worker.load, available_blocks=1000)
        await worker.drain(False, 1.0)


async def ask(fleet: ScriptedFleet, r: Request, rng: Random) -> str:
    await asyncio.sleep(rng.uniform(0, STORM_S / 2))
    if rng.random() < 0.2:
        try:
            async with asyncio.timeout(rng.uniform(0.05, 2.0)), aclosing(fleet.dispatcher.generate(r)) as chunks:
                async for _ in chunks:
                    await asyncio.sleep(0.02)
        except (TimeoutError, BatonError):
            return "left"
        return "read"
    assert await fleet.answers(r) == {c.index: expected(r, c.index) for c in r.choices}
    return "answered"


def leftovers(fleet: ScriptedFleet) -> list[str]:
    found = [f"{w.info.worker_id} has {w.num_requests} requests" for w in fleet.fleet.workers() if w.num_requests]
    found += [f"{c.info.worker_id} is charged for {c.num_sequences}"
              for c in fleet.fleet.candidates(Role.DECODE, {}) if c.num_sequences]
    return found + ([f"{fleet.dispatcher.num_inflight} in flight"] if fleet.dispatcher.num_inflight else [])


@pytest.mark.parametrize("seed", range(25))
def test_a_storm_costs_no_token_and_leaves_nothing_behind(seed: int) -> None:
    async def main() -> None:
        relay, rng = Relay(), Random(seed)
        relay.forgets = rng.random() < 0.8
        workers: list[ScriptedWorker] = movers(relay, 5)
        async with ScriptedFleet(*workers, max_attempts=100, retry_per_s=1000.0) as fleet:
            rs = [request(f"r{i}", max_tokens=rng.randint(1, 200), deadline_s=300.0,
                          choices=tuple(Choice(k) for k in range(rng.choice((1, 1, 3))))) for i in range(NUM_REQUESTS)]
            asking = [asyncio.create_task(ask(fleet, r, Random(f"{seed} {r.request_id}"))) for r in rs]
            await weather(fleet, relay, rng)
            ended = await asyncio.gather(*asking)
            assert ended.count("answered") > NUM_REQUESTS / 2
            await asyncio.sleep(6)
            assert [w.state for w in fleet.fleet.workers()] == [WorkerState.READY] * 5
            assert leftovers(fleet) == []

    simulate(main, [seed])
