"""What a client over its limits, or of a router with no room, gets to see: over HTTP and over gRPC."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx

from baton.core.errors import Overloaded, PeerLost, ResumedElsewhere
from baton.core.metrics import Metrics
from baton.router.claims import MAX_ACCOUNTS, MAX_FALSE, WITHIN_S, Claims
from baton.router.grpc_front import AdminFront, InferenceFront
from baton.wire import inference_pb2, inference_pb2_grpc
from baton.wire.server import start_router_server
from tests.router.front_world import MODEL, EchoDispatcher, FrontWorld, open_front

TENANTS = 'router.tenants={"*": {"requests_per_min": 2}, "big": {"tokens_per_min": 1000}}'

MADE_UP = f"1/1790000000/w/cmpl-{0:032x}"
"""The mark of a stream that never was."""


def body(**fields: object) -> dict[str, object]:
    return {"model": MODEL, "prompt": "Tokens are", "max_tokens": 3, **fields}


async def ask(world: FrontWorld, headers: dict[str, str], **fields: object) -> httpx.Response:
    async with httpx.AsyncClient() as client:
        return await client.post(world.url + "/v1/completions", json=body(**fields), headers=headers)


def test_each_tenant_and_each_key_has_its_own_limits_and_hears_when_to_come_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_front(tmp_path, None, TENANTS) as world:
            keys = ({"authorization": f"Bearer sk-{i}"} for i in range(2))
            for headers in ({"x-baton-tenant": "a"}, *keys):
                assert [(await ask(world, headers)).status_code for _ in range(2)] == [200, 200]
                refused = await ask(world, headers)
                assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limited")
                assert 1 <= int(refused.headers["retry-after"]) <= 30
                assert "sk-" not in refused.text
            assert world.metrics.value("baton_requests_total", outcome="rate_limited") == 3
            assert {r.tenant for r in world.source.requests} == {"a", ""}, "a key is no tenant: prefixes are shared"

    asyncio.run(scenario())


def test_tokens_are_settled_by_what_was_used(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_front(tmp_path, None, TENANTS) as world:
            headers = {"x-baton-tenant": "big"}
            for _ in range(8):  # each is charged 200 at first, and uses about 12
                assert (await ask(world, headers, max_tokens=200)).status_code == 200

    asyncio.run(scenario())


def test_what_failed_is_not_counted(tmp_path: Path) -> None:
    async def scenario() -> None:
        source = EchoDispatcher(fail_after=0, error=PeerLost("gone"))
        async with open_front(tmp_path, source, TENANTS) as world:
            assert [(await ask(world, {})).status_code for _ in range(5)] == [503] * 5
            source.fail_after = None
            assert [(await ask(world, {})).status_code for _ in range(3)] == [200, 200, 429]

    asyncio.run(scenario())


def test_a_router_without_room_says_so_before_it_reads_the_prompt(tmp_path: Path) -> None:
    async def scenario() -> None:
        source = EchoDispatcher(full=Overloaded("full", retry_after_s=6.2))
        async with open_front(tmp_path, source) as world:
            read = world.generation.codec.encode
            world.generation.codec.encode = None  # type: ignore[assignment, method-assign]
            refused = await ask(world, {})
            world.generation.codec.encode = read  # type: ignore[method-assign]
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "7")
            assert world.metrics.value("baton_requests_total", outcome="overloaded") == 1

    asyncio.run(scenario())


def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_front(tmp_path) as world:
            refused = await ask(world, {"x-baton-tenant": "x" * 200})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tenant")

    asyncio.run(scenario())


@contextlib.asynccontextmanager
async def grpc_client(world: FrontWorld) -> AsyncIterator[Any]:
    admin = AdminFront(None, None, Metrics(), None, None)  # type: ignore[arg-type]  # nobody asks it
    server = await start_router_server(InferenceFront(world.generation), admin, "127.0.0.1", 0, lambda: None)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield inference_pb2_grpc.InferenceStub(channel)
    finally:
        await server.stop(0)


def test_grpc_has_the_same_limits_and_says_when_in_its_trailers(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_front(tmp_path, None, TENANTS) as world, grpc_client(world) as stub:
            request = inference_pb2.GenerateRequest(model=MODEL, text="Tokens are", tenant="a")
            for _ in range(2):
                assert [part async for part in stub.Generate(request)]
            call = stub.Generate(request)
            assert await call.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            trailers = dict(await call.trailing_metadata())
            assert trailers["baton-code"] == "rate_limited"
            assert 1 <= int(trailers["retry-after"]) <= 30
            assert (await ask(world, {"x-baton-tenant": "a"})).status_code == 429, "one account, whichever door"

    asyncio.run(scenario())


def test_reading_on_costs_nothing_while_a_worker_works_on_it_and_is_paid_for_when_none_does(tmp_path: Path) -> None:
    async def scenario() -> None:
        for confirms, status in ((True, 200), (False, 429)):
            source = EchoDispatcher(confirms=confirms)
            async with open_front(tmp_path, source, TENANTS) as world:
                told = [await ask(world, {"x-baton-tenant": "a"}, stream=True) for _ in range(2)]
                last_id = next(line[4:] for line in told[0].text.split("\n") if line.startswith("id: "))
                rest = await ask(world, {"x-baton-tenant": "a", "last-event-id": last_id}, stream=True)
                assert rest.status_code == status

    asyncio.run(scenario())


def test_who_claimed_too_often_that_his_request_runs_is_treated_as_a_newcomer_for_a_while(tmp_path: Path) -> None:
    async def scenario() -> None:
        source = EchoDispatcher(confirms=False)
        async with open_front(tmp_path, source) as world:
            liar = {"x-baton-tenant": "liar", "last-event-id": MADE_UP}
            for _ in range(2 * MAX_FALSE):  # they wear off meanwhile
                assert (await ask(world, liar, stream=True)).status_code == 200
            source.full = Overloaded("full", retry_after_s=7)
            num_read = len(source.requests)
            assert (await ask(world, liar, stream=True)).status_code == 429
            assert len(source.requests) == num_read, "nobody was asked"
            assert (await ask(world, liar | {"x-baton-tenant": "other"}, stream=True)).status_code == 200
            source.full = None
            assert (await ask(world, liar, stream=True)).status_code == 200
            assert source.last_seen[-1] == "w", "it is read on with where it runs all the same"

    asyncio.run(scenario())


def test_who_is_not_believed_pays_before_any_worker_is_asked(tmp_path: Path) -> None:
    async def scenario() -> None:
        source = EchoDispatcher(confirms=False)
        async with open_front(tmp_path, source, TENANTS) as world:
            liar = {"x-baton-tenant": "a", "last-event-id": MADE_UP}
            statuses = [(await ask(world, liar, stream=True)).status_code for _ in range(2 * MAX_FALSE)]
            assert statuses[:2] == [200, 200]
            assert set(statuses[2:]) == {429}
            assert MAX_FALSE <= len(source.requests) < 2 * MAX_FALSE, "of the others nobody was asked"

    asyncio.run(scenario())


def test_who_is_not_believed_and_reads_on_all_the_same_gets_that_charge_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        source = EchoDispatcher(confirms=False)
        enough = f'router.tenants={{"*": {{"requests_per_min": {3 * MAX_FALSE}}}}}'
        async with open_front(tmp_path, source, enough) as world:
            liar = {"x-baton-tenant": "a", "last-event-id": MADE_UP}
            for _ in range(2 * MAX_FALSE):
                await ask(world, liar, stream=True)
            source.confirms = True
            statuses = {(await ask(world, liar, stream=True)).status_code for _ in range(3 * MAX_FALSE)}
            assert statuses == {200}, "each is paid for where it runs"

    asyncio.run(scenario())


def test_false_claims_wear_off_and_made_up_accounts_are_not_remembered_without_bound() -> None:
    claims = Claims()
    for _ in range(MAX_FALSE):
        assert claims.believes("a", 0.0)
        claims.was_false("a", 0.0)
    assert not claims.believes("a", 0.0)
    assert claims.believes("b", 0.0)
    assert claims.believes("a", 2 * WITHIN_S / MAX_FALSE), "one more"
    for number in range(MAX_ACCOUNTS):
        claims.was_false(f"made-up-{number}", 0.0)
    assert claims.believes("a", 0.0), "forgotten for so many others"
    assert len(claims._false) == MAX_ACCOUNTS


def test_who_reads_on_elsewhere_has_paid_for_all_of_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        moved_on = EchoDispatcher(fail_after=0, error=ResumedElsewhere("its client reads on"))
        async with open_front(tmp_path, moved_on, TENANTS) as world:
            answers = [await ask(world, {"x-baton-tenant": "a"}) for _ in range(3)]
            assert [answer.json()["error"]["code"] for answer in answers] == [
                "resumed_elsewhere", "resumed_elsewhere", "rate_limited"]

    asyncio.run(scenario())
