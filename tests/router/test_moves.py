"""Planned moves: requests leave a draining worker while they run, each token still exactly once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from baton.core.messages import Submit
from baton.core.request import Choice
from baton.core.worker import Role
from baton.router.moves import MAX_AT_ONCE
from tests.router.fake_fleet import (
    Act,
    Script,
    ScriptedFleet,
    ScriptedWorker,
    capability,
    expected,
    request,
    simulate,
)
from tests.router.relay import FULL, ROOMY, Point, Relay, finish, long, movers, moves, retries, start

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
