"""Rate limits per account, in requests and tokens per minute: charged by estimate, settled by what was used.

An account is a tenant, or a digest of an API key. The buckets are shared by all routers (cluster/store.py); when that
store does not answer, this router limits alone until it does: counted, logged once, and no request fails for it.

Life of a charge: `charge` takes one request and the tokens it is thought to need, or raises RateLimited -> it runs ->
`settle` gives back what it did not use; all of it if it failed before its client had a token. What was read is paid
for, however it ended, or a client would choose deadlines so short that nothing ever is. A client that goes while the
charge is taken gets all of it back.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass

from baton.cluster.rates import Buckets, MemoryBuckets, Rates
from baton.core.config import TenantConfig
from baton.core.errors import PeerLost, RateLimited
from baton.core.metrics import Metrics
from baton.core.request import Request
from baton.router.fair_queue import terms_of

LEARNT = 1 / 32
"""Weight of the newest request in the mean output."""
AGAIN_S = 1.0
"""A store that did not answer is asked again after this."""

log = logging.getLogger(__name__)


def account_of(tenant: str, authorization: str) -> str:
    """Whom it counts on; "" is everybody who does not say who he is. Keys are neither kept nor shown."""
    if tenant or not authorization:
        return tenant
    return "key-" + hashlib.sha256(authorization.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Charge:
    account: str
    rates: Rates
    tokens: int
    buckets: Buckets
    """Where they were taken from."""


class RateLimits:
    def __init__(self, tenants: Mapping[str, TenantConfig], shared: Buckets, metrics: Metrics) -> None:
        self._tenants = tenants
        self._shared = shared
        self._alone = MemoryBuckets(lambda: asyncio.get_running_loop().time())
        self._metrics = metrics
        self._mean_output: float | None = None
        self._asks_again_at: float | None = None
        """The shared store did not answer; it is asked again then."""
        self._settling: set[asyncio.Task[None]] = set()

    async def charge(self, account: str, request: Request) -> Charge | None:
        """None: it has no limits. Raises RateLimited."""
        terms = terms_of(self._tenants, account)
        rates = Rates(terms.requests_per_min, terms.tokens_per_min)
        if not rates:
            return None
        tokens = self._estimate(request)
        taking = asyncio.get_running_loop().create_task(self._take(account, rates, tokens))
        try:
            buckets, wait_s = await asyncio.shield(taking)
        except asyncio.CancelledError:
            self._later(self._give_back(taking, account, rates, tokens))
            raise
        if wait_s:
            self._metrics.inc("baton_admission_refusals_total", reason="rate")
            seconds = math.ceil(wait_s)
            raise RateLimited(
                f"{account or 'this client'} has used up its {_shown(rates)}. Come back in {seconds} s.",
                retry_after_s=seconds,
            )
        return Charge(account, rates, tokens, buckets)

    def settle(self, charge: Charge, request: Request, num_output_tokens: int, failed: bool) -> None:
        """Returns at once. `failed`: through no fault of the client's, as far as is known."""
        if failed and not num_output_tokens:
            unused, requests = charge.tokens, 1
        else:
            unused, requests = charge.tokens - len(request.prompt) - num_output_tokens, 0
        if not failed:
            mean = num_output_tokens if self._mean_output is None else self._mean_output
            self._mean_output = mean + LEARNT * (num_output_tokens - mean)
        if unused or requests:
            self._later(self._give(charge, requests, unused))

    async def close(self) -> None:
        """What is being settled is."""
        await asyncio.gather(*self._settling)

    def _estimate(self, request: Request) -> int:
        most = request.sampling.max_tokens * len(request.choices)
        return len(request.prompt) + (most if self._mean_output is None else min(most, round(self._mean_output)))

    async def _take(self, account: str, rates: Rates, tokens: int) -> tuple[Buckets, float]:
        now = asyncio.get_running_loop().time()
        if self._asks_again_at is None or now >= self._asks_again_at:
            if self._asks_again_at is not None:
                self._asks_again_at = now + AGAIN_S  # one finds out, the others do not wait for its answer
            try:
                taken = await self._shared.take(account, rates, tokens)
            except PeerLost as e:
                self._note_loss(e)
            else:
                if self._asks_again_at is not None:
                    log.warning("rate limits are shared again")
                    self._asks_again_at = None
                return self._shared, taken
        self._metrics.inc("baton_fallbacks_total", kind="own_rate_limits")
        return self._alone, await self._alone.take(account, rates, tokens)

    async def _give_back(self, taking: asyncio.Task[tuple[Buckets, float]], account: str, rates: Rates, tokens: int
                         ) -> None:
        buckets, wait_s = await taking
        if not wait_s:
            await self._give(Charge(account, rates, tokens, buckets), 1, tokens)

    def _later(self, settling: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(settling)
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)

    async def _give(self, charge: Charge, requests: int, tokens: int) -> None:
        try:
            await charge.buckets.give(charge.account, charge.rates, requests, tokens)
        except PeerLost as e:
            self._note_loss(e)  # not given back: the bucket fills again within a minute

    def _note_loss(self, error: PeerLost) -> None:
        if self._asks_again_at is None:
            log.warning("rate limits are this router's own until they can be shared again: %s", error.message)
        self._asks_again_at = asyncio.get_running_loop().time() + AGAIN_S


def _shown(rates: Rates) -> str:
    said = (("requests", rates.requests_per_min), ("tokens", rates.tokens_per_min))
    return " or ".join(f"{number} {what} a minute" for what, number in said if number is not None)
