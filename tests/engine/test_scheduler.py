"""The scheduler's rules, one by one. What they are for, under everything at once: test_scheduler_world.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from baton.core.block_hash import BlockHash
from baton.core.errors import Overloaded
from baton.core.request import FinishReason, SampledToken, SamplingParams
from baton.core.step import StepResult
from baton.engine.block_pool import BlockPool
from baton.engine.scheduler import Scheduler, SchedulerLimits
from tests.engine.builders import BLOCK_SIZE, SCOPE, Bench, limits, sequence, undisturbed

# ---- what goes into a step ----


def test_decodes_go_first_then_running_prompts_then_waiting_ones() -> None:
    bench = Bench.of(32, limits(max_step_tokens=6, max_chunk_tokens=4))
    bench.add(sequence("long", [0] * 9, 2), sequence("short", [1], 4))
    assert bench.step() == {"long": (0, 4), "short": (0, 1)}
    bench.add(sequence("late", [1, 1, 1], 2))
    step = bench.schedule()
    assert [(c.request_id, c.start, c.end) for c in step.chunks] == [("short", 1, 2), ("long", 4, 8), ("late", 0, 1)]
    assert [c.choices for c in step.chunks] == [(0,), (), ()]


def test_no_step_and_no_chunk_is_longer_than_its_budget() -> None:
    bench = Bench.of(32, limits(max_step_tokens=5, max_chunk_tokens=3))
    bench.add(sequence("a", [0] * 8), sequence("b", [1] * 8))
    assert bench.step() == {"a": (0, 3), "b": (0, 2)}
    assert bench.step() == {"a": (3, 6), "b": (2, 4)}


def test_no_more_sequences_run_than_allowed_and_a_new_limit_holds_at_once() -> None:
    bench = Bench.of(32, limits(max_sequences=2))
    bench.add(*(sequence(name, [0, 1], 5) for name in "abc"))
    assert set(bench.step()) == {"a", "b"}
    assert (bench.scheduler.num_running, bench.scheduler.num_waiting) == (2, 1)
    bench.scheduler.limits = dataclasses.replace(bench.scheduler.limits, max_sequences=3)
    assert set(bench.step()) == {"a", "b", "c"}


def test_a_full_queue_refuses_who_brings_no_blocks() -> None:
    bench = Bench.of(32, limits(max_waiting=1))
    bench.add(sequence("a", [0, 1]))
    with pytest.raises(Overloaded, match="1 requests are waiting"):
        bench.add(sequence("b", [0, 1]))
    assert bench.scheduler.get("b") is None
    bench.add(bench.received(sequence("c", [0, 1, 1]), 2))


def test_delivered_tokens_are_replayed_and_counted_as_output() -> None:
    bench = Bench.of(32)
    expected = undisturbed([1, 0, 1], 5)
    bench.add(sequence("a", [1, 0, 1], 5, delivered=expected[3:5]))
    assert bench.step() == {"a": (0, 5)}
    assert bench.run() == {"a": expected}


def test_nothing_to_do_is_no_step() -> None:
    assert Bench.of(4).scheduler.schedule(0.0) is None


# ---- one step in flight ----


def test_while_a_step_is_in_flight_a_prompt_goes_on_and_a_sampling_sequence_runs_ahead() -> None:
    bench = Bench.of(32, limits(max_chunk_tokens=2))
    bench.add(sequence("long", [0] * 6, 2), sequence("short", [1, 0], 4))
    first = bench.schedule()
    second = bench.schedule()
    assert [(c.request_id, c.start) for c in second.chunks] == [("short", 2), ("long", 2)]
    bench.commit(first)
    third = bench.schedule()
    assert [(c.request_id, c.start) for c in third.chunks] == [("short", 3), ("long", 4)]
    bench.commit(second)
    bench.commit(third)
    assert bench.run() == {"long": undisturbed([0] * 6, 2), "short": undisturbed([1, 0], 4)}


def test_a_third_step_and_a_commit_out_of_order_are_bugs() -> None:
    bench = Bench.of(32, limits(max_chunk_tokens=1))
    bench.add(sequence("a", [0] * 6))
    bench.schedule()
    second = bench.schedule()
    with pytest.raises(AssertionError, match="2 steps are in flight"):
        bench.scheduler.schedule(0.0)
    with pytest.raises(AssertionError, match="committed before"):
        bench.scheduler.commit(second, StepResult(((),)), 0.0)


def test_blocks_of_a_sequence_removed_in_flight_return_with_its_last_step() -> None:
    bench = Bench.of(4, limits(max_chunk_tokens=2))
    bench.add(sequence("a", [0] * 7))
    first, second = bench.schedule(), bench.schedule()
    bench.scheduler.remove("a")
    assert bench.scheduler.get("a") is None
    assert [s.request_id for s in bench.scheduler.sequences()] == ["a"], "it still holds blocks"
    assert bench.commit(first) == ()
    assert bench.pool.ledger().active == 2
    assert bench.commit(second) == ()
    assert bench.pool.ledger().active == 0
    assert list(bench.scheduler.sequences()) == []


def test_a_request_can_come_back_while_its_removed_self_is_in_flight() -> None:
    bench = Bench.of(8)
    bench.add(sequence("a", [0, 1, 1], 2))
    old = bench.schedule()
    bench.scheduler.remove("a")
    bench.add(sequence("a", [0, 1, 1], 2))
    new = bench.schedule()
    assert bench.commit(old) == ()
    (progress,) = bench.commit(new)
    assert progress.new_tokens == (SampledToken(undisturbed([0, 1, 1], 1)[-1]),)


# ---- the prefix map ----


def test_a_prompt_computed_before_is_found_but_for_its_last_block() -> None:
    bench = Bench.of(16)
    prompt = [0, 1, 1, 0, 1, 1]
    bench.add(sequence("a", prompt))
    bench.run()
    bench.add(sequence("b", prompt))
    assert bench.step() == {"b": (4, 6)}
    seq = bench.held("b")
    assert seq.num_cached_tokens == 4
    assert seq.tokens == undisturbed(prompt, 1)


def test_only_full_blocks_of_computed_tokens_are_published() -> None:
    bench = Bench.of(16)
    bench.add(sequence("a", [0, 1, 1], 2))
    bench.step()
    seq = bench.held("a")
    assert (seq.num_tokens, seq.num_computed_tokens) == (4, 3)
    assert len(bench.pool.match(bench.scheduler.hashes(seq))) == 1, "the sampled token has no KV yet"
    bench.step()
    assert len(bench.pool.match(bench.scheduler.hashes(seq))) == 2


def test_a_chunk_in_flight_is_not_found_by_others() -> None:
    bench = Bench.of(16)
    bench.add(sequence("a", [0, 1, 1, 0, 1]))
    bench.schedule()
    bench.add(sequence("b", [0, 1, 1, 0, 1]))
    assert [(c.request_id, c.start) for c in bench.schedule().chunks] == [("b", 0)]


def test_tenants_share_no_blocks() -> None:
    bench = Bench.of(16)
    bench.add(sequence("a", [0, 1, 1, 0, 1], tenant="red"))
    bench.run()
    bench.add(sequence("b", [0, 1, 1, 0, 1], tenant="blue"), sequence("c", [0, 1, 1, 0, 1], tenant="red"))
    assert bench.step() == {"b": (0, 5), "c": (4, 5)}


def test_received_blocks_are_published_and_a_received_sequence_goes_on_where_its_kv_ends() -> None:
    bench = Bench.of(16)
    tokens = undisturbed([0, 1, 1, 0], 1)
    bench.add(bench.received(sequence("a", tokens[:4], 3, delivered=tokens[4:]), 4))
    assert len(bench.pool.take_events()[0].stored) == 2
    assert bench.step() == {"a": (4, 5)}
    assert bench.run() == {"a": undisturbed([0, 1, 1, 0], 3)}


# ---- too few blocks ----


def test_the_youngest_gives_way_and_every_output_stays_what_it_was() -> None:
    bench = Bench.of(6)
    bench.add(*(sequence(name, prompt, 6) for name, prompt in (("old", [0, 0]), ("mid", [0, 1]), ("new", [1, 1]))))
    sequences = [bench.held(name) for name in ("old", "mid", "new")]
    assert bench.run() == {name: undisturbed(p, 6) for name, p in (("old", [0, 0]), ("mid", [0, 1]), ("new", [1, 1]))}
    preempted = [s.num_preemptions for s in sequences]
    assert preempted[0] == 0
    assert sum(preempted) == bench.scheduler.num_preemptions > 0
    assert bench.pool.ledger().active == 0


def test_a_preempted_sequence_gives_back_every_block_and_finds_what_nobody_took() -> None:
    bench = Bench.of(6)
    bench.add(sequence("old", [0, 0, 0, 1], 5), sequence("new", [1, 1, 1, 0, 1], 5))
    new = bench.held("new")
    assert bench.step() == {"old": (0, 4), "new": (0, 5)}
    assert bench.step() == {"old": (4, 5), "new": (5, 6)}
    assert bench.step() == {"old": (5, 6)}, "new finds no block, and keeps what it has"
    assert len(new.block_table.blocks) == 3
    assert bench.step() == {"old": (6, 7)}, "old takes it from new"
    assert (new.block_table.blocks, new.num_computed_tokens, new.num_preemptions) == ([], 0, 1)
    assert (bench.scheduler.num_running, bench.scheduler.num_waiting) == (1, 1)
    assert bench.step() == {"old": (7, 8)}
    bench.scheduler.remove("old")
    assert bench.step() == {"new": (4, 7)}, "old took the tail, the head was still cached"
    assert new.tokens == undisturbed([1, 1, 1, 0, 1], 3)
    assert new.num_cached_tokens == 0, "its own work is no cache hit"


def test_only_as_many_are_preempted_as_needed_and_they_wait_before_later_arrivals() -> None:
    bench = Bench.of(8)
    bench.add(sequence("old", [0, 0], 3), sequence("mid", [0, 1, 1], 3), sequence("new", [1, 1, 1], 3))
    bench.step()
    foreign = bench.pool.allocate(bench.pool.num_available)
    assert foreign is not None
    bench.add(sequence("later", [1, 0]))
    assert bench.step() == {"old": (2, 3), "mid": (3, 4)}
    assert [bench.held(name).num_preemptions for name in ("old", "mid", "new")] == [0, 0, 1]
    bench.scheduler.remove("old")
    bench.pool.release(foreign)
    bench.scheduler.limits = limits(max_sequences=2)
    assert bench.step() == {"mid": (4, 5), "new": (2, 4)}


def test_a_small_prompt_does_not_pass_a_big_one_that_waits_for_blocks() -> None:
    bench = Bench.of(6)
    bench.add(sequence("old", [0, 1, 1, 0], 3))
    bench.step()
    bench.add(sequence("big", [1] * 9), sequence("small", [0]))
    assert set(bench.step()) == {"old"}
    bench.scheduler.remove("old")
    assert set(bench.step()) == {"big"}


def test_a_sequence_in_flight_is_not_preempted() -> None:
    bench = Bench.of(5, limits(max_chunk_tokens=2))
    bench.add(sequence("old", [0, 0], 3), sequence("new", [1] * 6))
    first = bench.schedule()
    bench.scheduler.pause("old")
    second = bench.schedule()
    bench.scheduler.resume("old")
    bench.pool.allocate(bench.pool.num_available)
    bench.commit(first)
    assert bench.scheduler.schedule(0.0) is None
    assert bench.scheduler.num_preemptions == 0
    bench.commit(second)
    assert bench.step() == {"old": (2, 3)}
    assert bench.scheduler.num_preemptions == 1


def test_growth_leaves_credits_alone_and_goes_on_when_they_end() -> None:
    bench = Bench.of(4)
    bench.add(sequence("a", [0, 1], 4))
    bench.step()
    credit = bench.pool.reserve(3)
    assert credit is not None
    assert bench.scheduler.schedule(0.0) is None, "the only free blocks are promised"
    assert bench.scheduler.has_work
    bench.pool.release(bench.pool.bind(credit))
    assert bench.run() == {"a": undisturbed([0, 1], 4)}


def test_who_finds_no_block_keeps_what_he_has_and_nobody_younger_takes_one() -> None:
    bench = Bench.of(6)
    bench.add(sequence("old", [0, 1], 4), sequence("new", [1, 1], 4))
    bench.step()
    bench.scheduler.remove("new")
    credit = bench.pool.reserve(bench.pool.num_available)
    assert credit is not None
    assert bench.scheduler.schedule(0.0) is None
    bench.add(sequence("later", [1, 0], 4))
    assert bench.scheduler.schedule(0.0) is None
    old = bench.held("old")
    assert len(old.block_table.blocks) == 1
    bench.pool.drop(credit)
    assert bench.step() == {"old": (2, 3), "later": (0, 2)}


def test_a_prompt_takes_the_block_that_a_younger_decode_failed_to_find() -> None:
    """Decodes are tried first: one that finds nothing must not stand in the way of somebody older."""
    bench = Bench.of(5, limits(max_chunk_tokens=3))
    bench.add(sequence("old", [0] * 8))
    bench.step()
    bench.add(bench.received(sequence("new", [1, 1, 1, 0, 1], 4), 4))
    assert bench.step() == {"old": (3, 4), "new": (4, 5)}
    assert bench.step() == {"new": (5, 6)}
    assert bench.step() == {"old": (4, 7)}
    assert bench.scheduler.num_preemptions == 1


def test_a_waiting_sequence_that_holds_blocks_passes_one_that_waits_for_some() -> None:
    bench = Bench.of(5)
    tokens = undisturbed([0, 1, 1], 1)
    received = bench.received(sequence("received", tokens[:3], 2, delivered=tokens[3:]), 3)
    bench.add(sequence("big", [0] * 8), received)
    assert bench.scheduler.num_blocks_wanted == 4
    assert set(bench.step()) == {"received"}
    bench.scheduler.remove("received")
    assert bench.scheduler.num_waiting == 1
    assert set(bench.step()) == {"big"}


def test_a_waiting_sequence_that_holds_blocks_gives_way_to_an_older_one() -> None:
    bench = Bench.of(4, limits(max_sequences=1))
    bench.add(sequence("old", [0, 1], 6))
    bench.step()
    bench.add(bench.received(sequence("received", [1, 0, 1, 1, 1, 0], 2), 5))
    assert bench.pool.num_available == 0
    assert bench.step() == {"old": (2, 3)}
    assert bench.run() == {"old": undisturbed([0, 1], 6), "received": undisturbed([1, 0, 1, 1, 1, 0], 2)}


def test_two_prompts_that_do_not_fit_together_are_not_both_begun() -> None:
    """Their blocks are lent while they are computed: begun both, each would wait for the other's lease."""
    bench = Bench.of(8, limits(max_step_tokens=4, max_chunk_tokens=2))
    bench.add(sequence("a", [0] * 10), sequence("b", [1] * 10))
    lent: list[int] = []
    while bench.scheduler.get("a") is not None:
        for progress in bench.commit(bench.schedule()):
            assert progress.request_id == "a"
            for block in bench.held("a").block_table.blocks[len(lent) : progress.num_computed_tokens // 2]:
                bench.pool.lend(block)
                lent.append(block)
            if progress.finish is not None:
                bench.scheduler.remove("a")
    for block in reversed(lent):
        bench.pool.unlend(block)
    assert bench.run() == {"b": undisturbed([1] * 10, 1)}
    assert bench.scheduler.num_preemptions == 0


def test_a_sequence_whose_blocks_are_all_lent_is_not_preempted_for_nothing() -> None:
    bench = Bench.of(4)
    bench.add(sequence("old", [0, 1], 3), sequence("new", [1, 1, 0, 0], 3))
    bench.step()
    bench.pool.allocate(1)
    lent = list(bench.held("new").block_table.blocks)
    for block in lent:
        bench.pool.lend(block)
    assert bench.scheduler.schedule(0.0) is None
    assert bench.held("new").block_table.blocks == lent
    bench.pool.unlend(lent[1])
    assert bench.step() == {"old": (2, 3)}
    assert bench.scheduler.num_preemptions == 1


# ---- how it ends ----


@pytest.mark.parametrize(
    ("sampling", "eos", "finish"),
    [
        (SamplingParams(), (0, 1), FinishReason.STOP),
        (SamplingParams(ignore_eos=True), (0, 1), None),
        (SamplingParams(ignore_eos=True, stop_token_ids=(0, 1)), (0, 1), FinishReason.STOP),
        (SamplingParams(stop_token_ids=(7,)), (), None),
    ],
)
def test_an_output_ends_at_a_stop_token_unless_it_was_told_to_ignore_it(
    sampling: SamplingParams, eos: tuple[int, ...], finish: FinishReason | None
) -> None:
    bench = Bench.of(8, limits(eos_token_ids=eos))
    bench.add(sequence("a", [0, 1], 2, sampling=sampling))
    (progress,) = bench.commit(bench.schedule())
    assert progress.finish is finish
    assert (progress.start, progress.num_computed_tokens, progress.num_output_tokens) == (0, 2, 1)
    if finish is None:
        assert bench.commit(bench.schedule())[0].finish is FinishReason.LENGTH


def test_a_finished_sequence_keeps_its_blocks_until_it_is_removed() -> None:
    bench = Bench.of(8)
    bench.add(sequence("a", [0, 1, 1], 1))
    bench.step()
    assert not bench.scheduler.has_work
    assert bench.pool.ledger().active == 2
    assert bench.held("a").finish is FinishReason.LENGTH
    bench.scheduler.remove("a")
    bench.scheduler.remove("a")
    assert bench.pool.ledger().active == 0


def test_a_waiting_sequence_can_be_removed_with_the_blocks_it_brought() -> None:
    bench = Bench.of(8, limits(max_sequences=1))
    bench.add(sequence("a", [0]), bench.received(sequence("b", [0, 1, 1]), 2))
    bench.scheduler.remove("b")
    assert bench.pool.ledger().active == 0
    assert bench.run().keys() == {"a"}


def test_load_counts_what_is_left_of_prompts_and_what_decodes_have_to_read() -> None:
    bench = Bench.of(32, limits(max_step_tokens=6, max_chunk_tokens=4))
    bench.add(sequence("a", [0] * 9, 2), sequence("b", [1, 1], 4), sequence("c", [0, 1, 1], 2))
    assert bench.scheduler.queued_prefill() == (14, 45 + 3 + 6)
    step = bench.schedule()
    assert bench.scheduler.queued_prefill() == (14, 45 + 3 + 6), "tokens in flight are not computed yet"
    bench.commit(step)
    assert bench.scheduler.queued_prefill() == (8, 5 + 6 + 7 + 8 + 9 + 6)
    assert bench.scheduler.context_tokens == 6


def test_what_waiting_prompts_will_find_in_the_prefix_map_is_no_load() -> None:
    bench = Bench.of(32, limits(max_sequences=1, max_step_tokens=4, max_chunk_tokens=4))
    bench.add(sequence("a", [0] * 8, 2), sequence("b", [0] * 9, 2))
    assert bench.scheduler.queued_prefill()[0] == 8 + 9
    bench.step()
    assert bench.scheduler.queued_prefill()[0] == 4 + 5, "b waits, and its first two blocks are there"
    bench.step()
    assert bench.scheduler.queued_prefill() == (0, 0), "one token of b is left: no more than a decode step"


# ---- a blocked head of the queue -------------------------------------------------------------------------------------


class CountingPool(BlockPool):
    """Counts the hashes that were looked up."""

    num_looked_up = 0

    def match(self, hashes: Sequence[BlockHash]) -> list[int]:
        self.num_looked_up += len(hashes)
        return super().match(hashes)


def counting(num_blocks: int, budgets: SchedulerLimits | None = None) -> tuple[Bench, CountingPool]:
    pool = CountingPool(num_blocks, BLOCK_SIZE)
    return Bench(pool, Scheduler(pool, budgets or limits(), SCOPE)), pool


def test_a_head_that_waits_for_blocks_is_not_looked_up_again_until_some_return() -> None:
    bench, pool = counting(80)
    bench.add(sequence("warm", range(100)))
    bench.run()
    bench.add(sequence("a", [200, 201], 30), sequence("b", [210, 211], 30))
    bench.step()
    hogged = pool.allocate(pool.num_available - 20)
    assert hogged is not None
    bench.add(sequence("head", (*range(100), 7), 5))
    before = pool.num_looked_up
    for _ in range(10):
        assert "head" not in bench.step()
    assert pool.num_looked_up - before < 50 + 10, "once its whole prefix, then one hash a step"
    pool.release(hogged)
    assert "head" in bench.step()


def test_a_head_is_let_in_when_its_prefix_is_computed_by_somebody_else() -> None:
    """Nothing returned, and yet it fits now: the blocks it lacked are shared."""
    bench, _ = counting(8, limits(max_chunk_tokens=2))
    bench.add(sequence("first", [1, 0, 1, 1, 0, 0, 1, 0]), sequence("head", [1, 0, 1, 1, 0, 0, 1, 0, 1]))
    began = [sorted(bench.step()) for _ in range(3)]
    assert began == [["first"], ["first"], ["first", "head"]]


def test_a_refusal_is_the_sequences_own() -> None:
    """The one that was refused goes away: the next is looked at afresh."""
    bench, _ = counting(8)
    bench.add(sequence("a", [0] * 6, 4))
    bench.step()
    bench.add(sequence("big", [1] * 14), sequence("small", [1, 0, 1]))
    assert sorted(bench.step()) == ["a"]
    bench.scheduler.remove("big")
    assert sorted(bench.step()) == ["a", "small"]
