"""A client that reads on: what it says of its request is believed when a worker confirms it, and one run speaks."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator

import pytest

from baton.core.errors import InvalidRequest, Overloaded, PeerLost, RateLimited, ResumedElsewhere
from baton.core.messages import Submit, TokenChunk
from baton.core.request import FinishReason, Request
from baton.core.worker import WorkerLoad
from baton.router.room import SLACK
from tests.router.fake_fleet import (
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
)


def full(worker_id: str = "d0", **fields: object) -> ScriptedWorker:
    """Without a place, and no fresh one."""
    load = WorkerLoad(available_blocks=640, total_blocks=640, num_running=64 + SLACK, steps=1000)
    return ScriptedWorker(worker_id, load=load, **fields)  # type: ignore[arg-type]


async def read_on(fleet: ScriptedFleet, r: Request, last_seen: str | None = "d0") -> list[int]:
    tokens: list[int] = []
    async for chunk in fleet.dispatcher.generate(r, last_seen=last_seen):
        tokens += chunk.token_ids
    return tokens


# ---- admission -----------------------------------------------------------------------------------------------------


def test_who_only_claims_that_its_request_runs_waits_as_all_others_do() -> None:
    async def main() -> None:
        worker = full()
        async with ScriptedFleet(worker, max_queued=4) as fleet:
            honest = [asyncio.create_task(fleet.answer(request(f"h{i}"))) for i in range(3)]
            await asyncio.sleep(0.1)
            forged = [asyncio.create_task(read_on(fleet, request(f"m{i}"))) for i in range(20)]
            await asyncio.sleep(1)
            assert worker.submits == []
            assert len(worker.resumes) == 20
            refused = [task for task in forged if task.done()]
            assert len(refused) == 19
            assert all(isinstance(task.exception(), Overloaded) for task in refused)
            assert not any(task.done() for task in honest)
            for task in (*honest, *forged):
                task.cancel()
            await asyncio.wait((*honest, *forged))

    simulate(main)


def test_what_a_worker_runs_goes_on_however_many_wait() -> None:
    async def main() -> None:
        worker = full(knows={"mine": request("mine")})
        async with ScriptedFleet(worker, max_queued=1) as fleet:
            waits = asyncio.create_task(fleet.answer(request("waits")))
            await asyncio.sleep(0.1)
            assert await read_on(fleet, request("mine")) == expected(request("mine"))
            assert worker.submits == []
            waits.cancel()
            await asyncio.wait([waits])

    simulate(main)


def test_who_left_and_comes_back_for_what_was_cancelled_waits_for_a_place_again() -> None:
    """Else leaving after the first token and reading on would be a way around the queue."""

    def cancelled(submit: Submit) -> Iterator[Act]:
        for act in speak(submit):
            yield act
            if isinstance(act, TokenChunk):
                yield TokenChunk("mine", submit.epoch, act.first_index + 1, (), FinishReason.CANCELLED)
                return

    async def main() -> None:
        worker = full(knows={"mine": request("mine")}, script=cancelled)
        async with ScriptedFleet(worker, max_queued=1) as fleet:
            waits = asyncio.create_task(fleet.answer(request("waits")))
            await asyncio.sleep(0.1)
            with pytest.raises(Overloaded):
                await read_on(fleet, request("mine"))
            assert worker.submits == []
            waits.cancel()
            await asyncio.wait([waits])

    simulate(main)


def test_what_a_worker_runs_is_not_paid_for_again_and_what_none_runs_is_before_it_is_computed() -> None:
    async def main() -> None:
        worker = ScriptedWorker("d0", knows={"known": request("known")})

        async def refused() -> None:
            raise RateLimited("used up")

        async with ScriptedFleet(worker) as fleet:
            chunks = fleet.dispatcher.generate(request("known"), "d0", refused)
            assert [t async for chunk in chunks for t in chunk.token_ids] == expected(request("known"))
            with pytest.raises(RateLimited):
                await anext(fleet.dispatcher.generate(request("made up"), "d0", refused))
            assert worker.submits == []

    simulate(main)


# ---- one run speaks ------------------------------------------------------------------------------------------------


def test_a_run_that_still_asks_for_its_request_ends_when_its_client_reads_on() -> None:
    async def main() -> None:
        worker = ScriptedWorker("d0", down=True)
        async with ScriptedFleet(worker) as fleet:
            first = asyncio.create_task(read_on(fleet, request()))
            await asyncio.sleep(0.2)
            second = asyncio.create_task(read_on(fleet, request()))
            await asyncio.wait([first], timeout=0.1)
            assert isinstance(first.exception(), ResumedElsewhere)
            worker.down = False
            assert await second == expected(request())
            assert len(worker.submits) == 1

    simulate(main, range(1, 6))


def test_a_run_between_two_attempts_ends_when_its_client_reads_on() -> None:
    async def main() -> None:
        def dies(submit: Submit) -> Iterator[Act]:
            for act in break_after(2)(submit):
                worker.down = isinstance(act, PeerLost)
                yield act

        worker = ScriptedWorker("d0", script=once(dies))
        async with ScriptedFleet(worker) as fleet:
            first = asyncio.create_task(read_on(fleet, request(), None))
            await asyncio.sleep(1.4)
            second = asyncio.create_task(read_on(fleet, request()))
            await asyncio.wait([first], timeout=0.1)
            assert isinstance(first.exception(), ResumedElsewhere)
            worker.down = False
            assert await second == expected(request())
            assert len(worker.submits) == 2
            assert fleet.dispatcher.num_inflight == 0

    simulate(main, range(1, 6))


def test_a_run_in_the_queue_ends_when_its_client_reads_on_and_leaves_no_seat() -> None:
    async def main() -> None:
        worker = full()
        async with ScriptedFleet(worker, max_queued=2) as fleet:
            tasks = [asyncio.create_task(read_on(fleet, request(), None))]
            for _ in range(5):
                await asyncio.sleep(0.1)
                tasks.append(asyncio.create_task(read_on(fleet, request())))
            await asyncio.sleep(0.1)
            assert [task.done() for task in tasks] == [True] * 5 + [False]
            worker.load = dataclasses.replace(worker.load, num_running=0)
            worker.say()
            assert await tasks[-1] == expected(request())
            assert len(worker.submits) == 1
            assert all(isinstance(task.exception(), ResumedElsewhere) for task in tasks[:-1])

    simulate(main)


def test_another_question_under_the_same_id_ends_nobodys_answer() -> None:
    async def main() -> None:
        async with ScriptedFleet(ScriptedWorker("d0")) as fleet:
            theirs = asyncio.create_task(fleet.answer(request(max_tokens=20)))
            await asyncio.sleep(0.05)
            for other in (request(prompt=(9, 9), max_tokens=20), request(max_tokens=19)):
                with pytest.raises(InvalidRequest, match="is running"):
                    await read_on(fleet, other)
            assert await theirs == expected(request(max_tokens=20))

    simulate(main)


def test_what_is_refused_itself_ends_nobodys_answer() -> None:
    async def main() -> None:
        async with ScriptedFleet(ScriptedWorker("d0")) as fleet:
            theirs = asyncio.create_task(fleet.answer(request(max_tokens=20)))
            await asyncio.sleep(0.05)
            fleet.dispatcher._quarantine.enter(request(max_tokens=20), ["a", "b"])
            with pytest.raises(Exception, match="crashed"):
                await read_on(fleet, request(max_tokens=20))
            assert await theirs == expected(request(max_tokens=20))

    simulate(main)


# ---- where it runs -------------------------------------------------------------------------------------------------


def test_a_client_that_reads_on_at_the_same_router_gets_what_its_worker_goes_on_with() -> None:
    async def main() -> None:
        worker = ScriptedWorker("d0", knows={"r": request(max_tokens=20)})
        async with ScriptedFleet(ScriptedWorker("d1", script=refuse("overloaded")), worker) as fleet:
            first = asyncio.create_task(read_on(fleet, request(max_tokens=20), None))
            await asyncio.sleep(0.1)
            assert await read_on(fleet, request(max_tokens=20), "d1") == expected(request(max_tokens=20))
            assert isinstance(first.exception(), ResumedElsewhere)
            assert worker.cancels == []
            assert len(worker.submits) == 1

    simulate(main)


def test_what_moved_is_read_to_its_end_where_it_moved_to() -> None:
    def moved(submit: Submit) -> Iterator[Act]:
        yield TokenChunk("r", submit.epoch, 0, tuple(expected(request())[:2]))
        yield TokenChunk("r", submit.epoch, 2, (), FinishReason.CANCELLED, error_message="it was handed over")

    async def main() -> None:
        old = ScriptedWorker("d0", script=moved, knows={"r": request()})
        new = ScriptedWorker("d1", knows={"r": request()})
        async with ScriptedFleet(old, new) as fleet:
            assert await read_on(fleet, request()) == expected(request())
            assert (old.submits, new.submits) == ([], [])

    simulate(main)


def test_a_worker_whose_request_is_read_on_at_another_router_is_not_to_blame() -> None:
    def resumed_elsewhere(submit: Submit) -> Iterator[Act]:
        yield 0.01
        yield from refuse(ResumedElsewhere.code)(submit)

    async def main() -> None:
        worker = ScriptedWorker("d0", script=resumed_elsewhere)
        async with ScriptedFleet(worker) as fleet:
            for i in range(8):
                with pytest.raises(ResumedElsewhere):
                    await fleet.answer(request(f"r{i}"))
                await asyncio.sleep(1)
            assert len(worker.submits) == 8, "none is computed again"
            assert fleet.metrics.value("baton_circuits_opened_total", worker="d0") == 0
            assert worker.cancels == []

    simulate(main)
