"""Requests wait in the router, in a fair order and not for nothing; workers get what they can begin."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest

from baton.core.errors import BatonError, DeadlineExceeded, InternalError, InvalidRequest, NotFound, Overloaded
from baton.core.messages import Submit
from baton.core.worker import WorkerLoad
from baton.router.health import OPEN_FIRST_S, RAMP_S, TOGETHER_S
from baton.router.waiting import MAX_OVERTAKEN
from tests.router.fake_fleet import (
    Act,
    Script,
    ScriptedFleet,
    ScriptedWorker,
    expected,
    now,
    refuse,
    request,
    simulate,
    speak,
)

SLOTS = 66
"""What a worker of the default configuration takes: 64 run, 2 are at hand."""


def after_a_while(submit: Submit) -> Iterator[Act]:
    yield 0.05
    yield from speak(submit)


def worker(worker_id: str = "d0", free: int = 0, script: Script = after_a_while) -> ScriptedWorker:
    """With so many places free, and no fresh one."""
    load = WorkerLoad(available_blocks=640, total_blocks=640, num_running=SLOTS - free, steps=1000)
    return ScriptedWorker(worker_id, load=load, script=script)


def free(of: ScriptedWorker, places: int) -> None:
    of.load = replace(of.load, num_running=SLOTS - places)
    of.say()


async def ask_all(fleet: ScriptedFleet, *names: str, **fields: object) -> list[asyncio.Task[list[int]]]:
    """Ask in this order; returns when all of them wait."""
    tasks = []
    for name in names:
        tasks.append(asyncio.create_task(fleet.answer(request(name, tenant=name.split("-")[0], **fields))))
        await asyncio.sleep(0.0001)
    return tasks


async def drained_one_by_one(of: ScriptedWorker, num: int) -> list[str]:
    """Its submits, when a place becomes free now and then and is filled at once."""
    for i in range(num):
        free(of, 1)
        await asyncio.sleep(0.01)
        assert len(of.submits) == i + 1, "one place, one request"
        free(of, 0)
        await asyncio.sleep(0.2)
    return [submit.request.request_id for submit in of.submits]


def test_a_request_waits_in_the_router_while_no_worker_has_a_place_and_goes_when_one_reports_it() -> None:
    async def main() -> None:
        full = worker()
        async with ScriptedFleet(full) as fleet:
            (task,) = await ask_all(fleet, "r")
            await asyncio.sleep(5.0)
            assert full.submits == []
            assert fleet.metrics.value("baton_queued_requests") == 1
            free(full, 1)
            assert await task == expected(request("r"))
            assert fleet.metrics.value("baton_queued_requests") == 0

    simulate(main, range(3))


def test_a_request_waits_while_every_worker_has_too_many_prompts_before_it_unless_it_is_short() -> None:
    async def main() -> None:
        busy = worker(free=60)
        busy.load = replace(busy.load, queued_prefill_tokens=100_000)
        async with ScriptedFleet(busy, local_prefill_max_tokens=8) as fleet:
            (task,) = await ask_all(fleet, "r", prompt=range(50))
            await asyncio.sleep(2.0)
            assert busy.submits == []
            busy.load = replace(busy.load, queued_prefill_tokens=0)
            busy.say()
            assert await task == expected(request("r"))
            busy.load = replace(busy.load, queued_prefill_tokens=100_000)
            busy.say()
            assert await fleet.answer(request("short")) == expected(request("short"))

    simulate(main)


def test_what_waits_goes_by_class_then_by_fair_share_then_by_arrival() -> None:
    async def main() -> None:
        full = worker()
        tenants = {"gold": {"priority": "high"}, "batch": {"priority": "low"}}
        async with ScriptedFleet(full, tenants=tenants) as fleet:
            names = ["batch-0", "a-0", "a-1", "a-2", "a-3", "b-0", "b-1", "gold-0"]
            tasks = await ask_all(fleet, *names)
            order = await drained_one_by_one(full, len(names))
            assert order == ["gold-0", "a-0", "b-0", "a-1", "b-1", "a-2", "a-3", "batch-0"]
            await asyncio.gather(*tasks)

    simulate(main, range(3))


def test_a_request_may_ask_for_a_lower_class_than_its_tenants_and_is_placed_and_queued_in_it() -> None:
    async def main() -> None:
        full = worker()
        async with ScriptedFleet(full, tenants={"gold": {"priority": "high"}}) as fleet:
            tasks = await ask_all(fleet, "gold-nightly", priority=2)
            tasks += await ask_all(fleet, "a-0", "gold-0")
            assert await drained_one_by_one(full, 3) == ["gold-0", "a-0", "gold-nightly"]
            await asyncio.gather(*tasks)
            placed = {r.request_id: r.decisions[-1].facts.priority for r in fleet.dispatcher.traces.recent()}
            assert placed == {"gold-0": 1, "a-0": 0, "gold-nightly": -1}

    simulate(main, range(3))


def test_a_burst_gives_no_worker_more_than_its_places_before_it_has_reported() -> None:
    async def main() -> None:
        workers = [worker(f"d{i}", free=3) for i in range(2)]
        async with ScriptedFleet(*workers) as fleet:
            tasks = await ask_all(fleet, *(f"r{i}" for i in range(20)))
            assert [len(w.submits) for w in workers] == [3, 3]
            for w in workers:
                free(w, 60)
            await asyncio.gather(*tasks)

    simulate(main, range(3))


def test_one_place_is_given_once_however_often_it_is_reported() -> None:
    async def main() -> None:
        full = worker()
        async with ScriptedFleet(full) as fleet:
            tasks = await ask_all(fleet, *(f"r{i}" for i in range(3)))
            look = fleet.dispatcher._admission.look

            def twice() -> None:
                look()
                look()

            fleet.fleet.on_report = twice
            free(full, 1)
            await asyncio.sleep(0.01)
            assert len(full.submits) == 1
            free(full, 60)
            await asyncio.gather(*tasks)

    simulate(main, range(3))


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back() -> None:
    async def main() -> None:
        full = worker()
        async with ScriptedFleet(full, max_queued=4) as fleet:
            tasks = await ask_all(fleet, *(f"r{i}" for i in range(4)))
            started = now()
            with pytest.raises(Overloaded, match=r"router\.max_queued") as caught:
                await fleet.answer(request("one-more"))
            assert now() == started
            assert caught.value.retry_after_s >= 1
            assert fleet.metrics.value("baton_admission_refusals_total", reason="full") == 1
            free(full, 60)
            await asyncio.gather(*tasks)

    simulate(main)


async def learn_a_rate(fleet: ScriptedFleet, of: ScriptedWorker) -> list[asyncio.Task[list[int]]]:
    """Five requests a second go, and ten wait. Their clients."""
    tasks = await ask_all(fleet, *(f"r{i}" for i in range(20)), max_tokens=2)
    for _ in range(10):
        await asyncio.sleep(0.19)
        free(of, 1)
        await asyncio.sleep(0.01)
        free(of, 0)
    assert fleet.metrics.value("baton_queued_requests") == 10
    return tasks


@pytest.mark.parametrize(("deadline_s", "max_wait_s", "reason"), [(1.0, 30.0, "deadline"), (600.0, 1.0, "wait")])
def test_who_would_wait_too_long_by_the_measured_rate_is_refused_at_once(
    deadline_s: float, max_wait_s: float, reason: str
) -> None:
    async def main() -> None:
        full = worker()
        async with ScriptedFleet(full, max_queue_wait_s=30.0) as fleet:
            tasks = await learn_a_rate(fleet, full)
            fleet.dispatcher._admission._config = fleet.config.router.model_copy(
                update={"max_queue_wait_s": max_wait_s}
            )
            started = now()
            with pytest.raises(Overloaded, match="Come back") as caught:
                await fleet.answer(request("late", deadline_s=deadline_s, max_tokens=2))
            assert now() == started
            assert fleet.metrics.value("baton_admission_refusals_total", reason=reason) == 1
            assert 1 <= caught.value.retry_after_s <= 5, "ten wait, five go a second"
            free(full, 60)
            await asyncio.gather(*tasks)

    simulate(main)


def test_who_was_refused_and_comes_back_when_told_is_let_in() -> None:
    async def main() -> None:
        full = worker()
        async with ScriptedFleet(full) as fleet:
            tasks = await learn_a_rate(fleet, full)
            with pytest.raises(Overloaded) as caught:
                await fleet.answer(request("late", deadline_s=1.8, max_tokens=2))
            until = now() + caught.value.retry_after_s
            while now() < until:
                free(full, 1)
                await asyncio.sleep(0.01)
                free(full, 0)
                await asyncio.sleep(0.19)
            free(full, 60)
            assert await fleet.answer(request("late", deadline_s=1.8, max_tokens=2))
            await asyncio.gather(*tasks)

    simulate(main)


def test_a_stream_that_was_begun_at_another_router_is_not_refused() -> None:
    async def main() -> None:
        full = worker()
        async with ScriptedFleet(full, max_queued=1) as fleet:
            tasks = await ask_all(fleet, "waits")
            with pytest.raises(Overloaded):
                await fleet.answer(request("new"))
            full.knows["begun"] = request("begun")
            resumed = fleet.dispatcher.generate(request("begun"), last_seen="d0")
            assert (await anext(resumed)).token_ids == tuple(expected(request("begun"))[:1])
            await resumed.aclose()
            free(full, 60)
            await asyncio.gather(*tasks)

    simulate(main)


def test_a_fresh_worker_gets_a_part_of_its_places_at_first_and_then_all() -> None:
    async def main() -> None:
        fresh = worker(free=SLOTS, script=lambda submit: iter([]))
        fresh.load = replace(fresh.load, steps=0)
        async with ScriptedFleet(fresh) as fleet:
            tasks = await ask_all(fleet, *(f"r{i}" for i in range(100)))
            first = len(fresh.submits)
            assert 0.2 * SLOTS < first < 0.35 * SLOTS
            await asyncio.sleep(RAMP_S)
            assert len(fresh.submits) > first, "the rest comes by and by, whoever has ended"
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    simulate(main)


def test_smaller_requests_pass_one_that_no_worker_has_memory_for_until_they_have_passed_it_often_enough() -> None:
    async def main() -> None:
        tight = worker(free=60)
        tight.load = replace(tight.load, available_blocks=5)
        async with ScriptedFleet(tight) as fleet:
            (large,) = await ask_all(fleet, "large", prompt=range(40))
            for i in range(MAX_OVERTAKEN):
                assert await fleet.answer(request(f"r{i}")) == expected(request(f"r{i}"))
            (last,) = await ask_all(fleet, "last")
            await asyncio.sleep(5.0)
            assert not large.done()
            assert not last.done(), "what becomes free is left for the large one"
            tight.load = replace(tight.load, available_blocks=640)
            tight.say()
            await asyncio.gather(large, last)
            assert [s.request.request_id for s in tight.submits[-2:]] == ["large", "last"]

    simulate(main, range(3))


def test_who_is_refused_while_nobody_goes_is_told_to_stay_away_for_as_long_again() -> None:
    async def main() -> None:
        full = worker()
        async with ScriptedFleet(full, max_queued=1) as fleet:
            tasks = await ask_all(fleet, "waits")
            await asyncio.sleep(20.0)
            with pytest.raises(Overloaded) as caught:
                await fleet.answer(request("new"))
            assert 20 <= caught.value.retry_after_s <= 21
            free(full, 60)
            await asyncio.gather(*tasks)

    simulate(main)


def test_a_client_that_leaves_gives_up_its_seat_and_the_next_goes() -> None:
    async def main() -> None:
        full = worker()
        async with ScriptedFleet(full) as fleet:
            first, second = await ask_all(fleet, "first", "second")
            first.cancel()
            await asyncio.wait([first])
            assert fleet.metrics.value("baton_queued_requests") == 1
            free(full, 1)
            assert await second == expected(request("second"))
            assert [s.request.request_id for s in full.submits] == ["second"]
            assert fleet.dispatcher.num_inflight == 0

    simulate(main, range(3))


def test_one_that_leaves_just_when_its_turn_comes_does_not_hold_up_the_others() -> None:
    async def main() -> None:
        full = worker()
        async with ScriptedFleet(full) as fleet:
            first, second = await ask_all(fleet, "first", "second")
            look = fleet.dispatcher._admission.look

            def then_leave() -> None:
                look()
                first.cancel()

            fleet.fleet.on_report = then_leave
            free(full, 2)
            await asyncio.sleep(0.01)
            fleet.fleet.on_report = look
            assert await second == expected(request("second"))

    simulate(main, range(5))


def test_a_wait_ends_with_the_deadline() -> None:
    async def main() -> None:
        async with ScriptedFleet(worker()) as fleet:
            started = now()
            with pytest.raises(DeadlineExceeded):
                await fleet.answer(request(deadline_s=3.0))
            assert now() - started == pytest.approx(3.0, abs=0.01)

    simulate(main)


def test_a_wait_that_was_thought_to_be_short_ends_all_the_same() -> None:
    async def main() -> None:
        async with ScriptedFleet(worker(), max_queue_wait_s=5.0) as fleet:
            started = now()
            with pytest.raises(Overloaded, match="no worker had room"):
                await fleet.answer(request())
            assert now() - started == pytest.approx(10.0, abs=0.01)

    simulate(main)


def test_a_worker_that_breaks_requests_gets_no_more_of_them() -> None:
    async def main() -> None:
        broken, well = worker("broken", free=60, script=refuse("internal")), worker("well", free=60)
        broken.load = replace(broken.load, num_running=0)  # so that everybody would go there first
        async with ScriptedFleet(broken, well) as fleet:
            for i in range(40):
                try:
                    await fleet.answer(request(f"r{i}"))
                except InternalError:
                    await asyncio.sleep(0.3)
            assert len(broken.submits) < 10
            assert fleet.metrics.value("baton_circuits_opened_total", worker="broken") == 1

    simulate(main)


def test_a_worker_whose_circuit_was_open_is_tried_with_one_request() -> None:
    async def main() -> None:
        broken, well = worker("broken", free=60, script=refuse("internal")), worker("well", free=60)
        broken.load = replace(broken.load, num_running=0)
        async with ScriptedFleet(broken, well) as fleet:
            for i in range(4):
                with pytest.raises(InternalError):
                    await fleet.answer(request(f"r{i}"))
                await asyncio.sleep(TOGETHER_S)
            await asyncio.sleep(OPEN_FIRST_S)
            broken.script, before = after_a_while, len(broken.submits)
            tasks = await ask_all(fleet, *(f"again-{i}" for i in range(10)))
            assert len(broken.submits) == before + 1
            await asyncio.gather(*tasks)
            await asyncio.gather(*await ask_all(fleet, *(f"well-{i}" for i in range(10))))
            assert len(broken.submits) > before + 5, "it was well, and is trusted again"

    simulate(main)


@pytest.mark.parametrize("code", ["invalid_request", "not_found"])
def test_what_a_client_did_wrong_never_counts_against_a_worker(code: str) -> None:
    async def main() -> None:
        one, errors = worker(free=60, script=refuse(code)), list[BatonError]()
        async with ScriptedFleet(one) as fleet:
            for i in range(30):
                try:
                    await fleet.answer(request(f"r{i}"))
                except (InvalidRequest, NotFound) as e:
                    errors.append(e)
                await asyncio.sleep(0.3)
            assert len(errors) == len(one.submits) == 30
            assert fleet.metrics.value("baton_circuits_opened_total") == 0

    simulate(main)


def test_a_fleet_whose_circuits_are_all_open_is_asked_all_the_same() -> None:
    async def main() -> None:
        one = worker(free=60, script=refuse("internal"))
        async with ScriptedFleet(one) as fleet:
            for i in range(12):
                with pytest.raises(InternalError):
                    await fleet.answer(request(f"r{i}"))
                await asyncio.sleep(0.3)
            assert fleet.metrics.value("baton_circuits_opened_total", worker="d0") == 1
            assert len(one.submits) == 12

    simulate(main)
