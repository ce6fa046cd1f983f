"""Every policy: what all of them must get right."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.config import PolicyName, RouterConfig
from baton.core.worker import Route
from baton.router.choose import make_policy
from baton.router.policy import Facts, Policy
from tests.router.offers import choose, fits, fleet, storing, worker

NAMES: tuple[PolicyName, ...] = get_args(PolicyName)


def maker(name: PolicyName) -> Callable[[RouterConfig], Policy]:
    return lambda config: make_policy(config.model_copy(update={"policy": name}), random.Random(5))


POLICIES = [maker(name) for name in NAMES]

ANY_WORKER = st.tuples(
    st.sampled_from(["p", "d"]),
    st.sampled_from(["f00d", "beef"]),
    st.integers(0, 9),
    st.integers(0, 500),
    st.integers(0, 9),
    st.floats(0, 1e4),
    st.floats(0, 0.1),
)


@pytest.mark.parametrize("make", POLICIES, ids=NAMES)
@given(offered=st.lists(ANY_WORKER, max_size=6), num_tokens=st.integers(1, 60), limit=st.integers(0, 8))
def test_a_route_names_offered_workers_that_fit_and_says_why(
    make: Callable[[RouterConfig], Policy],
    offered: list[tuple[str, str, int, int, int, float, float]],
    num_tokens: int,
    limit: int,
) -> None:
    workers = [
        worker(
            f"{kind}{i}", model, held=held, queued=queued, sequences=n, prefill_tokens_per_s=rate, decode_step_s=step
        )
        for i, (kind, model, held, queued, n, rate, step) in enumerate(offered)
    ]
    candidates = fleet(*workers)
    route = make(RouterConfig(local_prefill_max_tokens=limit, fetch_min_tokens=4)).price(Facts(num_tokens), candidates)
    if not candidates.decode:
        assert route is None
        return
    assert route is not None
    decode = {c.info.worker_id: c.info for c in candidates.decode}[route.decode]
    lenders = [p for p in (route.prefill, *route.spares) if p is not None]
    assert len({p.worker_id for p in lenders}) == len(lenders) <= 3
    assert route.prefill is not None or not route.spares
    for lender in lenders:
        assert lender in [c.info for c in candidates.prefill]
        assert fits(lender, decode)
    computing = route.prefill or decode
    if route.holder is not None:
        held = {c.info.worker_id: c.held_blocks for c in (*candidates.decode, *candidates.prefill)}
        assert held[route.holder.worker_id] > held[computing.worker_id]
        assert fits(route.holder, computing)
    assert route.reason
    assert route.cost_s >= 0
    assert route.cost_s == pytest.approx(sum(s for _, s in route.terms))


@pytest.mark.parametrize("make", POLICIES, ids=NAMES)
def test_the_same_seed_and_questions_give_the_same_routes(make: Callable[[RouterConfig], Policy]) -> None:
    def routes() -> list[Route | None]:
        policy = make(RouterConfig())
        return [
            policy.price(Facts(n), fleet(*(worker(w) for w in ("p0", "p1", "d0", "d1", "d2"))))
            for n in range(1, 300, 7)
        ]

    assert routes() == routes()


@pytest.mark.parametrize("make", POLICIES, ids=NAMES)
def test_without_a_fitting_prefill_worker_decode_serves_alone(make: Callable[[RouterConfig], Policy]) -> None:
    assert choose(make(RouterConfig()), 5000, worker("p0", "beef"), worker("d0")).prefill is None


@pytest.mark.parametrize("make", POLICIES, ids=NAMES)
def test_a_long_prompt_on_an_idle_fleet_is_handed_off(make: Callable[[RouterConfig], Policy]) -> None:
    route = choose(make(RouterConfig()), 500, worker("p0"), worker("d0"))
    assert route.prefill is not None


@pytest.mark.parametrize("make", POLICIES, ids=NAMES)
def test_a_route_names_two_spares_that_fit_and_are_other_workers(make: Callable[[RouterConfig], Policy]) -> None:
    workers = [worker(f"p{i}", "beef" if i == 2 else "f00d") for i in range(5)]
    route = choose(make(RouterConfig()), 500, *workers, worker("d0"))
    assert route.prefill is not None
    names = {route.prefill.worker_id, *(s.worker_id for s in route.spares)}
    assert len(names) == 3
    assert "p2" not in names


@pytest.mark.parametrize("make", POLICIES, ids=NAMES)
def test_a_pair_that_stores_kv_alike_goes_before_any_that_converts_it(make: Callable[[RouterConfig], Policy]) -> None:
    busy, idle = storing("int8", worker("p0", queued=10**6)), storing("bf16", worker("p1"))
    policy = make(RouterConfig(local_prefill_max_tokens=0))
    for _ in range(4):
        route = choose(policy, 40, busy, idle, storing("int8", worker("d0")))
        assert route.prefill == busy.info
        assert route.spares == ()
        assert "converted" not in route.reason
