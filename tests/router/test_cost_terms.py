"""The parts of a price, each where it decides: take one away, and its test sends the request elsewhere. And what
routers do wrong when one is missing: the hot spots that users of other systems report."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter

import pytest

from baton.core.step_model import StepModel
from baton.core.worker import WorkerLoad
from baton.router.policy import Candidate, Facts
from baton.router.prices import MAX_PRESSURE, PRESSURE_RISE, STEPS_OUT, Prices
from tests.router.fake_fleet import BLOCK
from tests.router.offers import choose, cost_policy, fleet, worker

FAST = StepModel(0.002, 1e-4, 1e-8, 1e-4, 1e-8, 100, 100)


def like(candidate: Candidate, model: StepModel = FAST, *, context_tokens: int = 0, age_s: float = 0.0,
         **load: int) -> Candidate:
    """That worker, with a measured model and such a load."""
    told = dataclasses.replace(candidate.load, model=model, **load)
    return dataclasses.replace(candidate, load=told, context_tokens=context_tokens, age_s=age_s)


def terms(asked: int | Facts, *workers: Candidate) -> dict[str, float]:
    return dict(choose(cost_policy(limit=0), asked, *workers).terms)


# ---- computing -------------------------------------------------------------------------------------------------------


def test_attention_to_a_long_prefix_is_work_too() -> None:
    """Both lack 512 tokens; behind 30,000 they take longer than behind none."""
    num_blocks = 30_000 // BLOCK
    late = terms(30_512, like(worker("p0", held=num_blocks)), like(worker("d0")))["prefill"]
    early = terms(512, like(worker("p0")), like(worker("d0")))["prefill"]
    assert late - early == pytest.approx(512 * 30_000 * FAST.pair_s)


def test_a_queue_of_long_prompts_is_longer_than_one_of_as_many_tokens_in_short_ones() -> None:
    short = like(worker("p0", queued=8192))
    long = dataclasses.replace(like(worker("p1", queued=8192)), queued_prefill_pairs=8192**2 // 2)
    assert choose(cost_policy(limit=0), 500, long, short, like(worker("d0"))).prefill == short.info


def test_a_report_ages_but_what_was_sent_since_does_not() -> None:
    def queue_s(reported: int, sent: int, age_s: float) -> float:
        p = like(worker("p0", queued=reported + sent), queued_prefill_tokens=reported, age_s=age_s)
        return terms(100, p, like(worker("d0")))["queue"]

    per_token_s = FAST.token_s + FAST.step_s / 512
    assert queue_s(1000, 0, 0.0) == pytest.approx(1000 * per_token_s)
    assert queue_s(1000, 0, 0.03) == pytest.approx(1000 * per_token_s - 0.03)
    assert queue_s(1000, 500, 99.0) == pytest.approx(500 * per_token_s)


def test_the_base_of_a_step_is_paid_for_each_chunk() -> None:
    whole, chunked = like(worker("p0"), chunk_tokens=512), like(worker("p1"), chunk_tokens=64)
    assert choose(cost_policy(limit=0), 512, chunked, whole, like(worker("d0"))).prefill == whole.info


def test_a_hit_is_worth_more_the_more_prompts_wait() -> None:
    """The holder's queue is longer than computing the prefix takes: idle pools take the shorter queue, and pools in
    which everything computed delays many take the hit."""
    hit_s = 400 * BLOCK * FAST.token_s

    def choice(sequences: int, behind: int = 0) -> str:
        queued = int(1.5 * hit_s / (FAST.token_s + FAST.step_s / 512))
        holder = like(worker("p0", held=400, queued=queued, sequences=sequences))
        other = like(worker("p1", sequences=sequences))
        facts = Facts(450 * BLOCK, num_behind=behind)
        route = choose(cost_policy(limit=0, fetch_min_tokens=10**6), facts, holder, other, like(worker("d0")))
        assert route.prefill is not None
        assert ("so many wait for it" in route.reason) == (sequences > 1 or behind > 2)
        return route.prefill.worker_id

    assert [choice(1), choice(2), choice(3)] == ["p1", "p0", "p0"]
    assert choice(0, behind=6) == "p0", "those that wait in the router count as well"


def test_pressure_rises_with_those_who_wait_and_is_bounded() -> None:
    def pressure(sequences: int, behind: int = 0) -> float:
        offered = fleet(worker("p0", sequences=sequences), worker("p1"), worker("d0"))
        return Prices(Facts(100, num_behind=behind), cost_policy()._config, offered).pressure

    per_worker = PRESSURE_RISE / 2
    assert [pressure(n) for n in (0, 2, 3, 100)] == [1.0, 1.0, 1.0 + per_worker, MAX_PRESSURE]
    assert pressure(2, behind=1) == 1.0 + per_worker, "those that wait in the router count as well"


def test_a_worker_slower_than_its_peers_gets_what_its_speed_is_worth() -> None:
    slow = like(worker("p0"), dataclasses.replace(FAST, token_s=4 * FAST.token_s))
    busy = like(worker("p1", queued=500))
    assert choose(cost_policy(limit=0), 400, slow, busy, like(worker("d0"))).prefill == busy.info
    assert choose(cost_policy(limit=0), 100, slow, busy, like(worker("d0"))).prefill == slow.info


def test_a_decode_worker_that_never_prefilled_is_priced_with_its_peers_speed() -> None:
    fresh = dataclasses.replace(FAST, token_s=1.0, num_prefill_steps=0)
    told = terms(400, worker("p0", "beef", prefill_tokens_per_s=200.0), like(worker("d0"), fresh))
    assert told["prefill"] == pytest.approx(FAST.step_s + 400 / 200.0)


def test_a_prompt_computed_where_others_decode_shares_its_steps_with_them() -> None:
    """Each of its chunks takes as long as their step and its own tokens, and the steps that are out come first."""
    told = terms(512, like(worker("d0", sequences=10), context_tokens=80_000, chunk_tokens=128))
    step_s = FAST.decode_step_s(10, 80_000)
    assert told["queue"] == pytest.approx(STEPS_OUT * step_s)
    own_s = FAST.prefill_s(0, 512, 512) - FAST.step_s
    assert told["prefill"] == pytest.approx(own_s + 4 * step_s)
    assert told["stall"] == pytest.approx(10 * own_s), "their steps they had anyway"


def test_what_is_coming_counts_as_held_where_it_is_computed() -> None:
    coming = dataclasses.replace(like(worker("p0", queued=200)), expected_blocks=300)
    offered = coming, like(worker("p1")), like(worker("d0"))
    assert choose(cost_policy(limit=0), 310 * BLOCK, *offered).prefill == coming.info


# ---- between the two -------------------------------------------------------------------------------------------------


def test_only_what_is_not_hidden_behind_the_chunks_of_the_transfer_counts() -> None:
    def transfer_s(bytes_per_s: float, chunk_tokens: int) -> float:
        decode = like(worker("d0", bandwidth={"p0": bytes_per_s}))
        prefill = like(worker("p0"), chunk_tokens=chunk_tokens)
        told = terms(512, prefill, decode)
        assert told["prefill"] == pytest.approx(FAST.prefill_s(0, 512, chunk_tokens))
        return told["transfer"]

    num_bytes = 512 // BLOCK * worker("d0").info.capability.layout.block_bytes
    assert transfer_s(num_bytes / 0.04, 512) == pytest.approx(0.04), "one chunk: nothing to hide behind"
    assert transfer_s(num_bytes / 0.04, 128) == pytest.approx(0.01), "all but the last quarter"
    compute_s = FAST.prefill_s(0, 512, 128)
    assert transfer_s(num_bytes / 9.0, 128) == pytest.approx(9.0 - compute_s * 3 / 4), "the wire is the slower one"


# ---- decoding --------------------------------------------------------------------------------------------------------


def test_long_contexts_make_a_decode_worker_slower_than_as_many_short_ones() -> None:
    short = like(worker("d0", sequences=4), context_tokens=2_000)
    long = like(worker("d1", sequences=4), context_tokens=200_000)
    assert choose(cost_policy(limit=0), 100, like(worker("p0")), long, short).decode == "d0"


def test_who_decodes_long_counts_the_steps_of_others_more() -> None:
    """On the faster worker run many whom a newcomer slows down, for as long as it decodes."""
    crowded = like(worker("d0", sequences=30))
    slow = like(worker("d1"), dataclasses.replace(FAST, step_s=0.0055))
    told = [terms(Facts(1000, output_tokens=n), like(worker("p0")), crowded)["interference"] for n in (10, 100)]
    assert told[1] == pytest.approx(10 * told[0])
    assert told[0] == pytest.approx(30 * 10 * (FAST.row_s + 1000 * FAST.context_s))
    facts = Facts(1000, output_tokens=100)
    assert choose(cost_policy(limit=0), facts, like(worker("p0")), crowded, slow).decode == "d1"


def test_a_high_class_minds_others_less_and_a_low_one_more() -> None:
    """Its own steps are faster where many would be slowed down."""
    crowded = like(worker("d0", sequences=12))
    slow = like(worker("d1"), dataclasses.replace(FAST, step_s=0.0045))

    def choice(priority: int) -> str:
        facts = Facts(1000, output_tokens=50, priority=priority)
        return choose(cost_policy(limit=0), facts, like(worker("p0")), crowded, slow).decode

    assert [choice(1), choice(-1)] == ["d0", "d1"]


def test_a_session_stays_where_it_was_if_nothing_else_speaks_against_it() -> None:
    twins = like(worker("p0")), like(worker("d0")), like(worker("d1"))
    assert {choose(cost_policy(seed=n), Facts(400, home="d1"), *twins).decode for n in range(8)} == {"d1"}
    assert {choose(cost_policy(seed=n), Facts(400), *twins).decode for n in range(8)} == {"d0", "d1"}
    busy = like(worker("d1", sequences=20))
    assert choose(cost_policy(), Facts(400, home="d1"), like(worker("p0")), like(worker("d0")), busy).decode == "d0"


# ---- the deadline ----------------------------------------------------------------------------------------------------


def test_a_pair_that_makes_the_deadline_goes_before_a_cheaper_one_that_does_not() -> None:
    """Many are slowed down on the fast worker, so it costs more; but only there the answer is in time."""
    crowded = like(worker("d0", sequences=60))
    slow = like(worker("d1"), dataclasses.replace(FAST, step_s=0.012))
    asked = Facts(500, output_tokens=100)

    def choice(deadline_s: float) -> str:
        facts = dataclasses.replace(asked, deadline_s=deadline_s)
        return choose(cost_policy(limit=0), facts, like(worker("p0")), crowded, slow).decode

    assert choice(60.0) == "d1"
    assert choice(1.0) == "d0"
    assert choice(0.1) == "d1", "nobody makes it: the cheapest"


# ---- alternatives ----------------------------------------------------------------------------------------------------


def test_a_route_tells_the_next_best_and_the_best_of_the_other_kind() -> None:
    prefills = [like(worker(f"p{i}", queued=100 * i)) for i in range(6)]
    route = choose(cost_policy(), 800, *prefills, like(worker("d0", sequences=9)))
    names = [name for name, _, _ in route.alternatives]
    assert names == ["p1 -> d0", "p2 -> d0", "p3 -> d0", "d0 alone"]
    for _, cost_s, told in route.alternatives:
        assert cost_s == pytest.approx(sum(seconds for _, seconds in told))
        assert cost_s >= route.cost_s


@pytest.mark.parametrize("seed", range(20))
def test_looking_at_few_pairs_finds_the_best_of_all(seed: int) -> None:
    rng = random.Random(seed)

    def drawn(name: str) -> Candidate:
        wires = {f"p{i}": 10 ** rng.uniform(3, 9) for i in range(6)}
        fingerprint = rng.choice(("f00d", "f00d", "beef"))
        return like(worker(name, fingerprint, held=rng.randrange(60), queued=rng.randrange(9000),
                           sequences=rng.randrange(20), bandwidth=wires), context_tokens=rng.randrange(9000))

    workers = [drawn(f"{role}{i}") for role in "pd" for i in range(6)]
    facts, offered = Facts(400, output_tokens=20), fleet(*workers)
    route = cost_policy().price(facts, offered)
    assert route is not None
    prices = Prices(facts, cost_policy()._config, offered)
    every = [
        sum(s for _, s in prices.terms(prices.way(p), prices.place(d)))
        for d in offered.decode for p in (*offered.prefill, d)
        if p is d or offered.fits(p.info, d.info)
    ]
    assert route.cost_s == pytest.approx(min(every))
    told = [cost_s for _, cost_s, _ in route.alternatives]
    assert told[:3] == pytest.approx(sorted(every)[1:4])


# ---- hot spots of other routers --------------------------------------------------------------------------------------


class Burst:
    """Requests that come faster than any report: each decision is counted on the workers that it names."""

    def __init__(self, *workers: Candidate, policy_seed: int = 5) -> None:
        self.workers = {w.info.worker_id: w for w in workers}
        self.policy = cost_policy(limit=0, seed=policy_seed)
        self.chosen: Counter[str] = Counter()

    def send(self, facts: Facts, count: int) -> None:
        for _ in range(count):
            route = choose(self.policy, facts, *self.workers.values())
            computing = route.prefill.worker_id if route.prefill else route.decode
            self._charge(computing, self.workers[computing].uncached(facts.num_tokens))
            if route.decode != computing:
                self._charge(route.decode, 0)
            self.chosen.update({computing, route.decode})

    def _charge(self, name: str, tokens: int) -> None:
        w = self.workers[name]
        self.workers[name] = dataclasses.replace(
            w, queued_prefill_tokens=w.queued_prefill_tokens + tokens, num_sequences=w.num_sequences + 1
        )


def test_a_burst_of_prompts_with_one_shared_first_block_does_not_go_to_one_worker() -> None:
    """Best prefix match wins, without a load term: in some traces every request shares its first block."""
    pool = [like(worker(f"p{i}", held=1 if i == 0 else 0)) for i in range(4)]
    burst = Burst(*pool, *(like(worker(f"d{i}")) for i in range(4)))
    burst.send(Facts(600), 40)
    assert all(8 <= burst.chosen[f"p{i}"] <= 13 for i in range(4)), burst.chosen
    assert all(9 <= burst.chosen[f"d{i}"] <= 11 for i in range(4)), burst.chosen


def test_a_burst_of_one_popular_prefix_spreads_once_its_holder_is_busy() -> None:
    """A threshold on the difference in load would not be reached, or drop all affinity when it is."""
    pool = [like(worker(f"p{i}", held=140 if i == 0 else 0)) for i in range(4)]
    burst = Burst(*pool, *(like(worker(f"d{i}")) for i in range(4)))
    burst.send(Facts(300), 40)
    shares = [burst.chosen[f"p{i}"] for i in range(4)]
    assert shares[0] == max(shares) > 10, "who holds it computes the least for each"
    assert min(shares) >= 2, shares


def test_no_worker_is_left_idle_by_single_turn_traffic() -> None:
    """Requests without any hit: a score that is all prefix is 0 everywhere, and the first in the list gets them all."""
    burst = Burst(*(like(worker(f"p{i}")) for i in range(3)), *(like(worker(f"d{i}")) for i in range(5)))
    burst.send(Facts(500), 30)
    assert {burst.chosen[f"p{i}"] for i in range(3)} == {10}
    assert {burst.chosen[f"d{i}"] for i in range(5)} == {6}


def test_several_routers_do_not_all_begin_with_the_same_worker() -> None:
    first = set()
    for router in range(12):
        burst = Burst(*(like(worker(f"p{i}")) for i in range(4)), like(worker("d0")), policy_seed=router)
        burst.send(Facts(500), 1)
        first |= set(burst.chosen)
    assert first == {"p0", "p1", "p2", "p3", "d0"}


def test_a_full_holder_does_not_pin_its_prefix() -> None:
    """A saturated worker that keeps being chosen for its cache loses the cache, too."""
    full = like(worker("d0", held=90, total_blocks=100, available_blocks=1))
    free = like(worker("d1", total_blocks=1000, available_blocks=1000))
    assert choose(cost_policy(), 100 * BLOCK, full, free).decode == "d1"


def test_a_load_of_nothing_but_defaults_is_still_priced() -> None:
    """A worker that has said nothing yet: no division by what it did not say."""
    assert choose(cost_policy(), 10**6, Candidate(worker("d0").info, WorkerLoad())).decode == "d0"
