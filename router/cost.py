"""Where a request goes: one price in seconds for every (prefill, decode) pair, and the cheapest wins.

Owns the prices and their terms. Does not know streams, retries or how a prefix is looked up: it is handed facts and
answers with a `Route`.

    remote = prefill queue + prompt / prefill rate + KV to move / pair bandwidth + decode interference
    local  = decode queue + prompt / decode's rate + the running sequences it stalls + decode interference
    move   = KV to move / pair bandwidth + decode interference

`prompt` is what the worker that computes lacks: of its cache, and of what it first pulls from a holder of more, if that
costs less than computing it (term `fetch`). KV to move is what the decode worker does not hold. Queues count work from
the moment it was dispatched. A pair that stores KV alike goes before every pair that must convert it, at any price.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from baton.core.config import RouterConfig
from baton.core.layout import stored_alike
from baton.core.worker import Route, WorkerInfo, WorkerLoad
from baton.router.policy import MAX_SPARES, Candidate, Candidates, Facts

ASSUMED_STEP_S = 0.02
"""A decode step priced until some worker has measured one."""
MAX_HOLDERS = 4
"""Holders looked at for one prompt, those that hold most."""

Terms = tuple[tuple[str, float], ...]
"""(name, seconds) of each part of a price."""


class _Source(NamedTuple):
    """What a worker that computes the prompt begins with."""

    uncached: int
    """Tokens left to compute."""
    fetch_s: float = 0.0
    holder: Candidate | None = None
    """Whom it pulls from first."""
    num_fetched: int = 0
    """Tokens pulled."""


class _Option(NamedTuple):
    cost_s: float
    decode: Candidate
    prefill: Candidate | None

    @property
    def name(self) -> str:
        decode = self.decode.info.worker_id
        return f"{self.prefill.info.worker_id} -> {decode}" if self.prefill else f"{decode} alone"

    @property
    def converts(self) -> bool:
        """The decode worker stores KV in another element type."""
        return self.prefill is not None and not _alike(self.prefill, self.decode)


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
        prices = _Prices.of(facts, self._config, decode, candidates)
        options = _unconverted(_options(prices, decode, candidates), candidates)
        best_s = min(o.cost_s for o in options)
        best = [o for o in options if o.cost_s <= best_s * (1 + 1e-9)]
        chosen = best[0] if len(best) == 1 else self._rng.choice(best)
        terms = prices.terms(chosen.decode, chosen.prefill)
        rest = sorted((o for o in options if o is not chosen), key=lambda o: o.cost_s)
        spares = [o.prefill.info for o in rest if chosen.prefill and o.prefill and o.decode is chosen.decode]
        source = prices.source(chosen.prefill or chosen.decode)
        return Route(
            chosen.decode.info.worker_id,
            chosen.prefill.info if chosen.prefill else None,
            tuple(spares[:MAX_SPARES]),
            source.holder.info if source.holder else None,
            sum(seconds for _, seconds in terms),
            terms,
            _reason(prices, chosen, terms, rest[0] if rest else None),
        )


@dataclass(frozen=True, slots=True)
class _Prices:
    """What one request costs where."""

    facts: Facts
    config: RouterConfig
    candidates: Candidates
    rate: float
    """Prefill tokens/s of a worker that has measured none."""
    step_s: float
    """Decode step of a worker that has measured none."""

    @classmethod
    def of(cls, facts: Facts, config: RouterConfig, decode: Sequence[Candidate], candidates: Candidates) -> _Prices:
        rates = (_rate(c) for c in (*decode, *candidates.prefill))
        steps = (d.load.model.decode_step_s(1, 0) if d.load.model.num_decode_steps else 0.0 for d in decode)
        rate, step_s = _typical(rates, config.assumed_prefill_tokens_per_s), _typical(steps, ASSUMED_STEP_S)
        return cls(facts, config, candidates, rate, step_s)

    def terms(self, decode: Candidate, prefill: Candidate | None) -> Terms:
        ahead = self.ahead(prefill or decode)
        interference = ("decode", self.interference_s(decode))
        if prefill is not None:
            return (*ahead, ("transfer", self.moved_bytes(decode) / self.bandwidth(decode, prefill)), interference)
        # Prefill here stalls every running sequence for as long. At least one is assumed: decode workers are kept
        # free for decoding, otherwise an idle fleet would never hand anything off.
        return (*ahead, ("stall", dict(ahead)["prefill"] * max(1, decode.num_sequences)), interference)

    def ahead(self, worker: Candidate) -> Terms:
        """Until the prompt is computed on that worker."""
        rate, source = self.rate_of(worker), self.source(worker)
        terms = ("queue", worker.queued_prefill_tokens / rate), ("prefill", source.uncached / rate)
        return (*terms, ("fetch", source.fetch_s)) if source.holder else terms

    def source(self, worker: Candidate) -> _Source:
        """With the cheapest of the holders that have enough more than the worker itself, or alone."""
        layout = worker.info.capability.layout
        best, best_s = _Source(alone := worker.uncached(self.facts.num_tokens)), alone / self.rate_of(worker)
        for holder in self.candidates.holders[:MAX_HOLDERS]:
            more = holder.held_blocks - worker.held_blocks
            if more <= 0 or more * layout.block_size < self.config.fetch_min_tokens:
                break
            if holder.info.worker_id == worker.info.worker_id or not self.candidates.fits(holder.info, worker.info):
                continue
            if not _alike(holder, worker):
                continue  # what is converted is not cached
            fetch_s = more * layout.block_bytes / self.bandwidth(worker, holder)
            uncached = max(1, alone - more * layout.block_size)
            if fetch_s + uncached / self.rate_of(worker) < best_s:
                best = _Source(uncached, fetch_s, holder, more * layout.block_size)
                best_s = fetch_s + uncached / self.rate_of(worker)
        return best

    def rate_of(self, worker: Candidate) -> float:
        return _rate(worker) or self.rate

    def interference_s(self, decode: Candidate) -> float:
        """A step's time for each sequence there: what joining it costs them and us."""
        return decode.num_sequences * (decode.load.model.decode_step_s(1, 0) if decode.load.model.num_decode_steps else self.step_s)

    def moved_bytes(self, decode: Candidate) -> int:
        layout = decode.info.capability.layout
        return max(0, layout.num_blocks_for(self.facts.num_tokens) - decode.held_blocks) * layout.block_bytes

    def bandwidth(self, reader: Candidate, lender: Candidate) -> float:
        return reader.bandwidth.get(lender.info.worker_id) or self.config.assumed_bandwidth_bytes_per_s

    def is_short(self, decode: Candidate) -> bool:
        uncached = self.facts.num_tokens - decode.held_blocks * decode.info.capability.layout.block_size
        return uncached <= self.config.local_prefill_max_tokens


def _options(prices: _Prices, decode: Sequence[Candidate], candidates: Candidates) -> list[_Option]:
    """Every way to serve the request. The loop over pairs is the router's hottest: sums only, terms come later."""
    ahead = [(p, sum(seconds for _, seconds in prices.ahead(p))) for p in candidates.prefill]
    options = []
    for d in decode:
        pairs = []
        if not prices.is_short(d):
            moved_bytes, interference_s = prices.moved_bytes(d), prices.interference_s(d)
            pairs = [
                _Option(before_s + moved_bytes / prices.bandwidth(d, p) + interference_s, d, p)
                for p, before_s in ahead
                if candidates.fits(p.info, d.info)
            ]
        options += pairs
        if not pairs or prices.config.local_prefill_max_tokens > 0:  # 0: not on decode workers if it can be helped
            options.append(_Option(sum(s for _, s in prices.terms(d, None)), d, None))
    return options


def _unconverted(options: list[_Option], candidates: Candidates) -> list[_Option]:
    """Without pairs whose KV would be converted, if any pair needs no conversion: whether an answer is exact shall not
    depend on who is busy."""
    dtypes = {c.info.capability.layout.dtype for c in (*candidates.decode, *candidates.prefill)}
    if len(dtypes) == 1 or all(o.converts or o.prefill is None for o in options):
        return options
    return [o for o in options if not o.converts]


def _reason(prices: _Prices, chosen: _Option, terms: Terms, next_best: _Option | None) -> str:
    priced = ", ".join(f"{name} {seconds:.3f}" for name, seconds in terms)
    words = f"{chosen.name}: {chosen.cost_s:.3f} s ({priced}) for {prices.facts.num_tokens} tokens"
    for worker in (chosen.prefill, chosen.decode):
        if worker is not None and worker.held_blocks:
            words += f", {worker.held_blocks} blocks held by {worker.info.worker_id}"
    source = prices.source(chosen.prefill or chosen.decode)
    if source.holder is not None:
        words += f"; {source.num_fetched} tokens pulled from {source.holder.info.worker_id} first"
    if chosen.prefill is not None and chosen.converts:
        lent, read = (c.info.capability.layout.dtype for c in (chosen.prefill, chosen.decode))
        words += f"; KV is converted from {lent} to {read}"
    if chosen.prefill is None and prices.is_short(chosen.decode):
        words += f"; uncached suffix within local_prefill_max_tokens {prices.config.local_prefill_max_tokens}"
    return f"{words}; next best {next_best.name} {next_best.cost_s:.3f} s" if next_best else f"{words}; no other choice"


def price_move(facts: Facts, config: RouterConfig, source: WorkerInfo, candidates: Candidates) -> Route | None:
    """Where a request that runs on `source` moves to, KV and all; None: no decode worker fits and has room. Nothing is
    computed anew, so every policy moves alike: where it lands first and is in nobody's way."""
    able = [d for d in candidates.decode if d.has_room(facts) and candidates.fits(source, d.info)]
    if not able:
        return None
    able = [d for d in able if stored_alike(source.capability, d.info.capability)] or able
    prices, lender = _Prices.of(facts, config, able, candidates), Candidate(source, WorkerLoad())
    priced = {
        d.info.worker_id: (
            ("transfer", prices.moved_bytes(d) / prices.bandwidth(d, lender)),
            ("decode", prices.interference_s(d)),
        )
        for d in able
    }
    best = min(priced, key=lambda worker_id: sum(seconds for _, seconds in priced[worker_id]))
    cost_s = sum(seconds for _, seconds in priced[best])
    reason = f"{source.worker_id} drains: moves to {best}, {cost_s:.3f} s for {facts.num_tokens} tokens"
    return Route(best, None, cost_s=cost_s, terms=priced[best], reason=reason)


def _rate(c: Candidate) -> float:
    return c.load.model.tokens_per_s(c.load.chunk_tokens) if c.load.model.num_prefill_steps else 0.0


def _alike(one: Candidate, other: Candidate) -> bool:
    return stored_alike(one.info.capability, other.info.capability)


def _typical(measured: Iterable[float], assumed: float) -> float:
    """Mean of what was measured: a worker that has not run yet is probably like its peers."""
    known = [m for m in measured if m > 0]
    return sum(known) / len(known) if known else assumed
