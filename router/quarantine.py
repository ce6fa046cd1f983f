"""Poison: requests under which workers crashed, and their like, which are not sent anywhere for a while.

A request that was aboard MAX_CRASHES crashed workers is failed instead of being given a further one; sent again with
the same prompt and sampling by the same tenant it is refused at once. Only fingerprints are kept, never prompts.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict

from baton.core.errors import RequestQuarantined
from baton.core.metrics import Metrics
from baton.core.request import Request

MAX_CRASHES = 2
CAPACITY = 1024
"""Fingerprints remembered; past it the oldest is forgotten early."""


class Quarantine:
    def __init__(self, hold_s: float, metrics: Metrics) -> None:
        self._hold_s = hold_s
        self._metrics = metrics
        self._until: OrderedDict[bytes, float] = OrderedDict()
        """By fingerprint, in order of entry."""

    def __len__(self) -> int:
        return len(self._until)

    def refuse(self, request: Request) -> None:
        """Raises RequestQuarantined if the like of it is in quarantine."""
        until = self._until.get(_fingerprint(request)) if self._until else None
        now = asyncio.get_running_loop().time()
        if until is not None and now < until:
            self._metrics.inc("baton_quarantined_requests_total", reason="fingerprint")
            raise RequestQuarantined(
                f"request {request.request_id} is refused: workers crashed under one like it. It may come again in "
                f"{until - now:.0f} s (router.quarantine_s), or with another prompt."
            )

    def enter(self, request: Request, boots: list[str]) -> RequestQuarantined:
        """It was aboard these crashes. Returns what its client hears."""
        fingerprint = _fingerprint(request)
        self._until.pop(fingerprint, None)
        self._until[fingerprint] = asyncio.get_running_loop().time() + self._hold_s
        while len(self._until) > CAPACITY:
            self._until.popitem(last=False)
        self._metrics.inc("baton_quarantined_requests_total", reason="crashes")
        return RequestQuarantined(
            f"request {request.request_id} was aboard {len(boots)} workers that crashed ({', '.join(boots)}). It is "
            f"not sent to another, and its like is refused for {self._hold_s:g} s (router.quarantine_s); their "
            "logs say why."
        )


def _fingerprint(request: Request) -> bytes:
    same = (request.tenant, request.prompt, request.sampling)
    return hashlib.sha256(repr(same).encode()).digest()
