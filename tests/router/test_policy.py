"""Policies: one conformance suite for all, then what the cost in seconds must get right."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.config import RouterConfig
from baton.core.layout import difference
from baton.core.worker import Role, Route, WorkerInfo, WorkerLoad
from baton.router.policy import Candidate, Candidates, CostPolicy, Facts, Policy, RoundRobin
from tests.router.fake_fleet import BLOCK, capability

POLICIES: list[Callable[[RouterConfig], Policy]] = [lambda c: CostPolicy(c, random.Random(5)), RoundRobin]
NAMES = ["cost", "round_robin"]


def fits(prefill: WorkerInfo, decode: WorkerInfo) -> bool:
    return difference(prefill.capability, decode.capability) is None


def worker(
    worker_id: str,
    model: str = "f00d",
    *,
    held: int = 0,
    queued: int = 0,
    sequences: int = 0,
    bandwidth: dict[str, float] | None = None,
    **load: float,
) -> Candidate:
    role = Role.PREFILL if worker_id.startswith("p") else Role.DECODE
    info = WorkerInfo(worker_id, f"{worker_id}-boot", role, "x:1", capability(model_fingerprint=model))
    return Candidate(info, WorkerLoad(**load), held, queued, sequences, bandwidth or {})  # type: ignore[arg-type]


def fleet(*workers: Candidate) -> Candidates:
    return Candidates(
        [w for w in workers if w.info.role is Role.DECODE], [w for w in workers if w.info.role is Role.PREFILL], fits
    )


def cost_policy(limit: int = 4, seed: int = 5, **config: float) -> CostPolicy:
    return CostPolicy(RouterConfig(local_prefill_max_tokens=limit, **config), random.Random(seed))  # type: ignore[arg-type]


def choose(policy: Policy, num_tokens: int, *workers: Candidate) -> Route:
    route = policy.price(Facts(num_tokens), fleet(*workers))
    assert route is not None
    return route


# ---- every policy ----------------------------------------------------------------------------------------------------

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
    route = make(RouterConfig(local_prefill_max_tokens=limit)).price(Facts(num_tokens), candidates)
    if not candidates.decode:
        assert route is None
        return
    assert route is not None
    decode = {c.info.worker_id: c.info for c in candidates.decode}[route.decode]
    if route.prefill is not None:
        assert route.prefill in [c.info for c in candidates.prefill]
        assert fits(route.prefill, decode)
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


# ---- the cost in seconds ---------------------------------------------------------------------------------------------


def test_a_short_uncached_suffix_prefills_where_it_decodes() -> None:
    twins = worker("p0", held=10), worker("d0", held=10)
    assert choose(cost_policy(limit=4), 24, *twins).prefill is None
    assert choose(cost_policy(limit=3), 24, *twins).prefill is not None


def test_a_long_conversation_stays_where_its_prefix_is_rather_than_be_computed_anew() -> None:
    assert choose(cost_policy(limit=3), 60, worker("p0"), worker("d0", held=20)).prefill is None


def test_a_full_hit_is_local_even_where_local_prefill_is_off() -> None:
    assert choose(cost_policy(limit=0), 2 * BLOCK, worker("p0"), worker("d0", held=2)).prefill is None
    assert (
        choose(cost_policy(limit=0), 2 * BLOCK + 1, worker("p0", queued=10**6), worker("d0", held=2)).prefill
        is not None
    )


def test_a_busy_prefill_worker_loses_to_an_idle_one_and_to_an_idle_decode_worker() -> None:
    busy, idle = worker("p0", queued=4000), worker("p1", queued=50)
    route = choose(cost_policy(), 100, busy, idle, worker("d0"))
    assert route.prefill == idle.info
    assert choose(cost_policy(), 100, busy, worker("d0")).prefill is None


def test_local_prefill_is_dearer_the_more_sequences_it_would_stall() -> None:
    queue = worker("p0", queued=300)
    assert choose(cost_policy(), 200, queue, worker("d0", sequences=1, decode_step_s=0.001)).prefill is None
    assert choose(cost_policy(), 200, queue, worker("d0", sequences=8, decode_step_s=0.001)).prefill is not None


def test_the_prefix_decides_until_the_queue_costs_more_than_it_saves() -> None:
    def holder(queued: int) -> Candidate:
        return worker("p0", held=200, queued=queued)

    assert choose(cost_policy(), 500, holder(300), worker("p1"), worker("d0")).prefill == holder(300).info
    assert choose(cost_policy(), 500, holder(500), worker("p1"), worker("d0")).prefill == worker("p1").info


def test_blocks_that_decode_holds_are_not_priced_as_moved() -> None:
    slow = {"p0": 100.0}
    moved = dict(
        choose(
            cost_policy(),
            20,
            worker("p0", prefill_tokens_per_s=1e6),
            worker("d0", held=4, bandwidth=slow, prefill_tokens_per_s=0.1),
        ).terms
    )["transfer"]
    layout = capability().layout
    assert moved == pytest.approx((20 // BLOCK - 4) * layout.block_bytes / 100.0)


def test_a_pair_with_a_fast_wire_beats_one_with_a_slow_wire() -> None:
    slow, fast = worker("d0", bandwidth={"p0": 1e3}), worker("d1", bandwidth={"p0": 1e9})
    assert choose(cost_policy(), 200, worker("p0"), slow, fast).decode == "d1"


def test_the_less_loaded_decode_worker_wins() -> None:
    assert choose(cost_policy(), 50, worker("p0"), worker("d0", sequences=3), worker("d1", sequences=2)).decode == "d1"


def test_a_decode_worker_without_room_is_asked_only_when_nobody_has_room() -> None:
    full = worker("d0", total_blocks=100, available_blocks=3)
    roomy = worker("d1", sequences=50, total_blocks=100, available_blocks=60)
    assert choose(cost_policy(), 50, worker("p0"), full, roomy).decode == "d1"
    assert choose(cost_policy(), 50, worker("p0"), full).decode == "d0"


def test_a_worker_that_has_measured_nothing_is_priced_like_its_peers() -> None:
    """Otherwise a fresh decode worker's assumed speed would beat every prefill worker's real one."""
    route = choose(
        cost_policy(assumed_prefill_tokens_per_s=1e6), 200, worker("p0", prefill_tokens_per_s=300.0), worker("d0")
    )
    assert route.prefill is not None


def test_equal_prices_are_spread_by_the_seed() -> None:
    policy, idle = cost_policy(), [worker("p0"), *(worker(f"d{i}") for i in range(3))]
    assert {choose(policy, 50, *idle).decode for _ in range(50)} == {"d0", "d1", "d2"}


def test_the_reason_names_the_choice_its_terms_and_the_next_best() -> None:
    reason = choose(cost_policy(), 500, worker("p0", queued=200), worker("p1"), worker("d0")).reason
    assert reason.startswith("p1 -> d0: ")
    assert "queue 0.000, prefill 0.250" in reason
    assert "next best p0 -> d0 0.350 s" in reason


def test_round_robin_meets_every_pair() -> None:
    policy = RoundRobin(RouterConfig(local_prefill_max_tokens=4))
    workers = [worker(w) for w in ("p0", "p1", "d0", "d1")]
    pairs = {(r.prefill.worker_id, r.decode) for r in (choose(policy, 50, *workers) for _ in range(8)) if r.prefill}
    assert len(pairs) == 4
