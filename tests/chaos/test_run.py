"""Whole runs: real routers, workers and a registry as processes, real faults, every token compared."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from baton.chaos.outage import run_outage
from baton.chaos.plan import Plan
from baton.chaos.report import document, table, violations, write_json
from baton.chaos.run import run_chaos

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MIN_FAULTS = 30


def said(line: str) -> None:
    print(line, flush=True)


def test_three_minutes_of_faults_cost_no_token(tmp_path: Path) -> None:
    """The seed is in the name of the run: a failing one prints it with the faults it played, in order."""
    findings = asyncio.run(run_chaos(Plan(seed=1, duration_s=180.0), said))
    found = document(findings)
    write_json(found, str(tmp_path / "chaos.json"))
    print("\n".join(table(found)))
    assert not found["violations"], "\n".join(table(found))
    assert found["faults"] >= MIN_FAULTS, found["faults_by_kind"]
    assert all(f["proof"] for f in found["fault_list"])


def test_without_redis_and_without_rays_control_store_every_token_comes() -> None:
    plan = Plan(seed=1, duration_s=6.0, num_prefill=1, num_decode=3, use_namespaces=False)
    phases, bad = asyncio.run(run_outage(plan, said))
    assert not bad, bad
    for phase in phases[1:]:
        assert phase["in_flight"] > 0, f"{phase['phase']} struck when nothing ran"
        assert phase["ended"] > 0, f"no request ended during: {phase['phase']}"


def test_a_worker_that_loses_bits_is_found_out(tmp_path: Path) -> None:
    """A runner that finds nothing wrong with this would find nothing at all."""
    plan = Plan(seed=1, duration_s=4.0, use_namespaces=False, faults=("freeze registry",),
                decode_entry="tests.chaos.careless_worker:serve")
    broken = Counter(v.split()[0] for v in violations(asyncio.run(run_chaos(plan, said))))
    assert broken["WRONG"] > 0, broken
