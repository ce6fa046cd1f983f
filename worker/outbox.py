"""What a worker has to say to one router: token chunks, KV events, load. One message per engine step, and a
heartbeat now and then, alone when there is nothing else.

A router that reads slowly gets fewer, larger messages: what is pending is merged, and past `MAX_PENDING` entries the
stream is closed (the router has stopped draining): it may come back, and resume its requests, or another one may.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from baton.core.messages import KVEvents, KVSnapshot, StepMessage, TokenChunk

log = logging.getLogger(__name__)

MAX_PENDING = 65_536
NEWS_S = 0.02
"""Routers hear of each other's new work within this time: a step can be twenty times as long, and until they know they
all send to the same idle worker."""


class Outbox:
    """Created with a stream, closed with it. Single event loop."""

    def __init__(self, compose: Callable[..., StepMessage]) -> None:
        """`compose(chunks=, kv_events=, snapshot=, taken=, heartbeat=)` adds what only the worker knows: boot id,
        load."""
        self._compose = compose
        self._chunks: list[TokenChunk] = []
        self._events: list[KVEvents] = []
        self._snapshot: KVSnapshot | None = None
        self._taken: list[int] = []
        self._ready = asyncio.Event()
        self._soon: asyncio.TimerHandle | None = None
        self._heartbeat_at = 0.0
        """When the next message is one (the loop's time)."""
        self.router_id = ""
        """Who reads it, once it said so."""
        self.greeted = False
        self.closed = False

    def greet(self, router_id: str, snapshot: KVSnapshot) -> None:
        """The router said Hello: it gets the whole prefix map first, events after `snapshot.seq` later."""
        self.router_id = router_id
        self.greeted = True
        self._snapshot = snapshot
        self._events.clear()
        self._ready.set()

    def put(self, chunk: TokenChunk) -> None:
        """Queue news of a request; sent at the next `flush`. Dropped once closed."""
        if not self.closed:
            self._chunks.append(chunk)
            self._limit()

    def put_events(self, events: tuple[KVEvents, ...]) -> None:
        if self.greeted and not self.closed:
            self._events.extend(events)
            self._limit()

    def take(self, epoch: int) -> None:
        """The load covers this attempt from now on: said with the next message, whatever brings that about."""
        self._taken.append(epoch)

    def _limit(self) -> None:
        if len(self._chunks) + len(self._events) > MAX_PENDING:
            log.warning("a router reads nothing any more: its stream is closed")
            self._chunks.clear()
            self._events.clear()
            self.close()

    def flush(self, even_empty: bool = False) -> None:
        """Send what is pending as one message; `even_empty`: the load alone is news."""
        if self._chunks or self._events or self.closed or even_empty:
            self._ready.set()

    def flush_soon(self) -> None:
        """The load is news, but for no more than one message every NEWS_S."""
        if self._soon is None and not self.closed:
            self._soon = asyncio.get_running_loop().call_later(NEWS_S, self.flush, True)

    def close(self) -> None:
        self.closed = True
        self._hush()
        self._ready.set()

    async def next(self, heartbeat_s: float) -> StepMessage | None:
        """The next message: at a flush, or an empty one after `heartbeat_s`. Every `heartbeat_s` the one that is due is
        a heartbeat as well. None once closed and drained."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(heartbeat_s):
                await self._ready.wait()
        now = asyncio.get_running_loop().time()
        heartbeat = now >= self._heartbeat_at
        if heartbeat:
            self._heartbeat_at = now + heartbeat_s
        self._ready.clear()
        self._hush()
        if self.closed and not self._chunks:
            return None
        chunks, self._chunks = tuple(self._chunks), []
        events, self._events = tuple(self._events), []
        snapshot, self._snapshot = self._snapshot, None
        taken, self._taken = tuple(self._taken), []
        return self._compose(chunks=chunks, kv_events=events, snapshot=snapshot, taken=taken, heartbeat=heartbeat)

    def _hush(self) -> None:
        """Whatever is said now holds the news."""
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
