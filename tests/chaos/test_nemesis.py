"""The nemesis is fair: whatever it draws, somebody can serve; and it plays every kind it has."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace
from typing import cast

import pytest

from baton.chaos.clients import Clients
from baton.chaos.faults import REGISTRY, Scene
from baton.chaos.lossy import LossyControl
from baton.chaos.nemesis import REDIAL_S, Drawn, Landed, Nemesis
from baton.chaos.netns import Host, Namespaces
from baton.chaos.plan import Plan
from baton.chaos.stack import Stack

PLAN = Plan(1, 60.0)
KINDS = 24


def nemesis(seed: int, plan: Plan = PLAN, network: bool = True) -> Nemesis:
    names = (*plan.routers, *plan.prefills, *plan.decodes)
    net = Namespaces({n: Host(n, f"10.0.0.{i}", n) for i, n in enumerate(names)}, "switch", "dev", {})
    lossy = cast(LossyControl, object()) if network else None
    stack = Stack(plan, {}, {}, None, None, {}, net if network else None, lossy)  # type: ignore[arg-type]
    return Nemesis(Scene(stack, cast(Clients, None)), random.Random(seed))


@pytest.mark.parametrize("seed", range(20))
def test_a_router_and_a_decode_worker_are_always_untouched(seed: int) -> None:
    one, rng, held = nemesis(seed), random.Random(seed), list[tuple[str, ...]]()
    for _ in range(400):
        drawn = one._draw()
        if drawn is None or (held and rng.random() < 0.5):
            if held:
                one._busy.difference_update(held.pop(rng.randrange(len(held))))
            continue
        assert not one._busy & set(drawn.hosts), "two faults on one host"
        one._busy.update(drawn.hosts)
        held.append(drawn.hosts)
        assert set(PLAN.routers) - one._busy, f"no router is left: {one._busy}"
        assert set(PLAN.decodes) - one._busy, f"no decode worker is left: {one._busy}"
        assert not (REGISTRY in one._busy and one._busy & set(PLAN.routers)), "a router would start knowing nobody"


@pytest.mark.parametrize(("network", "num_kinds"), [(True, KINDS), (False, 12)])
def test_every_kind_is_played_before_any_comes_again(network: bool, num_kinds: int) -> None:
    one = nemesis(1, network=network)
    kinds = [drawn.kind for _ in range(num_kinds) if (drawn := one._draw()) is not None]
    assert len(set(kinds)) == len(kinds) == num_kinds == len(one._makers())


def test_only_the_kinds_that_were_asked_for_are_played() -> None:
    one = nemesis(1, Plan(1, 60.0, faults=("kill decode", "limit prefill")))
    assert {drawn.kind for _ in range(10) if (drawn := one._draw()) is not None} == {"kill decode", "limit prefill"}


def test_the_same_seed_draws_the_same_faults() -> None:
    def drawn(seed: int) -> list[tuple[str, tuple[str, ...], float]]:
        one = nemesis(seed)
        return [(d.kind, d.hosts, d.hold_s) for _ in range(60) if (d := one._draw()) is not None]

    assert drawn(5) == drawn(5) != drawn(6)


def test_a_router_is_disturbed_until_clients_can_know_that_it_is_back() -> None:
    one = nemesis(1)
    one.landed.append(Landed("kill router", ("router-0",), at_s=10.0, recovered_s=15.0))
    assert one.disturbed("router-0", 9.0)
    assert one.disturbed("router-0", 15.0 + REDIAL_S)
    assert not one.disturbed("router-0", 15.1 + REDIAL_S)
    assert not one.disturbed("router-1", 9.0)
    one.landed.append(Landed("kill router", ("router-1",), at_s=20.0))
    assert one.disturbed("router-1", 99.0), "it has not come back"


class Struck:
    """Ready to be hit, at once; the second look at it takes as long as a kill by another lane."""

    def __init__(self) -> None:
        self.strikes: list[float] = []
        self.heals = 0

    async def work(self) -> int:
        await asyncio.sleep(0.01)
        return 1

    async def strike(self) -> None:
        self.strikes.append(asyncio.get_running_loop().time())

    async def proof(self) -> str:
        return "seen"

    async def heal(self) -> None:
        self.heals += 1


def test_no_request_meets_two_kills() -> None:
    """Two lanes looked at the same moment, and each found its own kill fair."""

    async def main() -> None:
        in_flight = {"q1": object()}
        scene = Scene(nemesis(1).scene.stack, cast(Clients, SimpleNamespace(in_flight=in_flight)))
        one, faults = Nemesis(scene, random.Random(1)), [Struck(), Struck()]
        kills = [asyncio.create_task(one._play(Drawn("kill decode", f, (), 0.05, kills_worker=True))) for f in faults]
        await asyncio.sleep(0.2)
        assert sum(len(f.strikes) for f in faults) == 1
        in_flight.clear()
        await asyncio.gather(*kills)
        assert all(len(f.strikes) == f.heals == 1 for f in faults)

    asyncio.run(main())
