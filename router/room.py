"""Which workers have room: the bulkhead around each of them.

A worker that is full works no faster for a longer queue of its own, and what waits there is lost to better choices. So
a decode worker gets what it can run and SLACK more, to have the next one at hand; and nobody goes while every worker
that computes prompts has `worker_queue_s` of them before it. Of both, as much as their health allows (health.py). Does
not know the queue.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from baton.core.config import Config
from baton.core.worker import Role
from baton.router.health import FLOOR, START_SHARE, Health
from baton.router.policy import Candidate, Candidates, Facts

SLACK = 2
"""Sequences beyond what runs: a step's time and a round trip pass before the place of one that ended is taken."""
FEW = 4
"""So many sequences are no burden to a worker that has just begun."""


@dataclass(frozen=True, slots=True)
class Room:
    config: Config
    health: Health

    def is_open(self, facts: Facts, candidates: Candidates) -> bool:
        """Could some worker decode it, and some worker begin its prompt soon?"""
        decode = [(d, share) for d, share in self._with_slots(candidates.decode) if d.has_room(facts)]
        if not decode:
            return False
        router = self.config.router
        computing = self._with_slots(candidates.prefill) if candidates.prefill else decode
        if any(self._queue_s(c) < share * router.worker_queue_s for c, share in computing):
            return True
        return any(d.uncached(facts.num_tokens) <= router.local_prefill_max_tokens for d, _ in decode)

    def is_too_large(self, facts: Facts, candidates: Candidates) -> bool:
        """Is memory all that it lacks? Then one that needs less could go where it cannot."""
        with_slots = self._with_slots(candidates.decode)
        return bool(with_slots) and not any(d.has_room(facts) for d, _ in with_slots)

    def has_slot(self, candidate: Candidate) -> bool:
        """May it get one more? Of a large fleet, a shortlist prefers those that may: the idlest may all be broken."""
        share = self.health.share(candidate.info, candidate.load, asyncio.get_running_loop().time())
        return share > 0 and candidate.num_sequences < self._slots(candidate, share)

    def narrowed(self, candidates: Candidates) -> Candidates:
        """Without workers that have no slot, as long as others of their role have."""
        decode, prefill = (
            [c for c, _ in self._with_slots(side)] or [c for c, _ in self._trusted(side)]
            for side in (candidates.decode, candidates.prefill)
        )
        return replace(candidates, decode=decode, prefill=prefill)

    def _with_slots(self, side: Sequence[Candidate]) -> list[tuple[Candidate, float]]:
        return [(c, share) for c, share in self._trusted(side) if c.num_sequences < self._slots(c, share)]

    def _trusted(self, side: Sequence[Candidate]) -> list[tuple[Candidate, float]]:
        """Each with its share, without those whose circuit is open; when all are, what fails is not the workers."""
        now = asyncio.get_running_loop().time()
        shares = [(c, self.health.share(c.info, c.load, now)) for c in side]
        return [(c, share) for c, share in shares if share] or [(c, START_SHARE) for c in side]

    def _slots(self, candidate: Candidate, share: float) -> float:
        """A prefill worker has a queue in seconds instead: the price knows who is worth a longer one."""
        if share < FLOOR:
            return 1
        if candidate.info.role is Role.PREFILL:
            return math.inf
        return max(FEW, math.ceil(share * self.config.decode.max_sequences)) + (SLACK if share == 1.0 else 0)

    def _queue_s(self, candidate: Candidate) -> float:
        model = candidate.load.model
        if not model.num_prefill_steps:
            model = replace(model, token_s=1 / self.config.router.assumed_prefill_tokens_per_s)
        return candidate.queue_s(model)
