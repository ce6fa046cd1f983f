"""Records of decisions: enough to make every decision again, after a trip through JSON, with any policy."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.config import PolicyName, RouterConfig
from baton.core.errors import InvalidRequest
from baton.core.layout import difference
from baton.core.worker import Role, Span, Timeline, WorkerInfo, WorkerLoad
from baton.router.choose import make_policy
from baton.router.decisions import Decider, Decision
from baton.router.dice import Dice
from baton.router.policy import Candidate, Candidates, Facts
from baton.router.recorded import decision_document, document, replay
from baton.router.trace import AttemptRecord, TraceLog, TraceRecord
from tests.router.fake_fleet import capability

POLICIES = get_args(PolicyName)

LOAD = st.builds(
    WorkerLoad,
    queued_prefill_tokens=st.integers(0, 500),
    num_running=st.integers(0, 9),
    context_tokens=st.integers(0, 4000),
    available_blocks=st.integers(0, 60),
    total_blocks=st.sampled_from([0, 60]),
)
WORKER = st.tuples(
    st.sampled_from(["p", "d"]), st.sampled_from(["f00d", "beef"]), LOAD, st.integers(0, 9), st.integers(0, 300),
    st.integers(0, 9), st.dictionaries(st.sampled_from(["p0", "p1", "d2"]), st.floats(1e6, 1e10), max_size=3),
)  # fmt: skip


def fits(one: WorkerInfo, other: WorkerInfo) -> bool:
    return difference(one.capability, other.capability) is None


def offered(drawn: list[Any]) -> Candidates:
    workers = []
    for i, (kind, model, load, held, queued, sequences, bandwidth) in enumerate(drawn):
        role = Role.PREFILL if kind == "p" else Role.DECODE
        told = capability(model_fingerprint=model, transports=(("tcp", b"\xff\x00"),))
        info = WorkerInfo(f"{kind}{i}", f"boot-{i}", role, "x:1", told)
        workers.append(Candidate(info, load, held, queued, sequences, bandwidth))
    holders = sorted((w for w in workers if w.held_blocks), key=lambda w: -w.held_blocks)
    return Candidates(
        [w for w in workers if w.info.role is Role.DECODE], [w for w in workers if w.info.role is Role.PREFILL], fits,
        holders,
    )  # fmt: skip


def told_again(decision: Decision) -> dict[str, Any]:
    found = json.loads(json.dumps(decision_document(decision)))
    assert isinstance(found, dict)
    return found


def twins(count: int) -> Candidates:
    """A fleet in which everybody is equal: only dice decide."""
    load = WorkerLoad()
    return offered([("p", "f00d", load, 0, 0, 0, {})] * count + [("d", "f00d", load, 0, 0, 0, {})] * count)


@pytest.mark.parametrize("policy", POLICIES)
@given(
    drawn=st.lists(WORKER, max_size=7), asked=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    limit=st.integers(0, 8), seed=st.integers(0, 2**64 - 1),
)  # fmt: skip
def test_a_recorded_decision_is_made_again_with_the_same_pick_and_price(
    policy: PolicyName, drawn: list[Any], asked: list[int], limit: int, seed: int
) -> None:
    config = RouterConfig(policy=policy, local_prefill_max_tokens=limit, fetch_min_tokens=4)
    dice = Dice(seed)
    decider = Decider(make_policy(config, dice), config, dice)
    candidates = offered(drawn)
    for num_tokens in asked:
        decision = decider.choose(Facts(num_tokens, turn=decider.num_decisions), candidates)
        again = replay(told_again(decision))
        assert (again.same_pick, again.same_cost) == (True, True), (decision.route, again.route)


@pytest.mark.parametrize("policy", POLICIES)
def test_ties_and_turns_come_out_again_and_do_differ(policy: PolicyName) -> None:
    config = RouterConfig(policy=policy, local_prefill_max_tokens=1)
    dice = Dice(7)
    decider = Decider(make_policy(config, dice), config, dice)
    decisions = [decider.choose(Facts(500, turn=decider.num_decisions), twins(4)) for _ in range(40)]
    picks = {(d.route.decode, d.route.prefill) for d in decisions if d.route is not None}
    assert len(picks) > 3, "one of many equals was taken every time: this proves nothing"
    assert all(replay(told_again(d)).same_pick for d in decisions)


def test_other_dice_or_another_load_are_seen_as_another_pick() -> None:
    config = RouterConfig(local_prefill_max_tokens=1)
    dice = Dice(7)
    decision = Decider(make_policy(config, dice), config, dice).choose(Facts(500), twins(4))
    told = told_again(decision)
    assert not all(replay({**told, "dice": hex(state)}).same_pick for state in range(20))
    assert decision.route is not None
    assert decision.route.prefill is not None
    for one in told["prefill"]:
        if one["info"]["worker_id"] == decision.route.prefill.worker_id:
            one["queued_prefill_tokens"] = 90_000
    assert not replay(told).same_pick


def test_a_planned_move_is_made_again_too() -> None:
    candidates, config = twins(3), RouterConfig()
    source = replace(candidates.decode[0].info, worker_id="d9", boot_id="gone")
    decision = Decider(make_policy(config, random.Random(1)), config).choose_move(Facts(40), source, candidates)
    assert decision.route is not None
    again = replay(told_again(decision))
    assert again.route == decision.route
    assert again.same_pick


def test_nobody_to_choose_is_a_decision_too() -> None:
    config = RouterConfig()
    decision = Decider(make_policy(config, random.Random(1)), config).choose(Facts(40), offered([]))
    again = replay(told_again(decision))
    assert (decision.route, again.route, again.same_pick) == (None, None, True)


@pytest.mark.parametrize("broken", [{}, {"facts": 3}, {"facts": {"num_tokens": "many"}}])
def test_what_is_no_record_is_refused(broken: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="baton explain --json"):
        replay(broken)


def record(request_id: str, *decisions: Decision) -> TraceRecord:
    routes = [d.route for d in decisions if d.route is not None]
    attempts = tuple(AttemptRecord(i, r, 0.0, 1.0, "stop") for i, r in enumerate(routes, 1))
    spans = Timeline((Span("decode", 0.0, 1.0),))
    return TraceRecord(request_id, "stop", 40, 7, 0, 5.0, 0.1, 1.0, attempts, decisions, spans)


def decided(num_workers: int) -> Decision:
    config = RouterConfig()
    return Decider(make_policy(config, random.Random(1)), config).choose(Facts(900), twins(num_workers))


def test_a_record_says_which_decision_made_which_attempt() -> None:
    first, nobody, second = decided(1), replace(decided(1), route=None), decided(2)
    told = json.loads(json.dumps(document(record("r", first, nobody, second))))
    assert [a["decision"] for a in told["attempts"]] == [0, 2]
    assert [d["route"] is None for d in told["decisions"]] == [False, True, False]
    forgotten = replace(record("r", first, second), decisions=(second,))
    assert [a["decision"] for a in document(forgotten)["attempts"]] == [None, 0]


def test_the_log_of_records_is_bounded_in_number_and_in_bytes() -> None:
    log = TraceLog(capacity=3)
    for i in range(5):
        log.add(record(f"r{i}", decided(1)))
    assert [r.request_id for r in log.recent()] == ["r4", "r3", "r2"]
    small, large = record("small", decided(1)), record("large", decided(8))
    log = TraceLog(capacity=100, capacity_bytes=large.num_bytes + small.num_bytes)
    for one in (small, large, replace(large, request_id="larger")):
        log.add(one)
    assert [r.request_id for r in log.recent()] == ["larger"]
    assert log.num_bytes == large.num_bytes
    log.add(small)
    log.add(small)
    assert log.num_bytes == large.num_bytes + small.num_bytes


def test_dice_repeat_from_their_state_and_are_fair() -> None:
    dice = Dice(3)
    [dice.random() for _ in range(10)]
    state = dice.state
    drawn = [dice.choice("abcdef") for _ in range(600)]
    assert [Dice(state).choice("abcdef")] == drawn[:1]
    again = Dice(state)
    assert [again.choice("abcdef") for _ in range(600)] == drawn
    assert min(drawn.count(letter) for letter in "abcdef") > 60
    assert all(0 <= dice.random() < 1 for _ in range(100))
    assert {dice.getrandbits(70) >> 64 for _ in range(600)} == set(range(64))
