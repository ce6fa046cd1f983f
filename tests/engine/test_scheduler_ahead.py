"""A sequence runs ahead: it has a row in the next step while its token is still being sampled in this one."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from baton.core.errors import InternalError
from baton.core.request import FinishReason, SamplingParams
from baton.core.step import UNKNOWN_TOKEN, Step, StepResult
from tests.engine.builders import Bench, limits, sequence, undisturbed

STOPS = SamplingParams(seed=0, stop_token_ids=(0, 1))
"""Whatever the token is, it ends the sequence; nobody knows that before."""


def spans(step: Step) -> dict[str, tuple[int, int]]:
    return {c.request_id: (c.start, c.end) for c in step.chunks}


def overlapped(bench: Bench) -> dict[str, list[int]]:
    """As `Bench.run`, with two steps in flight wherever there is something for a second one."""
    tokens: dict[str, list[int]] = {}
    flights: deque[Step] = deque()
    for _ in range(1000):
        step = bench.scheduler.schedule(0.0) if len(flights) < 2 else None
        if step is not None:
            flights.append(step)
            if len(flights) < 2:
                continue
        if not flights:
            return tokens
        for progress in bench.commit(flights.popleft()):
            if progress.finish is not None:
                tokens[progress.request_id] = bench.held(progress.request_id).tokens
                bench.scheduler.remove(progress.request_id)
    raise AssertionError("1000 steps were not enough")


# ---- who runs ahead --------------------------------------------------------------------------------------------------


def test_the_row_says_which_chunk_samples_its_token_and_the_result_of_that_step_fills_it_in() -> None:
    penalised = SamplingParams(seed=0, presence_penalty=1.0)
    bench = Bench.of(32)
    bench.add(sequence("a", [0, 1], 3), sequence("b", [1, 1], 3, sampling=penalised))
    first = bench.schedule()
    a, b = bench.schedule().chunks
    assert (a.token_ids, a.token_from, a.choices, a.history) == ((UNKNOWN_TOKEN,), 0, (0,), ())
    assert (b.token_ids, b.token_from, b.history, b.num_prompt_tokens) == ((UNKNOWN_TOKEN,), 1, (1, 1), 2)
    result = bench.memory.execute(first)
    token = undisturbed([1, 1], 1, penalised=True)[-1]
    filled = b.filled(result)
    assert (filled.token_ids, filled.token_from, filled.history) == ((token,), None, (1, 1, token))
    assert (filled.start, filled.end, filled.num_prompt_tokens) == (2, 3, 2)


def test_who_must_end_with_the_token_or_answers_several_times_does_not_run_ahead() -> None:
    bench = Bench.of(32)
    bench.add(
        sequence("last", [0, 1], 1), sequence("leader", [1, 1], 4, choices=(0, 1)), sequence("paused", [0, 0], 4),
        sequence("on", [1, 0], 2),
    )
    bench.schedule()
    bench.scheduler.pause("paused")
    assert spans(bench.schedule()) == {"on": (2, 3)}


def test_a_paused_sequence_settles_when_the_step_it_runs_ahead_in_is_committed() -> None:
    bench = Bench.of(32)
    bench.add(sequence("a", [0, 1], 9))
    first, second = bench.schedule(), bench.schedule()
    bench.scheduler.pause("a")
    bench.commit(first)
    assert not bench.scheduler.is_settled("a")
    assert bench.scheduler.schedule(0.0) is None
    bench.commit(second)
    assert bench.scheduler.is_settled("a")
    assert bench.held("a").tokens == undisturbed([0, 1], 2)
    assert bench.held("a").num_computed_tokens == 3


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=6), st.integers(1, 9)), min_size=1, max_size=5),
    st.integers(12, 30), st.integers(1, 8), st.integers(1, 4),
)
def test_two_steps_in_flight_bring_the_tokens_of_one(
    asked: Sequence[tuple[Sequence[int], int]], num_blocks: int, max_step_tokens: int, max_chunk_tokens: int
) -> None:
    bench = Bench.of(num_blocks, limits(max_step_tokens, max_chunk_tokens))
    bench.add(*(sequence(f"r{i}", prompt, num_output) for i, (prompt, num_output) in enumerate(asked)))
    assert overlapped(bench) == {f"r{i}": undisturbed(prompt, n) for i, (prompt, n) in enumerate(asked)}
    assert bench.pool.ledger().active == 0


# ---- void rows -------------------------------------------------------------------------------------------------------


def test_a_row_behind_an_unforeseen_end_is_void_and_holds_the_blocks_until_it_is_done() -> None:
    bench = Bench.of(8)
    bench.add(sequence("a", [0, 1, 1], 5, sampling=STOPS), sequence("b", [1, 1, 0], 5))
    first, second = bench.schedule(), bench.schedule()
    assert spans(second).keys() == {"a", "b"}
    ended = {p.request_id: p.finish for p in bench.commit(first)}
    assert ended == {"a": FinishReason.STOP, "b": None}
    bench.scheduler.remove("a")
    assert bench.pool.ledger().active == 4, "its row may be written just now"
    third = bench.schedule()
    assert [p.request_id for p in bench.commit(second)] == ["b"]
    assert spans(third).keys() == {"b"}
    assert bench.pool.match(bench.scheduler.hashes(sequence("c", [*undisturbed([0, 1, 1], 1), 0]))) == [0]
    assert bench.pool.ledger().active == 3
    bench.commit(third)


def test_nothing_is_told_or_counted_of_a_void_row_of_one_that_was_not_removed_yet() -> None:
    bench = Bench.of(8)
    bench.add(sequence("a", [0, 1, 1], 5, sampling=STOPS))
    first, second = bench.schedule(), bench.schedule()
    bench.commit(first)
    assert bench.commit(second) == ()
    seq = bench.held("a")
    assert (seq.num_computed_tokens, seq.num_tokens_in_flight, seq.num_output_tokens) == (3, 0, 1)
    assert len(bench.pool.match(bench.scheduler.hashes(seq))) == 1, "the block that the void row filled is not known"
    bench.scheduler.remove("a")
    assert bench.pool.ledger().active == 0


def test_one_that_is_removed_while_it_runs_ahead_leaves_no_block_and_no_hash_of_a_token_it_never_had() -> None:
    bench = Bench.of(8)
    bench.add(sequence("a", [0, 1, 1], 5))
    first, second = bench.schedule(), bench.schedule()
    bench.scheduler.remove("a")
    assert bench.commit(first) == bench.commit(second) == ()
    assert bench.pool.ledger().active == 0
    assert bench.pool.ledger().cached == 1, "the full block of its prompt"


def test_a_row_behind_one_that_could_not_be_sampled_is_void() -> None:
    bench = Bench.of(8)
    bench.add(sequence("bad", [0, 1, 1], 5), sequence("good", [1, 1, 0], 5))
    first, second = bench.schedule(), bench.schedule()
    sampled = bench.memory.execute(first).tokens
    bench.memory.before = StepResult(((), sampled[1]), {0: InternalError("no numbers")})
    told = bench.scheduler.commit(first, bench.memory.before, 0.0)
    assert [(p.request_id, p.finish) for p in told] == [("bad", FinishReason.ERROR), ("good", None)]
    assert [p.request_id for p in bench.commit(second)] == ["good"]
    assert bench.pool.match(bench.scheduler.hashes(bench.held("bad"))) == []
    bench.scheduler.remove("bad")
    assert bench.run() == {"good": undisturbed([1, 1, 0], 5)}


# ---- room ------------------------------------------------------------------------------------------------------------


def test_nobody_is_preempted_to_run_ahead_but_for_the_same_row_once_its_token_is_known() -> None:
    bench = Bench.of(5)
    bench.add(sequence("old", [0, 0], 5))
    bench.step()
    bench.add(sequence("new", [1, 0, 0, 1], 3))
    step = bench.schedule()
    assert spans(step) == {"old": (2, 3), "new": (0, 4)}
    bench.pool.allocate(bench.pool.num_available)
    bench.scheduler.pause("new")
    ahead = bench.schedule()
    assert spans(ahead) == {"old": (3, 4)}
    bench.commit(step)
    bench.scheduler.resume("new")
    assert bench.scheduler.schedule(0.0) is None
    assert bench.scheduler.num_preemptions == 0
    bench.commit(ahead)
    assert spans(bench.schedule()) == {"old": (4, 5)}
    assert bench.scheduler.num_preemptions == 1


def test_nobody_younger_runs_ahead_of_one_who_lacks_a_block_so_that_he_can_be_preempted_soon() -> None:
    bench = Bench.of(6)
    bench.add(sequence("old", [0, 0], 9))
    bench.step()
    bench.add(sequence("new", [1, 0], 9))
    bench.step()
    step = bench.schedule()
    assert spans(step) == {"old": (3, 4), "new": (2, 3)}
    bench.pool.allocate(bench.pool.num_available)
    assert bench.scheduler.schedule(0.0) is None, "old lacks a block, and new waits with him, though he has room"
    bench.commit(step)
    assert spans(bench.schedule()) == {"old": (4, 5)}
    assert bench.scheduler.num_preemptions == 1
