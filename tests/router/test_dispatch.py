"""Requests and their attempts: every token once, whatever duplicates, reorders, refuses or dies."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.core.block_hash import HashScope, block_hashes
from baton.core.errors import (
    BatonError,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    Overloaded,
    PeerLost,
)
from baton.core.messages import Submit, TokenChunk
from baton.core.request import FinishReason, Request, SamplingParams
from baton.core.worker import Role, WorkerLoad
from tests.router.fake_fleet import (
    BLOCK,
    EOS,
    Act,
    ScriptedFleet,
    ScriptedWorker,
    break_after,
    capability,
    expected,
    mute,
    now,
    once,
    refuse,
    request,
    simulate,
    speak,
    token,
    with_delivered,
)

# ---- the plain case --------------------------------------------------------------------------------------------------


def test_a_request_gets_its_tokens_and_leaves_nothing_behind() -> None:
    async def main() -> None:
        worker = ScriptedWorker("d0")
        async with ScriptedFleet(worker) as fleet:
            assert await fleet.answer(request()) == expected(request())
            assert fleet.dispatcher.num_inflight == 0
            assert worker.cancels == []
            (view,) = fleet.fleet.workers()
            assert (view.num_requests, view.queued_prefill_tokens) == (0, 0)
            assert fleet.metrics.value("baton_dispatches_total", prefill="local") == 1

    simulate(main)


def test_the_route_names_prefill_for_a_long_prompt_and_the_epoch_starts_at_one() -> None:
    async def main() -> None:
        decode, prefill = ScriptedWorker("d0"), ScriptedWorker("p0", Role.PREFILL)
        async with ScriptedFleet(decode, prefill, local_prefill_max_tokens=4) as fleet:
            await fleet.answer(request(prompt=range(20)))
            (submit,) = decode.submits
            assert submit.route.prefill == prefill.info
            assert submit.epoch == 1
            assert 599 < submit.request.deadline_s <= 600
            assert fleet.metrics.value("baton_dispatches_total", prefill="remote") == 1

    simulate(main)


def test_a_prompt_goes_where_its_prefix_is() -> None:
    async def main() -> None:
        prompt = tuple(range(20))
        hashes = block_hashes(HashScope.of(capability()), prompt, BLOCK)
        holder = ScriptedWorker("d1", held=dict.fromkeys(hashes))
        async with ScriptedFleet(
            ScriptedWorker("d0"), holder, ScriptedWorker("d2"), local_prefill_max_tokens=4
        ) as fleet:
            for i in range(3):
                await fleet.answer(request(f"r{i}", prompt))
            assert len(holder.submits) == 3

    simulate(main)


def test_a_burst_is_spread_before_any_worker_reports() -> None:
    async def main() -> None:
        workers = [ScriptedWorker(f"d{i}", script=mute) for i in range(4)]
        async with ScriptedFleet(*workers) as fleet:
            burst = [asyncio.create_task(fleet.answer(request(f"r{i}", deadline_s=1.0))) for i in range(40)]
            await asyncio.sleep(0.01)
            assert [len(w.submits) for w in workers] == [10] * 4
            for task in burst:
                with pytest.raises(DeadlineExceeded):
                    await task

    simulate(main)


def test_handed_off_requests_count_on_the_decode_worker_until_their_first_token() -> None:
    async def main() -> None:
        decodes = [ScriptedWorker(f"d{i}", script=mute) for i in range(4)]
        prefill = ScriptedWorker("p0", Role.PREFILL)
        async with ScriptedFleet(*decodes, prefill, local_prefill_max_tokens=4) as fleet:
            for i in range(12):
                task = asyncio.create_task(fleet.answer(request(f"r{i}", range(20), deadline_s=99.0)))
                await asyncio.sleep(1.0)  # reports come in between and show nothing: the prompts are elsewhere
                assert not task.done()
            assert [len(w.submits) for w in decodes] == [3] * 4
            for worker in decodes:
                worker.say(*(TokenChunk(s.request.request_id, s.epoch, 0, (1,)) for s in worker.submits))
            await asyncio.sleep(0.01)
            assert [c.num_sequences for c in fleet.fleet.candidates(Role.DECODE, {})] == [0] * 4

    simulate(main)


def test_a_failed_attempt_leaves_no_work_counted() -> None:
    async def main() -> None:
        decode, prefill = ScriptedWorker("d0", script=refuse("overloaded")), ScriptedWorker("p0", Role.PREFILL)
        async with ScriptedFleet(decode, prefill, local_prefill_max_tokens=0, max_attempts=2) as fleet:
            with pytest.raises(Overloaded):
                await fleet.answer(request())
            for role in Role:
                (worker,) = fleet.fleet.candidates(role, {})
                assert (worker.num_sequences, worker.queued_prefill_tokens) == (0, 0)

    simulate(main)


def test_tenants_share_no_prefix_in_the_index() -> None:
    """A worker that holds a prompt for one tenant holds nothing of it for another."""

    async def main() -> None:
        prompt = tuple(range(20))
        mine, nobodys = (block_hashes(HashScope.of(capability(), salt), prompt, BLOCK) for salt in ("acme", ""))
        holder = ScriptedWorker("d0", held=dict.fromkeys(mine))
        plain = ScriptedWorker("d1", held=dict.fromkeys(nobodys))
        async with ScriptedFleet(holder, plain, ScriptedWorker("d2")) as fleet:
            for i in range(3):
                await fleet.answer(request(f"a{i}", prompt, tenant="acme"))
                await fleet.answer(request(f"n{i}", prompt))
            assert [s.request.tenant for s in holder.submits] == ["acme"] * 3
            assert [s.request.tenant for s in plain.submits] == [""] * 3

    simulate(main)


# ---- exactly once ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("say_finish", [True, False], ids=["", "last word lost"])
@pytest.mark.parametrize("lost_after", range(8))
def test_a_worker_lost_at_any_token_costs_the_client_nothing(lost_after: int, say_finish: bool) -> None:
    """With 7 tokens said and the finish lost, the request is complete: the router closes it, nobody is asked again."""
    r = request(max_tokens=7)

    async def main() -> None:
        script = once(break_after(lost_after, say_finish))
        workers = [ScriptedWorker("d0", script=script), ScriptedWorker("d1", script=script)]
        async with ScriptedFleet(*workers) as fleet:
            assert await fleet.answer(r) == expected(r)
            submits = sorted((s for w in workers for s in w.submits), key=lambda s: s.epoch)
            retried = lost_after < 7
            assert [s.epoch for s in submits] == [1, 2][: 1 + retried]
            assert submits[-1].request.choices[0].delivered == tuple(expected(r)[:lost_after] if retried else ())
            assert fleet.metrics.value("baton_dispatch_retries_total", reason="peer_lost") == retried

    simulate(main, range(3))


@st.composite
def mangled(draw: st.DrawFn) -> list[tuple[int, int, int, bool]]:
    """(epoch, first index, number of tokens, is it the last) of chunks in any order, any of them more than once."""
    return draw(
        st.lists(
            st.tuples(st.sampled_from([0, 1, 1, 1, 2]), st.integers(0, 7), st.integers(0, 3), st.booleans()),
            max_size=12,
        )
    )


@settings(max_examples=200)
@given(mess=mangled(), seed=st.integers(0, 3))
def test_duplicated_reordered_stale_and_contradicting_chunks_never_reach_the_client(
    mess: list[tuple[int, int, int, bool]], seed: int
) -> None:
    r = request(max_tokens=6)

    def messy(submit: Submit) -> Iterator[Act]:
        for epoch, first, count, last in mess:
            ids = tuple(token("r", i) for i in range(first, min(first + count, 6)))
            finish = FinishReason.LENGTH if last and first + len(ids) == 6 else None
            yield TokenChunk("r", epoch, first, ids, finish)
        yield PeerLost("killed")

    async def main() -> None:
        script = once(messy)
        async with ScriptedFleet(ScriptedWorker("d0", script=script), ScriptedWorker("d1", script=script)) as fleet:
            assert await fleet.answer(r) == expected(r)

    simulate(main, [seed])


def test_a_gap_is_a_lost_worker_and_the_attempt_is_cancelled_there() -> None:
    def skip(submit: Submit) -> Iterator[Act]:
        yield TokenChunk("r", 1, 0, (token("r", 0),))
        yield TokenChunk("r", 1, 2, (token("r", 2),))
        yield 5.0

    async def main() -> None:
        script = once(skip)
        workers = [ScriptedWorker("d0", script=script), ScriptedWorker("d1", script=script)]
        async with ScriptedFleet(*workers) as fleet:
            assert await fleet.answer(request()) == expected(request())
            first, second = sorted(workers, key=lambda w: w.submits[0].epoch)
            assert [(c.request_id, c.epoch) for c in first.cancels] == [("r", 1)]
            assert second.submits[0].request.choices[0].delivered == (token("r", 0),)

    simulate(main)


def test_an_end_before_what_the_client_already_has_is_not_believed() -> None:
    def contradict(submit: Submit) -> Iterator[Act]:
        yield TokenChunk("r", 1, 0, (token("r", 0), token("r", 1), token("r", 2)))
        yield TokenChunk("r", 1, 1, (token("r", 1),), FinishReason.LENGTH)

    async def main() -> None:
        script = once(contradict)
        async with ScriptedFleet(ScriptedWorker("d0", script=script), ScriptedWorker("d1", script=script)) as fleet:
            assert await fleet.answer(request()) == expected(request())

    simulate(main)


# ---- what ends a request when its worker cannot say so ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampling", "last", "finish"),
    [
        (SamplingParams(max_tokens=9), EOS, FinishReason.STOP),
        (SamplingParams(max_tokens=9, stop_token_ids=(5,)), 5, FinishReason.STOP),
        (SamplingParams(max_tokens=2, ignore_eos=True), EOS, FinishReason.LENGTH),
        (SamplingParams(max_tokens=9, ignore_eos=True), EOS, None),
        (SamplingParams(max_tokens=100), 1, None),
    ],
    ids=["eos", "stop id", "length", "eos ignored", "not at its end"],
)
def test_tokens_that_end_the_request_end_it_once(
    sampling: SamplingParams, last: int, finish: FinishReason | None
) -> None:
    r = Request("r", (1, 2, 3), sampling)

    def end_silently(submit: Submit) -> Iterator[Act]:
        yield TokenChunk("r", submit.epoch, 0, (1, last))
        yield PeerLost("killed")

    async def main() -> None:
        script = once(end_silently)
        workers = [ScriptedWorker("d0", script=script), ScriptedWorker("d1", script=script)]
        async with ScriptedFleet(*workers) as fleet:
            chunks = [c async for c in fleet.dispatcher.generate(r)]
            tokens = [t for c in chunks for t in c.token_ids]
            if finish is None:
                assert tokens[:2] == [1, last]
                assert len(tokens) == sampling.max_tokens
            else:
                assert tokens == [1, last]
                assert [c.finish for c in chunks] == [None, finish]
                assert sum(len(w.submits) for w in workers) == 1

    simulate(main)


def test_a_request_that_fills_the_context_ends_there() -> None:
    async def main() -> None:
        worker = ScriptedWorker("d0", capability=capability(max_model_len=8), script=break_after(3, say_finish=False))
        async with ScriptedFleet(worker) as fleet:
            chunks = [c async for c in fleet.dispatcher.generate(request(max_tokens=50))]
            assert sum(len(c.token_ids) for c in chunks) == 3
            assert chunks[-1].finish is FinishReason.LENGTH

    simulate(main)


def test_a_request_taken_over_goes_on_with_the_next_index() -> None:
    async def main() -> None:
        r = request(max_tokens=6)
        async with ScriptedFleet(ScriptedWorker("d0")) as fleet:
            some = with_delivered(r, expected(r)[:4])
            assert await fleet.answer(some) == expected(r)
            whole = with_delivered(r, expected(r))
            assert await fleet.answer(whole) == expected(r)
            assert len(fleet.workers["d0"].submits) == 1

    simulate(main)


# ---- refusals and failures -------------------------------------------------------------------------------------------


def test_a_refusal_goes_to_the_next_best_decode_worker_at_once() -> None:
    async def main() -> None:
        full = ScriptedWorker("d0", script=refuse("overloaded"))
        spare = ScriptedWorker("d1", load=WorkerLoad(num_running=9, available_blocks=64, total_blocks=64))
        async with ScriptedFleet(full, spare) as fleet:
            started = now()
            assert await fleet.answer(request()) == expected(request())
            assert now() - started < 0.08, "six tokens of 10 ms, and no pause"
            assert [s.epoch for s in spare.submits] == [2]
            assert full.cancels == [], "a refused attempt is over"

    simulate(main)


def test_when_all_refuse_they_are_asked_again_and_in_the_end_the_client_hears_it() -> None:
    async def main() -> None:
        workers = [ScriptedWorker(f"d{i}", script=refuse("overloaded", "no credit")) for i in range(2)]
        async with ScriptedFleet(*workers, max_attempts=2) as fleet:
            started = now()
            with pytest.raises(Overloaded, match=r"refused for 60 s.*no credit"):
                await fleet.answer(request())
            assert 60.0 <= now() - started < 61.5, "a refusal costs no attempt, only patience"
            epochs = sorted(s.epoch for w in workers for s in w.submits)
            assert epochs == list(range(1, len(epochs) + 1))
            assert abs(len(workers[0].submits) - len(workers[1].submits)) <= 1
            workers[0].script = once(refuse("overloaded"))
            assert await fleet.answer(request("later")) == expected(request("later"))

    simulate(main)


def test_a_long_prompt_is_not_overtaken_by_short_ones_for_ever() -> None:
    async def main() -> None:
        used = 0

        def with_memory(submit: Submit) -> Iterator[Act]:
            nonlocal used
            need = 4 if len(submit.request.prompt) > 9 else 1
            if used + need > 4:
                yield from refuse("overloaded", "no blocks")(submit)
                return
            used += need
            yield 0.3
            yield from speak(submit)
            used -= need

        async with ScriptedFleet(ScriptedWorker("d0", script=with_memory)) as fleet:

            async def stream_of_short_ones(name: int) -> None:
                for i in range(100):
                    short = request(f"{name}-{i}")
                    assert await fleet.answer(short) == expected(short)

            others = [asyncio.create_task(stream_of_short_ones(name)) for name in range(6)]
            await asyncio.sleep(1)
            long, started = request("long", range(1, 20)), now()
            assert await fleet.answer(long) == expected(long)
            assert now() - started < 15
            assert not any(task.done() for task in others)
            await asyncio.gather(*others)
            assert len(fleet.dispatcher._line) <= 1, "seats are given up with their requests"

    simulate(main, range(3))


@pytest.mark.parametrize(
    ("code", "error"),
    [("invalid_request", InvalidRequest), ("internal", InternalError), ("deadline_exceeded", DeadlineExceeded)],
)
def test_what_another_worker_would_answer_too_is_not_tried_again(code: str, error: type[BatonError]) -> None:
    async def main() -> None:
        worker = ScriptedWorker("d0", script=refuse(code, "because"))
        async with ScriptedFleet(worker, ScriptedWorker("p0", Role.PREFILL)) as fleet:
            with pytest.raises(error, match="because"):
                await fleet.answer(request())
            assert len(worker.submits) == 1

    simulate(main)


def test_a_failed_hand_off_is_blamed_on_the_prefill_worker() -> None:
    async def main() -> None:
        decode = ScriptedWorker("d0", script=once(refuse("peer_lost", "p is gone")))
        prefills = [ScriptedWorker(f"p{i}", Role.PREFILL) for i in range(2)]
        async with ScriptedFleet(decode, *prefills, local_prefill_max_tokens=4) as fleet:
            await fleet.answer(request(prompt=range(20)))
            first, second = decode.submits
            assert first.route.prefill is not None
            assert second.route.prefill is not None
            assert first.route.prefill != second.route.prefill

    simulate(main)


def test_a_worker_that_cancels_by_itself_is_left_for_another() -> None:
    def leave(submit: Submit) -> Iterator[Act]:
        yield TokenChunk("r", 1, 0, (token("r", 0),))
        yield TokenChunk("r", 1, 1, (), FinishReason.CANCELLED)

    async def main() -> None:
        script = once(leave)
        async with ScriptedFleet(ScriptedWorker("d0", script=script), ScriptedWorker("d1", script=script)) as fleet:
            assert await fleet.answer(request()) == expected(request())

    simulate(main)


def test_attempts_that_all_fail_end_with_the_last_error() -> None:
    async def main() -> None:
        workers = [ScriptedWorker(f"d{i}", script=break_after(0)) for i in range(3)]
        async with ScriptedFleet(*workers, max_attempts=3) as fleet:
            with pytest.raises(PeerLost, match="failed 3 times"):
                await fleet.answer(request())
            assert fleet.dispatcher.traces.get("r").outcome == "peer_lost"  # type: ignore[union-attr]

    simulate(main)


def test_nobody_reads_on_where_another_tenant_reads() -> None:
    async def main() -> None:
        async with ScriptedFleet(ScriptedWorker("d0", script=mute)) as fleet:
            theirs = asyncio.ensure_future(fleet.answer(request()))
            await asyncio.sleep(1)
            mine = dataclasses.replace(request(), tenant="another")
            with pytest.raises(InvalidRequest, match="is running"):
                await anext(fleet.dispatcher.generate(mine, last_seen="d0"))
            assert not theirs.done()
            theirs.cancel()

    simulate(main)


def test_a_pair_that_does_not_fit_is_never_made() -> None:
    async def main() -> None:
        odd = ScriptedWorker("p0", Role.PREFILL, capability(numerics="bf16"))
        decode = ScriptedWorker("d0")
        async with ScriptedFleet(decode, odd, local_prefill_max_tokens=4) as fleet:
            await fleet.answer(request(prompt=range(30)))
            assert decode.submits[0].route.prefill is None

    simulate(main)
