"""`baton simulate`: the production router, scheduler and hand-off on virtual time, with faults. A seed is a world."""

from __future__ import annotations

import logging
from typing import Annotated

import typer


def simulate(
    seed: Annotated[int, typer.Option(help="Which world; equal seeds give equal traces, everywhere.")] = 0,
    seeds: Annotated[
        int, typer.Option(min=1, metavar="N", help="Run this many worlds, SEED and those that follow.")
    ] = 1,
    trace: Annotated[bool, typer.Option("--trace", help="Print every event.")] = False,
) -> None:
    """Run worlds of workers, clients and faults, and check that nothing is lost."""
    from baton.sim.simulate import simulate as run_world

    if not trace:
        # What workers and routers warn about is the point of these worlds; the report counts it.
        logging.getLogger("baton").setLevel(logging.CRITICAL)
    failed = []
    for number in range(seed, seed + seeds):
        report = run_world(number, trace)
        if not report.ok:
            failed.append(number)
        if not report.ok or seeds == 1:
            print(report)
    if seeds > 1:
        print(f"{seeds - len(failed)} of {seeds} worlds ok" + (f"; failed: {failed}" if failed else ""))
    raise typer.Exit(1 if failed else 0)
