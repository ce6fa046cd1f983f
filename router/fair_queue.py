"""The order in which waiting requests go: by priority class, then each tenant by its share of tokens, then by arrival.

Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996, section 2), with tokens for packet lengths: a request's
start tag is where its tenant's previous one ends, or the queue's own time if the tenant was away; the lowest tag goes
first, and moves the queue's time there. For a tenant of weight 2 the same tokens are half as long. Who gives up
a seat owes nothing for it. An empty queue forgets everything: who did not wait owes nothing.

Knows tenants and tokens, neither workers nor seconds.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from baton.core.config import PRIORITIES, TenantConfig

EVERYBODY_ELSE = "*"
"""Names the terms of tenants that are not named."""

NOBODYS = TenantConfig()
"""Where the settings name neither the tenant nor everybody else."""

MAX_TENANTS = 16_384
"""Whose end tags are remembered; of more (clients may choose their names), those that came longest ago owe nothing."""

Order = tuple[int, float, int]
"""(class, start tag, arrival): the lowest goes first."""

Waiter = TypeVar("Waiter")


def terms_of(tenants: Mapping[str, TenantConfig], tenant: str) -> TenantConfig:
    return tenants.get(tenant) or tenants.get(EVERYBODY_ELSE) or NOBODYS


def class_of(tenants: Mapping[str, TenantConfig], tenant: str, lower: int) -> int:
    """Index in PRIORITIES: of a request that asks to go so many classes below its tenant's."""
    return min(PRIORITIES.index(terms_of(tenants, tenant).priority) + lower, len(PRIORITIES) - 1)


@dataclass(slots=True, eq=False)
class Seat(Generic[Waiter]):
    tenant: str
    waiter: Waiter
    tokens: int
    order: Order


def _order(seat: Seat[Waiter]) -> Order:
    return seat.order


@dataclass(slots=True)
class FairQueue(Generic[Waiter]):
    tenants: Mapping[str, TenantConfig]
    _seats: list[Seat[Waiter]] = field(default_factory=list)
    """In order."""
    _ends: dict[tuple[int, str], float] = field(default_factory=dict)
    """By class and tenant: the end tag of its last request. Who came last is the last."""
    _now: dict[int, float] = field(default_factory=dict)
    """By class: the start tag of the request that went last."""
    _arrivals: itertools.count[int] = field(default_factory=itertools.count)

    def __len__(self) -> int:
        return len(self._seats)

    def head(self, num: int) -> Sequence[Seat[Waiter]]:
        """Those that go next, in order."""
        return self._seats[:num]

    @property
    def tokens(self) -> int:
        return sum(seat.tokens for seat in self._seats)

    def tokens_before(self, tenant: str, lower: int = 0) -> int:
        """Of those that would go before a request that this tenant sent now."""
        priority, start = self._start(tenant, lower)
        return sum(seat.tokens for seat in self._seats if seat.order[:2] <= (priority, start))

    def enter(self, tenant: str, tokens: int, waiter: Waiter, lower: int = 0) -> Seat[Waiter]:
        """Take a seat, so many classes below the tenant's, until it is `called` or `leave` gives it up."""
        priority, start = self._start(tenant, lower)
        self._ends.pop((priority, tenant), None)
        self._ends[priority, tenant] = start + self._length(tenant, tokens)
        if len(self._ends) > MAX_TENANTS:
            del self._ends[next(iter(self._ends))]
        seat = Seat(tenant, waiter, tokens, (priority, start, next(self._arrivals)))
        bisect.insort(self._seats, seat, key=_order)
        return seat

    def called(self, seat: Seat[Waiter]) -> None:
        """Its turn has come."""
        if seat is self._seats[0]:
            priority, start, _ = seat.order
            self._now[priority] = max(start, self._now.get(priority, 0.0))
        self._remove(seat)

    def leave(self, seat: Seat[Waiter]) -> None:
        """It gives up, unless it was called: what its tenant sent after it moves up."""
        if seat not in self._seats:
            return
        self._remove(seat)
        priority, _, arrival = seat.order
        length, now = self._length(seat.tenant, seat.tokens), self._now.get(priority, 0.0)
        if (priority, seat.tenant) in self._ends:
            self._ends[priority, seat.tenant] -= length
        for other in self._seats:
            if other.tenant == seat.tenant and other.order[0] == priority and other.order[2] > arrival:
                other.order = (priority, max(now, other.order[1] - length), other.order[2])
        self._seats.sort(key=_order)

    def _remove(self, seat: Seat[Waiter]) -> None:
        self._seats.remove(seat)
        if not self._seats:
            self._ends.clear()
            self._now.clear()

    def _length(self, tenant: str, tokens: int) -> float:
        return tokens / terms_of(self.tenants, tenant).weight

    def _start(self, tenant: str, lower: int) -> tuple[int, float]:
        priority = class_of(self.tenants, tenant, lower)
        return priority, max(self._now.get(priority, 0.0), self._ends.get((priority, tenant), 0.0))
