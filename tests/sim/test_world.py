"""The world: production router, workers and hand-off under faults, for many seeds. Every failure prints the command
that replays it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

import pytest

from baton.sim.simulate import Report, simulate

SEEDS_PER_TEST = 20
NUM_SEEDS = 200


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """What workers warn about is the point of these runs; pytest would keep every line."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def check(report: Report) -> None:
    assert report.ok, f"\n{report}"
    missed = [name for name, evidence in report.faults if not evidence]
    assert not missed, f"{missed} did not land in the middle of work: replay with `{report.replay}`"
    assert report.num_requests >= 20
    assert report.num_turns >= 2000


FIRST = [pytest.param(0, id="seeds 0 to 19")]
OTHERS = [
    pytest.param(n, id=f"seeds {n} to {n + SEEDS_PER_TEST - 1}", marks=pytest.mark.slow)
    for n in range(SEEDS_PER_TEST, NUM_SEEDS, SEEDS_PER_TEST)
]


@pytest.mark.parametrize("first", FIRST + OTHERS)
def test_every_request_ends_once_with_the_tokens_of_an_undisturbed_run(first: int) -> None:
    for seed in range(first, first + SEEDS_PER_TEST):
        check(simulate(seed))


def test_the_seeds_exercise_what_they_are_for() -> None:
    """A world in which nothing is preempted, evicted, quarantined or cancelled proves nothing."""
    seen: Counter[str] = Counter()
    for seed in range(40):
        report = simulate(seed)
        seen.update({name.partition("{")[0]: int(value) for name, value in report.counters})
        seen.update(dict(report.outcomes))
    for name in ("baton_preemptions_total", "baton_quarantined_blocks_total", "baton_fences_total",
                 "baton_integrity_failures_total", "baton_refusals_total", "baton_fallbacks_total", "left", "stop"):
        assert seen[name] > 0, f"{name} never happened in 40 worlds: {seen}"


DIGESTS = """
import logging
logging.disable(logging.CRITICAL)
from baton.sim.simulate import simulate
for seed in (3, 5, 7, 11, 14):
    print(seed, simulate(seed).digest)
"""


def test_the_same_seed_gives_the_same_trace_in_another_process() -> None:
    def digests(hash_seed: str) -> str:
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", DIGESTS]
        return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout

    first = digests("1")
    assert first == digests("2")
    ours = "".join(f"{seed} {simulate(seed).digest}\n" for seed in (3, 5, 7, 11, 14))
    assert first == ours
    assert len({line.split()[1] for line in first.splitlines()}) == 5, "different seeds are different worlds"


def test_a_report_names_the_command_that_replays_it() -> None:
    report = simulate(4)
    assert report.replay == "baton simulate --seed 4 --trace"
    assert any(kind in str(report) for kind, _ in report.faults)
