"""Where a request goes: one price in seconds for every (prefill, decode) pair, and the cheapest wins.

Owns the prices and their terms. Does not know streams, retries or how a prefix is looked up: it is handed facts and
answers with a `Route`.

    remote = prefill queue + uncached prompt / prefill rate + KV to move / pair bandwidth + decode interference
    local  = decode queue + uncached prompt / decode's rate + the running sequences it stalls + decode interference

KV to move is what the decode worker does not hold. Queues count work from the moment it was dispatched.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from baton.core.config import RouterConfig
from baton.core.worker import Route, WorkerInfo, WorkerLoad

ASSUMED_STEP_S = 0.02
"""A decode step priced until some worker has measured one."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a request asks of the fleet."""

    num_tokens: int
    """prompt + delivered: tokens whose KV the decode worker must have."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that could take the request now."""

    info: WorkerInfo
    load: WorkerLoad
    """As reported."""
    held_blocks: int = 0
    """Leading blocks of this request in its prefix map."""
    queued_prefill_tokens: int = 0
    """Reported, plus what was dispatched to it since."""
    num_sequences: int = 0
    """Running, waiting, and dispatched since."""
    bandwidth: Mapping[str, float] = field(default_factory=dict)
    """Measured bytes/s from each peer it has pulled from."""

    def uncached(self, num_tokens: int) -> int:
        """Tokens it would have to compute: never less than one, the last is always computed to sample from it."""
        return max(1, num_tokens - self.held_blocks * self.info.capability.layout.block_size)

    def has_room(self, num_tokens: int) -> bool:
        missing = self.info.capability.layout.num_blocks_for(num_tokens + 1) - self.held_blocks
        return self.load.total_blocks == 0 or missing <= self.load.available_blocks


@dataclass(frozen=True, slots=True)
class Candidates:
    decode: Sequence[Candidate]
    prefill: Sequence[Candidate]
    fits: Callable[[WorkerInfo, WorkerInfo], bool]
    """(prefill, decode): do they store and speak alike?"""


class Policy(Protocol):
    """Chooses among candidates; None when no decode worker is offered. Never an unfitting pair, never a wait."""

    def price(self, facts: Facts, candidates: Candidates) -> Route | None: ...


@dataclass(frozen=True, slots=True)
class _Option:
    decode: Candidate
    prefill: Candidate | None
    terms: tuple[tuple[str, float], ...]

    @property
    def name(self) -> str:
        decode = self.decode.info.worker_id
        return f"{self.prefill.info.worker_id} -> {decode}" if self.prefill else f"{decode} alone"

    @property
    def cost_s(self) -> float:
        return sum(seconds for _, seconds in self.terms)


class CostPolicy:
    """The cheapest pair in seconds; ties are broken by `rng`, so that equal routers do not all pick the first."""

    def __init__(self, config: RouterConfig, rng: random.Random) -> None:
        self._config = config
        self._rng = rng

    def price(self, facts: Facts, candidates: Candidates) -> Route | None:
        # A worker that reports too few blocks is asked only when nobody has room: its report may be old.
        decode = [d for d in candidates.decode if d.has_room(facts.num_tokens)] or list(candidates.decode)
        if not decode:
            return None
        everyone = (*decode, *candidates.prefill)
        rate = _typical((c.load.prefill_tokens_per_s for c in everyone), self._config.assumed_prefill_tokens_per_s)
        step_s = _typical((d.load.decode_step_s for d in decode), ASSUMED_STEP_S)
        ahead = [
            (p, p.queued_prefill_tokens / _rate(p, rate), p.uncached(facts.num_tokens) / _rate(p, rate))
            for p in candidates.prefill
        ]
        options = [o for d in decode for o in self._options(facts, d, ahead, candidates.fits, (rate, step_s))]
        return self._cheapest(facts, options)

    def _options(
        self,
        facts: Facts,
        decode: Candidate,
        ahead: Sequence[tuple[Candidate, float, float]],
        fits: Callable[[WorkerInfo, WorkerInfo], bool],
        typical: tuple[float, float],
    ) -> list[_Option]:
        """Every way to serve the request with this decode worker."""
        rate, step_s = typical
        layout = decode.info.capability.layout
        interference_s = decode.num_sequences * (decode.load.decode_step_s or step_s)
        pairs = []
        if not self._is_short(facts, decode):
            moved_bytes = max(0, layout.num_blocks_for(facts.num_tokens) - decode.held_blocks) * layout.block_bytes
            for p, queue_s, prefill_s in ahead:
                if fits(p.info, decode.info):
                    measured = decode.bandwidth.get(p.info.worker_id)
                    transfer_s = moved_bytes / (measured or self._config.assumed_bandwidth_bytes_per_s)
                    pairs.append(
                        _Option(
                            decode,
                            p,
                            (
                                ("queue", queue_s),
                                ("prefill", prefill_s),
                                ("transfer", transfer_s),
                                ("decode", interference_s),
                            ),
                        )
                    )
        if pairs and self._config.local_prefill_max_tokens == 0:
            return pairs  # 0 says: not on decode workers if it can be helped
        rate = _rate(decode, rate)
        prefill_s = decode.uncached(facts.num_tokens) / rate
        # Prefill here stalls every running sequence for as long. At least one is assumed: decode workers are kept
        # free for decoding, otherwise an idle fleet would never hand anything off.
        stall_s = prefill_s * max(1, decode.num_sequences)
        local = _Option(
            decode,
            None,
            (
                ("queue", decode.queued_prefill_tokens / rate),
                ("prefill", prefill_s),
                ("stall", stall_s),
                ("decode", interference_s),
            ),
        )
        return [*pairs, local]

    def _is_short(self, facts: Facts, decode: Candidate) -> bool:
        uncached = facts.num_tokens - decode.held_blocks * decode.info.capability.layout.block_size
        return uncached <= self._config.local_prefill_max_tokens

    def _cheapest(self, facts: Facts, options: list[_Option]) -> Route:
        costs = [o.cost_s for o in options]
        least = min(costs)
        best = [o for o, cost in zip(options, costs, strict=True) if cost <= least * (1 + 1e-9)]
        chosen = best[0] if len(best) == 1 else self._rng.choice(best)
        others = [(cost, o) for o, cost in zip(options, costs, strict=True) if o is not chosen]
        return Route(
            chosen.decode.info.worker_id,
            chosen.prefill.info if chosen.prefill else None,
            chosen.cost_s,
            chosen.terms,
            self._reason(facts, chosen, min(others, key=lambda c: c[0], default=None)),
        )

    def _reason(self, facts: Facts, chosen: _Option, next_best: tuple[float, _Option] | None) -> str:
        terms = ", ".join(f"{name} {seconds:.3f}" for name, seconds in chosen.terms)
        words = f"{chosen.name}: {chosen.cost_s:.3f} s ({terms}) for {facts.num_tokens} tokens"
        held = chosen.decode.held_blocks
        if held:
            words += f", {held} blocks held by {chosen.decode.info.worker_id}"
        if chosen.prefill and chosen.prefill.held_blocks:
            words += f", {chosen.prefill.held_blocks} by {chosen.prefill.info.worker_id}"
        if chosen.prefill is None and self._is_short(facts, chosen.decode):
            words += f"; uncached suffix within local_prefill_max_tokens {self._config.local_prefill_max_tokens}"
        if next_best is None:
            return f"{words}; no other choice"
        return f"{words}; next best {next_best[1].name} {next_best[0]:.3f} s"


class RoundRobin:
    """The baseline: workers in turn, blind to load and prefixes."""

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self._turn = 0

    def price(self, facts: Facts, candidates: Candidates) -> Route | None:
        if not candidates.decode:
            return None
        turn, self._turn = self._turn, self._turn + 1
        decode = candidates.decode[turn % len(candidates.decode)].info
        fitting = [p.info for p in candidates.prefill if candidates.fits(p.info, decode)]
        if not fitting or facts.num_tokens <= self._config.local_prefill_max_tokens:
            return Route(decode.worker_id, None, reason=f"{decode.worker_id} alone: its turn")
        # One step of prefill workers per round of decode workers, so that equal pool sizes still meet in every pair.
        prefill = fitting[(turn + turn // len(candidates.decode)) % len(fitting)]
        return Route(decode.worker_id, prefill, reason=f"{prefill.worker_id} -> {decode.worker_id}: their turn")


def _typical(measured: Iterable[float], assumed: float) -> float:
    """Mean of what was measured: a worker that has not run yet is probably like its peers."""
    known = [m for m in measured if m > 0]
    return sum(known) / len(known) if known else assumed


def _rate(candidate: Candidate, typical: float) -> float:
    return candidate.load.prefill_tokens_per_s or typical
