"""The router's Drain call: it passes the word on to the worker, and tells what the worker itself says is left."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

from baton.core.errors import NotFound, PeerLost
from baton.core.worker import Role
from baton.router.grpc_front import AdminFront, Identity
from baton.wire.admin_pb2 import DrainProgress, DrainRequest
from tests.router.fake_fleet import ScriptedFleet, ScriptedWorker, mute, request, simulate, speak


async def drain(fleet: ScriptedFleet, worker_id: str, on: bool | None) -> DrainProgress:
    identity = Identity("router-0", "", "", "toy")
    admin = AdminFront(fleet.fleet, fleet.dispatcher, fleet.metrics, fleet._dial, lambda: identity)
    try:
        return await admin.Drain(DrainRequest(worker_id=worker_id, on=on), None)
    finally:
        await asyncio.sleep(0.01)  # the worker's word on its stream arrives


def test_it_is_told_and_untold_and_only_asked() -> None:
    async def main() -> None:
        d0, d1, p0 = ScriptedWorker("d0"), ScriptedWorker("d1"), ScriptedWorker("p0", Role.PREFILL)
        async with ScriptedFleet(d0, d1, p0) as fleet:
            assert not (await drain(fleet, "d0", None)).draining
            told = await drain(fleet, "d0", True)
            assert (told.draining, told.drained, told.peers) == (True, True, 1)
            assert (d0.load.draining, d1.load.draining) == (True, False)
            assert fleet.state("d0") == "draining"
            assert (await drain(fleet, "d0", None)).draining, "asking changes nothing"
            assert (await drain(fleet, "d1", None)).peers == 0, "one that drains takes nothing over"
            assert (await drain(fleet, "p0", None)).peers == 0, "nor does one of another role"
            assert not (await drain(fleet, "d0", False)).draining
            assert fleet.state("d0") == "ready"

    simulate(main)


def test_it_is_empty_when_nothing_runs_nothing_waits_and_nothing_is_lent() -> None:
    async def main() -> None:
        d0 = ScriptedWorker("d0")
        async with ScriptedFleet(d0) as fleet:
            await drain(fleet, "d0", True)
            idle = d0.load
            for left in ({"num_running": 2}, {"num_waiting": 1}, {"num_lent_out": 3}):
                d0.load = replace(idle, **left)
                said = await drain(fleet, "d0", None)
                assert (said.requests, said.leases) == (sum(left.values()) * ("num_lent_out" not in left),
                                                        left.get("num_lent_out", 0))  # fmt: skip
                assert not said.drained
            d0.load = idle
            assert (await drain(fleet, "d0", None)).drained
            d0.load = replace(idle, draining=False)
            assert not (await drain(fleet, "d0", None)).drained, "empty, but it takes new work"

    simulate(main)


def test_a_request_that_is_on_its_way_to_the_worker_counts() -> None:
    async def main() -> None:
        d0 = ScriptedWorker("d0", script=mute)
        async with ScriptedFleet(d0) as fleet, aclosing(fleet.dispatcher.generate(request())) as chunks:
            reading = asyncio.ensure_future(anext(chunks))
            while not d0.submits:
                await asyncio.sleep(0.001)
            assert d0.load.num_running == 0, "its own count does not have it yet"
            said = await drain(fleet, "d0", True)
            assert (said.requests, said.drained) == (1, False)
            reading.cancel()
            await asyncio.wait([reading])

    simulate(main)


def test_workers_that_nobody_knows_and_workers_that_do_not_answer_are_named() -> None:
    class Gone(ScriptedWorker):
        async def drain(self, on: bool, timeout_s: float) -> None:  # type: ignore[override]
            raise PeerLost("lost d0")

    async def main() -> None:
        async with ScriptedFleet(Gone("d0", script=speak)) as fleet:
            with pytest.raises(NotFound, match="no worker 'd9'; this router knows d0"):
                await drain(fleet, "d9", True)
            with pytest.raises(PeerLost, match="d0"):
                await drain(fleet, "d0", True)

    simulate(main)
