"""What each baseline's rule says. That all of them keep the Protocol is in test_policy.py."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from baton.core.config import PolicyName, RouterConfig
from baton.core.worker import Route
from baton.router.choose import make_policy
from baton.router.policy import Candidate, Facts
from tests.router.fake_fleet import BLOCK
from tests.router.offers import fleet, worker

PROMPT = 10 * BLOCK


def ask(name: PolicyName, *workers: Candidate, turn: int = 0, seed: int = 1, num_tokens: int = PROMPT) -> Route:
    policy = make_policy(RouterConfig(policy=name, local_prefill_max_tokens=4), random.Random(seed))
    route = policy.price(Facts(num_tokens, turn=turn), fleet(*workers))
    assert route is not None
    return route


def prefill_of(name: PolicyName, *workers: Candidate, seed: int = 1) -> str:
    route = ask(name, *workers, worker("d0"), seed=seed)
    assert route.prefill is not None
    return route.prefill.worker_id


@pytest.mark.parametrize(("num_prefill", "num_decode"), [(2, 2), (4, 1), (4, 2), (3, 4), (1, 3)])
def test_round_robin_meets_every_pair_equally_often(num_prefill: int, num_decode: int) -> None:
    workers = [worker(f"p{i}") for i in range(num_prefill)] + [worker(f"d{i}") for i in range(num_decode)]
    rounds = num_prefill * num_decode
    routes = [ask("round_robin", *workers, turn=turn) for turn in range(2 * rounds)]
    pairs = Counter((r.prefill.worker_id, r.decode) for r in routes if r.prefill)
    assert len(pairs) == rounds
    assert set(pairs.values()) == {2}


@pytest.mark.parametrize("name", ["round_robin", "prefix_affinity", "llm_d"])
def test_what_little_is_left_to_compute_is_computed_where_the_rest_is_held(name: PolicyName) -> None:
    prefill = worker("p0")
    assert ask(name, prefill, worker("d0", held=10), num_tokens=PROMPT + 4).prefill is None
    assert ask(name, prefill, worker("d0", held=9), num_tokens=PROMPT + 4).prefill is not None


def test_least_requests_counts_requests_and_least_work_counts_tokens() -> None:
    many, long = worker("p0", sequences=5, queued=50), worker("p1", sequences=1, queued=5000)
    assert prefill_of("least_requests", many, long) == "p1"
    assert prefill_of("least_work", many, long) == "p0"


def test_affinity_follows_the_prefix_into_any_queue() -> None:
    assert prefill_of("prefix_affinity", worker("p0", held=2, sequences=900), worker("p1", held=1)) == "p0"


def test_sglang_follows_a_long_match_and_ignores_a_short_one() -> None:
    idle = worker("p0")
    assert prefill_of("sglang", idle, worker("p1", held=4, sequences=60)) == "p1"
    assert prefill_of("sglang", idle, worker("p1", held=3, sequences=60)) == "p0"


def test_sglang_forgets_prefixes_once_the_workers_are_out_of_balance() -> None:
    holder = worker("p1", held=9, sequences=166)
    assert prefill_of("sglang", worker("p0", sequences=101), holder) == "p0"
    assert prefill_of("sglang", worker("p0", sequences=102), holder) == "p1"  # 64 more is not more than 64


def test_llm_d_weighs_the_prefix_against_the_queue_and_free_blocks() -> None:
    free = {"total_blocks": 100, "available_blocks": 100}
    full = {"total_blocks": 100, "available_blocks": 40}
    assert prefill_of("llm_d", worker("p0", held=6, sequences=9, **free), worker("p1", **free)) == "p1"
    assert prefill_of("llm_d", worker("p0", held=7, sequences=9, **free), worker("p1", **free)) == "p0"
    assert prefill_of("llm_d", worker("p0", held=3, **full), worker("p1", **free)) == "p1"
    assert prefill_of("llm_d", worker("p0", held=5, **full), worker("p1", **free)) == "p0"


def test_dynamo_adds_blocks_to_compute_and_blocks_in_use() -> None:
    used = {"total_blocks": 100, "available_blocks": 96}
    free = {"total_blocks": 100, "available_blocks": 100}
    assert prefill_of("dynamo", worker("p0", held=5, queued=2 * BLOCK, **free), worker("p1", **free)) == "p0"
    assert prefill_of("dynamo", worker("p0", held=5, queued=2 * BLOCK, **used), worker("p1", **free)) == "p1"


def test_dynamo_decodes_where_the_fewest_blocks_will_be_in_use() -> None:
    free = {"total_blocks": 100, "available_blocks": 100}
    half = {"total_blocks": 100, "available_blocks": 50}
    crowded, roomy = worker("d0", sequences=1, **half), worker("d1", sequences=9, **free)
    assert ask("dynamo", worker("p0"), crowded, roomy).decode == "d1"
    assert ask("llm_d", worker("p0"), crowded, roomy).decode == "d0"


def test_lmetric_multiplies_work_and_requests() -> None:
    assert prefill_of("lmetric", worker("p0", sequences=1), worker("p1", queued=PROMPT - 1)) == "p1"
    assert prefill_of("lmetric", worker("p0", sequences=1), worker("p1", queued=PROMPT + 1)) == "p0"


def test_ties_are_broken_by_chance_and_spares_are_the_next_best() -> None:
    equal = [worker(f"p{i}") for i in range(4)]
    assert {prefill_of("least_work", *equal, seed=seed) for seed in range(40)} == {"p0", "p1", "p2", "p3"}
    queued = [worker(f"p{i}", queued=n) for i, n in enumerate((30, 0, 20, 10))]
    route = ask("least_work", *queued, worker("d0"))
    assert route.prefill is not None
    assert [p.worker_id for p in (route.prefill, *route.spares)] == ["p1", "p3", "p2"]


def test_a_short_prompt_is_computed_where_it_decodes() -> None:
    assert ask("dynamo", worker("p0"), worker("d0"), num_tokens=4).prefill is None
