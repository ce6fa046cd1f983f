"""What is known of one request when it is over, and the arithmetic on it. Plain data: no clock, no HTTP.

Every latency counts from `intended_s`, the time at which the schedule wanted the request sent, not from when the
client got round to it: a client that falls behind would else hide the wait of exactly those requests that waited
(coordinated omission). Follow-up turns of a session are meant to leave a think time after the answer before them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise


@dataclass(slots=True)
class Record:
    """Times are seconds on one clock; the client fills them in while the answer comes."""

    label: str
    turn: int
    intended_s: float
    asked_prompt_tokens: int
    asked_output_tokens: int
    sent_s: float | None = None
    """When the request was handed to the connection; None if it never was."""
    event_s: list[float] = field(default_factory=list)
    """Arrival of each event that carried text. A server may put several tokens into one."""
    end_s: float | None = None
    prompt_tokens: int | None = None
    """From here on: as `usage` told, None where the server did not."""
    cached_tokens: int | None = None
    usage_output_tokens: int | None = None
    finish: str | None = None
    error: str | None = None
    """What kind of failure ended it: `connect`, `http 429`, `timeout`, `broken`, `in stream`, `malformed`."""
    message: str = ""
    """What was said about it."""

    @property
    def ok(self) -> bool:
        return self.error is None and self.end_s is not None

    @property
    def output_tokens(self) -> int:
        """As billed, else one per event."""
        return len(self.event_s) if self.usage_output_tokens is None else self.usage_output_tokens

    @property
    def late_s(self) -> float | None:
        """How far the client was behind its own schedule."""
        return None if self.sent_s is None else max(self.sent_s - self.intended_s, 0.0)

    @property
    def ttft_s(self) -> float | None:
        return self.event_s[0] - self.intended_s if self.event_s else None

    @property
    def e2e_s(self) -> float | None:
        return None if self.end_s is None else self.end_s - self.intended_s

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds per token after the first; None for answers of one token."""
        if len(self.event_s) < 2 or self.output_tokens < 2:
            return None
        return (self.event_s[-1] - self.event_s[0]) / (self.output_tokens - 1)

    def gaps_s(self) -> Iterator[float]:
        """ITL: between events that follow each other."""
        return (later - earlier for earlier, later in pairwise(self.event_s))


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits that one request keeps or misses. None: no limit. A request that failed misses."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    itl_s: float | None = None
    """On the longest gap of the answer."""

    def kept(self, record: Record) -> bool:
        if not record.ok:
            return False
        seen = (
            (self.ttft_s, record.ttft_s),
            (self.tpot_s, record.tpot_s),
            (self.itl_s, max(record.gaps_s(), default=None)),
        )
        return all(limit is None or value is None or value <= limit for limit, value in seen)
