"""Where a request goes: one price in seconds for every (prefill, decode) pair, and the cheapest wins.

Owns the choice. Does not know what a price is made of (prices.py), streams, retries or how a prefix is looked up: it is
handed facts and candidates and answers with a `Route`.

    remote = queue + prefill + fetch + handoff + pressure,  on the prefill worker
           + transfer                                       between the two
           + interference + decode + away                   on the decode worker
    local  = queue + prefill + fetch + stall + interference + decode + away
    move   = transfer + interference + decode

Whether a prompt is handed off is decided by these prices alone, but for `local_prefill_max_tokens` 0: then decode
workers compute nothing that somebody else could. A pair that stores KV alike goes before every pair that must convert
it, at any price; then one that makes the deadline before any that is predicted to miss it.

Only the transfer depends on both workers, and it is never negative. So with both sides in order of their own part,
pairs are looked at from the cheapest sum on, until a sum alone is no better than what was found: a few, not all.
"""

from __future__ import annotations

import bisect
import heapq
import math
import random
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, TypeVar

from baton.core.config import RouterConfig
from baton.core.layout import stored_alike
from baton.core.worker import Route, WorkerInfo, WorkerLoad
from baton.router.policy import MAX_SPARES, Candidate, Candidates, Facts
from baton.router.prices import Place, Prices, Terms, Way, alike

MAX_ALTERNATIVES = 3
"""Told with a route, and the best of the other kind if it is not among them."""

T = TypeVar("T")


class _Option(NamedTuple):
    cost_s: float
    way: Way
    place: Place

    @property
    def is_local(self) -> bool:
        return self.way.worker is self.place.worker

    @property
    def name(self) -> str:
        decode = self.place.worker.info.worker_id
        return f"{decode} alone" if self.is_local else f"{self.way.worker.info.worker_id} -> {decode}"


class CostPolicy:
    """The cheapest pair in seconds; ties are broken by `rng`, so that equal routers do not all pick the first."""

    compares_all: ClassVar = False

    def __init__(self, config: RouterConfig, rng: random.Random) -> None:
        self._config = config
        self._rng = rng

    def price(self, facts: Facts, candidates: Candidates) -> Route | None:
        # A worker that reports too few blocks is asked only when nobody has room: its report may be old.
        decode = [d for d in candidates.decode if d.has_room(facts)] or list(candidates.decode)
        if not decode:
            return None
        search = _Search(Prices(facts, self._config, candidates), decode, self._rng)
        found = search.cheapest()
        chosen, others = found[0], found[1:]
        prices, way = search.prices, chosen.way
        terms = prices.terms(way, chosen.place)
        alternatives = tuple((o.name, o.cost_s, prices.terms(o.way, o.place)) for o in others)
        return Route(
            chosen.place.worker.info.worker_id,
            None if chosen.is_local else way.worker.info,
            () if chosen.is_local else search.spares(chosen),
            way.holder.info if way.holder else None,
            sum(seconds for _, seconds in terms),
            terms,
            _reason(prices, chosen, terms, others[0] if others else None),
            alternatives,
        )


class _Search:
    """The cheapest options for one request."""

    def __init__(self, prices: Prices, decode: Sequence[Candidate], rng: random.Random) -> None:
        self.prices = prices
        self._ways = _in_order([(prices.ahead_s(w), w) for w in map(prices.way, prices.candidates.prefill)], rng)
        self._places = _in_order([(place.after_s, place) for place in map(prices.place, decode)], rng)
        self._converts = not self._is_uniform() and not any(
            self._fits(way, place) and alike(way.worker, place.worker)
            for _, place in self._places for _, way in self._ways
        )
        """There is no pair that stores KV alike. Else whether an answer is exact must not depend on who is busy."""

    def cheapest(self) -> list[_Option]:
        """At least one, the best first; the best remote and the best local one are among them, if there are any."""
        deadline_s = self.prices.facts.deadline_s
        locals_ = [self._local(place) for _, place in self._places if self._may_be_local(place)]
        remote = self._remote(deadline_s)
        local = [o for o in locals_ if self._is_in_time(o, deadline_s)]
        if not remote and not local:
            remote, local = self._remote(math.inf), locals_
        local.sort(key=_cost_s)
        found = sorted(remote + local, key=_cost_s)[: 1 + MAX_ALTERNATIVES]
        return found + [side[0] for side in (remote, local) if side and side[0] not in found]

    def spares(self, chosen: _Option) -> tuple[WorkerInfo, ...]:
        """The next best prefill workers for the same decode worker."""
        others = (self._pair(ahead_s, way, chosen.place) for ahead_s, way in self._ways if way is not chosen.way)
        able = [o for o in others if self._may_pair(o.way, o.place)]
        return tuple(o.way.worker.info for o in heapq.nsmallest(MAX_SPARES, able, key=_cost_s))

    def _remote(self, deadline_s: float) -> list[_Option]:
        """The best few that are in time. The loop over pairs is the router's hottest."""
        found: list[_Option] = []
        bound_s = math.inf
        for after_s, place in self._places:
            if not self._ways or after_s + self._ways[0][0] >= bound_s:
                break
            if self._is_held(place):
                continue
            for ahead_s, way in self._ways:
                if after_s + ahead_s >= bound_s:
                    break
                option = self._pair(ahead_s, way, place)
                if option.cost_s >= bound_s or not self._may_pair(way, place):
                    continue
                if not self._is_in_time(option, deadline_s):
                    continue
                bisect.insort(found, option, key=_cost_s)
                if len(found) > MAX_ALTERNATIVES:
                    del found[1 + MAX_ALTERNATIVES :]
                    bound_s = found[-1].cost_s
        return found

    def _pair(self, ahead_s: float, way: Way, place: Place) -> _Option:
        return _Option(ahead_s + place.after_s + self.prices.transfer_s(way, place), way, place)

    def _local(self, place: Place) -> _Option:
        way = self.prices.way(place.worker)
        return _Option(way.ready_s + self.prices.stall_s(way) + place.after_s, way, place)

    def _may_be_local(self, place: Place) -> bool:
        if self.prices.config.local_prefill_max_tokens or self._is_held(place):
            return True
        return not any(self._fits(way, place) for _, way in self._ways)

    def _is_held(self, place: Place) -> bool:
        """All of it: there is nothing to hand off."""
        held = place.worker.held_blocks * place.worker.info.capability.layout.block_size
        return held >= self.prices.facts.num_tokens

    def _is_in_time(self, option: _Option, deadline_s: float) -> bool:
        """Is its last token predicted by then? What it costs others takes it no time."""
        way, place = option.way, option.place
        if option.cost_s <= deadline_s:
            return True
        between_s = 0.0
        if not option.is_local:
            between_s = self.prices.facts.handoff_s + self.prices.transfer_s(way, place)
        return way.ready_s + between_s + place.decode_s <= deadline_s

    def _fits(self, way: Way, place: Place) -> bool:
        return self.prices.candidates.fits(way.worker.info, place.worker.info)

    def _may_pair(self, way: Way, place: Place) -> bool:
        return self._fits(way, place) and (self._converts or alike(way.worker, place.worker))

    def _is_uniform(self) -> bool:
        workers = (*(way.worker for _, way in self._ways), *(place.worker for _, place in self._places))
        return len({w.info.capability.layout.dtype for w in workers}) == 1


def _in_order(priced: list[tuple[float, T]], rng: random.Random) -> list[tuple[float, T]]:
    """Cheapest first. Equals begin at any of them, so that equal routers do not all pick the first."""
    turn = rng.getrandbits(32) % len(priced) if priced else 0
    return sorted(priced[turn:] + priced[:turn], key=_first)


def _first(priced: tuple[float, object]) -> float:
    return priced[0]


def _cost_s(option: _Option) -> float:
    return option.cost_s


def _reason(prices: Prices, chosen: _Option, terms: Terms, next_best: _Option | None) -> str:
    priced = ", ".join(f"{name} {seconds:.3f}" for name, seconds in terms)
    words = f"{chosen.name}: {chosen.cost_s:.3f} s ({priced}) for {prices.facts.num_tokens} tokens"
    way, decode = chosen.way, chosen.place.worker
    for worker in (decode,) if chosen.is_local else (way.worker, decode):
        if worker.held_blocks:
            words += f", {worker.held_blocks} blocks held by {worker.info.worker_id}"
    if way.holder is not None:
        words += f"; {way.num_fetched} tokens pulled from {way.holder.info.worker_id} first"
    if not chosen.is_local and prices.pressure > 1.0:
        words += f"; computing counts {prices.pressure:.1f} times, so many wait for it"
    if not chosen.is_local and not alike(way.worker, decode):
        lent, read = (c.info.capability.layout.dtype for c in (way.worker, decode))
        words += f"; KV is converted from {lent} to {read}"
    return f"{words}; next best {next_best.name} {next_best.cost_s:.3f} s" if next_best else f"{words}; no other choice"


def price_move(facts: Facts, config: RouterConfig, source: WorkerInfo, candidates: Candidates) -> Route | None:
    """Where a request that runs on `source` moves to, KV and all; None: no decode worker fits and has room. Nothing is
    computed anew, so every policy moves alike: where it lands first and is in nobody's way."""
    able = [d for d in candidates.decode if d.has_room(facts) and candidates.fits(source, d.info)]
    if not able:
        return None
    able = [d for d in able if stored_alike(source.capability, d.info.capability)] or able
    prices, lender = Prices(facts, config, candidates), Candidate(source, WorkerLoad())
    priced: dict[str, Terms] = {}
    for place in map(prices.place, able):
        moved_s = place.missing_bytes / prices.bandwidth(place.worker, lender)
        terms = ("transfer", moved_s), ("interference", place.interference_s), ("decode", place.decode_s)
        priced[place.worker.info.worker_id] = terms
    best = min(priced, key=lambda worker_id: sum(seconds for _, seconds in priced[worker_id]))
    cost_s = sum(seconds for _, seconds in priced[best])
    reason = f"{source.worker_id} drains: moves to {best}, {cost_s:.3f} s for {facts.num_tokens} tokens"
    return Route(best, None, cost_s=cost_s, terms=priced[best], reason=reason)
