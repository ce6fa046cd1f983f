"""Circuits in a router's choice: who is broken gets no work, and nobody else goes without for it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from baton.core.worker import Role, WorkerLoad
from baton.router.fleet import OFFERED_WHOLE
from baton.router.health import OPEN_FIRST_S, TOGETHER_S
from baton.router.shortlist import NEAREST
from tests.router.fake_fleet import ScriptedFleet, ScriptedWorker, expected, mute, now, request, simulate


async def break_all(fleet: ScriptedFleet, *broken: ScriptedWorker) -> None:
    """Their circuits have just been opened."""
    health = fleet.dispatcher._health
    while any(health.share(w.info, w.load, now()) for w in broken):
        await asyncio.sleep(TOGETHER_S)
        for worker in broken:
            health.failed(worker.worker_id, now())


@pytest.mark.parametrize("role", Role)
def test_in_a_large_fleet_more_broken_idle_workers_than_a_shortlist_holds_get_no_more_requests(role: Role) -> None:
    async def main() -> None:
        idle, busy = (WorkerLoad(available_blocks=64, total_blocks=64, steps=1000, num_running=num,
                                 queued_prefill_tokens=num * 100) for num in (0, 4))
        broken = [ScriptedWorker(f"broken{i}", role, load=idle) for i in range(NEAREST + 2)]
        well = [ScriptedWorker(f"well{i}", role, load=busy) for i in range(OFFERED_WHOLE)]
        other = [ScriptedWorker("other", next(r for r in Role if r is not role), load=idle)]
        async with ScriptedFleet(*broken, *well, *other, local_prefill_max_tokens=0) as fleet:
            await break_all(fleet, *broken)
            names = {w.worker_id for w in broken}
            decodes = [w for w in fleet.workers.values() if w.info.role is Role.DECODE]
            for i in range(10):
                await fleet.answer(request(f"r{i}"))
                (route,) = [s.route for w in decodes for s in w.submits if s.request.request_id == f"r{i}"]
                assert names.isdisjoint({route.decode, route.prefill and route.prefill.worker_id})

    simulate(main)


def test_a_fleet_whose_circuits_may_all_be_tried_lets_requests_in_though_each_worker_still_runs_one() -> None:
    async def main() -> None:
        load = WorkerLoad(available_blocks=640, total_blocks=640, steps=1000, num_running=1)
        workers = [ScriptedWorker(f"d{i}", load=load) for i in range(2)]
        async with ScriptedFleet(*workers) as fleet:
            await break_all(fleet, *workers)
            await asyncio.sleep(OPEN_FIRST_S)
            began, r = now(), request()
            assert await fleet.answer(r) == expected(r)
            assert now() - began < 0.1, "it did not wait"

    simulate(main)


def test_a_worker_that_may_be_tried_is_tried_once_however_much_it_runs_and_while_the_others_are_full() -> None:
    async def main() -> None:
        full = WorkerLoad(available_blocks=640, total_blocks=640, steps=1000, num_running=66)
        well, broken = ScriptedWorker("well", load=full), ScriptedWorker("broken", script=mute)
        broken.load = replace(full, num_running=20)
        async with ScriptedFleet(well, broken) as fleet:
            await break_all(fleet, broken)
            await asyncio.sleep(OPEN_FIRST_S)
            tasks = [asyncio.create_task(fleet.answer(request(f"r{i}"))) for i in range(5)]
            await asyncio.sleep(0.5 * OPEN_FIRST_S)
            assert (len(broken.submits), len(well.submits)) == (1, 0)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    simulate(main)
