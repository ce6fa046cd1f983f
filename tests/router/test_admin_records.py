"""What the admin service tells of finished requests."""

from __future__ import annotations

import asyncio
import json

import pytest

from baton.cli.explain import explanation
from baton.core.config import RouterConfig
from baton.core.errors import NotFound, Overloaded
from baton.core.worker import Role, WorkerLoad
from baton.router.baselines import RoundRobin
from baton.router.grpc_front import AdminFront, Identity
from baton.router.recorded import replay
from baton.wire.admin_pb2 import ExplainRequest, NewestRequest, TraceRequest
from tests.router.fake_fleet import ScriptedFleet, ScriptedWorker, refuse, request, simulate


def admin_of(fleet: ScriptedFleet) -> AdminFront:
    who = Identity("", "", "", "")
    return AdminFront(fleet.fleet, fleet.dispatcher, fleet.metrics, fleet._dial, lambda: who)


def test_the_newest_requests_are_told_with_where_they_stand_on_one_clock() -> None:
    async def main() -> None:
        async with ScriptedFleet(ScriptedWorker("p0", Role.PREFILL), ScriptedWorker("d0")) as fleet:
            admin = admin_of(fleet)
            for i in range(3):
                await fleet.answer(request(f"r{i}"))
            newest = (await admin.Newest(NewestRequest(count=2), None)).traces
            assert [t.request_id for t in newest] == ["r2", "r1"]
            assert newest[0].arrived_s >= newest[1].arrived_s + newest[1].total_s > 0
            for told in newest:
                assert told == await admin.Trace(TraceRequest(request_id=told.request_id), None)
                assert 0 <= told.zero_s <= told.total_s

    simulate(main)


def test_a_request_that_was_not_let_in_has_no_trace_and_a_reason() -> None:
    async def main() -> None:
        async with ScriptedFleet(ScriptedWorker("d0"), max_inflight=1) as fleet:
            running = asyncio.create_task(fleet.answer(request("r", max_tokens=50)))
            await asyncio.sleep(0.2)
            with pytest.raises(Overloaded):
                await fleet.answer(request("late"))
            with pytest.raises(Overloaded):
                fleet.dispatcher.check_early("early", "", 10.0)
            for name in ("late", "early"):
                with pytest.raises(NotFound, match="not let in: the router has 1 requests"):
                    await admin_of(fleet).Explain(ExplainRequest(request_id=name), None)
            await running

    simulate(main)


def test_a_request_that_runs_is_told_as_far_as_it_has_come() -> None:
    async def main() -> None:
        refusing = ScriptedWorker("d0", script=refuse("overloaded"))
        async with ScriptedFleet(refusing, ScriptedWorker("d1", load=WorkerLoad(num_running=9))) as fleet:
            admin = admin_of(fleet)
            running = asyncio.create_task(fleet.answer(request("r", max_tokens=50)))
            await asyncio.sleep(0.2)
            trace = await admin.Trace(TraceRequest(request_id="r"), None)
            told = json.loads((await admin.Explain(ExplainRequest(request_id="r"), None)).json)
            assert (trace.finished, told["outcome"]) == (False, "running")
            assert [a.outcome for a in trace.attempts] == ["overloaded", "running"]
            assert 0 < trace.output_tokens < 50
            assert [a["decision"] for a in told["attempts"]] == [0, 1]
            said = list(explanation(told))
            assert said[0].startswith("r: still running; ")
            assert not (await admin.Newest(NewestRequest(count=9), None)).traces
            await running
            assert (await admin.Trace(TraceRequest(request_id="r"), None)).finished

    simulate(main)


def test_who_goes_in_turns_goes_by_the_decisions_of_its_router() -> None:
    async def main() -> None:
        policy = RoundRobin(RouterConfig())
        async with ScriptedFleet(*(ScriptedWorker(f"d{i}") for i in range(3)), policy=policy) as fleet:
            for i in range(6):
                await fleet.answer(request(f"r{i}"))
            records = [fleet.dispatcher.traces.get(f"r{i}") for i in range(6)]
            assert [r.decisions[0].facts.turn for r in records if r] == list(range(6))
            assert [r.route.decode for r in records if r and r.route] == ["d0", "d1", "d2"] * 2

    simulate(main)


def test_a_record_comes_as_json_and_its_decision_is_made_again() -> None:
    async def main() -> None:
        workers = [ScriptedWorker(f"{kind}{i}", role) for kind, role in (("p", Role.PREFILL), ("d", Role.DECODE))
                   for i in range(3)]  # fmt: skip
        async with ScriptedFleet(*workers, local_prefill_max_tokens=4) as fleet:
            admin = admin_of(fleet)
            for i in range(8):
                await fleet.answer(request(f"r{i}", prompt=range(40)))
            told = json.loads((await admin.Explain(ExplainRequest(request_id="r6"), None)).json)
            newest = json.loads((await admin.Explain(ExplainRequest(), None)).json)
            assert (told["request_id"], newest["request_id"]) == ("r6", "r7")
            for record in (told, newest):
                (decision,) = record["decisions"]
                assert replay(decision).same_pick
                assert record["attempts"][0]["route"] == decision["route"]

    simulate(main)
