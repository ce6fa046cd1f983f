"""Charged by estimate, settled by what was used; and a store that is away stops nobody."""

from __future__ import annotations

import asyncio
import logging

import pytest

from baton.cluster.rates import MemoryBuckets, Rates
from baton.core.config import TenantConfig
from baton.core.errors import PeerLost, RateLimited
from baton.core.metrics import Metrics
from baton.core.request import Request
from baton.router.limits import AGAIN_S, RateLimits, account_of
from tests.router.fake_fleet import now, request, simulate


class LossyBuckets:
    """Shared buckets whose keeper may be away."""

    def __init__(self) -> None:
        self.away = False
        self.asked = 0
        self.answers_in_s = 0.0
        """After it has taken them, or not."""
        self._inner = MemoryBuckets(lambda: asyncio.get_running_loop().time())

    async def take(self, account: str, rates: Rates, tokens: int) -> float:
        self.asked += 1
        if self.away:
            await asyncio.sleep(self.answers_in_s)
            raise PeerLost("away")
        wait_s = await self._inner.take(account, rates, tokens)
        await asyncio.sleep(self.answers_in_s)
        return wait_s

    async def give(self, account: str, rates: Rates, requests: int, tokens: int) -> None:
        if self.away:
            raise PeerLost("away")
        await self._inner.give(account, rates, requests, tokens)

    async def close(self) -> None:
        pass


def asks(num_tokens: int, max_tokens: int = 10) -> Request:
    return request(prompt=range(num_tokens), max_tokens=max_tokens)


def limits(**terms: int) -> tuple[RateLimits, LossyBuckets, Metrics]:
    buckets, metrics = LossyBuckets(), Metrics()
    tenants = {"*": TenantConfig.model_validate(terms), "free": TenantConfig()}
    return RateLimits(tenants, buckets, metrics), buckets, metrics


def test_an_account_without_limits_asks_nobody() -> None:
    async def main() -> None:
        limited, buckets, _ = limits(requests_per_min=1)
        assert [await limited.charge("free", asks(5)) for _ in range(3)] == [None] * 3
        assert buckets.asked == 0

    simulate(main)


def test_an_account_over_its_limit_hears_when_to_come_back_and_then_goes() -> None:
    async def main() -> None:
        limited, _, metrics = limits(tokens_per_min=60)
        assert await limited.charge("a", asks(40)) is not None
        with pytest.raises(RateLimited, match=r"a has used up its 60 tokens a minute\. Come back in 10 s") as caught:
            await limited.charge("a", asks(10))
        assert metrics.value("baton_admission_refusals_total", reason="rate") == 1
        await asyncio.sleep(caught.value.retry_after_s)
        assert await limited.charge("a", asks(10)) is not None

    simulate(main)


def test_what_was_estimated_and_not_used_is_given_back_and_a_failure_before_the_first_token_costs_nothing() -> None:
    async def main() -> None:
        limited, buckets, _ = limits(tokens_per_min=100, requests_per_min=1)
        charge = await limited.charge("a", asks(20, max_tokens=80))
        assert charge is not None
        limited.settle(charge, asks(20), num_output_tokens=5, failed=False)
        await limited.close()
        rates = Rates(tokens_per_min=100)
        assert await buckets.take("a", rates, 76) > 0
        assert await buckets.take("a", rates, 75) == 0, "25 were used"

        failing = await limited.charge("b", asks(90, max_tokens=10))
        assert failing is not None
        limited.settle(failing, asks(90), num_output_tokens=0, failed=True)
        await limited.close()
        assert await limited.charge("b", asks(90, max_tokens=10)) is not None, "the first cost nothing"

    simulate(main)


def test_what_a_client_has_read_is_paid_for_however_the_request_ended() -> None:
    async def main() -> None:
        limited, buckets, _ = limits(tokens_per_min=100, requests_per_min=1)
        charge = await limited.charge("a", asks(20, max_tokens=80))
        assert charge is not None
        limited.settle(charge, asks(20), num_output_tokens=30, failed=True)
        await limited.close()
        assert await buckets.take("a", Rates(tokens_per_min=100), 51) > 0
        assert await buckets.take("a", Rates(tokens_per_min=100), 50) == 0
        assert await buckets.take("a", Rates(requests_per_min=1), 0) > 0

    simulate(main)


@pytest.mark.parametrize("away", [False, True])
def test_a_client_that_goes_while_its_charge_is_taken_is_given_all_of_it_back(away: bool, quiet: None) -> None:
    async def main() -> None:
        limited, buckets, _ = limits(tokens_per_min=100, requests_per_min=1)
        buckets.away, buckets.answers_in_s = away, 0.05
        going = asyncio.create_task(limited.charge("a", asks(20, max_tokens=80)))
        await asyncio.sleep(0.01)
        going.cancel()
        await asyncio.wait([going])
        assert going.cancelled()
        await limited.close()
        assert await limited.charge("a", asks(20, max_tokens=80)) is not None

    simulate(main, range(3))


def test_while_one_request_finds_out_whether_the_store_is_back_the_others_do_not_wait() -> None:
    async def main() -> None:
        limited, buckets, _ = limits(requests_per_min=1000)
        buckets.away = True
        await limited.charge("a", asks(1))
        await asyncio.sleep(AGAIN_S)
        buckets.answers_in_s = 0.25
        one = asyncio.create_task(limited.charge("a", asks(1)))
        await asyncio.sleep(0.01)
        began = now()
        for _ in range(10):
            await limited.charge("a", asks(1))
        assert now() == began
        assert buckets.asked == 2
        await one

    simulate(main)


def test_outputs_are_estimated_by_what_they_were() -> None:
    async def main() -> None:
        limited, _, _ = limits(tokens_per_min=1000)
        first = await limited.charge("a", asks(10, max_tokens=500))
        assert first is not None
        assert first.tokens == 510
        limited.settle(first, asks(10), num_output_tokens=40, failed=False)
        later = await limited.charge("a", asks(10, max_tokens=500))
        assert later is not None
        assert later.tokens == 50

    simulate(main)


def test_a_store_that_is_away_is_replaced_counted_logged_once_and_asked_again_later(
    caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        limited, buckets, metrics = limits(requests_per_min=2)
        buckets.away = True
        charges = [await limited.charge("a", asks(1)) for _ in range(2)]
        assert None not in charges
        with pytest.raises(RateLimited):
            await limited.charge("a", asks(1))
        assert buckets.asked == 1, "one that does not answer is not asked by every request"
        assert metrics.value("baton_fallbacks_total", kind="own_rate_limits") == 3
        buckets.away = False
        await asyncio.sleep(AGAIN_S)
        assert await limited.charge("a", asks(1)) is not None, "what was taken here is not taken there"
        assert buckets.asked == 2

    with caplog.at_level(logging.WARNING, logger="baton"):
        simulate(main)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "rate limits are this router's own until they can be shared again", "rate limits are shared again",
    ]


def test_settling_with_a_store_that_is_away_fails_nobody(quiet: None) -> None:
    async def main() -> None:
        limited, buckets, _ = limits(requests_per_min=2)
        charge = await limited.charge("a", asks(1))
        assert charge is not None
        buckets.away = True
        limited.settle(charge, asks(1), num_output_tokens=1, failed=True)
        started = now()
        await limited.close()
        assert now() == started

    simulate(main)


def test_an_account_is_a_tenant_or_a_key_that_cannot_be_read_from_it() -> None:
    assert account_of("acme", "Bearer sk-1") == "acme"
    assert account_of("", "") == ""
    named = account_of("", "Bearer sk-secret")
    assert named.startswith("key-")
    assert "secret" not in named
    assert named == account_of("", "Bearer sk-secret") != account_of("", "Bearer sk-other")
