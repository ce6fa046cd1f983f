"""A stream is lost, its requests are not: the same router comes back for them, or another one takes them over."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable

import pytest

from baton.core.config import RouterConfig
from baton.core.errors import Forgotten, ResumedElsewhere
from baton.core.messages import Hello, Resume, TokenChunk
from baton.core.request import FinishReason, Request
from baton.models.hash_model import expected
from baton.worker import token_log
from tests.worker.by_hand import ALIGNED, FANCY, HAND, MAX_MODEL_LEN, PLAIN, PROMPT, Bench, Heard, Stream, play, request

WINDOW_S = RouterConfig().orphan_window_s
SEEDS = range(3)


def resume_of(r: Request, heard: Heard | None, epoch: int) -> Resume:
    """What a router asks for that has heard so much; None: nothing."""
    lacking = [c.index for c in r.choices if heard is None or c.index not in heard.finish]
    have = {i: len(heard.tokens[i]) if heard else 0 for i in lacking}
    return Resume(r.request_id, epoch, r.asked, tuple(have.items()))


def rest(r: Request, heard: Heard, later: Heard) -> None:
    """What was heard before and after is the answer, log-probs and all, without a gap or a repetition."""
    for answer in expected(r, MAX_MODEL_LEN):
        i = answer.index
        assert heard.tokens[i] + later.tokens[i] == list(answer.token_ids), f"choice {i}"
        assert (heard.finish | later.finish)[i] is answer.finish
        if r.sampling.logprobs is not None:
            assert heard.logprobs[i] + later.logprobs[i] == [t.logprob for t in answer.tokens]


def so_far(heard: Heard) -> int:
    return sum(map(len, heard.tokens.values()))


async def begun(bench: Bench, r: Request, num_tokens: int = 2, remote: bool = True) -> tuple[Stream, Heard]:
    stream = bench.stream(bench.decode[0])
    heard = stream.submit(r, 1, bench.prefill[0] if remote else None)
    await heard.until(lambda h: so_far(h) >= num_tokens)
    return stream, heard


async def forgotten(heard: Heard) -> None:
    await heard.until(lambda h: h.failed)
    assert heard.last is not None
    assert (heard.last.error_code, so_far(heard)) == (Forgotten.code, 0)


# ---- the same router comes back -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("sampling", [PLAIN, FANCY], ids=["plain", "fancy"])
def test_a_router_that_comes_back_gets_each_token_once(seed: int, n: int, sampling: dict[str, object]) -> None:
    async def story(b: Bench) -> None:
        r = request("r", PROMPT, 20, n, **sampling)
        stream, heard = await begun(b, r, 2 * n)
        await stream.lose()
        again = b.stream(b.decode[0], Hello(HAND, (resume_of(r, heard, 1),)))
        later = again.heard["r", 1]
        await later.until(lambda h: len(heard.finish | h.finish) == n)
        rest(r, heard, later)

    play(story, seed=seed)


def test_a_stream_lost_in_the_middle_of_a_hand_off_costs_nothing() -> None:
    """Lost before the first token: the worker has nothing to say yet, and says it later."""

    async def story(b: Bench) -> None:
        r = request("r", tuple(range(60)), 5)
        stream = b.stream(b.decode[0])
        heard = stream.submit(r, 1, b.prefill[0])
        await asyncio.sleep(0.005)
        await stream.lose()
        assert not so_far(heard)
        again = b.stream(b.decode[0], Hello(HAND, (resume_of(r, heard, 1),)))
        await again.heard["r", 1].ended()
        rest(r, heard, again.heard["r", 1])
        assert b.computed(b.prefill[0]) == 60

    play(story)


def test_what_a_router_does_not_ask_for_when_it_comes_back_ends_at_once() -> None:
    async def story(b: Bench) -> None:
        wanted, unwanted = request("wanted", PROMPT, 50), request("unwanted", ALIGNED, 50)
        stream, heard = await begun(b, wanted)
        other = stream.submit(unwanted, 2)
        await other.until(lambda h: so_far(h) > 0)
        await stream.lose()
        again = b.stream(b.decode[0], Hello(HAND, (resume_of(wanted, heard, 1),)))
        await asyncio.sleep(0.05)
        assert b.decode[0].num_requests == 1
        await again.heard["wanted", 1].ended()
        rest(wanted, heard, again.heard["wanted", 1])

    play(story)


def test_an_attempt_that_never_arrived_is_forgotten() -> None:
    async def story(b: Bench) -> None:
        r = request("r", PROMPT)
        again = b.stream(b.decode[0], Hello(HAND, (resume_of(r, None, 1),)))
        await forgotten(again.heard["r", 1])

    play(story)


# ---- another router ------------------------------------------------------------------------------------------------

NEXT = "another router"


async def taken_over(b: Bench, r: Request, heard: Heard | None, epoch: int = 7) -> Heard:
    """By a router that has heard so much of it, all to its end."""
    later = b.stream(b.decode[0], Hello(NEXT)).resume(resume_of(r, heard, epoch))
    await later.until(lambda h: h.failed or len(h.finish) == len(r.choices))
    return later


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("sampling", [PLAIN, FANCY], ids=["plain", "fancy"])
@pytest.mark.parametrize("after", ["at once", "when it has ended"])
def test_another_router_gets_the_whole_answer(seed: int, n: int, sampling: dict[str, object], after: str) -> None:
    async def story(b: Bench) -> None:
        r = request("r", PROMPT, 20, n, **sampling)
        stream, _ = await begun(b, r, 2 * n)
        await stream.lose()
        if after == "when it has ended":
            while b.decode[0].num_requests:
                await asyncio.sleep(0.05)
        rest(r, Heard(), await taken_over(b, r, None))
        assert b.computed(b.decode[0]) <= len(PROMPT) + 20 * n, "it was computed once"

    play(story, seed=seed)


def test_what_ended_before_its_router_was_lost_can_still_be_heard() -> None:
    async def story(b: Bench) -> None:
        r = request("r", PROMPT, 4)
        stream, heard = await begun(b, r)
        await heard.ended()
        await stream.lose()
        later = await taken_over(b, r, None)
        rest(r, Heard(), later)
        assert later.last is not None
        assert later.last.spans, "and where its time went"

    play(story)


def test_a_router_that_is_not_dead_hears_that_its_request_is_taken_over() -> None:
    async def story(b: Bench) -> None:
        r = request("r", PROMPT, 40)
        stream, heard = await begun(b, r)
        later = await taken_over(b, r, None)
        rest(r, Heard(), later)
        assert heard.failed
        assert heard.last is not None
        assert heard.last.error_code == ResumedElsewhere.code, "no loss, and nobody's fault"
        assert len(heard.tokens[0]) < 40
        stream.cancel(r, 1)  # it no longer has a say

    play(story)


Change = Callable[[Request], Request]


@pytest.mark.parametrize("change", [
    lambda r: dataclasses.replace(r, tenant="umbra"),
    lambda r: dataclasses.replace(r, prompt=(*r.prompt[:-1], 99)),
    lambda r: dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, temperature=0.5)),
], ids=["tenant", "prompt", "sampling"])
def test_who_asks_anything_else_gets_nothing_and_disturbs_nobody(change: Change) -> None:
    async def story(b: Bench) -> None:
        r = request("r", PROMPT, 30)
        _, heard = await begun(b, r)
        await forgotten(await taken_over(b, change(r), None))
        await heard.ended()
        rest(r, Heard(), heard)

    play(story)


def test_log_probs_that_an_earlier_worker_had_are_forgotten_and_its_tokens_are_not() -> None:
    async def story(b: Bench) -> None:
        for logprobs in (2, None):
            r = request(f"r{logprobs}", PROMPT, 12, logprobs=logprobs)
            head = expected(r, MAX_MODEL_LEN)[0].token_ids[:5]
            sent = dataclasses.replace(r, choices=(dataclasses.replace(r.choices[0], delivered=head),))
            stream = b.stream(b.decode[0])
            heard = stream.submit(sent, 1)
            await heard.until(lambda h: so_far(h) > 0)
            await stream.lose()
            later = await taken_over(b, r, None)
            if logprobs is not None:
                await forgotten(later)
            else:
                rest(r, Heard(), later)

    play(story)


def test_a_choice_that_ended_elsewhere_is_not_known_here() -> None:
    async def story(b: Bench) -> None:
        r = request("r", PROMPT, 12, 2)
        sent = dataclasses.replace(r, choices=r.choices[1:])
        stream = b.stream(b.decode[0])
        heard = stream.submit(sent, 1)
        await heard.until(lambda h: so_far(h) > 0)
        await stream.lose()
        await forgotten(await taken_over(b, r, None))

    play(story)


# ---- the window ----------------------------------------------------------------------------------------------------


def later_than(window_share: float) -> Callable[[Bench], Awaitable[None]]:
    async def story(b: Bench) -> None:
        assert b.decode[0].runner is not None
        b.decode[0].runner.slowness = 100.0
        r = request("r", PROMPT, 60)
        stream, _ = await begun(b, r, 1, remote=False)
        await stream.lose()
        await asyncio.sleep(window_share * WINDOW_S)
        running = b.decode[0].num_requests
        later = await taken_over(b, r, None)
        if window_share < 1:
            assert running == 1
            rest(r, Heard(), later)
        else:
            assert running == 0, "nobody came, and it ended"
            assert later.last is not None
            assert later.last.finish is FinishReason.CANCELLED
            assert later.tokens[0], "what it had said it still knows"

    return story


@pytest.mark.parametrize("window_share", [0.9, 1.1])
def test_a_worker_works_on_for_nobody_for_the_window_and_no_longer(window_share: float) -> None:
    play(later_than(window_share))


def test_what_has_ended_is_forgotten_after_the_window() -> None:
    async def story(b: Bench) -> None:
        r = request("r", PROMPT, 3)
        _, heard = await begun(b, r)
        await heard.ended()
        node = b.decode[0].node
        assert node is not None
        assert len(node._logs) == 1
        await asyncio.sleep(WINDOW_S + 1.0)
        assert len(node._logs) == 0
        await forgotten(await taken_over(b, r, None))

    play(story)


def test_logs_of_the_ended_are_bounded_the_oldest_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_log, "MAX_ENDED_TOKENS", 3 * (len(PROMPT) + 3))

    async def story(b: Bench) -> None:
        stream = b.stream(b.decode[0])
        asked = [request(f"r{i}", PROMPT, 3) for i in range(5)]
        for r in asked:
            await stream.submit(r, 1).ended()
        node = b.decode[0].node
        assert node is not None
        assert [len([*node._logs.of(r.request_id)]) for r in asked] == [0, 0, 1, 1, 1]

    play(story)


def test_a_cancel_ends_a_request_at_once_and_leaves_what_it_had_said() -> None:
    async def story(b: Bench) -> None:
        r = request("r", PROMPT, 50)
        stream, heard = await begun(b, r, 5)
        stream.cancel(r, 1)
        await heard.until(lambda h: h.failed)
        assert b.decode[0].num_requests == 0
        later = await taken_over(b, r, None)
        assert isinstance(later.last, TokenChunk)
        assert later.last.finish is FinishReason.CANCELLED
        assert later.tokens[0] == heard.tokens[0]

    play(story)
