"""Exactness, per choice, as a pure function of what chunks arrive."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.errors import PeerLost
from baton.core.messages import TokenChunk
from baton.core.request import Choice, FinishReason, Request, SamplingParams, TokenLogprob
from baton.router.delivery import Delivery
from tests.router.fake_fleet import EOS, capability, token

LENGTH = 6


def a_request(num_choices: int = 2, logprobs: int | None = 0, **sampling: object) -> Request:
    choices = tuple(Choice(k) for k in range(num_choices))
    params = SamplingParams(max_tokens=LENGTH, logprobs=logprobs, **sampling)  # type: ignore[arg-type]
    return Request("r", (1, 2, 3), params, choices)


def logprob(index: int, choice: int) -> TokenLogprob:
    return TokenLogprob(-float(token("r", index, choice)))


def chunk(choice: int, start: int, end: int, finish: FinishReason | None = None, epoch: int = 1) -> TokenChunk:
    indices = range(start, end)
    return TokenChunk(
        "r", epoch, start, tuple(token("r", i, choice) for i in indices), finish, choice,
        tuple(logprob(i, choice) for i in indices),
    )


PIECES = st.builds(
    lambda choice, start, count, last: (choice, start, min(LENGTH, start + count), last),
    st.integers(0, 1), st.integers(0, LENGTH), st.integers(0, 3), st.booleans(),
)


@given(st.lists(PIECES, max_size=40))
def test_whatever_arrives_each_choice_is_a_prefix_of_the_truth_with_its_log_probs(
    pieces: list[tuple[int, int, int, bool]],
) -> None:
    delivery = Delivery(a_request())
    got: dict[int, list[tuple[int, TokenLogprob]]] = {0: [], 1: []}
    ends: dict[int, int] = {0: 0, 1: 0}
    for choice, start, end, last in pieces:
        finish = FinishReason.LENGTH if last and end == LENGTH else None
        gap = start > len(got[choice]) or (finish is not None and end < len(got[choice]))
        try:
            fresh = delivery.accept(chunk(choice, start, end, finish))
        except PeerLost:
            assert gap
            assert not ends[choice]
            continue
        if fresh is None:
            continue
        assert not ends[choice], "nothing comes after the end"
        assert fresh.choice == choice
        assert fresh.first_index == len(got[choice])
        got[choice] += zip(fresh.token_ids, fresh.logprobs, strict=True)
        ends[choice] += fresh.finish is not None
    for choice, news in got.items():
        assert news == [(token("r", i, choice), logprob(i, choice)) for i in range(len(news))]
        assert delivery.answers[choice].tokens == [t for t, _ in news]
        assert ends[choice] == (delivery.answers[choice].finish is not None)
    assert delivery.is_open == (0 in ends.values())


def test_a_duplicate_is_trimmed_together_with_its_log_probs() -> None:
    delivery = Delivery(a_request())
    assert delivery.accept(chunk(1, 0, 2)) == chunk(1, 0, 2)
    assert delivery.accept(chunk(1, 1, 4)) == chunk(1, 2, 4)
    assert delivery.accept(chunk(1, 0, 3)) is None
    assert delivery.accept(chunk(0, 0, 1)) == chunk(0, 0, 1), "the other choice counts for itself"


def test_log_probs_that_do_not_go_with_their_tokens_are_not_believed() -> None:
    delivery = Delivery(a_request())
    with pytest.raises(PeerLost, match="1 log-probs for 2 tokens"):
        delivery.accept(replace(chunk(0, 0, 2), logprobs=(logprob(0, 0),)))
    with pytest.raises(PeerLost, match="2 log-probs for 2 tokens"):
        Delivery(a_request(logprobs=None)).accept(chunk(0, 0, 2))
    assert delivery.num_output_tokens == 0


def test_a_choice_that_was_not_asked_for_is_not_believed() -> None:
    with pytest.raises(PeerLost, match="no choice 2"):
        Delivery(a_request()).accept(chunk(2, 0, 1))


def test_the_next_attempt_leaves_out_what_is_finished_and_replays_the_rest_choice_by_choice() -> None:
    delivery = Delivery(a_request(3))
    delivery.accept(chunk(0, 0, 2))
    delivery.accept(chunk(1, 0, LENGTH, FinishReason.LENGTH))
    again = delivery.remaining(7.0)
    assert again.choices == (Choice(0, tuple(delivery.answers[0].tokens)), Choice(2))
    assert again.deadline_s == 7.0
    assert (delivery.longest, delivery.num_shared_tokens, delivery.num_apart_tokens) == (5, 3, 2)
    assert again.shared == (1, 2, 3)
    assert delivery.shared_from(1) == (2, 3)
    delivery.accept(chunk(2, 0, LENGTH, FinishReason.LENGTH))
    assert (delivery.longest, delivery.num_shared_tokens, delivery.num_apart_tokens) == (5, 5, 0)
    assert delivery.remaining(7.0).shared == (1, 2, 3, token("r", 0), token("r", 1))
    assert [delivery.shared_from(start) for start in (2, 4)] == [(3, token("r", 0), token("r", 1)), (token("r", 1),)]


def test_choices_whose_tokens_end_them_are_finished_and_the_others_are_not() -> None:
    delivery = Delivery(a_request(4, None, stop_token_ids=(7,)))
    for choice, ids in enumerate([(1, EOS), (1, 7), (1, 2), (1, 2, 3, 4, 5, 6)]):
        delivery.accept(TokenChunk("r", 1, 0, ids, None, choice))
    ends = list(delivery.conclude(3, capability()))
    assert [(c.choice, c.finish, c.first_index, c.token_ids, c.epoch) for c in ends] == [
        (0, FinishReason.STOP, 2, (), 3),
        (1, FinishReason.STOP, 2, (), 3),
        (3, FinishReason.LENGTH, 6, (), 3),
    ]
    assert [c.index for c in delivery.remaining(1.0).choices] == [2]
    assert list(delivery.conclude(4, capability())) == [], "each end is said once"


def test_cached_tokens_are_those_of_the_first_attempt_that_brought_tokens() -> None:
    delivery = Delivery(a_request())
    delivery.accept(replace(chunk(0, 0, 1, epoch=4), cached_tokens=1))
    delivery.accept(replace(chunk(1, 0, 1, epoch=4), cached_tokens=2))
    delivery.accept(replace(chunk(0, 1, 2, epoch=5), cached_tokens=3))
    assert delivery.cached_tokens == 2
