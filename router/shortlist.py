"""Whom a policy is offered, when there are too many workers to price them all: the cheapest to begin with, and those
who hold most of the prompt.

Owns the order of the workers by what a typical prompt costs there of which they hold nothing (`standing_s`), kept up to
date as their loads change. Does not know what makes a worker able to take a prompt: it is told.

Why the choice is as good as among all: a price is a worker's standing, less what the blocks save that it holds. So of
all that hold equally much only the first by standing can be the cheapest, and one that holds less must stand better.
`_frontier` keeps just these. The gap: of more than MAX_EQUAL workers that hold equally much, and of more than
MAX_LOOKED_AT holders, the rest is only looked at as far as it is among the NEAREST; and where workers differ in speed
or bandwidth, the cheapest for one prompt may stand behind NEAREST others.

Life of a worker here: `touch` with each word of it and each dispatch to it -> placed anew when somebody is next offered
the order -> found not to be ready: out, until its next word -> `forget`.
"""

from __future__ import annotations

import bisect
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from baton.core.worker import Role
from baton.router.link import Link, WorkerState
from baton.router.policy import Candidate

NEAREST = 8
"""Of each role and kind are offered, whatever they hold."""
MAX_SCANNED = 128
"""Workers asked in their order, until NEAREST of them have room."""
MAX_LOOKED_AT, MAX_EQUAL = 64, 8
"""Holders compared for one prompt, those that hold most; and of those that hold equally much. Of a prefix that half of
the fleet holds, half of the NEAREST hold it as well."""
TYPICAL_TOKENS, TYPICAL_OUTPUT = 2048, 128
"""Of the request that workers are put in order for. For another one the order differs a little."""

Offer = Callable[[Link], Candidate | None]
"""The worker as a candidate for one prompt. None: it must not have it."""
Rung = tuple[float, int, str]
"""(standing_s, a number of its own in each router, worker_id)."""


def standing_s(worker: Candidate) -> float:
    """Seconds that a typical prompt of which nothing is held costs there (prices.py)."""
    load, model, rows = worker.load, worker.load.model, worker.num_sequences
    ready_s = worker.queue_s(model) + model.prefill_s(0, TYPICAL_TOKENS, load.chunk_tokens)
    if worker.info.role is Role.PREFILL:
        return ready_s
    slower_s = model.row_s + TYPICAL_TOKENS * model.context_s
    own_s = model.decode_step_s(rows + 1, worker.context_tokens + TYPICAL_TOKENS)
    return ready_s + TYPICAL_OUTPUT * (rows * slower_s + own_s)


class Order:
    """Workers of one role and kind, by standing. Among equals each router has an order of its own, so that several
    routers do not all begin with the same idle worker."""

    def __init__(self, standing: Callable[[Link], float], router_id: str) -> None:
        self._standing = standing
        self._router_id = router_id
        self._rungs: dict[str, Rung] = {}
        self._ladder: list[Rung] = []
        self._links: dict[str, Link] = {}
        self._touched: dict[str, Link] = {}
        self._silent: list[str] = []

    def touch(self, link: Link) -> None:
        self._touched[link.info.worker_id] = link

    def forget(self, worker_id: str) -> None:
        self._touched.pop(worker_id, None)
        self._remove(worker_id)

    def ready(self) -> Iterator[Link]:
        """First to last. Ask for no more while the order changes."""
        self._place()
        for _, _, worker_id in self._ladder:
            link = self._links[worker_id]
            if link.state is WorkerState.READY:
                yield link
            else:
                self._silent.append(worker_id)

    def _place(self) -> None:
        while self._silent:
            self._remove(self._silent.pop())
        if not self._touched:
            return
        if 8 * len(self._touched) > len(self._ladder):  # then sorting costs less than moving each
            for worker_id, link in self._touched.items():
                self._rungs[worker_id] = self._rung(link)
            self._links |= self._touched
            self._ladder = sorted(self._rungs.values())
        else:
            for worker_id, link in self._touched.items():
                self._remove(worker_id)
                self._links[worker_id] = link
                rung = self._rungs[worker_id] = self._rung(link)
                bisect.insort(self._ladder, rung)
        self._touched = {}

    def _rung(self, link: Link) -> Rung:
        own = zlib.crc32(f"{self._router_id} {link.info.boot_id}".encode())
        return self._standing(link), own, link.info.worker_id

    def _remove(self, worker_id: str) -> None:
        rung = self._rungs.pop(worker_id, None)
        if rung is not None:
            del self._ladder[bisect.bisect_left(self._ladder, rung)]
            del self._links[worker_id]


def shortlist(
    orders: Iterable[Order], holders: Iterable[Link], offer: Offer, has_room: Callable[[Candidate], bool]
) -> list[Candidate]:
    """Of one role. `holders`: of the prompt, most first."""
    chosen: dict[str, Candidate] = {}
    for order in orders:
        chosen |= {c.info.worker_id: c for c in _nearest(order, offer, has_room)}
    looked_at = [c for link in holders if (c := offer(link)) is not None and has_room(c)]
    looked_at.sort(key=standing_s)
    for blocks in (lambda c: c.held_blocks, lambda c: c.expected_blocks):
        chosen |= {c.info.worker_id: c for c in _frontier(looked_at, blocks)}
    return list(chosen.values())


def _nearest(order: Order, offer: Offer, has_room: Callable[[Candidate], bool]) -> list[Candidate]:
    """Those without room come last: their reports may be old."""
    roomy: list[Candidate] = []
    full: list[Candidate] = []
    for link in islice(order.ready(), MAX_SCANNED):
        candidate = offer(link)
        if candidate is not None:
            (roomy if has_room(candidate) else full).append(candidate)
            if len(roomy) == NEAREST:
                break
    return (roomy + full)[:NEAREST]


def _frontier(by_standing: Iterable[Candidate], blocks: Callable[[Candidate], int]) -> Iterator[Candidate]:
    """Those that no other beats: nobody who stands better holds as much."""
    most = 0
    for candidate in by_standing:
        if blocks(candidate) > most:
            most = blocks(candidate)
            yield candidate
