"""Whatever fails in the middle of a planned move: the client gets each token once, and nothing runs on for nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace

import pytest

from baton.core.errors import DeadlineExceeded
from baton.core.messages import Submit
from tests.router.fake_fleet import (
    Act,
    Script,
    ScriptedFleet,
    ScriptedWorker,
    capability,
    mute,
    now,
    refuse,
    request,
    simulate,
)
from tests.router.relay import FULL, Point, Relay, discourage, finish, long, movers, moves, retries, start


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


@pytest.mark.parametrize("point", [Point.FETCHING, Point.TAKEN])
def test_a_target_that_lives_and_never_speaks_does_not_hold_a_request_for_ever(point: Point) -> None:
    async def main() -> None:
        relay = Relay()
        source, target, other = movers(relay, 3)
        relay.at[point] = mute
        async with ScriptedFleet(source, target, other) as fleet:
            r = request(max_tokens=40 if point is Point.TAKEN else 4000)
            for worker in fleet.workers.values():
                worker.capability = capability(max_model_len=9000, num_blocks=9000)
            task = await start(fleet, source, r)
            await discourage(other)
            await source.drain(True, 1.0)
            began = now()
            while not moves(fleet).get("late"):
                await asyncio.sleep(0.1)
            assert now() - began == pytest.approx(fleet.config.cluster.drain_timeout_s, abs=0.2)
            assert [c.epoch for c in target.cancels] == [2]
            target.load = FULL
            target.say()
            await finish(task, r)
            assert retries(fleet) == (point is Point.TAKEN), "if the source has forgotten it, it is computed again"

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
            r = request(max_tokens=600)
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


def test_a_move_that_was_refused_goes_elsewhere_if_there_is_an_elsewhere() -> None:
    async def main() -> None:
        relay = Relay()
        source, full, other = movers(relay, 3)
        full.script = refuse("overloaded")
        async with ScriptedFleet(source, full, other) as fleet:
            r = request(max_tokens=600)
            task = await start(fleet, source, r)
            await discourage(other)
            await source.drain(True, 1.0)
            await finish(task, r)
            assert moves(fleet) == {"refused": 1, "moved": 1}
            assert [len(w.submits) for w in (full, other)] == [1, 1]

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
