"""The whole state of a request survives the change of hands, and what this build cannot read is refused by name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.core.errors import Incompatible
from baton.core.handoff import ChoiceState, HandoffState
from baton.core.layout import HANDOFF_VERSION
from baton.core.request import MAX_CHOICES, FinishReason, SamplingParams, TokenLogprob
from baton.core.worker import Span
from baton.wire import codec
from baton.wire import worker_pb2 as pb

TOKEN = st.integers(0, 2**31 - 1)
LOGPROB = st.floats(max_value=0.0, allow_nan=False)
"""-inf is one: a token that the bias forbids has no probability left."""
TOP = st.lists(st.tuples(TOKEN, LOGPROB), max_size=3).map(tuple)
BIASES = st.dictionaries(TOKEN, st.floats(-100, 100), max_size=4).map(lambda d: tuple(d.items()))
SAMPLING = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 2**31 - 1),
    temperature=st.floats(0, 100),
    seed=st.integers(0, 2**64 - 1),
    stop_token_ids=st.lists(TOKEN, max_size=4).map(tuple),
    frequency_penalty=st.floats(-2, 2),
    presence_penalty=st.floats(-2, 2),
    repetition_penalty=st.floats(0.01, 10),
    logit_bias=BIASES,
    logprobs=st.none() | st.integers(0, 20),
)


@st.composite
def choice_states(draw: st.DrawFn, index: int) -> ChoiceState:
    output = tuple(draw(st.lists(TOKEN, max_size=6)))
    tail = draw(st.integers(0, len(output)))
    logprobs = [TokenLogprob(draw(LOGPROB), draw(TOP)) for _ in range(tail)]
    finish = draw(st.none() | st.sampled_from(FinishReason))
    blobs = st.binary(max_size=40)
    return ChoiceState(index, output, tuple(logprobs), draw(st.integers(0, 9)), finish, draw(blobs), draw(blobs))


@st.composite
def states(draw: st.DrawFn) -> HandoffState:
    indices = sorted(draw(st.sets(st.integers(0, MAX_CHOICES - 1), max_size=MAX_CHOICES)))
    return HandoffState(
        version=HANDOFF_VERSION,
        request_id=draw(st.text(max_size=20)),
        epoch=draw(st.integers(0, 2**64 - 1)),
        tenant=draw(st.text(max_size=20)),
        sampling=draw(SAMPLING),
        num_prompt_tokens=draw(st.integers(0, 2**31)),
        choices=tuple(draw(choice_states(i)) for i in indices),
        num_computed_tokens=draw(st.integers(0, 2**31)),
        cached_tokens=draw(st.integers(0, 2**31)),
        deadline_s=draw(st.floats(0, 86_400)),
        spans=(Span("prefill chunk", 0.0, 0.5, "512 tokens"),),
        converted=draw(st.booleans()),
    )


def carried(state: HandoffState) -> HandoffState:
    back = codec.PREFILL_EVENT.decode(pb.PrefillEvent.FromString(codec.PREFILL_EVENT.encode(state).SerializeToString()))
    assert isinstance(back, HandoffState)
    return back


@pytest.mark.slow
@settings(max_examples=300, database=None)
@given(states())
def test_the_whole_state_survives(state: HandoffState) -> None:
    back = carried(state)
    assert back == state
    back.check()
    assert [type(c.finish) for c in back.choices] == [type(c.finish) for c in state.choices]


@settings(max_examples=50, database=None)
@given(states(), st.binary(min_size=1, max_size=40))
def test_what_a_later_build_adds_beside_it_changes_nothing(state: HandoffState, news: bytes) -> None:
    """Fields are only ever added: a reader steps over those it does not know, at every level."""
    message = codec.PREFILL_EVENT.encode(state)
    later = bytes([0xFA, 0x3E, len(news)]) + news  # field 1007, bytes
    parts: list[Any] = [message.handoff_state.sampling, *message.handoff_state.choices, message.handoff_state]
    for part in parts:
        part.MergeFromString(later)
    data = message.SerializeToString()
    assert data.count(later) == len(parts)
    assert codec.PREFILL_EVENT.decode(pb.PrefillEvent.FromString(data)) == state


STATE = HandoffState(
    HANDOFF_VERSION, "r-1", 3, "tenant", SamplingParams(seed=7), 5,
    (ChoiceState(0, (1, 2), (TokenLogprob(-math.inf, ((1, -0.5),)),), 4, FinishReason.STOP, b"\x00g", b"\xffd"),),
    6, 0, 9.5,
)  # fmt: skip


def test_grammar_and_draft_state_are_carried_as_they_are() -> None:
    (choice,) = carried(STATE).choices
    assert (choice.grammar, choice.draft) == (b"\x00g", b"\xffd")
    assert choice.logprobs[0].logprob == -math.inf


@pytest.mark.parametrize("version", [0, 1, HANDOFF_VERSION + 1, 99])
def test_a_version_this_build_does_not_know_is_refused_by_its_number(version: int) -> None:
    other = carried(dataclasses.replace(STATE, version=version))
    with pytest.raises(Incompatible, match=f"r-1 has version {version}, this worker knows {HANDOFF_VERSION}"):
        other.check()


def lacking(*path: str) -> Callable[[Any], None]:
    def change(state: Any) -> None:
        *outer, last = path
        for name in outer:
            state = getattr(state, name)
        state.ClearField(last)

    return change


def naming(member: int) -> Callable[[Any], None]:
    def change(state: Any) -> None:
        state.choices[0].finish = member

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lacking("sampling"), "HandoffState without sampling"),
        (naming(0), "FinishReason number 0"),
        (naming(9), "FinishReason number 9"),
    ],
)
def test_a_state_with_a_part_missing_or_unknown_is_refused_and_the_part_is_named(
    change: Callable[[Any], None], named: str
) -> None:
    message = codec.PREFILL_EVENT.encode(STATE)
    change(message.handoff_state)
    with pytest.raises(Incompatible, match=named):
        codec.PREFILL_EVENT.decode(pb.PrefillEvent.FromString(message.SerializeToString()))


@pytest.mark.parametrize("member", [0, 9])
def test_a_call_of_a_mode_unknown_here_is_refused_instead_of_computed(member: int) -> None:
    message = pb.PrefillCall(request=pb.Request(sampling=pb.SamplingParams()), mode=member)  # type: ignore[arg-type]
    with pytest.raises(Incompatible, match=f"LendMode number {member}"):
        codec.PREFILL_CALL.decode(message)
