"""Rate limits as buckets that fill by the minute: one for requests, one for tokens, per account.

A bucket holds a minute's worth at most. What is taken may turn out to be more or less than was used, so it can be given
back, and go below zero: then the account waits until it has filled again. A request of more tokens than a minute's
worth goes when the bucket is full, so that it goes at all.

Life of a taking: `take` with an estimate -> refused with the seconds to wait, or taken -> `give` what was not used.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

MAX_ACCOUNTS = 65_536
"""Kept in memory; of more, those that asked least lately are forgotten, which fills their buckets."""


@dataclass(frozen=True, slots=True)
class Rates:
    requests_per_min: int | None = None
    """None: no limit."""
    tokens_per_min: int | None = None

    def __bool__(self) -> bool:
        return self.requests_per_min is not None or self.tokens_per_min is not None


class Buckets(Protocol):
    """Raises PeerLost, within a moment, when whoever keeps the buckets does not answer."""

    async def take(self, account: str, rates: Rates, tokens: int) -> float:
        """Take one request and its tokens. 0: taken. Else nothing was, and could be after so many seconds."""
        ...

    async def give(self, account: str, rates: Rates, requests: int, tokens: int) -> None:
        """Give back what was not used, or (below zero) take what was used beyond the estimate."""
        ...

    async def close(self) -> None: ...


@dataclass(slots=True)
class _Level:
    requests: float
    tokens: float
    at: float


class MemoryBuckets:
    """For one process: a router without a shared store, or one that has lost it."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._levels: OrderedDict[str, _Level] = OrderedDict()

    async def take(self, account: str, rates: Rates, tokens: int) -> float:
        level = self._filled(account, rates)
        wait_s = max(_wait_s(level.requests, 1, rates.requests_per_min),
                     _wait_s(level.tokens, tokens, rates.tokens_per_min))
        if not wait_s:
            level.requests -= 1
            level.tokens -= tokens
        return wait_s

    async def give(self, account: str, rates: Rates, requests: int, tokens: int) -> None:
        level = self._filled(account, rates)
        level.requests += requests
        level.tokens += tokens

    async def close(self) -> None:
        pass

    def _filled(self, account: str, rates: Rates) -> _Level:
        now, requests, tokens = self._now(), rates.requests_per_min or 0, rates.tokens_per_min or 0
        level = self._levels.setdefault(account, _Level(requests, tokens, now))
        self._levels.move_to_end(account)
        while len(self._levels) > MAX_ACCOUNTS:
            self._levels.popitem(last=False)
        minutes, level.at = (now - level.at) / 60, now
        level.requests = min(requests, level.requests + minutes * requests)
        level.tokens = min(tokens, level.tokens + minutes * tokens)
        return level


def _wait_s(level: float, need: int, per_min: int | None) -> float:
    return 0.0 if per_min is None else max(0.0, min(need, per_min) - level) * 60 / per_min
