"""Sequences of several choices, and what the sampler is told of those before a token."""

from __future__ import annotations

import pytest

from baton.core.request import SampledToken, SamplingParams
from baton.core.sequence import fork_sequence
from tests.engine.builders import BLOCK_SIZE, Bench, limits, sequence, undisturbed

# ---- several choices -------------------------------------------------------------------------------------------------


def test_a_leader_ends_with_a_token_for_each_choice_and_keeps_its_blocks() -> None:
    bench = Bench.of(16, limits(max_chunk_tokens=2))
    prompt = [0, 1, 1]
    bench.add(sequence("a", prompt, 5, choices=(0, 2, 5)))
    first = bench.schedule()
    assert [c.choices for c in first.chunks] == [()]
    bench.commit(first)
    last = bench.schedule()
    assert [c.choices for c in last.chunks] == [(0, 2, 5)]
    (progress,) = bench.commit(last)
    assert progress.new_tokens == tuple(SampledToken(undisturbed(prompt, 1, choice=c)[-1]) for c in (0, 2, 5))
    assert (progress.finish, progress.num_output_tokens, progress.num_computed_tokens) == (None, 0, 3)
    assert bench.held("a").tokens == prompt, "whose token would it be?"
    assert not bench.scheduler.has_work
    assert bench.scheduler.schedule(0.0) is None
    assert bench.pool.ledger().active == 2
    bench.scheduler.remove("a")
    assert bench.pool.ledger().active == 0


@pytest.mark.parametrize("prompt", [[0, 1, 1], [0, 1, 1, 0]], ids=["a tail", "full blocks"])
def test_choices_go_on_from_shared_blocks_and_each_gets_what_it_gets_alone(prompt: list[int]) -> None:
    bench = Bench.of(32)
    bench.add(sequence("a", prompt, 6, choices=range(4)))
    (progress,) = bench.commit(bench.schedule())
    children = bench.fork(bench.held("a"), progress.new_tokens, 6)
    assert bench.pool.ledger().active == (5 if len(prompt) % BLOCK_SIZE else 2)
    bench.add(*children)
    assert set(bench.step().values()) == {(len(prompt), len(prompt) + 1)}, "nothing is computed twice"
    outputs = bench.run()
    assert outputs == {f"a.{c}": undisturbed(prompt, 6, choice=c) for c in range(4)}
    assert len({tuple(tokens) for tokens in outputs.values()}) > 1
    assert bench.pool.ledger().active == 0


def test_choices_without_a_seed_of_their_own_draw_from_their_leaders() -> None:
    leader = sequence("a", [0, 1], 3, sampling=SamplingParams(), choices=range(2))
    for choice in leader.request.choices:
        assert fork_sequence(leader, choice, [], 3).request.seed == leader.request.seed


def test_a_choice_that_gives_way_is_computed_again_as_the_choice_it_is() -> None:
    bench = Bench.of(6)
    bench.add(sequence("old", [0, 0], 7))
    bench.step()
    bench.add(sequence("a", [1, 1], 4, choices=(3, 4)))
    (leader,) = (p for p in bench.commit(bench.schedule()) if p.request_id == "a")
    bench.add(*bench.fork(bench.held("a"), leader.new_tokens, 4))
    outputs = bench.run()
    assert bench.scheduler.num_preemptions > 0
    assert outputs["a.3"] == undisturbed([1, 1], 4, choice=3)
    assert outputs["a.4"] == undisturbed([1, 1], 4, choice=4)


# ---- what the sampler is told ----------------------------------------------------------------------------------------


def test_a_chunk_brings_its_history_only_when_it_samples_and_a_penalty_is_on() -> None:
    bench = Bench.of(16, limits(max_chunk_tokens=3))
    bench.add(
        sequence("plain", [0, 1, 1, 0], 3, delivered=[1]),
        sequence("penalised", [0, 1, 1, 0], 3, delivered=[1], sampling=SamplingParams(seed=0, presence_penalty=1.0)),
    )
    first = bench.schedule()
    assert [(c.history, c.num_prompt_tokens) for c in first.chunks] == [((), 0), ((), 0)]
    bench.commit(first)
    (plain, penalised) = bench.schedule().chunks
    assert (plain.choices, plain.history, plain.num_prompt_tokens) == ((0,), (), 0)
    assert (penalised.choices, penalised.history, penalised.num_prompt_tokens) == ((0,), (0, 1, 1, 0, 1), 4)
