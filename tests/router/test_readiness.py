"""Ready means that a request would get somewhere now: judged by what decode workers get done, not by open streams."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from baton.core.worker import Role
from baton.router.server import why_not_ready
from tests.router.fake_fleet import ScriptedFleet, ScriptedWorker, simulate


def test_a_decode_worker_that_works_makes_the_router_ready_and_a_prefill_worker_alone_does_not() -> None:
    async def main() -> None:
        d0, p0 = ScriptedWorker("d0", down=True), ScriptedWorker("p0", Role.PREFILL)
        async with ScriptedFleet(d0, p0) as fleet:
            assert fleet.state("p0") == "ready"
            assert why_not_ready(fleet.fleet) == (
                "no decode worker is ready: d0 is connecting. `baton status` shows the workers.")
            d0.down = False
            await asyncio.sleep(3)
            assert why_not_ready(fleet.fleet) is None

    simulate(main)


def test_a_worker_that_answers_and_gets_nothing_done_makes_nobody_ready() -> None:
    async def main() -> None:
        d0 = ScriptedWorker("d0")
        async with ScriptedFleet(d0) as fleet:
            stall_s = fleet.config.handoff.stall_timeout_s
            d0.load = replace(d0.load, num_running=1, steps=7)
            await asyncio.sleep(stall_s - 1)
            assert why_not_ready(fleet.fleet) is None, "a step may take so long"
            await asyncio.sleep(3)
            assert "d0 is suspect" in str(why_not_ready(fleet.fleet)), "its heartbeats come all the time"
            d0.load = replace(d0.load, steps=8)
            await asyncio.sleep(1)
            assert why_not_ready(fleet.fleet) is None

    simulate(main)


def test_workers_that_are_silent_or_drain_do_not_count_and_one_good_one_is_enough() -> None:
    async def main() -> None:
        d0, d1 = ScriptedWorker("d0"), ScriptedWorker("d1")
        async with ScriptedFleet(d0, d1) as fleet:
            d0.frozen = True
            await d1.drain(True, 1)
            await asyncio.sleep(2)
            assert "d0 is suspect, d1 is draining" in str(why_not_ready(fleet.fleet))
            await d1.drain(False, 1)
            await asyncio.sleep(0.1)
            assert why_not_ready(fleet.fleet) is None

    simulate(main)


def test_before_any_worker_has_registered_it_says_so() -> None:
    async def main() -> None:
        async with ScriptedFleet() as fleet:
            assert "none has registered" in str(why_not_ready(fleet.fleet))

    simulate(main)
