"""One contract, both kinds of buckets; and what only shared ones can do: be exact for several routers, and be away.

Rates are so low that what fills during a test is less than what is asked for."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import redis.asyncio as redis

from baton.cluster.embedded import start_embedded_redis
from baton.cluster.rates import MAX_ACCOUNTS, Buckets, MemoryBuckets, Rates
from baton.cluster.store import RedisBuckets
from baton.core.errors import PeerLost


@asynccontextmanager
async def in_memory() -> AsyncIterator[Buckets]:
    yield MemoryBuckets(asyncio.get_running_loop().time)


@asynccontextmanager
async def in_redis() -> AsyncIterator[Buckets]:
    server = await start_embedded_redis()
    buckets = RedisBuckets(server.url)
    try:
        yield buckets
    finally:
        await buckets.close()
        await server.close()


@pytest.fixture(params=[in_memory, in_redis], ids=["memory", "redis"])
def opened(request: pytest.FixtureRequest) -> Callable[[], object]:
    return request.param  # type: ignore[no-any-return]


def run(opened: Callable[[], object], body: Callable[[Buckets], Awaitable[None]]) -> None:
    async def inside() -> None:
        async with asyncio.timeout(60), opened() as buckets:  # type: ignore[attr-defined]
            await body(buckets)

    asyncio.run(inside())


def test_a_minutes_worth_of_requests_goes_and_the_next_hears_when(opened: Callable[[], object]) -> None:
    async def body(buckets: Buckets) -> None:
        rates = Rates(requests_per_min=3)
        assert [await buckets.take("a", rates, 10**6) for _ in range(3)] == [0, 0, 0]
        assert 0 < await buckets.take("a", rates, 1) <= 20
        assert await buckets.take("b", rates, 1) == 0, "another account has its own"

    run(opened, body)


def test_tokens_are_limited_by_themselves(opened: Callable[[], object]) -> None:
    async def body(buckets: Buckets) -> None:
        rates = Rates(tokens_per_min=100)
        assert await buckets.take("a", rates, 80) == 0
        wait_s = await buckets.take("a", rates, 80)
        assert 0 < wait_s <= 36, "60 of 100 are missing"
        assert await buckets.take("a", rates, 20) == 0, "what was refused took nothing"

    run(opened, body)


def test_what_was_not_used_is_given_back_and_what_was_used_beyond_is_taken(opened: Callable[[], object]) -> None:
    async def body(buckets: Buckets) -> None:
        rates = Rates(requests_per_min=2, tokens_per_min=100)
        assert await buckets.take("a", rates, 100) == 0
        await buckets.give("a", rates, 1, 100)
        assert await buckets.take("a", rates, 50) == 0
        await buckets.give("a", rates, 0, -110)
        assert 50 < await buckets.take("a", rates, 50) <= 66, "60 below zero, 50 are needed"

    run(opened, body)


def test_more_than_was_taken_cannot_be_saved_up(opened: Callable[[], object]) -> None:
    async def body(buckets: Buckets) -> None:
        rates = Rates(requests_per_min=1, tokens_per_min=10)
        await buckets.give("a", rates, 5, 500)
        assert await buckets.take("a", rates, 10) == 0
        assert await buckets.take("a", rates, 10) > 0

    run(opened, body)


def test_a_request_of_more_than_a_minutes_tokens_goes_when_the_bucket_is_full(opened: Callable[[], object]) -> None:
    async def body(buckets: Buckets) -> None:
        rates = Rates(tokens_per_min=10)
        assert await buckets.take("a", rates, 25) == 0
        assert 60 < await buckets.take("a", rates, 1) <= 96, "15 below zero"

    run(opened, body)


def test_a_lower_limit_holds_at_once(opened: Callable[[], object]) -> None:
    async def body(buckets: Buckets) -> None:
        assert await buckets.take("a", Rates(tokens_per_min=1000), 100) == 0
        assert await buckets.take("a", Rates(tokens_per_min=10), 10) == 0
        assert await buckets.take("a", Rates(tokens_per_min=10), 10) > 0

    run(opened, body)


def test_two_routers_that_ask_at_once_share_one_limit() -> None:
    async def body() -> None:
        server = await start_embedded_redis()
        routers = [RedisBuckets(server.url) for _ in range(2)]
        try:
            asked = [routers[i % 2].take("a", Rates(requests_per_min=5), 1) for i in range(40)]
            assert [wait_s == 0 for wait_s in await asyncio.gather(*asked)].count(True) == 5
        finally:
            for router in routers:
                await router.close()
            await server.close()

    asyncio.run(body())


def test_a_store_that_falls_silent_is_a_lost_peer_and_has_forgotten_nothing_afterwards() -> None:
    async def body() -> None:
        server = await start_embedded_redis()
        buckets, rates = RedisBuckets(server.url), Rates(requests_per_min=1)
        client = redis.Redis.from_url(server.url)
        pid = int((await client.info("server"))["process_id"])
        try:
            assert await buckets.take("a", rates, 1) == 0
            os.kill(pid, signal.SIGSTOP)
            try:
                with pytest.raises(PeerLost, match="rate limits at"):
                    await buckets.take("a", rates, 1)
            finally:
                os.kill(pid, signal.SIGCONT)
            await client.ping()
            assert await buckets.take("a", rates, 1) > 0
        finally:
            await client.aclose()
            await buckets.close()
            await server.close()

    asyncio.run(body())


def test_a_store_that_is_not_there_is_a_lost_peer() -> None:
    async def body() -> None:
        buckets = RedisBuckets("unix:///nowhere/redis.sock")
        with pytest.raises(PeerLost, match="rate limits at"):
            await buckets.take("a", Rates(requests_per_min=1), 1)
        await buckets.close()

    asyncio.run(body())


def test_accounts_that_nobody_uses_any_more_are_forgotten() -> None:
    async def body() -> None:
        buckets, rates = MemoryBuckets(lambda: 0.0), Rates(requests_per_min=1)
        for i in range(MAX_ACCOUNTS + 10):
            await buckets.take(f"a{i}", rates, 1)
        assert len(buckets._levels) == MAX_ACCOUNTS
        assert await buckets.take("a20", rates, 1) > 0, "the latest are remembered"

    asyncio.run(body())
