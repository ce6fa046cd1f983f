"""From records to figures. Every key of the JSON is described in docs/load.md.

A request counts for latencies if it was meant to be sent in the measured window, [warm-up, warm-up + duration); for
throughput what counts is what came out during the window, whoever asked for it, so that neither the filling of an
empty server at the start nor the emptying at the end is measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from baton.bench.load.host import Watch
from baton.bench.load.record import Record, Slo

FORMAT = 1
LATE_S = 0.01
"""A request sent later than this counts as a late send."""
QUIET_CORES = 0.1
"""Of other processes; above it a run is called contended."""
MESSAGE_CHARS = 300
PERCENTILES = (50, 90, 99)

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Window:
    """The measured part of a run, on the records' clock."""

    start_s: float
    duration_s: float

    def holds(self, at_s: float) -> bool:
        return self.start_s <= at_s < self.start_s + self.duration_s


def percentile(ascending: Sequence[float], percent: float) -> float:
    """Linear between neighbours, as numpy's default."""
    assert ascending
    place = (len(ascending) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ascending) - 1)
    return ascending[below] + (ascending[above] - ascending[below]) * (place - below)


def spread(values: Iterable[float]) -> Json | None:
    """None where there is nothing to describe: no figure is better than a zero."""
    ascending = sorted(values)
    if not ascending:
        return None
    return {
        "count": len(ascending),
        "mean": sum(ascending) / len(ascending),
        **{f"p{percent}": percentile(ascending, percent) for percent in PERCENTILES},
        "max": ascending[-1],
    }


def measured(records: Sequence[Record], window: Window, slo: Slo) -> Json:
    """The figures of one run, or of one label of it."""
    counted = [r for r in records if window.holds(r.intended_s)]
    ok = [r for r in counted if r.ok]
    kept = sum(slo.kept(r) for r in counted)
    late = [r.late_s for r in counted if r.late_s is not None]
    ended = sum(r.ok and r.end_s is not None and window.holds(r.end_s) for r in records)
    return {
        "offered_rate": len(counted) / window.duration_s,
        "achieved_rate": ended / window.duration_s,
        "output_tokens_per_s": sum(tokens_within(r, window) for r in records if r.ok) / window.duration_s,
        "goodput_rate": kept / window.duration_s,
        "slo_share": kept / len(counted) if counted else None,
        "requests": {
            "sent": len(counted),
            "ok": len(ok),
            "errors": dict(Counter(r.error for r in counted if r.error is not None)),
            "first_messages": {r.error: r.message[:MESSAGE_CHARS] for r in reversed(counted) if r.error is not None},
        },
        "in_flight": in_flight(records, window),
        "ttft_s": spread(r.ttft_s for r in ok if r.ttft_s is not None),
        "itl_s": spread(gap for r in ok for gap in r.gaps_s()),
        "tpot_s": spread(r.tpot_s for r in ok if r.tpot_s is not None),
        "e2e_s": spread(r.e2e_s for r in ok if r.e2e_s is not None),
        "tokens": _tokens(ok),
        "client": {"late_s": spread(late), "late_sends": sum(s > LATE_S for s in late)},
    }


def tokens_within(record: Record, window: Window) -> float:
    """Output tokens that came during the window; an event stands for equally many of its answer's tokens."""
    if not record.event_s:
        return 0.0
    return sum(map(window.holds, record.event_s)) * record.output_tokens / len(record.event_s)


def in_flight(records: Sequence[Record], window: Window) -> Json:
    """Requests sent and not yet ended, during the window: mean over time, and most at once."""
    end_s = window.start_s + window.duration_s
    flights = [
        (max(r.sent_s, window.start_s), min(r.end_s, end_s))
        for r in records
        if r.sent_s is not None and r.end_s is not None and r.sent_s < end_s and r.end_s > window.start_s
    ]
    # At one instant landings come first: a request that follows another is not beside it.
    changes = sorted([(begin_s, 1) for begin_s, _ in flights] + [(done_s, -1) for _, done_s in flights])
    most = max(accumulate(change for _, change in changes), default=0)
    return {"mean": sum(done_s - begin_s for begin_s, done_s in flights) / window.duration_s, "max": most}


def _tokens(ok: Sequence[Record]) -> Json:
    """What was asked for, and what the endpoint says it was."""
    billed = [r for r in ok if r.prompt_tokens is not None]
    events = sum(len(r.event_s) for r in ok)
    return {
        "counted_by": "usage" if any(r.usage_output_tokens is not None for r in ok) else "events",
        "prompt_asked": _mean(r.asked_prompt_tokens for r in ok),
        "prompt": _mean(r.prompt_tokens for r in billed if r.prompt_tokens is not None),
        "prompt_cached": _mean(r.cached_tokens for r in billed if r.cached_tokens is not None),
        "output_asked": _mean(r.asked_output_tokens for r in ok),
        "output": _mean(r.output_tokens for r in ok),
        "output_short": sum(r.output_tokens < r.asked_output_tokens for r in ok),
        "per_event": sum(r.output_tokens for r in ok) / events if events else None,
    }


def _mean(values: Iterable[float]) -> float | None:
    seen = list(values)
    return sum(seen) / len(seen) if seen else None


def run_report(records: Sequence[Record], window: Window, slo: Slo, watch: Watch) -> Json:
    """All of one run, and of each kind of request in it."""
    report = measured(records, window, slo)
    used = watch.mean
    report["cpu_cores"] = used and {
        "client": used.client, "server": used.server, "others": used.others, "others_worst_second": watch.worst_others,
    }  # fmt: skip
    report["client"]["loop_lag_s"] = watch.loop_lag_s
    labels = sorted({r.label for r in records})
    report["labels"] = {name: measured([r for r in records if r.label == name], window, slo) for name in labels}
    return report


def others_cores(run: Json) -> float:
    """0 where it is not known."""
    return float(run["cpu_cores"]["others"]) if run["cpu_cores"] else 0.0


def largest_within(runs: Sequence[Json], share: float) -> float | None:
    """The largest offered rate up to which every rate kept the SLO in at least `share` of its requests: one that is
    met by luck above one that is missed does not count."""
    best = None
    for run in sorted(runs, key=lambda run: run["rate"]):
        if run["slo_share"] is None or run["slo_share"] < share:
            break
        best = run["rate"]
    return best


# ---- for people ------------------------------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, str]]) -> list[str]:
    """A heading, and a line per row."""
    widths = {name: max(len(name), *(len(r[name]) for r in rows)) for name in rows[0]}
    return [
        "  ".join(r[name].rjust(width) for name, width in widths.items())
        for r in ({name: name for name in widths}, *rows)
    ]


def row(run: Json) -> dict[str, str]:
    failed = sum(run["requests"]["errors"].values())
    cores = run["cpu_cores"]
    return {
        "rate": f"{run['offered_rate']:.2f}",
        "achieved": f"{run['achieved_rate']:.2f}",
        "goodput": f"{run['goodput_rate']:.2f}",
        "out tok/s": f"{run['output_tokens_per_s']:.0f}",
        "TTFT p50/p99": pair_ms(run["ttft_s"]),
        "ITL p50/p99": pair_ms(run["itl_s"]),
        "TPOT p50/p99": pair_ms(run["tpot_s"]),
        "failed": f"{failed}/{run['requests']['sent']}",
        "in flight": f"{run['in_flight']['mean']:.1f}",
        "late": str(run["client"]["late_sends"]),
        "others' cores": f"{cores['others']:.2f}" if cores else "-",
    }


def pair_ms(figures: Json | None) -> str:
    return f"{figures['p50'] * 1e3:.1f} / {figures['p99'] * 1e3:.1f} ms" if figures else "-"


def warnings(run: Json) -> list[str]:
    """What makes a run's figures less than they look."""
    said = []
    if errors := run["requests"]["errors"]:
        messages = run["requests"]["first_messages"]
        said += [f"failed: {count} x {kind}, such as: {messages[kind]}" for kind, count in sorted(errors.items())]
    tokens, client, cores = run["tokens"], run["client"], run.get("cpu_cores")
    if tokens["output_short"]:
        mean = f"{tokens['output']:.0f} tokens on average"
        said.append(f"{tokens['output_short']} answers ended before max_tokens: {mean}")
    if tokens["counted_by"] == "events" and run["requests"]["ok"]:
        said.append("the endpoint tells no usage: one token per event is assumed, and prompt lengths are a guess")
    asked, got = tokens["prompt_asked"], tokens["prompt"]
    if asked and got and abs(got - asked) > 0.05 * asked:
        said.append(f"prompts have {got:.0f} tokens on average, {asked:.0f} were wanted")
    if client["late_sends"]:
        said.append(f"{client['late_sends']} requests left late, the worst by {client['late_s']['max'] * 1e3:.0f} ms")
    if cores and cores["others"] > QUIET_CORES:
        said.append(f"other processes used {cores['others']:.2f} cores: a contended run")
    return said
