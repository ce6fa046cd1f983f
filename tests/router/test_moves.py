"""Planned moves: requests leave a draining worker while they run, each token still exactly once, whatever fails in the
middle."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import aclosing
from dataclasses import replace

import pytest

from baton.core.errors import DeadlineExceeded
from baton.core.messages import Submit
from baton.core.request import Choice, Request
from baton.core.worker import Role, WorkerLoad
from baton.router.moves import MAX_AT_ONCE
from tests.router.fake_fleet import (
    Act,
    Script,
    ScriptedFleet,
    ScriptedWorker,
    capability,
    expected,
    mute,
    now,
    refuse,
    request,
    simulate,
)
from tests.router.relay import Point, Relay, movers

FULL = WorkerLoad(available_blocks=0, total_blocks=1000)
ROOMY = replace(FULL, available_blocks=1000)


def long(name: str = "r", **fields: object) -> Request:
    return request(name, max_tokens=40, **fields)


async def start(fleet: ScriptedFleet, worker: ScriptedWorker, r: Request) -> asyncio.Task[dict[int, list[int]]]:
    """A request that streams from this worker."""
    others = [w for w in fleet.workers.values() if w is not worker]
    for other in others:
        other.load = replace(other.load, num_running=50)
    await asyncio.sleep(0.6)
    task = asyncio.create_task(fleet.answers(r))
    await asyncio.sleep(0.045)
    assert [s.request.request_id for s in worker.submits][-1] == r.request_id
    for other in others:
        other.load = replace(other.load, num_running=0)
        other.say()
    return task


async def discourage(worker: ScriptedWorker) -> None:
    """Make it the worse choice."""
    worker.load = replace(worker.load, num_running=9)
    worker.say()
    await asyncio.sleep(0.01)


async def finish(task: asyncio.Task[dict[int, list[int]]], r: Request) -> None:
    assert await task == {c.index: expected(r, c.index) for c in r.choices}


def moves(fleet: ScriptedFleet) -> dict[str, float]:
    return {labels["end"]: value for metric, labels, value in fleet.metrics.samples()
            if metric.name == "baton_moves_total"}


def retries(fleet: ScriptedFleet) -> float:
    return fleet.metrics.value("baton_dispatch_retries_total")


# ---- the plain case --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_choices", [1, 3])
def test_a_draining_worker_s_requests_go_on_elsewhere_and_no_token_is_computed_again(num_choices: int) -> None:
    async def main() -> None:
        relay = Relay()
        source, target = movers(relay, 2)
        async with ScriptedFleet(source, target) as fleet:
            r = long(choices=tuple(Choice(k) for k in range(num_choices)))
            task = await start(fleet, source, r)
            await source.drain(True, 1.0)
            await asyncio.sleep(0.2)
            (submit,) = target.submits
            assert submit.take_from is not None
            assert (submit.take_from.worker, submit.take_from.epoch) == (source.info, 1)
            assert (submit.epoch, submit.route.decode, submit.route.prefill) == (2, "d1", None)
            assert submit.route.reason.startswith("d0 drains: moves to d1")
            delivered = [len(c.delivered) for c in submit.request.choices]
            assert delivered == [delivered[0]] * num_choices
            assert delivered[0] > 0
            await finish(task, r)
            assert moves(fleet) == {"moved": 1}
            assert retries(fleet) == 0
            assert [p for p, _ in relay.points] == list(Point)
            assert relay.attempts[2].lengths == dict.fromkeys(range(num_choices), 40)
            record = fleet.dispatcher.traces.get("r")
            assert record is not None
            assert [(a.route.decode, a.outcome) for a in record.attempts] == [("d0", "moved"), ("d1", "length")]

    simulate(main, range(3))


def test_a_worker_that_drains_is_no_candidate_and_its_state_says_so() -> None:
    async def main() -> None:
        workers = [ScriptedWorker("d0"), ScriptedWorker("d1"), ScriptedWorker("p0", Role.PREFILL)]
        async with ScriptedFleet(*workers, local_prefill_max_tokens=4) as fleet:
            await workers[0].drain(True, 1.0)
            await workers[2].drain(True, 1.0)
            await asyncio.sleep(0.01)
            assert [fleet.state(w) for w in ("d0", "d1", "p0")] == ["draining", "ready", "draining"]
            assert fleet.metrics.value("baton_workers", role="decode", state="draining") == 1
            for i in range(3):
                r = request(f"r{i}", range(20))
                assert await fleet.answer(r) == expected(r)
            assert not workers[0].submits
            assert [s.route.prefill for s in workers[1].submits] == [None] * 3
            await workers[0].drain(False, 1.0)
            await asyncio.sleep(0.01)
            assert fleet.state("d0") == "ready"

    simulate(main)


def test_a_request_without_a_first_token_moves_only_once_it_has_one() -> None:
    async def main() -> None:
        relay = Relay()
        source, target = movers(relay, 2)
        late = source.script

        def slow_start(submit: Submit) -> Iterator[Act]:
            yield 1.0
            yield from late(submit)

        source.script = slow_start
        async with ScriptedFleet(source, target) as fleet:
            r = long()
            task = await start(fleet, source, r)
            await source.drain(True, 1.0)
            await asyncio.sleep(0.9)
            assert not target.submits
            await finish(task, r)
            assert moves(fleet) == {"moved": 1}

    simulate(main)


def test_at_most_so_many_requests_of_one_worker_move_at_once_and_in_the_end_all_have() -> None:
    async def main() -> None:
        relay = Relay()
        source, *targets = movers(relay, 3)
        async with ScriptedFleet(source, *targets) as fleet:
            count = 3 * MAX_AT_ONCE
            rs = [request(f"r{i}", max_tokens=400, prompt=(i, i, i)) for i in range(count)]
            for w in targets:
                w.load = replace(w.load, num_running=50)
            await asyncio.sleep(0.6)
            tasks = [asyncio.create_task(fleet.answers(r)) for r in rs]
            await asyncio.sleep(0.1)
            on_source = len(source.submits)
            assert on_source > 2 * MAX_AT_ONCE
            for w in targets:
                w.load = ROOMY
                w.say()
            await source.drain(True, 1.0)
            most = 0
            while moves(fleet).get("moved", 0) < on_source:
                reached = [p for p, _ in relay.points]
                most = max(most, reached.count(Point.FETCHING) - reached.count(Point.SPOKEN))
                await asyncio.sleep(0.005)
            assert most == MAX_AT_ONCE
            for r, task in zip(rs, tasks, strict=True):
                await finish(task, r)
            assert moves(fleet) == {"moved": on_source}
            assert retries(fleet) == 0

    simulate(main)


def test_without_a_place_it_stays_and_goes_when_there_is_one() -> None:
    async def main() -> None:
        relay = Relay()
        source, target, odd = *movers(relay, 2), ScriptedWorker("d2", capability=capability(numerics="bf16"))
        async with ScriptedFleet(source, target, odd) as fleet:
            r = request(max_tokens=50)
            task = await start(fleet, source, r)
            target.load = FULL
            target.say()
            await asyncio.sleep(0.01)
            await source.drain(True, 1.0)
            await asyncio.sleep(0.2)
            assert not target.submits
            target.load = ROOMY
            target.say()
            await finish(task, r)
            assert moves(fleet) == {"moved": 1}
            assert not odd.submits, "it stores KV differently"

    simulate(main)


def test_a_drain_that_is_called_off_moves_nobody_any_more() -> None:
    async def main() -> None:
        relay = Relay()
        source, target = movers(relay, 2)
        async with ScriptedFleet(source, target) as fleet:
            r = long()
            task = await start(fleet, source, r)
            target.load = FULL
            target.say()
            await asyncio.sleep(0.01)
            await source.drain(True, 1.0)
            await asyncio.sleep(0.05)
            await source.drain(False, 1.0)
            target.load = ROOMY
            target.say()
            await finish(task, r)
            assert moves(fleet) == {}

    simulate(main)


# ---- what fails in the middle ----------------------------------------------------------------------------------------


def kills(*victims: ScriptedWorker, then: Script = mute) -> Script:
    def script(submit: Submit) -> Iterator[Act]:
        for victim in victims:
            victim.die()
        yield 0.5
        yield from then(submit)

    return script


LOST = refuse("peer_lost", "the source is gone")


@pytest.mark.parametrize("point", [Point.FETCHING, Point.PAUSED])
def test_a_source_that_dies_before_it_has_handed_over_costs_a_retry_and_no_token(point: Point) -> None:
    async def main() -> None:
        relay = Relay()
        source, target = movers(relay, 2)
        relay.at[point] = kills(source, then=LOST)
        async with ScriptedFleet(source, target) as fleet:
            r = long()
            task = await start(fleet, source, r)
            await source.drain(True, 1.0)
            await finish(task, r)
            assert moves(fleet) == {"refused": 1}
            assert retries(fleet) == 1
            assert [s.take_from is None for s in target.submits] == [False, True]

    simulate(main, range(3))


def test_a_source_that_dies_after_it_has_handed_over_is_not_missed() -> None:
    async def main() -> None:
        relay = Relay()
        source, target = movers(relay, 2)

        def go_on(submit: Submit) -> Iterator[Act]:
            source.die()
            yield 0.5
            yield from relay._start(submit)

        relay.at[Point.TAKEN] = go_on
        async with ScriptedFleet(source, target) as fleet:
            r = long()
            task = await start(fleet, source, r)
            await source.drain(True, 1.0)
            await finish(task, r)
            assert moves(fleet) == {"moved": 1}
            assert retries(fleet) == 0
            assert len(target.submits) == 1, "what it had taken over was waited for"

    simulate(main, range(3))


def test_a_source_lost_while_the_target_never_speaks_is_waited_for_only_so_long() -> None:
    async def main() -> None:
        relay = Relay()
        source, target, other = movers(relay, 3)
        relay.at[Point.TAKEN] = kills(source)
        async with ScriptedFleet(source, target, other) as fleet:
            r = long()
            task = await start(fleet, source, r)
            await discourage(other)
            await source.drain(True, 1.0)
            began = now()
            await finish(task, r)
            assert now() - began < 4.0 + 1.0, "handoff.peer_timeout_s + handoff.release_timeout_s, and the rest"
            assert moves(fleet) == {"late": 1}
            assert [c.epoch for c in target.cancels] == [2]

    simulate(main)


@pytest.mark.parametrize("point", [Point.FETCHING, Point.PAUSED])
@pytest.mark.parametrize("how", ["dies", "is frozen"])
def test_a_target_lost_before_it_has_taken_over_leaves_the_request_where_it_was(point: Point, how: str) -> None:
    async def main() -> None:
        relay = Relay()
        source, target = movers(relay, 2)

        def vanish(submit: Submit) -> Iterator[Act]:
            if how == "dies":
                target.die()
            else:
                target.frozen = True
            yield 1000.0

        relay.at[point] = vanish
        async with ScriptedFleet(source, target) as fleet:
            r = request(max_tokens=50)
            task = await start(fleet, source, r)
            await source.drain(True, 1.0)
            await finish(task, r)
            assert retries(fleet) == 0
            assert moves(fleet).get("moved", 0) == 0
            assert len(source.submits) == 1

    simulate(main, range(3))


def test_a_target_lost_after_it_has_taken_over_in_silence_is_noticed_because_the_source_is_silent_too() -> None:
    async def main() -> None:
        relay = Relay()
        source, target, other = movers(relay, 3)
        relay.at[Point.TAKEN] = kills(target)
        async with ScriptedFleet(source, target, other) as fleet:
            r = long()
            task = await start(fleet, source, r)
            await discourage(other)
            await source.drain(True, 1.0)
            await finish(task, r)
            assert moves(fleet) == {"lost": 1, "refused": 1}, "the source says that it has it no more"
            assert retries(fleet) == 1
            assert [s.take_from is None for s in other.submits] == [False, True]
            assert [c.epoch for c in source.cancels] == [1], "should it run there after all"

    simulate(main, range(3))


def test_a_target_that_dies_after_its_first_word_is_a_lost_worker_like_any_other() -> None:
    async def main() -> None:
        relay = Relay()
        source, target, other = movers(relay, 3)
        relay.at[Point.SPOKEN] = kills(target)
        async with ScriptedFleet(source, target, other) as fleet:
            r = long()
            task = await start(fleet, source, r)
            await discourage(other)
            await source.drain(True, 1.0)
            await finish(task, r)
            assert moves(fleet) == {"moved": 1}
            assert retries(fleet) == 1

    simulate(main, range(3))


@pytest.mark.parametrize("code", ["overloaded", "not_found", "integrity", "incompatible", "internal"])
def test_a_move_that_is_refused_is_tried_again_after_a_pause(code: str) -> None:
    async def main() -> None:
        relay = Relay()
        source, target = movers(relay, 2)
        relay.at[Point.FETCHING] = refuse(code, "no room for it")
        async with ScriptedFleet(source, target) as fleet:
            r = request(max_tokens=100)
            task = await start(fleet, source, r)
            await source.drain(True, 1.0)
            began = now()
            while len(target.submits) < 2:
                await asyncio.sleep(0.01)
            assert now() - began >= 0.5
            await finish(task, r)
            assert moves(fleet) == {"refused": 1, "moved": 1}
            assert retries(fleet) == 0

    simulate(main)


def test_a_source_that_finishes_first_has_the_last_word_and_the_move_is_called_off() -> None:
    async def main() -> None:
        relay = Relay()
        source, target = movers(relay, 2)
        relay.at[Point.FETCHING] = mute
        async with ScriptedFleet(source, target) as fleet:
            r = long()
            task = await start(fleet, source, r)
            await source.drain(True, 1.0)
            await finish(task, r)
            await asyncio.sleep(0.01)
            assert moves(fleet) == {"finished": 1}
            assert [(c.request_id, c.epoch) for c in target.cancels] == [("r", 2)]
            assert source.cancels == []
            record = fleet.dispatcher.traces.get("r")
            assert record is not None
            assert record.attempts[-1].outcome == "length"

    simulate(main)


def test_when_both_speak_the_client_hears_each_token_once_and_the_source_is_cancelled() -> None:
    async def main() -> None:
        relay = Relay(forgets=False)
        source, target = movers(relay, 2)
        async with ScriptedFleet(source, target) as fleet:
            r = long()
            task = await start(fleet, source, r)
            await source.drain(True, 1.0)
            await finish(task, r)
            assert moves(fleet) == {"moved": 1}
            assert [(c.request_id, c.epoch) for c in source.cancels] == [("r", 1)]
            assert fleet.metrics.value("baton_stale_chunks_total") > 0

    simulate(main, range(5))


@pytest.mark.parametrize("point", [Point.FETCHING, Point.PAUSED, Point.TAKEN])
def test_a_client_that_leaves_in_the_middle_of_a_move_cancels_both_attempts(point: Point) -> None:
    async def main() -> None:
        relay = Relay()
        source, target = movers(relay, 2)
        relay.at[point] = mute
        async with ScriptedFleet(source, target) as fleet:
            source.load = replace(source.load, num_running=0)
            target.load = replace(target.load, num_running=5)
            await asyncio.sleep(0.6)


            async def read() -> None:
                async with aclosing(fleet.dispatcher.generate(long())) as chunks:
                    async for _ in chunks:
                        if not source.load.draining:
                            await source.drain(True, 1.0)

            reader = asyncio.create_task(read())
            while (point, "r") not in relay.points:
                await asyncio.sleep(0.001)
            reader.cancel()
            await asyncio.sleep(0.01)
            assert [c.epoch for c in source.cancels] == [1]
            assert [c.epoch for c in target.cancels] == [2]
            assert moves(fleet) == {"cancelled": 1}
            assert fleet.dispatcher.num_inflight == 0

    simulate(main)


def test_a_deadline_in_the_middle_of_a_move_ends_both_attempts() -> None:
    async def main() -> None:
        relay = Relay()
        source, target = movers(relay, 2)
        relay.at[Point.TAKEN] = mute
        async with ScriptedFleet(source, target) as fleet:
            task = await start(fleet, source, long(deadline_s=1.0))
            await source.drain(True, 1.0)
            with pytest.raises(DeadlineExceeded):
                await task
            await asyncio.sleep(0.01)
            assert [c.epoch for c in source.cancels] == [1]
            assert [c.epoch for c in target.cancels] == [2]
            assert moves(fleet) == {"cancelled": 1}

    simulate(main)


@pytest.mark.parametrize("point", [Point.FETCHING, Point.PAUSED, Point.TAKEN, Point.SPOKEN])
def test_a_target_that_drains_in_the_middle_hands_it_on(point: Point) -> None:
    async def main() -> None:
        relay = Relay()
        source, target, third = movers(relay, 3)

        async def drain_when_there() -> None:
            while all(p is not point for p, _ in relay.points):
                await asyncio.sleep(0.001)
            await target.drain(True, 1.0)

        async with ScriptedFleet(source, target, third) as fleet:
            r = request(max_tokens=58)
            task = await start(fleet, source, r)
            await discourage(third)
            draining = asyncio.create_task(drain_when_there())
            await source.drain(True, 1.0)
            await finish(task, r)
            await draining
            assert moves(fleet) == {"moved": 2}
            assert retries(fleet) == 0
            record = fleet.dispatcher.traces.get("r")
            assert record is not None
            assert [a.route.decode for a in record.attempts] == ["d0", "d1", "d2"]

    simulate(main, range(3))


def test_usage_counts_what_the_first_attempt_found_cached_not_what_a_move_brought_along() -> None:
    async def main() -> None:
        relay = Relay()
        source, target = movers(relay, 2)
        told: dict[str, int] = {"d0": 2, "d1": 5}

        def telling(worker: ScriptedWorker, script: Script) -> Callable[[Submit], Iterator[Act]]:
            def tell(submit: Submit) -> Iterator[Act]:
                for act in script(submit):
                    yield act if isinstance(act, float) else replace(act, cached_tokens=told[worker.worker_id])  # type: ignore[type-var]

            return tell

        for worker in (source, target):
            worker.script = telling(worker, worker.script)
        async with ScriptedFleet(source, target) as fleet:
            task = await start(fleet, source, long())
            await source.drain(True, 1.0)
            await task
            assert moves(fleet) == {"moved": 1}
            record = fleet.dispatcher.traces.get("r")
            assert record is not None
            assert record.cached_tokens == 2

    simulate(main)
