"""Sequences that stand still: paused, not yet begun, or unable to go on."""

from __future__ import annotations

import pytest

from baton.core.errors import InternalError
from baton.core.request import FinishReason
from baton.core.step import StepResult
from tests.engine.builders import Bench, limits, sequence, undisturbed

# ---- paused ----------------------------------------------------------------------------------------------------------


def test_a_paused_sequence_is_in_no_step_until_it_is_resumed_at_its_place() -> None:
    bench = Bench.of(16)
    bench.add(sequence("a", [0, 1], 4), sequence("b", [1, 1], 4))
    bench.step()
    bench.scheduler.pause("a")
    assert bench.scheduler.is_settled("a")
    assert bench.step() == {"b": (2, 3)}
    assert bench.held("a").num_computed_tokens == 2
    bench.scheduler.resume("a")
    assert [*bench.step()] == ["a", "b"]
    assert bench.run() == {"a": undisturbed([0, 1], 4), "b": undisturbed([1, 1], 4)}


def test_a_sequence_paused_in_flight_settles_with_the_commit_which_may_end_it() -> None:
    bench = Bench.of(16)
    bench.add(sequence("a", [0, 1], 2), sequence("b", [1, 1], 1))
    step = bench.schedule()
    for name in "ab":
        bench.scheduler.pause(name)
        assert not bench.scheduler.is_settled(name)
    progress = {p.request_id: p for p in bench.commit(step)}
    assert bench.scheduler.is_settled("a")
    assert len(progress["a"].new_tokens) == 1
    assert progress["b"].finish is FinishReason.LENGTH
    bench.scheduler.resume("b")
    assert bench.scheduler.schedule(0.0) is None, "one is paused, one has ended"
    assert not bench.scheduler.has_work, "an engine that does nothing now does not stand still"
    bench.scheduler.resume("a")
    assert bench.scheduler.has_work


def test_a_paused_sequence_keeps_its_blocks_when_an_older_one_needs_some() -> None:
    bench = Bench.of(4)
    bench.add(sequence("old", [0, 1], 3), sequence("new", [1, 1, 0], 2))
    bench.step()
    bench.pool.allocate(1)
    bench.scheduler.pause("new")
    blocks = list(bench.held("new").block_table.blocks)
    assert bench.scheduler.schedule(0.0) is None
    assert bench.held("new").block_table.blocks == blocks
    bench.scheduler.resume("new")
    assert bench.step() == {"old": (2, 3)}
    assert bench.scheduler.num_preemptions == 1


def test_a_paused_sequence_that_waits_holds_nobody_up_and_keeps_its_place() -> None:
    bench = Bench.of(16, limits(max_sequences=2))
    bench.add(*(sequence(name, [0, 1, 1], 2) for name in "abc"))
    bench.scheduler.pause("a")
    assert bench.scheduler.num_blocks_wanted == 2
    assert set(bench.step()) == {"b", "c"}
    assert bench.scheduler.num_blocks_wanted == 0
    bench.add(sequence("d", [0, 1, 0], 2))
    bench.step()
    for name in "bc":
        bench.scheduler.remove(name)
    bench.scheduler.resume("a")
    assert [*bench.step()] == ["a", "d"]


def test_a_paused_sequence_can_be_removed_and_its_name_is_not_paused_when_it_comes_back() -> None:
    bench = Bench.of(16)
    bench.add(sequence("a", [0, 1], 2))
    bench.step()
    bench.scheduler.pause("a")
    bench.scheduler.remove("a")
    assert bench.pool.ledger().active == 0
    assert not bench.scheduler.is_settled("a")
    with pytest.raises(AssertionError, match="not here"):
        bench.scheduler.pause("a")
    bench.add(sequence("a", [0, 1], 2))
    assert bench.run() == {"a": undisturbed([0, 1], 2)}
    bench.scheduler.resume("a")  # a lease that ends late


# ---- logits that are no numbers --------------------------------------------------------------------------------------


def test_a_sequence_that_could_not_be_sampled_ends_alone_and_its_blocks_are_found_no_more() -> None:
    bench = Bench.of(16, limits(max_chunk_tokens=4))
    bench.add(sequence("bad", [0, 1, 1, 0, 0], 3), sequence("good", [1, 1, 1], 3))
    bench.step()
    assert len(bench.pool.match(bench.scheduler.hashes(bench.held("bad")))) == 2
    step = bench.schedule()
    error = InternalError("not finite")
    index = [c.request_id for c in step.chunks].index("bad")
    tokens = [t if i != index else () for i, t in enumerate(bench.memory.execute(step).tokens)]
    told = {p.request_id: p for p in bench.scheduler.commit(step, StepResult(tuple(tokens), {index: error}), 0.0)}
    bad = told["bad"]
    assert (bad.finish, bad.error, bad.new_tokens, bad.num_output_tokens) == (FinishReason.ERROR, error, (), 0)
    assert told["good"].error is None
    assert bench.pool.match(bench.scheduler.hashes(bench.held("bad"))) == []
    assert bench.pool.ledger().active == 5, "it keeps its blocks until it is removed"
    bench.scheduler.remove("bad")
    assert bench.run() == {"good": undisturbed([1, 1, 1], 3)}


# ---- who waits how long ----------------------------------------------------------------------------------------------


def test_the_oldest_that_was_in_no_step_yet_tells_how_long_the_engine_keeps_people_waiting() -> None:
    bench = Bench.of(16, limits(max_sequences=1))
    assert bench.scheduler.oldest_waiting_s(5.0) == 0.0
    for name, added in (("a", 10.0), ("b", 12.0), ("c", 15.0)):
        bench.scheduler.add(sequence(name, [0, 1], 3), added)
    assert bench.scheduler.oldest_waiting_s(20.0) == 10.0
    assert bench.step().keys() == {"a"}
    assert bench.scheduler.oldest_waiting_s(20.0) == 8.0
    bench.scheduler.remove("b")
    assert bench.scheduler.oldest_waiting_s(20.0) == 5.0
    bench.run()
    assert bench.scheduler.oldest_waiting_s(90.0) == 0.0
