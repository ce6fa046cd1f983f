"""Many worlds, side by side in processes, and what they add up to; and the smallest world that still fails.

Does not know clocks: whoever runs a campaign measures it.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import combinations

from baton.sim.simulate import Report, simulate

SHARD_SEEDS = 5
"""Worlds per task of a process: few enough for a steady progress, enough to pay for the way there and back."""


def run_many(seeds: Iterable[int], num_processes: int) -> Iterator[Report]:
    """The report of every seed, in the order in which they end; in this process if one is enough."""
    todo = list(seeds)
    if num_processes == 1:
        yield from map(simulate, todo)
        return
    shards = [todo[i : i + SHARD_SEEDS] for i in range(0, len(todo), SHARD_SEEDS)]
    with ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn"), _start) as processes:
        try:
            for shard in as_completed([processes.submit(_run_shard, s) for s in shards]):
                yield from shard.result()
        finally:
            processes.shutdown(cancel_futures=True)


def _start() -> None:
    logging.disable(logging.CRITICAL)  # what workers and routers warn about is the point of these worlds


def _run_shard(seeds: list[int]) -> list[Report]:
    return [simulate(seed) for seed in seeds]


@dataclass(slots=True)
class Summary:
    """Of a campaign so far."""

    num_worlds: int = 0
    num_requests: int = 0
    num_turns: int = 0
    virtual_s: float = 0.0
    landed: Counter[str] = field(default_factory=Counter)
    """Faults that hit work, by name."""
    missed: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    counters: Counter[str] = field(default_factory=Counter)
    failed: list[Report] = field(default_factory=list)

    def add(self, report: Report) -> None:
        self.num_worlds += 1
        self.num_requests += report.num_requests
        self.num_turns += report.num_turns
        self.virtual_s += report.virtual_s
        for name, evidence in report.faults:
            (self.landed if evidence else self.missed)[name] += 1
        self.outcomes.update(dict(report.outcomes))
        self.counters.update({name.partition("{")[0]: int(value) for name, value in report.counters})
        if not report.ok:
            self.failed.append(report)

    def lines(self, wall_s: float) -> Iterator[str]:
        ok = self.num_worlds - len(self.failed)
        yield f"{ok} of {self.num_worlds} worlds ok"
        ended = ", ".join(f"{n:,} {outcome}" for outcome, n in sorted(self.outcomes.items()))
        yield f"  {self.num_requests:,} requests ({ended}), {self.num_turns:,} events"
        kinds = ", ".join(f"{name} {n:,}" for name, n in sorted(self.landed.items()))
        yield f"  {self.landed.total():,} faults landed in the middle of work: {kinds}"
        if self.missed:
            yield f"  did not land: {', '.join(f'{name} {n:,}' for name, n in sorted(self.missed.items()))}"
        ratio = self.virtual_s / wall_s if wall_s else 0.0
        yield f"  {self.virtual_s:,.0f} simulated seconds in {wall_s:,.1f} s: {ratio:,.0f} times faster than real"


def shrink(report: Report) -> Report:
    """The smallest world of this seed that still fails: fewest faults first, then fewest clients. The same failure is
    not asked for: what fails with less is the better start."""
    assert not report.ok, f"seed {report.seed} does not fail"
    best, num_faults = report, len(report.faults)
    for size in range(num_faults):
        runs = (simulate(report.seed, kept_faults=kept) for kept in combinations(range(num_faults), size))
        smaller = next((r for r in runs if not r.ok), None)
        if smaller is not None:
            best = smaller
            break
    few, many = 0, best.num_requests
    while few < many:  # not monotone, so this is a small failing number, not always the smallest
        middle = (few + many) // 2
        found = simulate(report.seed, kept_faults=best.kept_faults, kept_jobs=middle)
        if found.ok:
            few = middle + 1
        else:
            best, many = found, middle
    return best
