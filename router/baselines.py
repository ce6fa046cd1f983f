"""Routing policies that Baton's own is compared with, behind the same Protocol, on the same facts.

Each is the published rule of another system, or a textbook's: it says how good a prefill worker is for a prompt. What
the rules do not speak of is the same for all: who fits whom, a prompt that is short enough goes to decode alone, and
the decode worker is the one with the fewest sequences, unless the rule knows better.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from baton.core.config import RouterConfig
from baton.core.layout import stored_alike
from baton.core.worker import Route, WorkerInfo
from baton.router.policy import MAX_SPARES, Candidate, Candidates, Facts

Rank = tuple[float, ...]
"""The smallest is chosen; among equal ones, chance."""
Rule = Callable[[Facts, Sequence[Candidate]], list[Rank]]
"""A rank for each of these workers, for one prompt."""

SGLANG_ABS_THRESHOLD, SGLANG_REL_THRESHOLD, SGLANG_MATCH = 64, 1.5, 0.3
"""Its cache_aware policy's defaults: when prefixes no longer count, and how much of one is worth following."""
LLM_D_PREFIX, LLM_D_QUEUE, LLM_D_KV = 3.0, 2.0, 2.0
"""Weights of its scorers in the default profile."""


class RoundRobin:
    """Workers in turn, blind to load and prefixes."""

    compares_all: ClassVar = True

    def __init__(self, config: RouterConfig) -> None:
        self._config = config

    def price(self, facts: Facts, candidates: Candidates) -> Route | None:
        if not candidates.decode:
            return None
        turn = facts.turn
        its_turn = candidates.decode[turn % len(candidates.decode)]
        decode = its_turn.info
        fitting = [p.info for p in _fitting(decode, candidates)]
        if not fitting or its_turn.uncached(facts.num_tokens) <= self._config.local_prefill_max_tokens:
            return Route(decode.worker_id, None, reason=f"{decode.worker_id} alone: its turn")
        # Pools whose sizes have a divisor in common would meet in some pairs only: a step aside after each round.
        sizes = len(fitting), len(candidates.decode)
        prefill = fitting[(turn + turn // math.lcm(*sizes) % math.gcd(*sizes)) % len(fitting)]
        spares = tuple(p for p in fitting if p is not prefill)[:MAX_SPARES]
        return Route(decode.worker_id, prefill, spares, reason=f"{prefill.worker_id} -> {decode.worker_id}: their turn")


@dataclass(frozen=True, slots=True)
class Ranked:
    """The best worker of each role by a rule; the next best prefill workers are the spares."""

    compares_all: ClassVar = True
    name: str
    config: RouterConfig
    rng: random.Random
    prefill_rule: Rule
    decode_rule: Rule

    def price(self, facts: Facts, candidates: Candidates) -> Route | None:
        roomy = [d for d in candidates.decode if d.has_room(facts)] or list(candidates.decode)
        if not roomy:
            return None
        (decode, _), *_ = self._best_first(self.decode_rule(facts, roomy), roomy)
        decode_id, able = decode.info.worker_id, _fitting(decode.info, candidates)
        if not able or decode.uncached(facts.num_tokens) <= self.config.local_prefill_max_tokens:
            return Route(decode_id, None, reason=f"{decode_id} alone: nobody fits, or little is left to compute")
        order = self._best_first(self.prefill_rule(facts, able), able)
        prefill, *spares = (p.info for p, _ in order)
        ranks = ", ".join(f"{p.info.worker_id} {' '.join(f'{r:g}' for r in rank)}" for p, rank in order)
        reason = f"{prefill.worker_id} -> {decode_id}: lowest by {self.name} ({ranks})"
        return Route(decode_id, prefill, tuple(spares[:MAX_SPARES]), reason=reason)

    def _best_first(self, ranks: list[Rank], workers: Sequence[Candidate]) -> list[tuple[Candidate, Rank]]:
        drawn = [(rank, self.rng.random(), i) for i, rank in enumerate(ranks)]
        return [(workers[i], rank) for rank, _, i in sorted(drawn)]


def _fitting(decode: WorkerInfo, candidates: Candidates) -> list[Candidate]:
    """Who may lend to it: those that store KV alike, if there are any."""
    able = [p for p in candidates.prefill if candidates.fits(p.info, decode)]
    return [p for p in able if stored_alike(p.info.capability, decode.capability)] or able


# ---- rules -------------------------------------------------------------------------------------------------------


def least_requests(facts: Facts, workers: Sequence[Candidate]) -> list[Rank]:
    return [(w.num_sequences,) for w in workers]


def least_work(facts: Facts, workers: Sequence[Candidate]) -> list[Rank]:
    """Prompt tokens that wait or are computed."""
    return [(w.queued_prefill_tokens,) for w in workers]


def prefix_affinity(facts: Facts, workers: Sequence[Candidate]) -> list[Rank]:
    """Who holds most, whatever its load; that only decides between equals."""
    return [(-w.held_blocks, w.num_sequences) for w in workers]


def sglang(facts: Facts, workers: Sequence[Candidate]) -> list[Rank]:
    """SGLang's cache_aware: the longest match, unless it is short or the workers are far out of balance; then the first
    of those with the fewest requests."""
    counts = [w.num_sequences for w in workers]
    most, fewest = max(counts), min(counts)
    unbalanced = most - fewest > SGLANG_ABS_THRESHOLD and most > SGLANG_REL_THRESHOLD * fewest
    if not unbalanced and max(_matched(facts, w) for w in workers) > SGLANG_MATCH:
        return [(-w.held_blocks,) for w in workers]
    return [(count, place) for place, count in enumerate(counts)]


def llm_d(facts: Facts, workers: Sequence[Candidate]) -> list[Rank]:
    """llm-d's scorers, each in [0, 1]: share of the prompt held, queue between the longest and the shortest, free KV
    blocks. Their weighted sum, highest first."""
    counts = [w.num_sequences for w in workers]
    most, spread = max(counts), max(counts) - min(counts)
    return [
        (-(LLM_D_PREFIX * _matched(facts, w) + LLM_D_QUEUE * ((most - n) / spread if spread else 1.0)
           + LLM_D_KV * (1.0 - _used(w))),)
        for w, n in zip(workers, counts, strict=True)
    ]


def dynamo(facts: Facts, workers: Sequence[Candidate]) -> list[Rank]:
    """Dynamo's KV router: prompt tokens to compute there, this prompt's included, and blocks in use, all in blocks."""
    return [
        ((w.queued_prefill_tokens + w.uncached(facts.num_tokens)) / _size(w) + _used(w) * w.load.total_blocks,)
        for w in workers
    ]


def dynamo_decode(facts: Facts, workers: Sequence[Candidate]) -> list[Rank]:
    """Dynamo's, where nothing is computed: blocks in use once the prompt is there."""
    return [
        (_used(w) * w.load.total_blocks + max(0, w.info.capability.layout.num_blocks_for(facts.num_tokens)
                                               - w.held_blocks),)
        for w in workers
    ]


def lmetric(facts: Facts, workers: Sequence[Candidate]) -> list[Rank]:
    """Dynamo's option: tokens to compute there, times requests there."""
    return [((w.queued_prefill_tokens + w.uncached(facts.num_tokens)) * (w.num_sequences + 1),) for w in workers]


RULES: Mapping[str, tuple[Rule, Rule]] = {
    "least_requests": (least_requests, least_requests),
    "least_work": (least_work, least_requests),
    "prefix_affinity": (prefix_affinity, least_requests),
    "sglang": (sglang, least_requests),
    "llm_d": (llm_d, least_requests),
    "dynamo": (dynamo, dynamo_decode),
    "lmetric": (lmetric, least_requests),
}
"""(rule for prefill workers, rule for decode workers) by the policy's name."""


def _matched(facts: Facts, worker: Candidate) -> float:
    """Share of the prompt that it holds."""
    return min(1.0, worker.held_blocks * _size(worker) / facts.num_tokens)


def _used(worker: Candidate) -> float:
    """Share of its blocks that somebody holds."""
    load = worker.load
    return 1.0 - load.available_blocks / load.total_blocks if load.total_blocks else 0.0


def _size(worker: Candidate) -> int:
    return worker.info.capability.layout.block_size
