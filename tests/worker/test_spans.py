"""The bars that a decode worker tells of a request."""

from __future__ import annotations

from baton.core.step import Progress
from baton.core.worker import Span
from baton.worker.spans import MAX_SPANS, Spans


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_bars_count_from_the_arrival_and_marks_from_their_bar() -> None:
    clock = Clock(100.0)
    spans = Spans("d0", clock)
    spans.decode_ends(1, [100.0])  # an answer that ended with its first token, which came from elsewhere
    spans.add_chunk(Progress("r", 1, 4, 13, (), 0, None), 100.5, 101.0)
    spans.decode_begins(101.0)
    clock.now = 103.0
    spans.decode_ends(3, [101.0, 101.5, 102.0])
    spans.add_lent([Span("prefill chunk", 0.5, 1.0, "9 tokens", "p0", (0.1,))], called_s=100.25)
    assert spans.told() == (
        Span("prefill chunk (local)", 0.5, 1.0, "9 tokens", "d0"),
        Span("decode", 1.0, 3.0, "3 tokens", "d0", (0.5, 1.0)),
        Span("prefill chunk", 0.75, 1.25, "9 tokens", "p0", (0.1,)),
    )


def test_bars_are_bounded_and_the_decoding_is_told_all_the_same() -> None:
    spans = Spans("d0", Clock(1.0))
    for i in range(MAX_SPANS - 10):
        spans.add(f"transfer {i}", 1.0)
    spans.add_lent([Span("prefill chunk", 0.0, 1.0)] * 50, called_s=1.0)
    spans.add("transfer", 1.0)
    spans.add_lent([Span("prefill chunk", 0.0, 1.0)] * 50, called_s=1.0)
    spans.decode_begins()
    spans.decode_ends(7, ())
    told = spans.told()
    assert len(told) == MAX_SPANS + 1
    assert told[-1].detail == "7 tokens"
    assert sum(s.name == "prefill chunk" for s in told) == 10
