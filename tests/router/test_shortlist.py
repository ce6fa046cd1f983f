"""The shortlist against the choice among all, on fleets of the real links; and how the order keeps up with loads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random

import pytest

from baton.core.config import RouterConfig
from baton.core.step_model import StepModel
from baton.core.worker import Role, WorkerLoad
from baton.router.cost import CostPolicy
from baton.router.fleet import NONE_HELD, OFFERED_WHOLE
from baton.router.link import Work
from baton.router.policy import Candidates, Facts
from baton.router.shortlist import MAX_LOOKED_AT, NEAREST
from tests.router.fake_fleet import BLOCK, ScriptedFleet, ScriptedWorker, capability, simulate

MODEL = StepModel(0.01, 0.001, 1e-7, 0.001, 1e-7, num_prefill_steps=9, num_decode_steps=9)
BIG = capability(max_model_len=100_000, num_blocks=50_000)


def load_of(rng: Random, role: Role, model: StepModel = MODEL) -> WorkerLoad:
    if role is Role.PREFILL:
        return WorkerLoad(queued_prefill_tokens=rng.choice([0, rng.randrange(20_000)]), num_running=1, model=model)
    rows = rng.randrange(30)
    room = rng.choice([0, 50_000, 50_000])
    return WorkerLoad(
        num_running=rows, context_tokens=rows * 1000, available_blocks=room, total_blocks=50_000, model=model
    )


def some_fleet(rng: Random, num_each: int, model: Callable[[], StepModel] = lambda: MODEL) -> ScriptedFleet:
    roles = [("p", Role.PREFILL), ("d", Role.DECODE)]
    return ScriptedFleet(*(
        ScriptedWorker(f"{letter}{i}", role, BIG, load=load_of(rng, role, model()))
        for letter, role in roles for i in range(num_each)
    ))


def some_prefix(rng: Random, fleet: ScriptedFleet, num_blocks: int, num_holders: int) -> dict[str, int]:
    depths = sorted((rng.randrange(1, num_blocks) for _ in range(num_holders)), reverse=True)
    return dict(zip(rng.sample(sorted(fleet.workers), num_holders), depths, strict=True))


def cost_s(fleet: ScriptedFleet, facts: Facts, held: dict[str, int], *, of_all: bool) -> float:
    f, has_room = fleet.fleet, None if of_all else lambda c: c.has_room(facts)
    offered = Candidates(
        f.candidates(Role.DECODE, held, has_room=has_room),
        f.candidates(Role.PREFILL, held, has_room=None if of_all else lambda _: True),
        f.fits, f.holders(held),
    )
    if not of_all:
        assert max(len(offered.decode), len(offered.prefill)) <= 2 * NEAREST, "it is a short list"
    no_fetch = RouterConfig(fetch_min_tokens=100_000)  # with it, where a prefix is hardly matters
    route = CostPolicy(no_fetch, Random(1)).price(facts, offered)
    assert route is not None
    return route.cost_s


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_from_the_shortlist_costs_what_the_choice_among_all_costs(seed: int) -> None:
    rng = Random(seed)

    async def main() -> None:
        async with some_fleet(rng, 60) as fleet:
            for _ in range(20):
                facts = Facts(rng.choice([200, 2000, 20_000]))
                held = some_prefix(rng, fleet, facts.num_tokens // BLOCK, rng.randrange(MAX_LOOKED_AT))
                among_all = cost_s(fleet, facts, held, of_all=True)
                assert cost_s(fleet, facts, held, of_all=False) == pytest.approx(among_all)

    simulate(main)


@pytest.mark.parametrize("seed", range(3))
def test_where_speeds_differ_the_shortlist_costs_little_more(seed: int) -> None:
    """The gap that is stated: 1 % on average, speeds within a factor of ten, half of the workers idle."""
    rng = Random(seed)

    def model() -> StepModel:
        return StepModel(0.01, 0.001 * rng.uniform(0.2, 2.0), 1e-7, 0.001, 1e-7, 9, 9)

    async def main() -> None:
        async with some_fleet(rng, 60, model) as fleet:
            gaps = []
            for _ in range(20):
                facts = Facts(rng.choice([1000, 8000]))
                held = some_prefix(rng, fleet, facts.num_tokens // BLOCK, 40)
                among_all = cost_s(fleet, facts, held, of_all=True)
                gaps.append(cost_s(fleet, facts, held, of_all=False) / among_all)
            assert min(gaps) >= 1 - 1e-9
            assert sum(gaps) / len(gaps) < 1.01

    simulate(main)


def nearest(fleet: ScriptedFleet) -> list[str]:
    return [c.info.worker_id for c in fleet.fleet.candidates(Role.PREFILL, {}, has_room=lambda _: True)]


def test_the_order_follows_reports_dispatches_silence_and_deaths() -> None:
    async def main() -> None:
        loads = [WorkerLoad(10_000 * i, num_running=1, model=MODEL) for i in range(1, OFFERED_WHOLE + 2)]
        workers = [ScriptedWorker(f"p{i}", Role.PREFILL, load=load) for i, load in enumerate(loads)]
        async with ScriptedFleet(*workers) as fleet:
            assert nearest(fleet) == [f"p{i}" for i in range(NEAREST)]
            fleet.fleet.charge("p0", 1, Work(prefill_tokens=900_000))
            assert nearest(fleet) == [f"p{i}" for i in range(1, NEAREST + 1)]
            fleet.fleet.settle("p0", 1)
            assert nearest(fleet)[0] == "p0"
            workers[-1].load = WorkerLoad(model=MODEL)
            workers[-1].say()
            await asyncio.sleep(0.01)
            assert nearest(fleet)[0] == workers[-1].worker_id
            workers[-1].frozen = True
            await asyncio.sleep(2)
            assert workers[-1].worker_id not in nearest(fleet)
            workers[-1].frozen = False
            await asyncio.sleep(1)
            assert nearest(fleet)[0] == workers[-1].worker_id, "it spoke again"
            workers[-1].die()
            await asyncio.sleep(0.1)
            assert nearest(fleet) == [f"p{i}" for i in range(NEAREST)]

    simulate(main)


def test_the_best_holder_is_offered_however_it_stands() -> None:
    async def main() -> None:
        rng = Random(1)
        async with some_fleet(rng, 40) as fleet:
            last = max(fleet.fleet.candidates(Role.PREFILL, {}), key=lambda c: c.queued_prefill_tokens).info
            assert last.worker_id not in nearest(fleet)
            for held, coming in (({last.worker_id: 7}, NONE_HELD), ({}, {last.boot_id: 7})):
                offered = fleet.fleet.candidates(Role.PREFILL, held, coming, has_room=lambda _: True)
                (found,) = [c for c in offered if c.info == last]
                assert (found.held_blocks, found.expected_blocks) == (held.get(last.worker_id, 0), 7)

    simulate(main)


def test_the_worker_of_the_sessions_last_turn_is_offered_once_however_it_stands() -> None:
    async def main() -> None:
        async with some_fleet(Random(1), 40) as fleet:
            for home in fleet.workers:
                offered = fleet.fleet.candidates(Role.DECODE, {}, has_room=lambda _: True, home=home)
                names = [c.info.worker_id for c in offered]
                assert len(set(names)) == len(names)
                assert (home in names) == home.startswith("d")

    simulate(main)


def test_workers_without_room_are_offered_after_all_that_have_some() -> None:
    async def main() -> None:
        none_left = WorkerLoad(available_blocks=0, total_blocks=64)
        full = [ScriptedWorker(f"d{i}", load=none_left) for i in range(OFFERED_WHOLE)]
        roomy = ScriptedWorker("roomy", load=WorkerLoad(num_running=40, available_blocks=64, total_blocks=64))
        async with ScriptedFleet(*full, roomy) as fleet:
            offered = fleet.fleet.candidates(Role.DECODE, {}, has_room=lambda c: c.has_room(Facts(4)))
            assert len(offered) == NEAREST
            assert offered[0].info.worker_id == "roomy"

    simulate(main)


def test_two_routers_begin_with_different_workers_of_a_fleet_that_is_idle() -> None:
    async def main() -> None:
        workers = [ScriptedWorker(f"p{i}", Role.PREFILL) for i in range(64)]
        async with ScriptedFleet(*workers) as one, ScriptedFleet(*workers, router_id="router-1") as other:
            assert nearest(one) != nearest(other)

    simulate(main)


def test_each_kind_of_worker_is_offered() -> None:
    """The cheapest of all may be of a kind that fits nobody."""

    async def main() -> None:
        idle = [ScriptedWorker(f"a{i}", Role.PREFILL, capability(model_fingerprint="beef")) for i in range(40)]
        busy = ScriptedWorker("busy", Role.PREFILL, load=WorkerLoad(queued_prefill_tokens=9999, num_running=1))
        async with ScriptedFleet(*idle, busy) as fleet:
            assert "busy" in nearest(fleet)

    simulate(main)
