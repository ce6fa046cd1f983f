"""Baton's prices: what the cost in seconds must get right. Each term has a test that fails without it."""

from __future__ import annotations

from collections import Counter

import pytest

from baton.core.config import RouterConfig
from baton.router.cost import price_move
from baton.router.policy import Candidate, Candidates, Facts
from tests.router.fake_fleet import BLOCK, capability
from tests.router.offers import choose, cost_policy, fits, fleet, storing, worker

# ---- the cost in seconds ---------------------------------------------------------------------------------------------


def test_a_hand_off_must_be_worth_its_calls() -> None:
    """Where both hold as much, computing 8 tokens in a decode step stalls it for 4 ms, and a hand-off costs 5."""
    def prefill_for(uncached: int, **facts: float) -> str | None:
        twins = worker("p0", held=10), worker("d0", held=10)
        route = choose(cost_policy(), Facts(10 * BLOCK + uncached, **facts), *twins)  # type: ignore[arg-type]
        assert ("handoff" in dict(route.terms)) == (route.prefill is not None)
        return route.prefill and route.prefill.worker_id

    assert (prefill_for(8), prefill_for(12)) == (None, "p0")
    assert prefill_for(12, handoff_s=0.01) is None
    assert choose(cost_policy(limit=0), 10 * BLOCK + 1, worker("p0"), worker("d0", held=10)).prefill is not None


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

    alone = cost_policy(fetch_min_tokens=10**6)
    assert choose(alone, 500, holder(300), worker("p1"), worker("d0")).prefill == holder(300).info
    assert choose(alone, 500, holder(500), worker("p1"), worker("d0")).prefill == worker("p1").info
    shared = choose(cost_policy(fetch_min_tokens=100), 500, holder(300), worker("p1"), worker("d0"))
    assert (shared.prefill, shared.holder) == (worker("p1").info, holder(300).info), "the prefix goes to who is idle"


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


def test_every_pair_of_equal_workers_has_its_turn_and_none_of_them_twice_as_often_as_it_should() -> None:
    policy, idle = cost_policy(), [*(worker(f"p{i}") for i in range(4)), *(worker(f"d{i}") for i in range(4))]
    routes = [choose(policy, 500, *idle) for _ in range(1600)]
    counts = Counter((route.prefill and route.prefill.worker_id, route.decode) for route in routes)
    assert len(counts) == 16
    assert max(counts.values()) < 200


def test_the_reason_names_the_choice_its_terms_and_the_next_best() -> None:
    reason = choose(cost_policy(), 500, worker("p0", queued=200), worker("p1"), worker("d0")).reason
    assert reason.startswith("p1 -> d0: ")
    assert "(queue 0.000, prefill 0.261, handoff 0.005, transfer 0.000, decode 0.707) for 500 tokens" in reason
    assert "next best p0 -> d0 1.075 s" in reason


# ---- spares ----------------------------------------------------------------------------------------------------------


def test_spares_are_the_next_best_of_the_chosen_decode_worker() -> None:
    queues = {"p0": 300, "p1": 0, "p2": 200, "p3": 100}
    prefills = [worker(name, queued=queued) for name, queued in queues.items()]
    far = worker("d1", sequences=40, bandwidth=dict.fromkeys(queues, 1e12))
    route = choose(cost_policy(), 500, *prefills, worker("d0"), far)
    assert (route.prefill, route.decode) == (prefills[1].info, "d0")
    assert route.spares == (prefills[3].info, prefills[2].info)


def test_a_local_route_has_no_spares() -> None:
    assert choose(cost_policy(), 30, worker("p0"), worker("p1"), worker("d0", held=15)).spares == ()


# ---- a holder of the prefix ------------------------------------------------------------------------------------------

SLOW = {"prefill_tokens_per_s": 100.0}


def test_a_prefix_that_another_holds_is_pulled_when_that_is_cheaper_than_computing_it() -> None:
    holder, computing = worker("d1", held=200, sequences=30, **SLOW), worker("p0", **SLOW)
    route = choose(cost_policy(fetch_min_tokens=100), 500, computing, worker("d0", **SLOW), holder)
    assert (route.prefill, route.decode, route.holder) == (computing.info, "d0", holder.info)
    terms = dict(route.terms)
    assert terms["prefill"] == pytest.approx(100 / 100.0), "only what the holder lacks is computed"
    assert terms["fetch"] == pytest.approx(200 * capability().layout.block_bytes / 1e9)
    assert "400 tokens pulled from d1 first" in route.reason


@pytest.mark.parametrize(
    ("fetch_min_tokens", "bytes_per_s", "fetched"), [(401, 1e9, False), (400, 1e9, True), (400, 100.0, False)]
)
def test_a_fetch_must_be_worth_it(fetch_min_tokens: int, bytes_per_s: float, fetched: bool) -> None:
    """200 blocks of 16 bytes take 32 s at 100 bytes/s; to compute them takes 4 s."""
    computing = worker("p0", bandwidth={"d1": bytes_per_s}, **SLOW)
    policy = cost_policy(fetch_min_tokens=fetch_min_tokens, limit=0)
    route = choose(policy, 500, computing, worker("d1", held=200, sequences=30, **SLOW))
    assert (route.holder is not None) == fetched


def test_the_decode_worker_may_lend_its_prefix_to_the_prefill_worker_that_computes_the_rest() -> None:
    decode = worker("d0", held=200, **SLOW)
    route = choose(cost_policy(fetch_min_tokens=100, limit=0), 1000, worker("p0", prefill_tokens_per_s=1e4), decode)
    assert route.prefill is not None
    assert route.holder == decode.info
    moved_s = 300 * capability().layout.block_bytes / 1e9
    assert dict(route.terms)["transfer"] == pytest.approx(moved_s / 2), "two chunks: one moves behind the other"


def test_a_draining_worker_still_lends_what_it_holds_and_one_that_stores_differently_does_not() -> None:
    policy, workers = cost_policy(fetch_min_tokens=100), (worker("p0", **SLOW), worker("d0", **SLOW))
    leaving, odd = worker("d1", held=200), worker("d2", "beef", held=220)
    assert choose(policy, 500, *workers, draining=(leaving,)).holder == leaving.info
    assert choose(policy, 500, *workers, draining=(leaving, odd)).holder == leaving.info
    assert choose(policy, 500, *workers, draining=(odd,)).holder is None


def test_a_local_route_may_fetch_too() -> None:
    route = choose(cost_policy(limit=200, fetch_min_tokens=100), 150, worker("d0", **SLOW), draining=(
        worker("d1", held=60),))
    assert (route.prefill, route.decode) == (None, "d0")
    assert route.holder is not None
    assert dict(route.terms)["prefill"] == pytest.approx(30 / 100.0)


def test_of_several_holders_the_cheapest_counts_not_the_one_that_holds_most() -> None:
    far, near = worker("d1", held=240), worker("d2", held=230)
    computing = worker("p0", bandwidth={"d1": 1000.0, "d2": 1e9}, **SLOW)
    policy = cost_policy(fetch_min_tokens=100, limit=0)
    route = choose(policy, 500, computing, worker("d0", **SLOW), draining=(far, near))
    assert (route.prefill, route.holder) == (computing.info, near.info)


# ---- moves -----------------------------------------------------------------------------------------------------------


def test_a_move_goes_where_the_wire_is_fast_and_few_are_in_its_way() -> None:
    source = worker("d0").info
    config = RouterConfig()

    def target(*workers: Candidate, num_choices: int = 1) -> str | None:
        route = price_move(Facts(100, num_choices), config, source, fleet(*workers))
        assert route is None or (route.prefill, route.holder, route.spares) == (None, None, ())
        assert route is None or route.cost_s == pytest.approx(sum(s for _, s in route.terms))
        return route.decode if route else None

    assert target(worker("d1", bandwidth={"d0": 1e3}), worker("d2", bandwidth={"d0": 1e9})) == "d2"
    assert target(worker("d1", sequences=3), worker("d2", sequences=2)) == "d2"
    assert target(worker("d1", held=50), worker("d2"), worker("d3")) == "d1", "its prefix need not move"
    assert target(worker("d1", "beef"), worker("p0")) is None
    assert target(worker("d1", total_blocks=100, available_blocks=51)) == "d1"
    assert target(worker("d1", total_blocks=100, available_blocks=50)) is None, "100 tokens, and one to come"
    assert target(worker("d1", total_blocks=100, available_blocks=51), num_choices=2) is None


# ---- KV in different element types -----------------------------------------------------------------------------------


def test_where_no_pair_stores_kv_alike_it_is_converted_and_the_reason_says_so() -> None:
    route = choose(cost_policy(), 40, storing("bf16", worker("p0")), storing("int8", worker("d0")))
    assert route.prefill is not None
    assert "KV is converted from bf16 to int8" in route.reason


def test_a_move_goes_where_kv_is_stored_alike_while_anybody_there_has_room() -> None:
    source = storing("int8", worker("d0")).info
    near, far = storing("bf16", worker("d1")), storing("int8", worker("d2", sequences=50, decode_step_s=1.0))
    route = price_move(Facts(40), RouterConfig(), source, fleet(near, far))
    assert route is not None
    assert route.decode == "d2"
    route = price_move(Facts(40), RouterConfig(), source, fleet(near))
    assert route is not None
    assert route.decode == "d1"


def test_a_prefix_is_not_fetched_from_a_holder_whose_kv_would_be_converted() -> None:
    config = {"fetch_min_tokens": 4, "prefill_tokens_per_s": 1.0}
    for dtype, fetched in (("int8", True), ("bf16", False)):
        holder = storing(dtype, worker("d9", held=9, sequences=50, decode_step_s=10.0))
        policy = cost_policy(fetch_min_tokens=config["fetch_min_tokens"])
        target = storing("int8", worker("d0", prefill_tokens_per_s=1.0))
        route = policy.price(Facts(9 * BLOCK + 2), Candidates([target], [], fits, [holder]))
        assert route is not None
        assert (route.holder == holder.info) == fetched
