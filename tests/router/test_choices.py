"""Requests with several answers: each of them exactly once, whoever dies."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from baton.core.errors import Cancelled, PeerLost
from baton.core.messages import Submit, TokenChunk
from baton.core.request import Choice, FinishReason, Request, SamplingParams
from baton.core.worker import WorkerLoad
from tests.router.fake_fleet import (
    EOS,
    Act,
    ScriptedFleet,
    ScriptedWorker,
    break_after,
    expected,
    once,
    refuse,
    request,
    simulate,
    speak,
    token,
)


def three(name: str = "r", **fields: object) -> Request:
    return request(name, choices=tuple(Choice(k) for k in range(3)), **fields)


def truth(r: Request) -> dict[int, list[int]]:
    return {c.index: expected(r, c.index) for c in r.choices}


def test_all_choices_come_over_one_attempt() -> None:
    async def main() -> None:
        worker = ScriptedWorker("d0")
        async with ScriptedFleet(worker) as fleet:
            assert await fleet.answers(three()) == truth(three())
            (submit,) = worker.submits
            assert submit.request.choices == three().choices
            assert worker.cancels == []
            assert fleet.dispatcher.traces.get("r").num_output_tokens == 18  # type: ignore[union-attr]

    simulate(main)


@pytest.mark.parametrize("say_finish", [True, False], ids=["", "last words lost"])
@pytest.mark.parametrize("lost_after", range(19))
def test_a_worker_lost_at_any_token_of_any_choice_costs_the_client_nothing(lost_after: int, say_finish: bool) -> None:
    """Three choices of six tokens, in turn: what is finished is left out of the second attempt, the rest replayed."""

    async def main() -> None:
        script = once(break_after(lost_after, say_finish))
        workers = [ScriptedWorker("d0", script=script), ScriptedWorker("d1", script=script)]
        async with ScriptedFleet(*workers) as fleet:
            assert await fleet.answers(three()) == truth(three())
            submits = sorted((s for w in workers for s in w.submits), key=lambda s: s.epoch)
            have = {k: lost_after // 3 + (lost_after % 3 > k) for k in range(3)}
            left = tuple(Choice(k, tuple(expected(three(), k)[:n])) for k, n in have.items() if n < 6)
            assert [s.request.choices for s in submits[1:]] == ([left] if left else [])

    simulate(main, range(2))


def test_a_choice_that_ended_with_its_word_lost_is_closed_while_the_others_go_on() -> None:
    sampling = SamplingParams(max_tokens=9)

    def one_ends(submit: Submit) -> Iterator[Act]:
        yield TokenChunk("r", submit.epoch, 0, (1, EOS), None, 0)
        yield TokenChunk("r", submit.epoch, 0, (2,), None, 1)
        yield PeerLost("killed")

    async def main() -> None:
        script = once(one_ends)
        workers = [ScriptedWorker("d0", script=script), ScriptedWorker("d1", script=script)]
        async with ScriptedFleet(*workers) as fleet:
            r = Request("r", (1, 2, 3), sampling, (Choice(0), Choice(1)))
            chunks = [c async for c in fleet.dispatcher.generate(r)]
            ends = [(c.choice, c.finish, c.first_index) for c in chunks if c.finish is not None]
            assert ends == [(0, FinishReason.STOP, 2), (1, FinishReason.LENGTH, 8)]
            second = max((s for w in workers for s in w.submits), key=lambda s: s.epoch)
            assert second.request.choices == (Choice(1, (2,)),)

    simulate(main)


def test_an_error_of_one_choice_ends_the_attempt_for_all() -> None:
    def fail(submit: Submit) -> Iterator[Act]:
        yield TokenChunk("r", submit.epoch, 0, (token("r", 0, 1),), None, 1)
        yield from refuse("overloaded")(submit)
        yield TokenChunk("r", submit.epoch, 1, (token("r", 1, 1),), None, 1)

    async def main() -> None:
        script = once(fail)
        workers = [ScriptedWorker("d0", script=script), ScriptedWorker("d1", script=script)]
        async with ScriptedFleet(*workers) as fleet:
            assert await fleet.answers(three()) == truth(three())
            first, second = sorted(workers, key=lambda w: w.submits[0].epoch)
            assert first.cancels == []
            assert [len(c.delivered) for c in second.submits[0].request.choices] == [0, 1, 0]
            assert fleet.metrics.value("baton_stale_chunks_total", reason="unknown") == 1

    simulate(main)


def test_several_choices_ask_for_more_room() -> None:
    async def main() -> None:
        tight = ScriptedWorker("d0", load=WorkerLoad(available_blocks=4, total_blocks=64))
        roomy = ScriptedWorker("d1", load=WorkerLoad(num_running=40, available_blocks=60, total_blocks=64))
        async with ScriptedFleet(tight, roomy) as fleet:
            await fleet.answers(request("one"))
            await fleet.answers(three("three"))
            assert [[s.request.request_id for s in w.submits] for w in (tight, roomy)] == [["one"], ["three"]]

    simulate(main)


def test_the_buffer_of_a_slow_reader_is_one_for_all_choices_and_its_worker_is_told_at_once() -> None:
    async def main() -> None:
        worker = ScriptedWorker("d0")
        async with ScriptedFleet(worker, client_buffer_tokens=8) as fleet:
            quick = asyncio.create_task(fleet.answers(three("quick")))
            chunks = fleet.dispatcher.generate(three())
            first = await anext(chunks)
            await asyncio.sleep(0.5)
            assert [(c.request_id, c.reason) for c in worker.cancels] == [("r", "the client reads too slowly")]
            assert first.token_ids
            for _ in range(8):
                assert (await anext(chunks)).token_ids, "what was buffered before is still handed out"
            with pytest.raises(Cancelled, match="left more than 8 tokens unread"):
                await anext(chunks)
            assert await quick == truth(three("quick"))
            assert fleet.dispatcher.num_inflight == 0

    simulate(main)


@pytest.mark.parametrize("max_tokens", [8, 9])
def test_a_buffer_that_the_last_token_overflows_is_an_error_and_no_short_answer(max_tokens: int) -> None:
    async def main() -> None:
        worker = ScriptedWorker("d0")
        async with ScriptedFleet(worker, client_buffer_tokens=8) as fleet:
            chunks = fleet.dispatcher.generate(request(max_tokens=max_tokens + 1, deadline_s=20.0))
            assert (await anext(chunks)).first_index == 0
            await asyncio.sleep(30)
            rest = [await anext(chunks) for _ in range(8)]
            assert [c.first_index for c in rest] == list(range(1, 9))
            if max_tokens == 8:
                assert rest[-1].finish is FinishReason.LENGTH, "it was all there before its deadline"
                with pytest.raises(StopAsyncIteration):
                    await anext(chunks)
            else:
                with pytest.raises(Cancelled):
                    await anext(chunks)

    simulate(main)


def test_a_deadline_cancels_at_the_worker_at_once_however_slowly_the_client_reads() -> None:
    def slow(submit: Submit) -> Iterator[Act]:
        for act in speak(submit):
            yield act
            yield 1.0

    async def main() -> None:
        worker = ScriptedWorker("d0", script=slow)
        async with ScriptedFleet(worker) as fleet:
            chunks = fleet.dispatcher.generate(request(deadline_s=2.0))
            await anext(chunks)
            await asyncio.sleep(2.6)
            assert [(c.request_id, c.reason) for c in worker.cancels] == [("r", "its time is up")]
            await chunks.aclose()

    simulate(main)
