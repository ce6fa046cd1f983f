"""Whom to trust with how much."""

from __future__ import annotations

import pytest

from baton.core.metrics import Metrics
from baton.core.worker import Role, WorkerInfo, WorkerLoad
from baton.router.health import FRESH_STEPS, OPEN_FIRST_S, OPEN_MAX_S, RAMP_S, START_SHARE, TOGETHER_S, Health
from tests.router.fake_fleet import capability

OLD, NEW = WorkerLoad(steps=FRESH_STEPS), WorkerLoad()


def info(boot: str = "b1") -> WorkerInfo:
    return WorkerInfo("w", boot, Role.DECODE, "w:1", capability())


def opened(health: Health, at: float) -> float:
    """Fail until the circuit is open; returns when it is."""
    while health.share(info(), OLD, at) > 0:
        health.failed("w", at)
        at += TOGETHER_S
    return at - TOGETHER_S


def test_a_worker_that_has_run_for_long_is_trusted_at_first_sight() -> None:
    assert Health(Metrics()).share(info(), OLD, 100.0) == 1.0


def test_a_fresh_boot_gets_its_share_over_time_and_each_boot_anew() -> None:
    health = Health(Metrics())
    assert health.share(info(), NEW, 100.0) == START_SHARE
    assert START_SHARE < health.share(info(), NEW, 100.0 + RAMP_S / 2) < 1.0
    assert health.share(info(), NEW, 100.0 + RAMP_S) == 1.0
    assert health.share(info("b2"), NEW, 200.0) == START_SHARE


def test_what_fails_together_counts_once() -> None:
    health = Health(Metrics())
    health.share(info(), OLD, 0.0)
    for i in range(64):
        health.failed("w", i * TOGETHER_S / 100)
    assert health.share(info(), OLD, 1.0) == 0.5


def test_successes_bring_a_share_back() -> None:
    health = Health(Metrics())
    health.share(info(), OLD, 0.0)
    health.failed("w", 0.0)
    for _ in range(10):
        health.succeeded("w")
    assert health.share(info(), OLD, 1.0) == 1.0


def test_who_keeps_failing_gets_nothing_then_one_then_all() -> None:
    metrics = Metrics()
    health = Health(metrics)
    at = opened(health, 0.0)
    assert metrics.value("baton_circuits_opened_total", worker="w") == 1
    assert health.share(info(), OLD, at + OPEN_FIRST_S * 0.9) == 0.0
    assert health.share(info(), OLD, at + OPEN_FIRST_S) > 0.0
    health.tried("w", at + OPEN_FIRST_S)
    assert health.share(info(), OLD, at + 1.9 * OPEN_FIRST_S) == 0.0
    assert health.share(info(), OLD, at + 2 * OPEN_FIRST_S) > 0.0, "its probe was lost, or runs for long"
    health.succeeded("w")
    assert health.share(info(), OLD, at + OPEN_FIRST_S) == pytest.approx(START_SHARE * 1.1)


def test_a_probe_that_fails_makes_the_next_come_later_up_to_a_bound() -> None:
    health = Health(Metrics())
    at = opened(health, 0.0)
    open_s = OPEN_FIRST_S
    for _ in range(8):
        at += open_s
        assert health.share(info(), OLD, at) > 0.0, "the probe"
        health.failed("w", at)
        open_s = min(OPEN_MAX_S, 2 * open_s)
        assert health.share(info(), OLD, at + 0.9 * open_s) == 0.0
    assert open_s == OPEN_MAX_S


def test_a_new_boot_of_a_worker_that_kept_failing_is_not_trusted_for_that() -> None:
    health = Health(Metrics())
    at = opened(health, 0.0)
    assert health.share(info("b2"), NEW, at) == 0.0
