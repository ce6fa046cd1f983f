"""What routers and workers share in Redis: who is in the fleet, and how much of its rate limits an account has left.
The registry of worker incarnations is here in both its forms, the buckets of rate limits in Redis' (rates.py).

The registry is discovery and nothing more. A worker registers again and again while it lives; readers treat an entry as
a hint where to connect, decide life and death by the worker's own stream, and keep what they know when the registry is
empty or gone. So no request waits for it, and losing it loses nothing.

Life of an entry: register -> refreshed by further registers -> deregister by the same boot, replaced by the next
boot's register, or (Redis) expired `expire_s` after the last refresh, for workers that died without a word.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Protocol

import redis.asyncio as redis
from google.protobuf.json_format import MessageToJson, Parse, ParseError
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from baton.cluster.rates import Rates
from baton.core.errors import ConfigError, Incompatible, PeerLost
from baton.core.worker import WorkerInfo
from baton.wire import codec, worker_pb2

log = logging.getLogger("baton.cluster")

EXPIRE_S = 30.0
"""Many times the refresh interval: an entry outlives short outages of its worker or of Redis, not its worker."""
_KEY_PREFIX = "baton:worker:"
_SOCKET_TIMEOUT_S = 1.0
_CALL_TIMEOUT_S = 2.5
"""For one call, its connection and the one retry that a restarted server needs (the old connection is dead)."""

# A late deregister of an old boot must not remove its successor. An entry that is no JSON is nobody's.
_DELETE_IF_BOOT = """
local value = redis.call('GET', KEYS[1])
if not value then return 0 end
local ok, entry = pcall(cjson.decode, value)
if ok and entry['boot_id'] == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""

_BUCKET_PREFIX = "baton:rate:"
_BUCKET_TIMEOUT_S = 0.25
"""A request waits for its limits: not for long."""
_BUCKET_CONNECTIONS = 4
"""A burst takes turns on them: a connection for each would cost more than the calls."""

# The arithmetic of rates.MemoryBuckets, by the server's clock, so that all routers agree. A rate of 0 is no limit.
_TAKE = """
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
local rates, needs = {tonumber(ARGV[1]), tonumber(ARGV[2])}, {tonumber(ARGV[3]), tonumber(ARGV[4])}
local forced = ARGV[5] == '1'
local kept = redis.call('HMGET', KEYS[1], 'requests', 'tokens', 'at')
local minutes = math.max(0, now - tonumber(kept[3] or now)) / 60
local levels, wait = {}, 0
for i = 1, 2 do
  levels[i] = math.min(rates[i], tonumber(kept[i] or rates[i]) + minutes * rates[i])
  if rates[i] > 0 and not forced then
    wait = math.max(wait, (math.min(needs[i], rates[i]) - levels[i]) * 60 / rates[i])
  end
end
if wait > 0 then return string.format('%.6f', wait) end
redis.call('HSET', KEYS[1], 'requests', string.format('%.6f', levels[1] - needs[1]),
  'tokens', string.format('%.6f', levels[2] - needs[2]), 'at', string.format('%.6f', now))
redis.call('PEXPIRE', KEYS[1], ARGV[6])
return '0'
"""
_BUCKET_EXPIRE_MS = 3_600_000
"""An account that owes more than an hour's worth is forgiven the rest."""


class Registry(Protocol):
    """Every call raises PeerLost, within a few seconds, when the registry does not answer."""

    async def register(self, info: WorkerInfo) -> None:
        """Enter this incarnation, or refresh it. Replaces an earlier boot of the same worker."""
        ...

    async def deregister(self, worker_id: str, boot_id: str) -> None:
        """Take this incarnation out. Nothing happens if it is not there, or a later boot is."""
        ...

    async def list(self) -> tuple[WorkerInfo, ...]:
        """All entries, by worker_id. Entries that cannot be read are skipped and logged."""
        ...

    async def close(self) -> None: ...


class MemoryRegistry:
    """For one process (tests, the simulator). Entries do not expire: nobody here dies without the registry."""

    def __init__(self) -> None:
        self._entries: dict[str, WorkerInfo] = {}

    async def register(self, info: WorkerInfo) -> None:
        self._entries[info.worker_id] = info

    async def deregister(self, worker_id: str, boot_id: str) -> None:
        held = self._entries.get(worker_id)
        if held is not None and held.boot_id == boot_id:
            del self._entries[worker_id]

    async def list(self) -> tuple[WorkerInfo, ...]:
        return tuple(self._entries[name] for name in sorted(self._entries))

    async def close(self) -> None:
        pass


class RedisRegistry:
    """Redis or Valkey; one key per worker. Connects when first used, and again whenever it must."""

    def __init__(self, url: str, expire_s: float = EXPIRE_S) -> None:
        """`url`: redis://host:port/0, rediss://..., unix:///path. Raises ConfigError for any other."""
        self._expire_ms = int(expire_s * 1000)
        self._unreadable: dict[bytes, bytes] = {}
        self._server = _Server(url, "registry", _SOCKET_TIMEOUT_S, _CALL_TIMEOUT_S, 64)
        self._redis = self._server.redis

    async def register(self, info: WorkerInfo) -> None:
        async with self._server.answering():
            await self._redis.set(_KEY_PREFIX + info.worker_id, _to_json(info), px=self._expire_ms)

    async def deregister(self, worker_id: str, boot_id: str) -> None:
        async with self._server.answering():
            await self._redis.eval(_DELETE_IF_BOOT, 1, _KEY_PREFIX + worker_id, boot_id)

    async def list(self) -> tuple[WorkerInfo, ...]:
        async with self._server.answering():
            keys = sorted({key async for key in self._redis.scan_iter(match=_KEY_PREFIX + "*", count=1000)})
            values = await self._redis.mget(keys) if keys else []
        entries = [self._read(key, value) for key, value in zip(keys, values, strict=True) if value is not None]
        return tuple(info for info in entries if info is not None)

    async def close(self) -> None:
        await self._redis.aclose()

    def _read(self, key: bytes, value: bytes) -> WorkerInfo | None:
        try:
            return _from_json(value)
        except (ParseError, Incompatible) as e:
            if self._unreadable.get(key) != value:  # Once per content: this is polled.
                self._unreadable[key] = value
                log.warning("skipping registry entry %r, which this version cannot read: %s", key, e)
            return None


class RedisBuckets:
    """rates.Buckets that all routers of one Redis share: exact, whoever asks."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError for a URL that is none."""
        self._server = _Server(url, "store of rate limits", _BUCKET_TIMEOUT_S, _BUCKET_TIMEOUT_S,
                               _BUCKET_CONNECTIONS)
        self._take = self._server.redis.register_script(_TAKE)

    async def take(self, account: str, rates: Rates, tokens: int) -> float:
        return await self._call(account, rates, 1, tokens, forced=False)

    async def give(self, account: str, rates: Rates, requests: int, tokens: int) -> None:
        await self._call(account, rates, -requests, -tokens, forced=True)

    async def close(self) -> None:
        await self._server.redis.aclose()

    async def _call(self, account: str, rates: Rates, requests: int, tokens: int, forced: bool) -> float:
        limits = rates.requests_per_min or 0, rates.tokens_per_min or 0
        async with self._server.answering():
            return float(await self._take(
                [_BUCKET_PREFIX + account], [*limits, requests, tokens, int(forced), _BUCKET_EXPIRE_MS]))


class _Server:
    """The connections to it, and what its failures are to us."""

    def __init__(self, url: str, what: str, socket_timeout_s: float, call_timeout_s: float,
                 max_connections: int) -> None:
        self._where = f"{what} at {url.rpartition('@')[2]}"  # Without the password: this goes into messages.
        self._call_timeout_s = call_timeout_s
        try:
            pool = redis.BlockingConnectionPool.from_url(
                url, max_connections=max_connections, timeout=call_timeout_s, socket_timeout=socket_timeout_s,
                socket_connect_timeout=socket_timeout_s, retry=Retry(NoBackoff(), 1))
        except ValueError as e:
            where = url.rpartition("@")[2]
            raise ConfigError(f"cluster.redis_url {where!r} cannot be used: {e}", "cluster.redis_url") from None
        self.redis: Any = redis.Redis.from_pool(pool)

    @asynccontextmanager
    async def answering(self) -> AsyncIterator[None]:
        """Raises PeerLost for whatever happens inside."""
        try:
            async with asyncio.timeout(self._call_timeout_s):
                yield
        except TimeoutError:
            raise PeerLost(f"the {self._where} did not answer within {self._call_timeout_s} s.") from None
        except (RedisError, OSError) as e:
            raise PeerLost(f"the {self._where} is not usable: {e}") from None


def _to_json(info: WorkerInfo) -> str:
    return MessageToJson(codec.INFO.encode(info), preserving_proto_field_name=True, indent=None)


def _from_json(raw: bytes) -> WorkerInfo:
    """The wire's own rules: fields of a later version are stepped over. Raises ParseError or Incompatible for what is
    no worker."""
    entry = codec.INFO.decode(Parse(raw, worker_pb2.WorkerInfo(), ignore_unknown_fields=True))
    if not entry.worker_id or not entry.boot_id:
        raise ParseError("it has no worker_id or no boot_id.")
    return entry
