"""Circuits in a router's choice: who is broken gets no work, and nobody else goes without for it."""

from __future__ import annotations

import asyncio

import pytest

from baton.core.worker import Role, WorkerLoad
from baton.router.fleet import OFFERED_WHOLE
from baton.router.shortlist import NEAREST
from tests.router.fake_fleet import ScriptedFleet, ScriptedWorker, request, simulate


@pytest.mark.parametrize("role", Role)
def test_in_a_large_fleet_more_broken_idle_workers_than_a_shortlist_holds_get_no_more_requests(role: Role) -> None:
    async def main() -> None:
        idle, busy = (WorkerLoad(available_blocks=64, total_blocks=64, steps=1000, num_running=num,
                                 queued_prefill_tokens=num * 100) for num in (0, 4))
        broken = [ScriptedWorker(f"broken{i}", role, load=idle) for i in range(NEAREST + 2)]
        well = [ScriptedWorker(f"well{i}", role, load=busy) for i in range(OFFERED_WHOLE)]
        other = [ScriptedWorker("other", next(r for r in Role if r is not role), load=idle)]
        async with ScriptedFleet(*broken, *well, *other, local_prefill_max_tokens=0) as fleet:
            names, health = {w.worker_id for w in broken}, fleet.dispatcher._health
            for worker in (*broken, *well):
                health.share(worker.info, worker.load, 0.0)
            for _ in range(4):
                for worker in broken:
                    health.failed(worker.worker_id, asyncio.get_running_loop().time())
                await asyncio.sleep(0.3)
            decodes = [w for w in fleet.workers.values() if w.info.role is Role.DECODE]
            for i in range(10):
                await fleet.answer(request(f"r{i}"))
                (route,) = [s.route for w in decodes for s in w.submits if s.request.request_id == f"r{i}"]
                assert names.isdisjoint({route.decode, route.prefill and route.prefill.worker_id})

    simulate(main)
