"""How much a long prompt hurts those who are being answered: ITL of a steady decode load while long prompts arrive.

    decode   short prompts, long answers, one after the other at a constant rate: what is measured
    long     long prompts, short answers, Poisson at a given rate: what disturbs

1. capacity    long prompts alone, one after the other: how many a second the first system can take in
2. each system in turn, and as often as asked: the decode load under each rate of long prompts, 0 first
3. per system and rate: ITL p50 and p99 of the decode load, TTFT p99 of the long prompts

Systems are Baton disaggregated (1 prefill + 1 decode worker, one thread each), Baton aggregated (one worker, two
threads), started here one after the other, and endpoints that somebody else has started.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from baton.bench.load.arrivals import Process
from baton.bench.load.drive import drive
from baton.bench.load.plan import Lengths, Session, Shape, synthetic
from baton.bench.load.prose import Prose
from baton.bench.load.report import FORMAT, Json, others_cores, table, warnings
from baton.bench.load.run import Measuring, Met, Say, Target, meet, run_one
from baton.bench.stack import serving
from baton.core.errors import SetupError

DECODE, LONG = "decode", "long"
Open = Callable[[], contextlib.AbstractAsyncContextManager[Target]]
"""Brings a system up, for as long as it is entered."""


@dataclass(frozen=True, slots=True)
class Disturbance:
    """The load. Rates of long prompts are shares of the measured capacity, or absolute where `rates` is given."""

    decode_rate: float = 1.0
    decode: Shape = Shape(Lengths(32, 32), Lengths(128, 128))
    long: Shape = Shape(Lengths(2048, 2048), Lengths(4, 4))
    shares: tuple[float, ...] = (0.0, 0.2, 0.4)
    rates: tuple[float, ...] | None = None
    capacity_prompts: int = 5
    seed: int = 0


def mixed(load: Disturbance, long_rate: float, span_s: float, prose: Prose, seed: str) -> list[Session]:
    """Both kinds of a run."""
    sessions = synthetic(load.decode, Process("constant"), load.decode_rate, span_s, prose, seed, DECODE)
    if long_rate > 0:
        sessions += synthetic(load.long, Process("poisson"), long_rate, span_s, prose, seed, LONG)
    return sessions


async def capacity(met: Met, load: Disturbance, seed: str) -> float:
    """Long prompts per second that the system computes when it has nothing else to do: from the median TTFT of one
    after the other, all different. The first is not counted. Raises SetupError if one fails."""
    alone = replace(load.long, output=Lengths(1, 1))
    sessions = synthetic(alone, Process("constant"), 1.0, load.capacity_prompts + 1.0, met.prose, seed, "capacity")
    seen = []
    for session in sessions:
        _, (record,) = await drive([replace(session, at_s=0.0)], met.asker)
        if not record.event_s or not record.ok:
            raise SetupError(f"a prompt of {load.long.prompt.high} tokens got no answer: {record.error or 'no token'}.")
        assert record.sent_s is not None
        seen.append(record.event_s[0] - record.sent_s)
    return 1 / statistics.median(seen[1:])


async def measure(
    met: Met, load: Disturbance, measuring: Measuring, rates: Sequence[float], seed: str, say: Say
) -> list[Json]:
    """One system, every rate."""
    runs = []
    for number, rate in enumerate(rates):
        plan = functools.partial(mixed, load, rate, measuring.span_s, met.prose)
        say(f"  {rate:.3g} long prompts/s beside {load.decode_rate:g} decode requests/s for {measuring.span_s:g} s")
        run = await run_one(met, plan, f"{seed}/{number}", measuring)
        runs.append({"long_rate": rate, **run})
    return runs


async def compare(systems: Mapping[str, Open], load: Disturbance, measuring: Measuring, repeats: int, say: Say) -> Json:
    """In turn, A B A B, so that a machine that is busy for a while hits all alike. Capacity is the first system's,
    measured once: all get the same load."""
    per_s, rates = None, load.rates
    results: dict[str, list[Json]] = {name: [] for name in systems}
    for repeat in range(repeats):
        for name, opened in systems.items():
            say(f"{name}, {repeat + 1} of {repeats}")
            seed = f"{load.seed}/{repeat}"
            async with opened() as target, meet(target, seed) as met:
                if rates is None:
                    per_s = await capacity(met, load, seed)
                    rates = tuple(share * per_s for share in load.shares)
                    say(f"  capacity: {per_s:.3g} prompts of {load.long.prompt.high} tokens a second")
                results[name] += await measure(met, load, measuring, rates, seed, say)
    return {
        "format": FORMAT,
        "load": asdict(load),
        "measuring": asdict(measuring),
        "capacity_prompts_per_s": per_s,
        "systems": results,
    }


@dataclass(frozen=True, slots=True)
class Point:
    """One system at one rate of long prompts: a value per repeat, in ms but for the last two."""

    long_rate: float
    itl_p50: list[float]
    itl_p99: list[float]
    ttft_p99: list[float]
    """Of the long prompts."""
    goodput: list[float]
    """Decode requests per second within the SLO."""
    others_cores: list[float]


def curve(runs: Sequence[Json]) -> list[Point]:
    """Of one system, by rate."""
    points = []
    for rate in sorted({run["long_rate"] for run in runs}):
        same = [run for run in runs if run["long_rate"] == rate]
        decode, long = ([run["labels"][kind] for run in same if kind in run["labels"]] for kind in (DECODE, LONG))
        points.append(
            Point(
                rate,
                _ms(decode, "itl_s", "p50"),
                _ms(decode, "itl_s", "p99"),
                _ms(long, "ttft_s", "p99"),
                [figures["goodput_rate"] for figures in decode],
                [others_cores(run) for run in same],
            )
        )
    return points


def _ms(labels: Sequence[Json], measure: str, percent: str) -> list[float]:
    return [figures[measure][percent] * 1e3 for figures in labels if figures[measure]]


def lines(report: Json) -> list[str]:
    """A row per system and rate: the median over the repeats, with its extremes; and what is to be known of a run."""
    rows = [
        {
            "system": name,
            "long/s": f"{point.long_rate:.3f}",
            "ITL p50, ms": _shown(point.itl_p50),
            "ITL p99, ms": _shown(point.itl_p99),
            "long TTFT p99, ms": _shown(point.ttft_p99),
            "decode goodput": _shown(point.goodput),
            "others' cores": f"{max(point.others_cores):.2f}",
        }
        for name, runs in report["systems"].items()
        for point in curve(runs)
    ]
    return table(rows) + [
        f"  {name} at {run['long_rate']:.3f}/s: {text}"
        for name, runs in report["systems"].items()
        for run in runs
        for text in warnings(run)
    ]


def _shown(values: Sequence[float]) -> str:
    if not values:
        return "-"
    between = f" ({min(values):.1f}-{max(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.median(values):.1f}{between}"


# ---- systems ---------------------------------------------------------------------------------------------------------

BATON = {
    "disaggregated": ("--prefill", "1", "--decode", "1", "--set", "engine.threads=1"),
    "aggregated": ("--prefill", "0", "--decode", "1", "--set", "engine.threads=2"),
}


@contextlib.asynccontextmanager
async def elsewhere(target: Target) -> AsyncIterator[Target]:
    """Somebody else started it, and will stop it."""
    yield target


@contextlib.asynccontextmanager
async def own_baton(arguments: Sequence[str], target: Target) -> AsyncIterator[Target]:
    """A stack of our own on free ports; `target` says everything but where."""
    async with serving(arguments) as (url, pid):
        yield replace(target, url=url, server_pids=frozenset({pid}))
