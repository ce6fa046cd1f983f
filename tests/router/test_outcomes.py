"""Predictions and what became of them."""

from __future__ import annotations

import pytest

from baton.core.metrics import Metrics
from baton.core.worker import Role, Route
from baton.router.outcomes import (
    ASSUMED_HANDOFF_S,
    ASSUMED_OUTPUT_TOKENS,
    MAX_LATE_S,
    MAX_SESSIONS,
    TRUST_AFTER,
    Outcomes,
)
from tests.router.fake_fleet import ScriptedFleet, ScriptedWorker, request, simulate
from tests.router.offers import choose, cost_policy, worker


def remote_route() -> Route:
    route = choose(cost_policy(), 400, worker("p0"), worker("d0"))
    assert route.prefill is not None
    return route


def regret_s(metrics: Metrics, kind: str = "remote") -> float:
    return metrics.value("baton_routing_regret_seconds_total", prefill=kind)


def test_what_was_predicted_and_how_far_off_it_was_is_counted_by_kind() -> None:
    metrics, route = Metrics(), remote_route()
    outcomes = Outcomes(metrics)
    outcomes.first_token(route, route.ttft_s + 0.02)
    outcomes.first_token(route, route.ttft_s - 0.01)
    assert metrics.value("baton_ttft_predictions_total", prefill="remote") == 2
    assert metrics.value("baton_ttft_predicted_seconds_total", prefill="remote") == pytest.approx(2 * route.ttft_s)
    assert metrics.value("baton_ttft_error_seconds_total", prefill="remote") == pytest.approx(0.03)
    assert metrics.value("baton_ttft_predictions_total", prefill="local") == 0


def test_a_choice_is_regretted_as_far_as_it_came_later_than_the_rejected_kind_was_dearer() -> None:
    metrics, route = Metrics(), remote_route()
    (name, cost_s, _), *_ = route.alternatives
    assert name == "d0 alone"
    margin_s = cost_s - route.cost_s
    assert margin_s > 0.1
    Outcomes(metrics).first_token(route, route.ttft_s + margin_s - 0.01)
    assert regret_s(metrics) == 0
    Outcomes(metrics).first_token(route, route.ttft_s + margin_s + 0.5)
    assert regret_s(metrics) == pytest.approx(0.5)


def test_where_there_was_no_other_kind_nothing_is_regretted() -> None:
    metrics, route = Metrics(), choose(cost_policy(), 400, worker("d0"), worker("d1"))
    Outcomes(metrics).first_token(route, 99.0)
    assert regret_s(metrics, "local") == 0
    assert metrics.value("baton_ttft_predictions_total", prefill="local") == 1


def test_outputs_are_expected_to_be_as_long_as_they_were_and_never_longer_than_allowed() -> None:
    outcomes = Outcomes(Metrics())
    assert outcomes.expected_tokens(10_000) == ASSUMED_OUTPUT_TOKENS
    outcomes.ended(600, num_choices=2)
    assert outcomes.expected_tokens(10_000) == 300
    for _ in range(500):
        outcomes.ended(20, num_choices=1)
    assert outcomes.expected_tokens(10_000) == pytest.approx(20, rel=0.01)
    assert outcomes.expected_tokens(7) == 7


def test_what_a_hand_off_takes_is_what_remote_first_tokens_are_late_and_local_ones_are_not() -> None:
    outcomes, remote = Outcomes(Metrics()), remote_route()
    local = choose(cost_policy(), 400, worker("d0"))
    without_s = remote.ttft_s - dict(remote.terms)["handoff"]
    for _ in range(TRUST_AFTER - 1):
        outcomes.first_token(remote, without_s + 0.03)
    assert outcomes.handoff_s == ASSUMED_HANDOFF_S
    outcomes.first_token(remote, without_s + 0.03)
    assert outcomes.handoff_s == pytest.approx(0.03)
    for _ in range(TRUST_AFTER):
        outcomes.first_token(local, local.ttft_s + 0.01)
    assert outcomes.handoff_s == pytest.approx(0.02), "what both wait for is not the hand-off's"


def test_queues_and_stalls_are_not_taken_for_hand_offs() -> None:
    outcomes, calm = Outcomes(Metrics()), remote_route()
    queued = choose(cost_policy(limit=0), 400, worker("p0", queued=500), worker("d0"))
    for _ in range(2 * TRUST_AFTER):
        outcomes.first_token(queued, queued.ttft_s + 5.0)
    assert outcomes.handoff_s == ASSUMED_HANDOFF_S
    for _ in range(TRUST_AFTER):
        outcomes.first_token(calm, calm.ttft_s + 60.0)
    assert outcomes.handoff_s <= MAX_LATE_S
    for _ in range(3 * TRUST_AFTER):
        outcomes.first_token(calm, 0.0)
    assert outcomes.handoff_s == 0.0


def test_a_session_is_known_by_tenant_and_the_quietest_is_forgotten() -> None:
    outcomes = Outcomes(Metrics())
    mine, theirs = request("a", tenant="me", session="s"), request("b", tenant="you", session="s")
    outcomes.decodes(mine, "d0")
    outcomes.decodes(request("c"), "d1")
    assert (outcomes.home(mine), outcomes.home(theirs), outcomes.home(request("d"))) == ("d0", "", "")
    for number in range(MAX_SESSIONS):
        outcomes.decodes(request("e", tenant="you", session=str(number)), "d2")
    assert (outcomes.home(mine), outcomes.home(request("e", tenant="you", session="7"))) == ("", "d2")


def test_the_turns_of_a_session_are_decoded_on_one_worker() -> None:
    async def main() -> None:
        decodes = [ScriptedWorker(f"d{i}") for i in range(4)]
        async with ScriptedFleet(*decodes) as fleet:
            for number in range(6):
                await fleet.answer(request(f"r{number}", range(number, number + 20), session="talk"))
            assert sorted(len(d.submits) for d in decodes) == [0, 0, 0, 6]

    simulate(main)


def test_the_dispatcher_counts_first_tokens_and_tells_the_policy_what_it_learnt() -> None:
    async def main() -> None:
        async with ScriptedFleet(ScriptedWorker("d0"), ScriptedWorker("p0", Role.PREFILL)) as fleet:
            for number in range(3):
                await fleet.answer(request(f"r{number}", range(20), max_tokens=6, deadline_s=40.0))
            assert fleet.metrics.value("baton_ttft_predictions_total") == 3
            facts = fleet.dispatcher.traces.recent(1)[0].decisions[0].facts
            assert (facts.output_tokens, facts.priority, facts.num_behind) == (6.0, 0, 0)
            assert facts.deadline_s == pytest.approx(40.0)

    simulate(main)
