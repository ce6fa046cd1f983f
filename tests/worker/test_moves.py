"""Planned moves seen from the streams: a running request goes to a peer, KV and all, whatever happens meanwhile. Every
story ends with nothing held anywhere (tests/worker/by_hand.py)."""

from __future__ import annotations

import asyncio

import pytest

from baton.core.errors import NotFound
from baton.core.handoff import HandoffState, LendMode, PrefillCall, RunningAttempt
from baton.core.messages import TakeFrom
from baton.core.request import Choice, Request
from baton.models.hash_model import expected
from tests.worker.by_hand import FANCY, HAND, MAX_MODEL_LEN, PROMPT, Bench, Heard, Stream, check, play, request

pytestmark = pytest.mark.usefixtures("quiet")


async def moved(b: Bench, r: Request, at_token: int) -> tuple[Heard, Heard, Stream]:
    """Run on decode-0, taken over by decode-1 when choice 0 has `at_token` tokens. The router has heard all of them
    but the last."""
    source, target = b.stream(b.decode[0]), b.stream(b.decode[1])
    before = source.submit(r, 1)
    await before.until(lambda h: len(h.tokens[0]) >= at_token)
    known = tuple(Choice(c.index, tuple(before.tokens[c.index][:-1])) for c in r.choices)
    taken = Request(r.request_id, r.prompt, r.sampling, known, r.tenant, r.deadline_s)
    after = target.submit(taken, 2, take_from=TakeFrom(source.info, 1))
    await after.ended(len(r.choices))
    return before, after, source


KINDS: dict[str, dict[str, object]] = {
    "plain": {},
    "stop": {"stop_token_ids": (40, 41, 42)},
    "penalties": {"frequency_penalty": 0.5, "presence_penalty": 0.25, "repetition_penalty": 1.2},
    "seed": {"temperature": 0.9, "seed": 2**63 + 5},
    "logprobs": {"logprobs": 5},
    "two answers": {"n": 2, "temperature": 0.9},
    "all at once": {"n": 3, **FANCY},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_running_request_moves_with_its_kv_at_every_token(kind: str) -> None:
    """T32: nothing is computed twice, and the answer is that of an undisturbed run."""
    num_moved = 0

    async def story(b: Bench, at_token: int) -> None:
        nonlocal num_moved
        r = request("r", PROMPT, max_tokens=40, **KINDS[kind])  # type: ignore[arg-type]
        right = expected(r, MAX_MODEL_LEN)
        before, after, source = await moved(b, r, at_token)
        if after.failed:  # a stop token came first
            assert kind == "stop"
            assert before.finish, after.last
            return
        num_moved += 1
        for answer in right:
            k, whole = answer.index, [t.token_id for t in answer.tokens]
            cut = after.first_index[k]
            assert before.tokens[k] == whole[: len(before.tokens[k])]
            assert cut <= len(before.tokens[k]), "no gap"
            assert after.tokens[k] == whole[cut:]
            assert after.finish[k] is answer.finish
            if r.sampling.logprobs is not None:
                assert after.logprobs[k] == [t.logprob for t in answer.tokens[cut:]]
        computed = b.computed(b.decode[0]) + b.computed(b.decode[1])
        assert computed == len(PROMPT) + sum(len(a.tokens) - 1 for a in right), "no token was computed twice"
        assert before.failed, "the source's last word is that it gave it away"
        await asyncio.sleep(1.0)  # a heartbeat
        assert source.load.num_running == 0

    for at_token in range(1, 21):
        play(lambda b, k=at_token: story(b, k), num_decode=2)  # type: ignore[misc]
    assert num_moved >= (20 if kind != "stop" else 5), num_moved


async def moving(b: Bench, r: Request) -> tuple[Stream, Stream, Heard]:
    """It runs on the source, with five tokens told, and the target was asked to take it over."""
    source, target = b.stream(b.decode[0]), b.stream(b.decode[1])
    before = source.submit(r, 1)
    await before.until(lambda h: len(h.tokens[0]) >= 5)
    known = Request("r", PROMPT, r.sampling, (Choice(0, tuple(before.tokens[0])),), "", 60.0)
    target.submit(known, 2, take_from=TakeFrom(source.info, 1))
    return source, target, before


@pytest.mark.slow
def test_a_move_whose_target_dies_leaves_the_request_where_it_was() -> None:
    """Whenever it dies: until it has acknowledged, the source only pauses. After that it is lost like any other
    worker, and the router replays."""
    ended = []

    async def story(b: Bench, delay_s: float) -> None:
        r = request("r", PROMPT, max_tokens=60)
        source, _, before = await moving(b, r)
        await asyncio.sleep(delay_s)
        b.decode[1].kill(silent=False)
        await asyncio.sleep(10.0)
        assert source.load.num_running == 0, f"killed after {delay_s} s, the request hangs"
        if not before.failed:
            check(r, before)
        ended.append("there" if before.failed else "here")

    for delay_ms in range(0, 60, 3):
        play(lambda b, s=delay_ms / 1e3: story(b, s), num_decode=2)  # type: ignore[misc]
    assert ended.count("here") >= 5, ended
    assert ended.index("there") > 3, ended
    assert "here" not in ended[ended.index("there") :], "acknowledged is acknowledged"


@pytest.mark.slow
def test_a_move_out_of_a_source_that_dies_ends_with_an_error() -> None:
    async def story(b: Bench, delay_s: float) -> None:
        r = request("r", PROMPT, max_tokens=60)
        source, target = b.stream(b.decode[0]), b.stream(b.decode[1])
        before = source.submit(r, 1)
        await before.until(lambda h: len(h.tokens[0]) >= 5)
        known = Request("r", PROMPT, r.sampling, (Choice(0, tuple(before.tokens[0])),), "", 60.0)
        after = target.submit(known, 2, take_from=TakeFrom(source.info, 1))
        await asyncio.sleep(delay_s)
        b.decode[0].kill(silent=False)
        await after.ended()
        if not after.failed:
            check(known, after)

    for delay_ms in range(0, 60, 3):
        play(lambda b, s=delay_ms / 1e3: story(b, s), num_decode=2)  # type: ignore[misc]


def test_answers_that_go_on_together_are_lent_to_nobody_any_more() -> None:
    """One lease of a move ended badly, all answers resumed, and wrote into blocks that the other lease still lent."""

    async def story(b: Bench) -> None:
        source, node = b.stream(b.decode[0]), b.decode[0].node
        assert node is not None
        r = request("r", PROMPT, max_tokens=40, n=2)
        before = source.submit(r, 1)
        await before.until(lambda h: len(h.tokens[0]) >= 4)
        calls = []
        for choice in r.choices:
            one = Request("r", PROMPT, r.sampling, (choice,), "", 60.0)
            running = RunningAttempt(HAND, 1, choice.index)
            call = PrefillCall(one, 2, "decode-1", 0, 3.0, LendMode.TAKE_OVER, running)
            calls.append(aiter(node.prefill(call)))
        for events in calls:
            while not isinstance(await anext(events), HandoffState):
                pass
        leases = node.parts.leases
        assert leases.num_live == 2
        await calls[0].aclose()  # type: ignore[attr-defined]
        await asyncio.sleep(0.001)
        assert leases.num_live == 0, "the other answer writes again: its blocks are nobody's to read"
        await before.ended(2)
        check(r, before)

    play(story)


def test_a_request_that_ended_is_not_moved() -> None:
    async def story(b: Bench) -> None:
        r = request("r", PROMPT)
        source, target = b.stream(b.decode[0]), b.stream(b.decode[1])
        before = source.submit(r, 1)
        await before.ended()
        after = target.submit(request("r", PROMPT), 2, take_from=TakeFrom(source.info, 1))
        await after.ended()
        assert after.last is not None
        assert after.last.error_code == "not_found"

    play(story, num_decode=2)


@pytest.mark.parametrize("end", ["cancelled", "finished"])
def test_a_request_that_ends_before_it_is_paused_is_not_moved(end: str) -> None:
    async def story(b: Bench) -> None:
        r, node = request("r", PROMPT, max_tokens=8), b.decode[0].node
        assert node is not None
        source = b.stream(b.decode[0])
        before = source.submit(r, 1)
        await before.until(lambda h: len(h.tokens[0]) >= 4)
        running = RunningAttempt(HAND, 1, 0)
        events = node.prefill(PrefillCall(r, 2, "decode-1", 0, 3.0, LendMode.TAKE_OVER, running))
        await anext(events)  # accepted; the reader is slow to read on
        if end == "cancelled":
            source.cancel(r, 1)
            await asyncio.sleep(0.5)
        else:
            await before.ended()
        with pytest.raises(NotFound):
            await anext(events)

    play(story)


def test_a_cancel_in_the_middle_of_a_move_ends_both_sides() -> None:
    async def story(b: Bench, delay_s: float) -> None:
        r = request("r", PROMPT, max_tokens=60)
        source, target, before = await moving(b, r)
        await asyncio.sleep(delay_s)
        source.cancel(r, 1)
        target.cancel(r, 2)
        await asyncio.sleep(1.5)
        for machine in b.decode:
            assert machine.node is not None
            assert machine.node.load().num_running + machine.node.load().num_waiting == 0
            assert machine.node.load().available_blocks == machine.node.load().total_blocks

    for delay_ms in range(0, 60, 3):
        play(lambda b, s=delay_ms / 1e3: story(b, s), num_decode=2)  # type: ignore[misc]
