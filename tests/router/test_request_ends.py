"""How long a request may wait, who may come in, how it is cancelled, and what can be told of it afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace

import pytest

from baton.core.errors import (
    BatonError,
    DeadlineExceeded,
    Incompatible,
    InvalidRequest,
    Overloaded,
    PeerLost,
)
from baton.core.messages import Submit, TokenChunk
from baton.core.worker import Span, WorkerLoad
from tests.router.fake_fleet import (
    Act,
    ScriptedFleet,
    ScriptedWorker,
    capability,
    expected,
    mute,
    now,
    refuse,
    request,
    simulate,
    speak,
)

# ---- waiting, deadlines, cancelling ----------------------------------------------------------------------------------


def test_a_request_waits_for_a_worker_and_goes_when_one_is_ready() -> None:
    async def main() -> None:
        worker = ScriptedWorker("d0", down=True)
        async with ScriptedFleet(worker) as fleet:
            asyncio.get_running_loop().call_later(4.0, setattr, worker, "down", False)
            assert await fleet.answer(request()) == expected(request())
            assert worker.submits[0].request.deadline_s < 597

    simulate(main)


@pytest.mark.parametrize(("deadline_s", "error", "after_s"), [(600.0, PeerLost, 10.0), (3.0, DeadlineExceeded, 3.0)])
def test_waiting_for_a_worker_ends(deadline_s: float, error: type[BatonError], after_s: float) -> None:
    async def main() -> None:
        async with ScriptedFleet(ScriptedWorker("d0", down=True)) as fleet:
            started = now()
            with pytest.raises(error):
                await fleet.answer(request(deadline_s=deadline_s))
            assert now() - started == pytest.approx(after_s, abs=0.01)

    simulate(main)


def test_the_refusal_says_how_the_workers_are() -> None:
    async def main() -> None:
        async with ScriptedFleet(ScriptedWorker("d0", down=True)) as fleet:
            with pytest.raises(PeerLost, match="d0 is connecting"):
                await fleet.answer(request())
        async with ScriptedFleet() as fleet:
            with pytest.raises(PeerLost, match="none has been registered"):
                await fleet.answer(request())

    simulate(main)


def test_a_worker_that_forgets_the_deadline_is_overruled_a_heartbeat_later() -> None:
    async def main() -> None:
        worker = ScriptedWorker("d0", script=mute)
        async with ScriptedFleet(worker) as fleet:
            started = now()
            with pytest.raises(DeadlineExceeded, match=r"0 tokens after its deadline of 2 s"):
                await fleet.answer(request(deadline_s=2.0))
            assert now() - started == pytest.approx(2.5)
            await asyncio.sleep(0.01)
            assert [c.request_id for c in worker.cancels] == ["r"]

    simulate(main)


def test_retries_share_one_deadline() -> None:
    def stall(submit: Submit) -> Iterator[Act]:
        yield 1.5
        yield PeerLost("killed")

    async def main() -> None:
        workers = [ScriptedWorker(f"d{i}", script=stall) for i in range(4)]
        async with ScriptedFleet(*workers) as fleet:
            with pytest.raises(DeadlineExceeded):
                await fleet.answer(request(deadline_s=4.0))
            left = sorted((s.epoch, s.request.deadline_s) for w in workers for s in w.submits)
            assert left == [(1, 4.0), (2, pytest.approx(2.5, abs=0.2)), (3, pytest.approx(1.0, abs=0.3))]

    simulate(main)


def test_closing_the_iterator_cancels_on_the_worker() -> None:
    async def main() -> None:
        worker = ScriptedWorker("d0")
        async with ScriptedFleet(worker) as fleet:
            async with aclosing(fleet.dispatcher.generate(request(max_tokens=50))) as chunks:
                async for chunk in chunks:
                    if chunk.first_index == 2:
                        break
            await asyncio.sleep(0.01)
            assert [(c.request_id, c.epoch) for c in worker.cancels] == [("r", 1)]
            assert fleet.dispatcher.num_inflight == 0
            assert fleet.dispatcher.traces.get("r").outcome == "cancelled"  # type: ignore[union-attr]

    simulate(main)


def test_a_reader_cancelled_while_it_waits_cancels_on_the_worker() -> None:
    async def main() -> None:
        worker = ScriptedWorker("d0", script=mute)
        async with ScriptedFleet(worker) as fleet:

            async def read() -> None:
                async with aclosing(fleet.dispatcher.generate(request())) as chunks:
                    async for _ in chunks:
                        pass

            task = asyncio.create_task(read())
            await asyncio.sleep(1)
            task.cancel()
            await asyncio.sleep(0.01)
            assert task.cancelled()
            assert len(worker.cancels) == 1

    simulate(main)


# ---- admission -------------------------------------------------------------------------------------------------------


def test_more_requests_than_max_inflight_are_refused_at_once() -> None:
    async def main() -> None:
        async with ScriptedFleet(ScriptedWorker("d0"), max_inflight=3) as fleet:
            running = [asyncio.create_task(fleet.answer(request(f"r{i}"))) for i in range(3)]
            await asyncio.sleep(0.001)
            started = now()
            with pytest.raises(Overloaded, match="max_inflight"):
                await fleet.answer(request("one too many"))
            assert now() == started
            assert await asyncio.gather(*running) == [expected(request(f"r{i}")) for i in range(3)]

    simulate(main)


def test_two_requests_cannot_share_an_id() -> None:
    async def main() -> None:
        async with ScriptedFleet(ScriptedWorker("d0")) as fleet:
            first = asyncio.create_task(fleet.answer(request()))
            await asyncio.sleep(0.001)
            with pytest.raises(InvalidRequest):
                await fleet.answer(request())
            assert await first == expected(request())

    simulate(main)


def test_a_prompt_that_no_worker_holds_is_refused_with_both_numbers() -> None:
    async def main() -> None:
        small, large = ScriptedWorker("d0", capability=capability(max_model_len=16)), ScriptedWorker("d1")
        async with ScriptedFleet(small, large) as fleet:
            with pytest.raises(InvalidRequest, match=r"64 tokens.*64") as e:
                await fleet.answer(request(prompt=range(64)))
            assert e.value.param == "prompt"
            await fleet.answer(request(prompt=range(30)))
            assert not small.submits, "the larger worker has room for it"

    simulate(main)


# ---- what can be told afterwards -------------------------------------------------------------------------------------


def test_a_finished_request_can_be_explained() -> None:
    def speak_with_spans(submit: Submit) -> Iterator[Act]:
        for act in speak(submit):
            if isinstance(act, TokenChunk) and act.finish:
                act = replace(
                    act, cached_tokens=4, spans=(Span("decode", 0.02, 0.05), Span("prefill chunk", 0.0, 0.01))
                )
            yield act

    async def main() -> None:
        refusing = ScriptedWorker("d0", script=refuse("overloaded"))
        busy = ScriptedWorker("d1", script=speak_with_spans, load=WorkerLoad(num_running=9))
        async with ScriptedFleet(refusing, busy) as fleet:
            await fleet.answer(request())
            record = fleet.dispatcher.traces.get("r")
            assert record is not None
            assert (record.outcome, record.num_prompt_tokens, record.num_output_tokens) == ("length", 5, 6)
            assert record.cached_tokens == 4
            assert [(a.route.decode, a.outcome) for a in record.attempts] == [("d0", "overloaded"), ("d1", "length")]
            assert record.route is not None
            assert record.route.reason.startswith("d1 alone")
            assert record.route.terms
            assert [s.name for s in record.timeline.spans] == [
                "router queue",
                "attempt",
                "prefill chunk",
                "first token",
                "decode",
            ]
            assert record.ttft_s == pytest.approx(0.01)

    simulate(main)


def test_only_the_last_requests_are_remembered() -> None:
    async def main() -> None:
        async with ScriptedFleet(ScriptedWorker("d0")) as fleet:
            for i in range(300):
                await fleet.answer(request(f"r{i}", max_tokens=1))
            traces = fleet.dispatcher.traces
            assert len(traces.recent()) == 256
            assert traces.recent(1)[0].request_id == "r299"
            assert traces.get("r43") is None
            assert traces.get("r44") is not None

    simulate(main)


def test_incompatible_is_retried_elsewhere() -> None:
    async def main() -> None:
        workers = [
            ScriptedWorker("d0", script=refuse(Incompatible.code)),
            ScriptedWorker("d1", load=WorkerLoad(num_running=5)),
        ]
        async with ScriptedFleet(*workers) as fleet:
            assert await fleet.answer(request()) == expected(request())

    simulate(main)
