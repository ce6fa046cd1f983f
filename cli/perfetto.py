"""Requests as a file of trace events, which ui.perfetto.dev shows: the router and each worker a process of its own, in
it a track for each kind of bar.

Owns the file's shape. Where bars come from and what they mean is the caller's business. Bars of one track that overlap
(two transfers, two requests) get tracks side by side, so that bars only ever contain each other.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from baton.wire.admin_pb2 import RequestTrace
    from baton.wire.worker_pb2 import Span

ROUTER = "router"
STEPS = "decode"
"""The bar whose marks are the ends of steps; those of others are moments."""

Event = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Bar:
    """`start` and `end` in nanoseconds of the router's clock."""

    process: str
    track: str
    name: str
    start: int
    end: int
    args: Mapping[str, object] = field(default_factory=dict)
    marks: tuple[int, ...] = ()


def trace_file(traces: Sequence[RequestTrace]) -> dict[str, Any]:
    """As `json.dumps` takes it."""
    bars = sorted((bar for trace in traces for bar in bars_of(trace)), key=lambda b: (b.start, -b.end))
    begin = min((b.start for b in bars), default=0)
    processes = {name: i for i, name in enumerate(dict.fromkeys((ROUTER, *(b.process for b in bars))), 1)}
    events: list[Event] = []
    for name, pid in processes.items():
        events += _named("process", name, pid, 0)
    tids = itertools.count(1)
    for (process, track), group in _by_track(bars).items():
        pid = processes[process]
        for number, lane in enumerate(_lanes(group), 1):
            tid = next(tids)
            events += _named("thread", track if number == 1 else f"{track} ({number})", pid, tid)
            for bar in lane:
                events += ({**event, "pid": pid, "tid": tid} for event in _events(bar, begin))
    return {"displayTimeUnit": "ms", "traceEvents": events}


def bars_of(trace: RequestTrace) -> Iterator[Bar]:
    """The whole request, then its spans."""
    told: dict[str, object] = {"request": trace.request_id}
    counts: dict[str, object] = {"prompt_tokens": trace.prompt_tokens, "cached_tokens": trace.cached_tokens,
                                 "output_tokens": trace.output_tokens}  # fmt: skip
    end_s = trace.arrived_s + trace.total_s
    yield Bar(ROUTER, "request", trace.request_id, _ns(trace.arrived_s), _ns(end_s), told | counts)
    zero_s = trace.arrived_s + trace.zero_s
    for span in trace.spans:
        start_s = zero_s + span.start_s
        args = told | ({"detail": span.detail} if span.detail else {})
        start, end = _ns(start_s), _ns(zero_s + span.end_s)
        marks = tuple(min(max(start, _ns(start_s + at)), end) for at in span.marks)
        yield Bar(span.worker or ROUTER, _track(span), span.name, start, end, args, marks)


def _track(span: Span) -> str:
    """Chunks are chunks, wherever they are computed."""
    return span.name.partition(" (")[0]


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _by_track(bars: Iterable[Bar]) -> dict[tuple[str, str], list[Bar]]:
    tracks: dict[tuple[str, str], list[Bar]] = {}
    for bar in bars:
        tracks.setdefault((bar.process, bar.track), []).append(bar)
    return tracks


def _lanes(bars: Iterable[Bar]) -> list[list[Bar]]:
    """Each bar in the first lane that is free when it begins. They come in the order in which they begin."""
    lanes: list[list[Bar]] = []
    for bar in bars:
        free = next((lane for lane in lanes if lane[-1].end <= bar.start), None)
        if free is None:
            lanes.append([bar])
        else:
            free.append(bar)
    return lanes


def _named(kind: str, name: str, pid: int, tid: int) -> list[Event]:
    """The name of a process or thread, and its place: in the order of their first bars."""
    place = {"process": pid, "thread": tid}[kind]
    return [
        {"ph": "M", "ts": 0, "pid": pid, "tid": tid, "name": f"{kind}_{what}", "args": args}
        for what, args in (("name", {"name": name}), ("sort_index", {"sort_index": place}))
    ]


def _events(bar: Bar, begin: int) -> Iterator[Event]:
    """Microseconds since `begin`."""
    args = dict(bar.args)
    if bar.end == bar.start:
        yield {"ph": "i", "s": "t", "name": bar.name, "ts": (bar.start - begin) / 1e3, "args": args}
        return
    yield _bar_event(bar.name, bar.start, bar.end, begin, args)
    if bar.name != STEPS:
        for at in bar.marks:
            yield {"ph": "i", "s": "t", "name": "published", "ts": (at - begin) / 1e3, "args": args}
        return
    for number, (start, end) in enumerate(itertools.pairwise((bar.start, *bar.marks)), 1):
        yield _bar_event("step", start, end, begin, {"token": number})


def _bar_event(name: str, start: int, end: int, begin: int, args: dict[str, object]) -> Event:
    return {"ph": "X", "name": name, "ts": (start - begin) / 1e3, "dur": (end - start) / 1e3, "args": args}
