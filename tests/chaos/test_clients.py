"""A client that knows the right answer says what is wrong with another one."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable

import pytest

from baton.chaos.clients import Mismatch, Reading
from baton.chaos.speakers import Piece
from baton.chaos.workload import Front, HashWorkload, Job, Shape
from baton.core.request import Choice, FinishReason, Request, SampledToken, SamplingParams, TokenLogprob
from baton.models.hash_files import text_of
from baton.models.hash_model import expected

REQUEST = Request(
    "r", (5, 6, 7), SamplingParams(max_tokens=12, seed=1, ignore_eos=True, logprobs=1), (Choice(0), Choice(1))
)
JOB = Job(REQUEST, expected(REQUEST, 100))
USAGE = (3, 24)


def pieces(job: Job = JOB, size: int = 5) -> list[Piece]:
    """The right answer, as a router would send it, in pieces of `size` tokens."""
    said = []
    for answer in job.answers:
        for at in range(0, len(answer.tokens), size):
            tokens = answer.tokens[at : at + size]
            finish = answer.finish if at + size >= len(answer.tokens) else None
            said.append(Piece(answer.index, tokens, "", finish))
    said[-1] = dataclasses.replace(said[-1], usage=USAGE)
    return said


def read(job: Job, said: Iterable[Piece]) -> None:
    reading = Reading(job)
    for piece in said:
        reading.take(piece)
    reading.end()


def test_the_right_answer_is_right_however_it_is_cut_and_mixed() -> None:
    for size in (1, 4, 12):
        read(JOB, pieces(size=size))
    right = pieces(size=4)
    read(JOB, [right[3], right[0], right[4], right[1], right[2], right[5]])


def changed(at: int, **fields: object) -> list[Piece]:
    said = pieces()
    said[at] = dataclasses.replace(said[at], **fields)  # type: ignore[arg-type]
    return said


FIRST = JOB.answers[0].tokens
OTHER = SampledToken((FIRST[1].token_id + 1) % 97, FIRST[1].logprob)
SHIFTED = SampledToken(FIRST[1].token_id, TokenLogprob(-1.0, ()))


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (changed(0, tokens=(FIRST[0], OTHER, *FIRST[2:5])), "wrong"),
        (changed(0, tokens=(FIRST[0], SHIFTED, *FIRST[2:5])), "wrong"),
        ([pieces()[0], pieces()[0], *pieces()[1:]], "5 repeated"),
        (pieces()[:1] + pieces()[2:], "5 lost"),
        (changed(0, choice=1), "choice 1 from token 0"),
        (changed(0, choice=2), "was not asked for"),
        (changed(0, finish=FinishReason.LENGTH), "ended as length after 5"),
        (changed(2, finish=FinishReason.STOP), "it should as length"),
        ([*pieces(), Piece(1, FIRST[:1])], "has ended"),
        (changed(2, finish=None), r"choices \[0\] have not"),
        (pieces()[:-1], r"choices \[1\] have not"),
        (changed(5, usage=(3, 25)), "usage"),
        (changed(5, usage=None), "usage"),
    ],
)
def test_each_way_of_being_wrong_is_seen(said: list[Piece], why: str) -> None:
    with pytest.raises(Mismatch, match=why):
        read(JOB, said)


def http_job() -> tuple[Job, str]:
    request = Request("r", (5, 6, 7), SamplingParams(max_tokens=200, seed=4))
    (answer,) = expected(request, 300)
    assert answer.finish is FinishReason.STOP, "it ends with a token that has no text"
    return Job(request, (answer,), Front.HTTP), text_of(answer.token_ids)


def test_an_answer_over_http_is_compared_as_text() -> None:
    job, text = http_job()
    usage = (3, len(text) + 1)
    read(job, [Piece(text=text[:4]), Piece(text=text[4:], finish=FinishReason.STOP), Piece(usage=usage)])
    for wrong in (text[:3] + text[4:], text[:4] + text[3:], text + "x", text[:-1]):
        with pytest.raises(Mismatch):
            read(job, [Piece(text=wrong, finish=FinishReason.STOP), Piece(usage=usage)])


def test_a_workload_is_drawn_from_its_seed_and_asks_for_everything() -> None:
    def jobs(seed: int) -> list[Job]:
        workload = HashWorkload(random.Random(seed), 60.0, 1)
        return [workload.draw() for _ in range(120)]

    one = jobs(1)
    assert one == jobs(1) != jobs(2)
    assert {j.front for j in one} == set(Front)
    assert {len(j.answers) for j in one} == {1, 2, 3}
    sampling = [j.request.sampling for j in one]
    assert any(s.needs_history for s in sampling)
    assert any(s.logprobs is not None for s in sampling)
    assert any(j.cancel_after_tokens is not None for j in one)
    assert {a.finish for j in one for a in j.answers} == {FinishReason.STOP, FinishReason.LENGTH}
    heads = [j.request.prompt[:64] for j in one]
    assert len(set(heads)) < len(heads) / 2, "prompts share prefixes"
    for s in sampling:
        s.check()
    assert all(len(j.request.prompt) + j.request.sampling.max_tokens <= 800 for j in one)
    assert Shape().output_tokens[1] < 800
