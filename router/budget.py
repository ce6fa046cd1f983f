"""The retry budget: how many requests may be sent again after a loss, over all requests of a router.

Without one, a fleet that loses workers under load gets every request twice just when it can serve the fewest, and does
not recover (Envoy's retry budget, gRPC's retry throttling). A token bucket: each admitted request brings a share of a
retry, time brings some too, and a retry takes one. Who finds it empty waits for its turn, in order of arrival.
"""

from __future__ import annotations

import asyncio

from baton.core.metrics import Metrics

CAP = 64.0
"""Retries that may be saved up: a lost worker's requests go on at once."""


class RetryBudget:
    def __init__(self, per_request: float, per_s: float, metrics: Metrics) -> None:
        self._per_request = per_request
        self._per_s = per_s
        self._metrics = metrics
        self._tokens = CAP
        """Below 0: so many have been promised to those who wait."""
        self._as_of: float | None = None

    def admitted(self) -> None:
        """A request came in."""
        self._tokens = min(CAP, self._refilled() + self._per_request)

    async def take(self, until: float) -> bool:
        """Wait for a retry's turn. False: it would not come before `until` (the loop's time); nothing was taken, and
        until then was waited."""
        loop = asyncio.get_running_loop()
        wait_s = max(0.0, (1.0 - self._refilled()) / self._per_s)
        if wait_s:
            self._metrics.inc("baton_retry_waits_total")
        if loop.time() + wait_s > until:
            await asyncio.sleep(max(0.0, until - loop.time()))
            return False
        self._tokens -= 1.0
        try:
            if wait_s:
                await asyncio.sleep(wait_s)
        except asyncio.CancelledError:
            self._tokens += 1.0
            raise
        return True

    def _refilled(self) -> float:
        now = asyncio.get_running_loop().time()
        if self._as_of is not None:
            self._tokens = min(CAP, self._tokens + (now - self._as_of) * self._per_s)
        self._as_of = now
        return self._tokens
