"""`baton simulate`: one seed, one run, one report. The same seed gives the same report in every process."""

from __future__ import annotations

import dataclasses
import gc
import sys
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from baton.sim.clocks import host_clocks
from baton.sim.loop import SimDeadlock, SimLivelock, SimLoop, run
from baton.sim.oracle import OracleFailure
from baton.sim.plan import Plan, draw_plan
from baton.sim.world import World


@dataclass(frozen=True, slots=True)
class Report:
    seed: int
    failure: str
    """What must never happen and did; empty when all went well."""
    faults: tuple[tuple[str, str], ...]
    """(name, evidence that it landed; empty if it did not)."""
    outcomes: tuple[tuple[str, int], ...]
    """How the drawn requests ended; probes and what faults send are not among them."""
    num_requests: int
    num_lines: int
    """Of the trace."""
    num_turns: int
    """Events: turns of the loop, each followed by the oracle's counters."""
    virtual_s: float
    counters: tuple[tuple[str, float], ...]
    """Of all boots of all hosts together: fallbacks, quarantines, preemptions and the like."""
    digest: str
    """Of the whole trace."""
    kept_faults: tuple[int, ...] | None = None
    kept_jobs: int | None = None
    """What of the seed's faults and clients was left in this run; None: all."""

    @property
    def ok(self) -> bool:
        return not self.failure

    @property
    def replay(self) -> str:
        """The command that runs this world again, with its trace."""
        command = f"baton simulate --seed {self.seed}"
        if self.kept_faults is not None:
            command += f" --faults {','.join(map(str, self.kept_faults)) or 'none'}"
        if self.kept_jobs is not None:
            command += f" --jobs-kept {self.kept_jobs}"
        return f"{command} --trace"

    def __str__(self) -> str:
        faults = "; ".join(f"{name}: {evidence or 'did not land'}" for name, evidence in self.faults) or "no faults"
        ended = ", ".join(f"{n} {outcome}" for outcome, n in self.outcomes)
        head = (f"seed {self.seed}: {'ok' if self.ok else 'FAILED'}, {self.num_requests} requests ({ended}), "
                f"{self.num_turns} events in {self.virtual_s:.1f} s, trace {self.digest} of {self.num_lines} lines\n"
                f"  {faults}")
        return head if self.ok else f"{head}\n  {self.failure}\n  replay: {self.replay}"


def simulate(
    seed: int,
    trace: bool = False,
    plan: Plan | None = None,
    kept_faults: Collection[int] | None = None,
    kept_jobs: int | None = None,
) -> Report:
    """Run the world of a seed (or of a given plan), or what is kept of it. Prints the trace to standard output if
    asked; never raises for what the run finds, that is in the report."""
    worlds: list[World] = []
    whole = plan or draw_plan(seed)
    plan = dataclasses.replace(whole, kept_faults=kept_faults, kept_jobs=kept_jobs)

    async def main(loop: SimLoop) -> None:
        with host_clocks(loop):
            worlds.append(World(loop, plan, sys.stdout if trace else None))
            await worlds[0].run()

    failure = ""
    collecting = gc.isenabled()
    gc.disable()  # when cycles are collected would depend on what ran before
    try:
        run(seed, main)
    except (AssertionError, SimDeadlock, SimLivelock) as e:
        failure = str(e) if isinstance(e, OracleFailure) else f"{type(e).__name__}: {e}"
    finally:
        if collecting:
            gc.enable()
        gc.collect(0)
    return _report(seed, worlds[0], failure)


def _report(seed: int, world: World, failure: str) -> Report:
    drawn = [r for r in world.oracle.records.values() if world.is_drawn(r.request_id)]
    outcomes = Counter(r.outcome for r in drawn)
    counters: Counter[str] = Counter()
    boots = [m for machine in world.machines.values() for m in machine.metrics]
    boots += [m for router in world.routers.values() for m in router.metrics]
    for metrics in boots:
        counters.update({name: int(value) for name, value in metrics.rendered()})
    kept = world.plan.kept_faults
    return Report(
        seed, failure, tuple((f.name, f.evidence) for f in world.faults.values()), tuple(sorted(outcomes.items())),
        len(drawn), world.trace.num_lines, world.loop.num_turns, world.loop.now,
        tuple(sorted(counters.items())), world.trace.digest, None if kept is None else tuple(sorted(kept)),
        world.plan.kept_jobs)
