"""Bugs that the world found, each in a world drawn to meet it again."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator

import pytest

from baton.core.config import Config
from baton.core.worker import Role
from baton.sim.faults import BadPulls, Freeze
from baton.sim.network import Conditions
from baton.sim.simulate import Report, simulate
from baton.sim.transport import PullFault
from baton.sim.world import Plan, draw_plan


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


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


@pytest.mark.parametrize("seed", [8, 33])
def test_a_request_whose_first_token_is_its_last_needs_no_kv(seed: int) -> None:
    """The fallback of a finished sequence was handed to the scheduler."""
    plan = remote(draw_plan(seed))
    shape = dataclasses.replace(plan.shape, output_tokens=(1, 1))
    faults = (BadPulls(PullFault.NEVER, 10),)
    report = simulate(seed, plan=dataclasses.replace(plan, shape=shape, faults=faults))
    assert report.ok, report


@pytest.mark.parametrize("seed", [7, 8, 10])
def test_a_hand_off_cancelled_in_the_moment_it_fails_keeps_no_block(seed: int) -> None:
    """A task group raised the failure and forgot the cancellation: the sequence ran on for nobody."""
    faults = (Freeze(Role.DECODE, 3.5), Freeze(Role.DECODE, 2.5))
    report = simulate(seed, plan=dataclasses.replace(draw_plan(seed), num_jobs=30, faults=faults))
    assert report.ok, report


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
