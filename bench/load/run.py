"""One load run and a sweep of them, against any OpenAI-compatible endpoint.

1. meet      who serves what here, which fields it takes, how long texts must be: two probes
2. plan      all sessions of a rate are made
3. drive     open loop; whose CPU was used is watched meanwhile
4. report    figures of the window; after the last rate the goodput curve
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
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
from baton.bench.load.report import FORMAT, Json, Window, largest_within, run_report
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
    duration_s: float = 60.0
    warmup_s: float = 5.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Met:
    """An endpoint that answers."""

    asker: Asker
    prose: Prose
    server_pids: frozenset[int]


@contextlib.asynccontextmanager
async def meet(target: Target, seed: str) -> AsyncIterator[Met]:
    """Raises SetupError if it cannot be measured."""
    headers = {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    async with Client(target.url, headers) as client:
        model = target.model or await first_model(client)
        counted = Prose.counted(target.tokenizer) if target.tokenizer else None
        dialect, prose = await sized(client, Dialect(target.api, model, extra=target.extra), counted, seed)
        pids = target.server_pids or await asyncio.to_thread(listener, client.host, client.port)
        yield Met(Asker(client, dialect, target.timeout_s), prose, pids)


async def run_once(met: Met, sessions: Sequence[Session], warmup_s: float, duration_s: float, slo: Slo) -> Json:
    """One run's figures, when everything sent has ended."""
    gc.collect()
    gc.freeze()  # the plan is large and lives on: the collector would walk it again and again between tokens
    try:
        async with Watch(met.server_pids) as watch:
            start_s, records = await drive(sessions, met.asker)
    finally:
        gc.unfreeze()
    return run_report(records, Window(start_s + warmup_s, duration_s), slo, watch)


async def sweep(
    target: Target, traffic: Traffic, rates: Sequence[float | None], slo: Slo, slo_share: float, say: Say
) -> Json:
    """The whole report. `rates`: sessions per second; None is for traces alone, as recorded."""
    trace = spread(read_trace(traffic.trace), random.Random(traffic.seed)) if traffic.trace else None
    runs = []
    async with meet(target, str(traffic.seed)) as met:
        for number, rate in enumerate(rates):
            sessions = planned(traffic, trace, rate, met.prose, f"{traffic.seed}/{number}")
            per_s = rate or len(sessions) / span_s(traffic)
            say(f"{len(sessions)} sessions at {per_s:.3g}/s for {span_s(traffic):g} s")
            run = await run_once(met, sessions, traffic.warmup_s, traffic.duration_s, slo)
            runs.append({"rate": rate or run["offered_rate"], **run})
        dialect = met.asker.dialect
    return {
        "format": FORMAT,
        "target": {
            "url": target.url, "api": target.api, "model": dialect.model,
            "ignore_eos": dialect.ignore_eos, "usage": dialect.usage,
        },
        "traffic": json.loads(json.dumps(asdict(traffic), default=str)),
        "slo": {**asdict(slo), "share": slo_share},
        "runs": runs,
        "largest_rate_within_slo": largest_within(runs, slo_share),
    }  # fmt: skip


def span_s(traffic: Traffic) -> float:
    return traffic.warmup_s + traffic.duration_s


def planned(
    traffic: Traffic, trace: Sequence[Traced] | None, rate: float | None, prose: Prose, seed: str
) -> list[Session]:
    """`seed`: of the prompts; arrivals of a trace are its own."""
    if trace is not None:
        return from_trace(replayed(trace, traffic.trace_from_s, rate, span_s(traffic)), traffic.scale, prose, seed)
    assert rate is not None, "only a trace has a rate of its own"
    return synthetic(traffic.shape, traffic.process, rate, span_s(traffic), prose, seed)
