"""`baton simulate`: one seed, one run, one report. The same seed gives the same report in every process."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from dataclasses import dataclass

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
    """How the requests ended."""
    num_requests: int
    num_events: int
    num_turns: int
    virtual_s: float
    counters: tuple[tuple[str, float], ...]
    """Of all workers' last boots together: fallbacks, quarantines, preemptions and the like."""
    digest: str
    """Of the whole trace."""

    @property
    def ok(self) -> bool:
        return not self.failure

    @property
    def replay(self) -> str:
        """The command that runs this seed again, with its trace."""
        return f"baton simulate --seed {self.seed} --trace"

    def __str__(self) -> str:
        faults = "; ".join(f"{name}: {evidence or 'did not land'}" for name, evidence in self.faults)
        ended = ", ".join(f"{n} {outcome}" for outcome, n in self.outcomes)
        head = (f"seed {self.seed}: {'ok' if self.ok else 'FAILED'}, {self.num_requests} requests ({ended}), "
                f"{self.num_events} events in {self.virtual_s:.1f} s, trace {self.digest}\n  {faults}")
        return head if self.ok else f"{head}\n  {self.failure}\n  replay: {self.replay}"


def simulate(seed: int, trace: bool = False, plan: Plan | None = None) -> Report:
    """Run the world of a seed (or of a given plan). Prints the trace to standard output if asked; never raises for
    what the run finds, that is in the report."""
    worlds: list[World] = []

    async def main(loop: SimLoop) -> None:
        worlds.append(World(loop, plan or draw_plan(seed), sys.stdout if trace else None))
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
    outcomes = Counter(r.outcome for r in world.oracle.records.values())
    counters: Counter[str] = Counter()
    for machine in world.machines.values():
        if machine.node is not None:
            counters.update({name: int(value) for name, value in machine.node.parts.metrics.rendered()})
    return Report(
        seed, failure, tuple((f.name, f.evidence) for f in world.faults.values()), tuple(sorted(outcomes.items())),
        len(world.oracle.records), world.trace.num_events, world.loop.num_turns, world.loop.time(),
        tuple(sorted(counters.items())), world.trace.digest)
