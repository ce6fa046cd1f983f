"""Who may come in, and who goes when a worker has room: one bounded queue in front of all workers.

A request is bound to a worker when that can begin soon, not before: what waits here can still go anywhere, in a fair
order (fair_queue.py), and what waits on a worker can not. Does not know workers or prices: it is told whether the next
request could go.

Life of a request here:

1. `check_early` and `check`, before and after its prompt is read: Overloaded at once, with the time to come back, if
   the queue is full, or if by the measured rate (drain_rate.py) it would wait too long or end past its deadline
2. `turn`: it goes at once if nobody waits and a worker has room, else it takes a seat
3. `look`, whenever a worker may have got room: the first in order goes, one at a time, so that each sees what those
   before it were given. While it needs more memory than any worker has free, smaller ones behind it go first; not for
   ever: then what becomes free is left for it
4. `ended`: what it turned out to cost is learnt
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from baton.core.config import RouterConfig
from baton.core.errors import Overloaded
from baton.core.metrics import Metrics
from baton.router.drain_rate import DrainRate
from baton.router.fair_queue import FairQueue, Seat
from baton.router.run import Run
from baton.router.waiting import MAX_OVERTAKEN

MARGIN = 1.25
"""A predicted wait is taken to be so many times longer: who is let in should not be sent away later."""
PATIENCE = 2.0
"""Who was let in waits for up to so many times `max_queue_wait_s`: the rate may fall meanwhile."""
RETRY_MAX_S = 60.0
MAX_PASSED = 8
"""So many that are too large may be passed at a time: each is asked about at each look."""


class _Waiter:
    def __init__(self, run: Run) -> None:
        self.run = run
        self.granted = asyncio.get_running_loop().create_future()
        self.overtaken = 0


class Admission:
    def __init__(self, config: RouterConfig, metrics: Metrics, is_open: Callable[[Run], bool],
                 is_too_large: Callable[[Run], bool]) -> None:
        """`is_open`: could a worker take this request now, and begin soon? True if nobody will say better by
        waiting. `is_too_large`: it lacks nothing but memory."""
        self._config = config
        self._metrics = metrics
        self._is_open = is_open
        self._is_too_large = is_too_large
        self._queue: FairQueue[_Waiter] = FairQueue(config.tenants)
        self._rate = DrainRate()
        self._going: Seat[_Waiter] | None = None
        """Its turn has come, and it has not been sent yet."""

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def tokens(self) -> int:
        """Of those that wait."""
        return self._queue.tokens

    def check(self, run: Run) -> None:
        """Raises Overloaded if it had better not wait."""
        if not self._goes_at_once(run):
            request = run.request
            self._refuse(request.tenant, request.deadline_s, self._rate.service_s(request), request.priority)

    def check_early(self, tenant: str, deadline_s: float) -> None:
        """The same, as far as it is certain before the prompt was read: what is refused in any case shall cost next to
        nothing."""
        if self._queue:
            self._refuse(tenant, deadline_s, 0.0)

    async def turn(self, run: Run) -> None:
        """Wait until a worker has room. Raises DeadlineExceeded or Overloaded when that takes too long."""
        if self._goes_at_once(run):
            return
        loop = asyncio.get_running_loop()
        began = loop.time()
        until = min(run.deadline, began + PATIENCE * self._config.max_queue_wait_s)
        tokens = self._rate.tokens_of(run.request)
        seat = self._queue.enter(run.request.tenant, tokens, _Waiter(run), run.request.priority)
        self._observe()
        try:
            self.look()  # it may be smaller than those before it
            async with asyncio.timeout_at(until):
                await seat.waiter.granted
        except TimeoutError:
            if until >= run.deadline:
                raise run.late() from None
            raise self._refusal("patience", f"no worker had room for it within {until - began:g} s", tokens) from None
        finally:
            self._queue.leave(seat)
            self._observe()
            self._metrics.observe("baton_queue_seconds", loop.time() - began)
            loop.call_soon(self._gone, seat)

    def look(self) -> None:
        """Some worker may have room now."""
        self._rate.passes(asyncio.get_running_loop().time())
        seat = self._next() if self._queue and self._going is None else None
        if seat is None:
            return
        self._going = seat
        self._queue.called(seat)
        self._rate.went(seat.tokens, asyncio.get_running_loop().time())
        if not seat.waiter.granted.done():
            seat.waiter.granted.set_result(None)

    def ended(self, run: Run) -> None:
        """It has all its tokens."""
        dispatched = run.arrived + run.records[0].start_s if run.records else run.arrived
        service_s = asyncio.get_running_loop().time() - dispatched
        num_choices = len(run.request.choices)
        self._rate.ended(round(run.delivery.num_output_tokens / num_choices), service_s)

    def retry_after_s(self, tokens: float) -> float:
        """When so many tokens' worth of those that wait will have gone; whole seconds, as HTTP wants them. While nobody
        goes, no sooner than after as long again."""
        now = asyncio.get_running_loop().time()
        wait_s = max(self._rate.wait_s(round(tokens), now), self._rate.stalled_s(now))
        return min(RETRY_MAX_S, max(1.0, math.ceil(wait_s)))

    def _refuse(self, tenant: str, deadline_s: float, service_s: float, lower: int = 0) -> None:
        queued, limit_s = len(self._queue), self._config.max_queue_wait_s
        if queued >= self._config.max_queued:
            raise self._refusal("full", f"{queued} requests wait for a worker (router.max_queued)", self.tokens / 2)
        ahead = self._queue.tokens_before(tenant, lower)
        wait_s = MARGIN * self._rate.wait_s(ahead, asyncio.get_running_loop().time())
        if wait_s > limit_s:
            why = f"it would wait for about {wait_s:.1f} s (router.max_queue_wait_s)"
            raise self._refusal("wait", why, ahead * (1 - limit_s / wait_s))
        if wait_s and wait_s + service_s > deadline_s:
            why = f"it would wait for about {wait_s:.1f} s and run for {service_s:.1f} s, past its deadline of " \
                  f"{deadline_s:g} s"
            raise self._refusal("deadline", why, ahead * (1 - max(0.0, deadline_s - service_s) / wait_s))

    def _goes_at_once(self, run: Run) -> bool:
        return not self._queue and self._going is None and self._is_open(run)

    def _next(self) -> Seat[_Waiter] | None:
        """Whose turn it is; None: a worker must get room first."""
        passed: list[_Waiter] = []
        for seat in self._queue.head(MAX_PASSED):
            waiter = seat.waiter
            if self._is_open(waiter.run):
                for other in passed:
                    other.overtaken += 1
                return seat
            if waiter.overtaken >= MAX_OVERTAKEN or not self._is_too_large(waiter.run):
                return None
            passed.append(waiter)
        return None

    def _gone(self, seat: Seat[_Waiter]) -> None:
        if self._going is seat:
            self._going = None
        self.look()

    def _refusal(self, reason: str, why: str, tokens: float) -> Overloaded:
        """`tokens`: of those before it that must have gone for it to be let in."""
        self._metrics.inc("baton_admission_refusals_total", reason=reason)
        seconds = self.retry_after_s(tokens)
        return Overloaded(f"the workers have more than they can do: {why}. Come back in {seconds:g} s.",
                          retry_after_s=seconds)

    def _observe(self) -> None:
        self._metrics.set("baton_queued_requests", len(self._queue))
        self._rate.waiting(bool(self._queue), asyncio.get_running_loop().time())
