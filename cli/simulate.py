"""`baton simulate`: the production router, scheduler and hand-off on virtual time, with faults. A seed is a world."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from typing import Annotated

import typer


def simulate(
    seed: Annotated[int, typer.Option(help="Which world; equal seeds give equal traces, everywhere.")] = 0,
    seeds: Annotated[
        int, typer.Option(min=1, metavar="N", help="Run this many worlds, SEED and those that follow.")
    ] = 1,
    jobs: Annotated[int, typer.Option(min=1, help="Processes to run them in.")] = 1,
    faults: Annotated[
        str | None, typer.Option(metavar="I,J", help="Only these faults of the world, by position; or `none`.")
    ] = None,
    jobs_kept: Annotated[
        int | None, typer.Option("--jobs-kept", min=0, metavar="N", help="Only the first N clients of the world.")
    ] = None,
    shrink: Annotated[
        bool, typer.Option("--shrink/--no-shrink", help="When a world fails, look for the smallest that still does.")
    ] = True,
    trace: Annotated[bool, typer.Option("--trace", help="Print every event.")] = False,
) -> None:
    """Run worlds of routers, workers, clients and faults, and check that nothing is lost."""
    from baton.sim.more_faults import draw_faults

    if seeds > 1:
        if trace or faults is not None or jobs_kept is not None:
            raise typer.BadParameter("--trace, --faults and --jobs-kept are for one world: leave --seeds out.")
        with _quiet():
            raise typer.Exit(_campaign(range(seed, seed + seeds), jobs, shrink))
    kept = _positions(faults)
    num_faults = len(draw_faults(seed))
    if kept is not None and any(position >= num_faults for position in kept):
        raise typer.BadParameter(f"--faults {faults}: world {seed} has {num_faults} faults, counted from 0.")
    with contextlib.nullcontext() if trace else _quiet():
        raise typer.Exit(_one(seed, trace, kept, jobs_kept, shrink))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What workers and routers warn about is the point of these worlds; the report counts it."""
    ours = logging.getLogger("baton")
    before = ours.level
    ours.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        ours.setLevel(before)


def _one(seed: int, trace: bool, kept_faults: tuple[int, ...] | None, kept_jobs: int | None, shrink: bool) -> int:
    """The exit code."""
    from baton.sim.campaign import shrink as smallest
    from baton.sim.simulate import simulate as run_world

    report = run_world(seed, trace, kept_faults=kept_faults, kept_jobs=kept_jobs)
    print(report)
    if not report.ok and shrink and not trace and kept_faults is None and kept_jobs is None:
        print(f"smallest: {smallest(report)}")
    return 0 if report.ok else 1


def _campaign(seeds: range, jobs: int, shrink: bool) -> int:
    """The exit code. Failures are printed as they come, with the smallest world that still fails."""
    from baton.sim.campaign import Summary, run_many
    from baton.sim.campaign import shrink as smallest

    summary, began = Summary(), time.monotonic()
    for report in run_many(seeds, jobs):
        summary.add(report)
        if not report.ok:
            _clear_progress()
            print(smallest(report) if shrink else report, flush=True)
        _show_progress(summary.num_worlds, len(seeds), len(summary.failed), time.monotonic() - began)
    _clear_progress()
    print("\n".join(summary.lines(time.monotonic() - began)))
    return 1 if summary.failed else 0


def _show_progress(done: int, total: int, num_failed: int, wall_s: float) -> None:
    line = f"{done} of {total} worlds, {num_failed} failed, {wall_s:.0f} s"
    if sys.stderr.isatty():
        print(f"\r{line} ", end="", file=sys.stderr, flush=True)
    elif done * 10 // total > (done - 1) * 10 // total:
        print(line, file=sys.stderr, flush=True)


def _clear_progress() -> None:
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def _positions(faults: str | None) -> tuple[int, ...] | None:
    if faults is None or faults == "none":
        return None if faults is None else ()
    try:
        return tuple(int(part) for part in faults.split(","))
    except ValueError:
        raise typer.BadParameter(f"--faults {faults!r}: positions as in `0,2`, or `none`.") from None
