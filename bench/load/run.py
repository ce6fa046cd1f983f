"""One load run and a sweep of them, against any OpenAI-compatible endpoint.

1. meet      who serves what here, which fields it takes, how long texts must be: two probes
2. plan      all sessions of a rate are made
3. drive     open loop; whose CPU was used is watched meanwhile
4. report    figures of the window; after the last rate the goodput curve
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import json
import random
import resource
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from baton.bench.load.arrivals import Process
from baton.bench.load.client import Client
from baton.bench.load.drive import drive
from baton.bench.load.host import Watch, listener
from baton.bench.load.openai import Api, Asker, Dialect, first_model, sized
from baton.bench.load.plan import Scale, Session, Shape, from_trace, synthetic
from baton.bench.load.prose import Prose
from baton.bench.load.record import Slo
from baton.bench.load.report import (
    FORMAT,
    QUIET_CORES,
    Json,
    Window,
    largest_within,
    others_cores,
    run_report,
)
from baton.bench.load.traces import Traced, read_trace, replayed, spread

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Target:
    """Where, and how to be let in."""

    url: str
    api: Api = "completions"
    model: str | None = None
    """None: the first that the endpoint lists."""
    tokenizer: Path | None = None
    api_key: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 600.0
    server_pids: frozenset[int] = frozenset()
    """Empty: whoever listens at the URL, if it is on this machine."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What comes in, but for how much of it."""

    shape: Shape = Shape()
    process: Process = Process()
    trace: Path | None = None
    """Instead of shape and process."""
    trace_from_s: float = 0.0
    scale: Scale = Scale()
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Measuring:
    """How each run is measured."""

    slo: Slo = Slo()
    slo_share: float = 0.9
    """Of requests that must keep it, for a rate to be within it."""
    duration_s: float = 60.0
    warmup_s: float = 5.0
    attempts: int = 1
    """A run during which others used more than QUIET_CORES is made again, up to so many in all. The one with the
    least counts: chosen by that alone, never by its figures."""

    max_in_flight: int | None = None
    """None: unbounded. Else a request may leave late, and its latency counts from when it was meant to."""

    @property
    def span_s(self) -> float:
        return self.warmup_s + self.duration_s


@dataclass(frozen=True, slots=True)
class Met:
    """An endpoint that answers."""

    asker: Asker
    prose: Prose
    server_pids: frozenset[int]


@contextlib.asynccontextmanager
async def meet(target: Target, seed: str) -> AsyncIterator[Met]:
    """Raises SetupError if it cannot be measured."""
    open_many_files()
    headers = {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    async with Client(target.url, headers) as client:
        model = target.model or await first_model(client)
        counted = Prose.counted(target.tokenizer) if target.tokenizer else None
        dialect, prose = await sized(client, Dialect(target.api, model, extra=target.extra), counted, seed)
        pids = target.server_pids or await asyncio.to_thread(listener, client.host, client.port)
        yield Met(Asker(client, dialect, target.timeout_s), prose, pids)


def open_many_files() -> None:
    """Requests in flight are unbounded, and each is a file: as many as the system lets this process have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # some systems refuse what they call their own limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


Plan = Callable[[str], Sequence[Session]]
"""Sessions from a seed. Runs have different ones, so that no prefix cache knows a prompt from an earlier run."""


async def run_one(met: Met, plan: Plan, seed: str, measuring: Measuring) -> Json:
    """One run's figures, when everything sent has ended; of several attempts the least disturbed."""
    return await quietest(lambda n: attempt(met, plan(f"{seed}/{n}"), measuring), measuring.attempts)


async def quietest(once: Callable[[int], Awaitable[Json]], attempts: int) -> Json:
    """Of at most so many attempts; the first that is quiet enough ends them."""
    made: list[Json] = []
    for number in range(attempts):
        made.append(await once(number))
        if others_cores(made[-1]) <= QUIET_CORES:
            break
    best = min(made, key=others_cores)
    return {**best, "attempts_others_cores": [others_cores(run) for run in made]}


async def attempt(met: Met, sessions: Sequence[Session], measuring: Measuring) -> Json:
    gc.collect()
    gc.freeze()  # the plan is large and lives on: the collector would walk it again and again between tokens
    try:
        async with Watch(met.server_pids) as watch:
            start_s, records = await drive(sessions, met.asker, measuring.max_in_flight)
    finally:
        gc.unfreeze()
    return run_report(records, Window(start_s + measuring.warmup_s, measuring.duration_s), measuring.slo, watch)


async def sweep(
    target: Target, traffic: Traffic, measuring: Measuring, rates: Sequence[float | None], say: Say
) -> Json:
    """The whole report. `rates`: sessions per second; None is for traces alone, as recorded."""
    trace = spread(read_trace(traffic.trace), random.Random(traffic.seed)) if traffic.trace else None
    runs = []
    async with meet(target, str(traffic.seed)) as met:
        for number, rate in enumerate(rates):
            plan = functools.partial(planned, traffic, trace, rate, measuring.span_s, met.prose)
            say(f"{'as recorded' if rate is None else f'{rate:g} sessions/s'}, for {measuring.span_s:g} s")
            run = await run_one(met, plan, f"{traffic.seed}/{number}", measuring)
            runs.append({"rate": rate or run["offered_rate"], **run})
        dialect = met.asker.dialect
    return {
        "format": FORMAT,
        "target": {
            "url": target.url, "api": target.api, "model": dialect.model,
            "ignore_eos": dialect.ignore_eos, "usage": dialect.usage,
        },
        "traffic": json.loads(json.dumps(asdict(traffic), default=str)),
        "measuring": asdict(measuring),
        "runs": runs,
        "largest_rate_within_slo": largest_within(runs, measuring.slo_share),
    }  # fmt: skip


def planned(
    traffic: Traffic, trace: Sequence[Traced] | None, rate: float | None, span_s: float, prose: Prose, seed: str
) -> list[Session]:
    """`seed`: of the prompts; arrivals of a trace are its own."""
    if trace is not None:
        return from_trace(replayed(trace, traffic.trace_from_s, rate, span_s), traffic.scale, prose, seed)
    assert rate is not None, "only a trace has a rate of its own"
    return synthetic(traffic.shape, traffic.process, rate, span_s, prose, seed)
