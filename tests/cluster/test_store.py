"""One contract, both registries; and what Redis alone can do: fall silent, hold rubbish, forget."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis.asyncio as redis

from baton.cluster.embedded import EmbeddedRedis, start_embedded_redis
from baton.cluster.store import MemoryRegistry, RedisRegistry, Registry, _to_json
from baton.core.errors import ConfigError, PeerLost
from baton.core.layout import Capability, KVLayout
from baton.core.worker import Role, WorkerInfo

CAPABILITY = Capability("tiny", "f00d", KVLayout(2, 1, 8, 16, "fp32"), 512, 64, (2, 7), "torch-fp32",
                        transports=(("shm", b"\x00\xff\x80"), ("tcp", b"127.0.0.1:1")))


def info(worker_id: str, boot_id: str = "b1", role: Role = Role.DECODE) -> WorkerInfo:
    return WorkerInfo(worker_id, boot_id, role, "127.0.0.1:5000", CAPABILITY)


@asynccontextmanager
async def in_memory() -> AsyncIterator[Registry]:
    registry = MemoryRegistry()
    yield registry
    await registry.close()


@asynccontextmanager
async def in_redis() -> AsyncIterator[Registry]:
    async with embedded() as server:
        registry = RedisRegistry(server.url)
        yield registry
        await registry.close()


@asynccontextmanager
async def embedded() -> AsyncIterator[EmbeddedRedis]:
    server = await start_embedded_redis()
    try:
        yield server
    finally:
        await server.close()


@pytest.fixture(params=[in_memory, in_redis], ids=["memory", "redis"])
def opened(request: pytest.FixtureRequest) -> Callable[[], object]:
    return request.param  # type: ignore[no-any-return]


def run(opened: Callable[[], object], body: Callable[[Registry], Awaitable[None]]) -> None:
    async def inside() -> None:
        async with asyncio.timeout(60), opened() as registry:  # type: ignore[attr-defined]
            await body(registry)

    asyncio.run(inside())


def test_what_was_registered_is_listed_whole_and_in_order(opened: Callable[[], object]) -> None:
    async def body(registry: Registry) -> None:
        assert await registry.list() == ()
        second, first = info("w-2"), info("w-1", role=Role.PREFILL)
        await registry.register(second)
        await registry.register(first)
        await registry.register(first)
        assert await registry.list() == (first, second)

    run(opened, body)


def test_a_new_boot_replaces_the_old_and_survives_its_late_deregistration(opened: Callable[[], object]) -> None:
    async def body(registry: Registry) -> None:
        old, new = info("w", "b1"), info("w", "b2")
        await registry.register(old)
        await registry.register(new)
        await registry.deregister("w", "b1")
        assert await registry.list() == (new,)
        await registry.deregister("w", "b2")
        await registry.deregister("w", "b2")
        assert await registry.list() == ()

    run(opened, body)


def test_rubbish_in_redis_is_skipped_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        async with embedded() as server:
            registry, raw = RedisRegistry(server.url), redis.Redis.from_url(server.url)
            good = info("good")
            await registry.register(good)
            await raw.set("baton:worker:bad", "no json")
            await raw.set("baton:worker:old", '{"worker_id": "old", "boot_id": "b", "role": "juggler", "address": ""}')
            for at, entry in enumerate(_no_workers(good)):
                await raw.set(f"baton:worker:no-{at}", json.dumps(entry))
            for _ in range(3):
                assert await registry.list() == (good,)
            await registry.deregister("bad", "b")
            await raw.aclose()
            await registry.close()

    with caplog.at_level(logging.WARNING, "baton.cluster"):
        asyncio.run(body())
    assert len(caplog.records) == 2 + 5
    for named in ("boot_id", "Capability without layout", "block_size", "transports", "Role number 0"):
        assert named in caplog.text
    assert "baton:worker:bad" in caplog.text


def _no_workers(good: WorkerInfo) -> list[dict[str, Any]]:
    """Something missing, here and deeper; something of another kind, twice; a member that is none."""
    entry = json.loads(_to_json(good))
    capability, layout = entry["capability"], entry["capability"]["layout"]
    return [
        {name: value for name, value in entry.items() if name != "boot_id"},
        entry | {"capability": {name: value for name, value in capability.items() if name != "layout"}},
        entry | {"capability": capability | {"layout": layout | {"block_size": "many"}}},
        entry | {"capability": capability | {"transports": [{"name": "shm", "advert": "x"}]}},
        entry | {"role": "juggler"},
    ]


def test_an_entry_of_a_later_version_is_read_as_far_as_it_is_known() -> None:
    async def body() -> None:
        async with embedded() as server:
            registry, raw = RedisRegistry(server.url), redis.Redis.from_url(server.url)
            good = info("good")
            entry = json.loads(_to_json(good))
            capability = entry["capability"]
            later = entry | {"hat": "red", "capability": capability | {"layout": capability["layout"] | {"scales": 1}}}
            await raw.set("baton:worker:good", json.dumps(later))
            assert await registry.list() == (good,)
            await raw.aclose()
            await registry.close()

    asyncio.run(body())


def test_a_worker_that_stops_refreshing_leaves_redis() -> None:
    async def body() -> None:
        async with embedded() as server, asyncio.timeout(30):
            registry = RedisRegistry(server.url, expire_s=0.05)
            await registry.register(info("w"))
            while await registry.list():
                await asyncio.sleep(0.01)
            await registry.close()

    asyncio.run(body())


@pytest.mark.slow
@pytest.mark.parametrize("state", ["absent", "ended", "frozen"])
def test_a_registry_that_does_not_answer_is_a_lost_peer_in_bounded_time(state: str) -> None:
    async def body() -> None:
        async with embedded() as server:
            registry = RedisRegistry("unix:///nowhere/redis.sock" if state == "absent" else server.url)
            pid = await _server_pid(server)
            if state != "absent":
                await registry.register(info("w"))
            if state == "ended":
                await server.close()  # for good: one that is killed comes back
            if state == "frozen":
                os.kill(pid, signal.SIGSTOP)
            try:
                async with asyncio.timeout(20):
                    for call in (registry.register(info("w")), registry.list(), registry.deregister("w", "b1")):
                        with pytest.raises(PeerLost, match="registry at"):
                            await call
            finally:
                if state == "frozen":
                    os.kill(pid, signal.SIGCONT)
            if state == "frozen":
                assert await registry.list() == (info("w"),), "it answers again, and so do we"
            await registry.close()

    asyncio.run(body())


async def _server_pid(server: EmbeddedRedis) -> int:
    client = redis.Redis.from_url(server.url)
    pid = (await client.info("server"))["process_id"]
    await client.aclose()
    return int(pid)


def test_a_url_of_no_known_kind_is_a_config_error_without_its_password() -> None:
    with pytest.raises(ConfigError, match="redis_url") as caught:
        RedisRegistry("http://user:secret@host/0")
    assert "secret" not in caught.value.message
