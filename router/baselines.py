"""Routing policies that Baton's own is compared with, behind the same Protocol, on the same facts."""

from __future__ import annotations

from baton.core.config import RouterConfig
from baton.core.layout import stored_alike
from baton.core.worker import Route
from baton.router.policy import MAX_SPARES, Candidates, Facts


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
        able = [p for p in candidates.prefill if candidates.fits(p.info, decode)]
        fitting = [p.info for p in able if stored_alike(p.info.capability, decode.capability)] or [p.info for p in able]
        if not fitting or facts.num_tokens <= self._config.local_prefill_max_tokens:
            return Route(decode.worker_id, None, reason=f"{decode.worker_id} alone: its turn")
        # One step of prefill workers per round of decode workers, so that equal pool sizes still meet in every pair.
        prefill = fitting[(turn + turn // len(candidates.decode)) % len(fitting)]
        spares = tuple(p for p in fitting if p is not prefill)[:MAX_SPARES]
        return Route(decode.worker_id, prefill, spares, reason=f"{prefill.worker_id} -> {decode.worker_id}: their turn")
