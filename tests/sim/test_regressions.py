"""Bugs that the world found, each in a world drawn to meet it again."""

from __future__ import annotations

import asyncio
import dataclasses
import random

import pytest

from baton.core.config import Config
from baton.core.request import Request
from baton.core.worker import Role
from baton.sim.faults import Freeze
from baton.sim.more_faults import BadPulls
from baton.sim.network import Conditions
from baton.sim.plan import Plan, draw_plan
from baton.sim.simulate import Report, simulate
from baton.sim.transport import PullFault
from tests.sim.scene import Scene, gone, play, request, right
from tests.sim.scene import plan as quiet

pytestmark = pytest.mark.usefixtures("quiet")


def remote(plan: Plan, **handoff: object) -> Plan:
    """The same world with every prompt computed on a prefill worker."""
    config = plan.terms.config
    router = config.router.model_copy(update={"local_prefill_max_tokens": 0})
    changed: Config = config.model_copy(
        update={"router": router, "handoff": config.handoff.model_copy(update=handoff)}
    )
    return dataclasses.replace(plan, terms=dataclasses.replace(plan.terms, config=changed))


def counter(report: Report, name: str) -> float:
    return sum(value for key, value in report.counters if key.startswith(name))


def test_workers_with_pools_of_different_sizes_meet() -> None:
    """The handshake asked for the block behind the reader's own pool, and every request fell back."""
    plan = remote(draw_plan(1))
    terms = dataclasses.replace(plan.terms, num_blocks={Role.PREFILL: 60, Role.DECODE: 50})
    report = simulate(1, plan=dataclasses.replace(plan, terms=terms, faults=()))
    assert report.ok, report
    assert counter(report, "baton_fallbacks_total") == 0
    assert counter(report, "baton_verified_bytes_total") > 0


@pytest.mark.parametrize("seed", [8, pytest.param(33, marks=pytest.mark.slow)])
def test_a_request_whose_first_token_is_its_last_needs_no_kv(seed: int) -> None:
    """The fallback of a finished sequence was handed to the scheduler."""
    plan = remote(draw_plan(seed))
    shape = dataclasses.replace(plan.shape, output_tokens=(1, 1))
    faults = (BadPulls(PullFault.NEVER, 10),)
    report = simulate(seed, plan=dataclasses.replace(plan, shape=shape, faults=faults))
    assert report.ok, report


@pytest.mark.parametrize("seed", [7, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (8, 10))])
def test_a_hand_off_cancelled_in_the_moment_it_fails_keeps_no_block(seed: int) -> None:
    """A task group raised the failure and forgot the cancellation: the sequence ran on for nobody."""
    faults = (Freeze(Role.DECODE, 3.5), Freeze(Role.DECODE, 2.5))
    report = simulate(seed, plan=dataclasses.replace(draw_plan(seed), num_jobs=30, faults=faults))
    assert report.ok, report


@pytest.mark.slow
def test_what_was_pulled_under_a_lease_that_expired_is_never_used() -> None:
    """Renewals that come too late on a lossy link: good=False at release, and the prompt is computed here."""
    num_bad = 0.0
    for seed in range(6):
        plan = remote(draw_plan(seed), lease_ttl_s=0.05)
        terms = dataclasses.replace(plan.terms, conditions=Conditions(loss=0.1))
        report = simulate(seed, plan=dataclasses.replace(plan, terms=terms))
        assert report.ok, report
        num_bad += counter(report, 'baton_integrity_failures_total{reason="lease"}')
    assert num_bad > 0


# ---- one id, many uses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_an_id_that_comes_again_gets_nothing_of_its_last_use(seed: int) -> None:
    """Epochs began at 1 again with every use: tokens of a cancelled request that were on their way were given to the
    next one of that id, and the prefill worker had its attempt "here already"."""

    async def story(s: Scene) -> None:
        rng = random.Random(seed)

        def again() -> Request:
            return request("same", [rng.randrange(60) for _ in range(rng.randint(6, 20))])

        for _ in range(25):
            client = asyncio.create_task(s.ask(again()))
            await asyncio.sleep(rng.uniform(0.0, 0.08))
            await gone(client)
            r = again()
            answer = await s.ask(r)
            assert answer.error is None
            assert answer.tokens == right(r)
            assert answer.took_s < 2.0

    plan = dataclasses.replace(draw_plan(seed), faults=())
    play(seed, plan, story)


def test_two_routers_may_use_the_same_ids_at_once() -> None:
    """A worker's engine knew a sequence by request id and epoch: the second attempt of that name removed the first's
    sequence, whose client then waited for its deadline."""

    async def story(s: Scene) -> None:
        one, other = s.routers.values()
        rng = random.Random(1)
        for k in range(20):
            requests = [request(f"id-{k}", [rng.randrange(60) for _ in range(rng.randint(10, 30))]) for _ in range(2)]
            first = asyncio.create_task(s.ask(requests[0], router=one))
            await asyncio.sleep(rng.uniform(0.0, 0.03))
            second = asyncio.create_task(s.ask(requests[1], router=other))
            for r, client in zip(requests, (first, second), strict=True):
                answer = await client
                assert answer.error is None
                assert answer.tokens == right(r)
                assert answer.took_s < 2.0

    play(3, quiet(num_routers=2), story)
