"""What is recorded of requests on production routers and workers, and what can be made of it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from baton.cli.explain import explanation
from baton.cli.perfetto import trace_file
from baton.core.metrics import Metrics
from baton.router.grpc_front import AdminFront, Identity
from baton.router.recorded import document, replay
from baton.router.trace import TraceRecord
from baton.wire.admin_pb2 import NewestRequest, RequestTrace
from tests.cli.test_perfetto import check_nesting, events
from tests.sim.scene import Scene, plan, play, request, right

NUM_REQUESTS = 12


def told(scene: Scene) -> list[TraceRecord]:
    dispatcher = scene.router.dispatcher
    assert dispatcher is not None
    return list(dispatcher.traces.recent())


async def traces_of(scene: Scene) -> list[RequestTrace]:
    fleet, dispatcher = scene.router.fleet, scene.router.dispatcher
    assert fleet is not None
    assert dispatcher is not None

    def nobody(info: object) -> Any:
        raise AssertionError("no worker is asked")

    admin = AdminFront(fleet, dispatcher, Metrics(), nobody, lambda: Identity("", "", "", ""))
    return list((await admin.Newest(NewestRequest(count=NUM_REQUESTS), None)).traces)


async def burst(scene: Scene) -> None:
    """Requests of which many share a prefix, some at once."""
    async def one(number: int) -> None:
        r = request(f"r{number}", (*range(1, 17), *range(20 + number % 3, 30)))
        assert (await scene.ask(r)).tokens == right(r)

    for start in range(0, NUM_REQUESTS, 4):
        await asyncio.gather(*map(one, range(start, start + 4)))


def test_every_decision_under_load_is_made_again_from_its_record() -> None:
    async def story(s: Scene) -> None:
        await burst(s)
        decisions = [d for record in told(s) for d in json.loads(json.dumps(document(record)))["decisions"]]
        assert len(decisions) >= NUM_REQUESTS
        assert len({d["route"]["prefill"] for d in decisions}) > 1, "a world without choices proves nothing"
        assert any(c["held_blocks"] for d in decisions for c in d["prefill"])
        for decision in decisions:
            again = replay(decision)
            assert again.same_pick, decision
            assert again.same_cost, decision

    play(3, plan(num_prefill=2, num_decode=2), story)


def test_a_trace_has_the_chunks_where_they_ran_and_a_mark_for_each_token() -> None:
    async def story(s: Scene) -> None:
        await burst(s)
        traces = await traces_of(s)
        assert [t.request_id for t in traces] == [r.request_id for r in told(s)]
        remote = [t for t in traces if t.attempts[-1].route.HasField("prefill")]
        assert 0 < len(remote) < len(traces), "both ways are looked at"
        for one in traces:
            route = one.attempts[-1].route
            spans: dict[str, list[Any]] = {}
            for span in one.spans:
                spans.setdefault(span.name, []).append(span)
            if one in remote:
                chunks, lender = spans["prefill chunk"], route.prefill.worker_id
                assert {x.worker for x in chunks} == {lender}
                assert {x.worker for x in spans["transfer"]} == {route.decode}
                assert all(f"from {lender}" in x.detail for x in spans["transfer"])
            else:
                chunks = spans["prefill chunk (local)"]
                assert {x.worker for x in chunks} == {route.decode}
            assert sum(int(x.detail.split()[0]) for x in chunks) == one.prompt_tokens - one.cached_tokens
            (decode,) = spans["decode"]
            assert len(decode.marks) == one.output_tokens - 1, "the first token ends the prompt"
            assert list(decode.marks) == sorted(decode.marks)
            assert decode.marks[-1] <= decode.end_s - decode.start_s
            assert all(a.end_s <= b.start_s + 1e-9 for a, b in zip(chunks, chunks[1:], strict=False))
        assert max(len(x.marks) for one in traces for x in one.spans if x.name == "prefill chunk") > 0

    play(4, plan(num_prefill=2, num_decode=2), story)


def test_the_file_of_many_requests_at_once_is_sound() -> None:
    async def story(s: Scene) -> None:
        await burst(s)
        traces = await traces_of(s)
        found = events(*traces)
        check_nesting(found)
        assert len([e for e in found if e["name"] == "step"]) == sum(t.output_tokens - 1 for t in traces)
        assert trace_file(traces)["displayTimeUnit"] == "ms"

    play(5, plan(num_prefill=2, num_decode=2), story)


def test_the_words_of_a_real_request_price_the_other_choices_and_measure_this_one() -> None:
    async def story(s: Scene) -> None:
        await burst(s)
        for record in told(s):
            said = list(explanation(json.loads(json.dumps(document(record)))))
            rows = [line.split() for line in said]
            assert any(row[-1:] == ["chosen"] for row in rows)
            assert any("lost" in row or "chance" in row for row in rows), said
            compared = {row[0] for row in rows if row[2:3] == ["ms"] and row[4:] == ["ms"]}
            assert compared >= {"prefill"}
            assert any(row[:3] == ["a", "decode", "step"] for row in rows)
            assert record.route is not None
            assert record.route.prefill is None or compared >= {"queue", "handoff"}

    play(6, plan(num_prefill=2, num_decode=2), story)
