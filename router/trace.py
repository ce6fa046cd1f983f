"""What became of the last requests: the router's decisions and every span, for `baton explain`, `baton trace` and the
waterfall.

A ring of finished requests, bounded in number and bytes. It knows neither streams nor text.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from baton.core.worker import Route, Span, Timeline
from baton.router.decisions import Decision

RUNNING = "running"
"""The outcome of what has not ended yet."""
CAPACITY = 256
CAPACITY_BYTES = 16 << 20
MAX_REFUSED = 4096
RECORD_BYTES, SPAN_BYTES = 2_000, 300
"""What a record, and each span of it, keeps alive at most."""


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """One dispatch. Seconds since the request reached the router."""

    epoch: int
    route: Route
    start_s: float
    end_s: float
    outcome: str
    """Finish reason, or the code of the error that ended it, or RUNNING."""


@dataclass(frozen=True, slots=True)
class TraceRecord:
    request_id: str
    outcome: str
    num_prompt_tokens: int
    num_output_tokens: int
    cached_tokens: int
    arrived_s: float
    """When it came, on the router's own clock."""
    ttft_s: float | None
    """Seconds from arrival at the router to its first token; None if there was none."""
    total_s: float
    attempts: tuple[AttemptRecord, ...]
    decisions: tuple[Decision, ...]
    """The newest ones, those that found nobody too. Of an attempt: the one with its very route."""
    timeline: Timeline

    @property
    def route(self) -> Route | None:
        """Of the last attempt."""
        return self.attempts[-1].route if self.attempts else None

    @property
    def zero_s(self) -> float:
        """Zero of the timeline, in seconds since the arrival: the last dispatch."""
        return self.attempts[-1].start_s if self.attempts else 0.0

    @property
    def num_bytes(self) -> int:
        """Of memory, at most."""
        spans = SPAN_BYTES * len(self.timeline.spans)
        return RECORD_BYTES * (1 + len(self.attempts)) + spans + sum(d.num_bytes for d in self.decisions)


def timeline(
    attempts: Iterable[AttemptRecord], worker_spans: Iterable[Span], ttft_s: float | None, total_s: float
) -> Timeline:
    """One waterfall, in order: the router's queue and lost attempts (before 0), then what the last worker said.

    Zero is the last dispatch: the worker's clock starts when it gets the request, and the hop is not known to either.
    First token and decode are the router's view unless the worker told its own.
    """
    done = list(attempts)
    if not done:
        return Timeline((Span("router queue", 0.0, total_s),))
    zero = done[-1].start_s
    spans = [Span("router queue", -zero, done[0].start_s - zero, done[0].route.reason)]
    spans += [Span("attempt", a.start_s - zero, a.end_s - zero, f"{a.route.decode}: {a.outcome}") for a in done[:-1]]
    told = sorted(worker_spans, key=lambda s: (s.start_s, s.end_s))
    names = {s.name for s in told}
    spans += told
    if ttft_s is not None and "first token" not in names:
        spans.append(Span("first token", max(0.0, ttft_s - zero), max(0.0, ttft_s - zero)))
    if ttft_s is not None and "decode" not in names:
        spans.append(Span("decode", max(0.0, ttft_s - zero), total_s - zero))
    spans.sort(key=lambda s: s.start_s)
    return Timeline(tuple(spans))


class TraceLog:
    """The last finished requests, at most `capacity`, and at most `capacity_bytes` of all but the newest; the oldest
    leave first."""

    def __init__(self, capacity: int = CAPACITY, capacity_bytes: int = CAPACITY_BYTES) -> None:
        self._capacity = capacity
        self._capacity_bytes = capacity_bytes
        self._records: OrderedDict[str, TraceRecord] = OrderedDict()
        self._refused: OrderedDict[str, str] = OrderedDict()
        self.num_bytes = 0

    def add(self, record: TraceRecord) -> None:
        again = self._records.pop(record.request_id, None)
        self._records[record.request_id] = record
        self.num_bytes += record.num_bytes - (again.num_bytes if again is not None else 0)
        while len(self._records) > (self._capacity if self.num_bytes <= self._capacity_bytes else 1):
            _, oldest = self._records.popitem(last=False)
            self.num_bytes -= oldest.num_bytes

    def refuse(self, request_id: str, why: str) -> None:
        """It was not let in. Kept apart: thousands of these must not push out what ran."""
        self._refused[request_id] = why
        if len(self._refused) > MAX_REFUSED:
            self._refused.popitem(last=False)

    def why_refused(self, request_id: str) -> str | None:
        return self._refused.get(request_id)

    def get(self, request_id: str) -> TraceRecord | None:
        return self._records.get(request_id)

    def recent(self, count: int = CAPACITY) -> tuple[TraceRecord, ...]:
        """Newest first."""
        return tuple(reversed(self._records.values()))[:count]
