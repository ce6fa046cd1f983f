"""The bars of one request, as its decode worker tells them: its own, and its lenders', moved to its time line. Bounded,
whatever the request: the last words carry them all."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence

from baton.core.worker import Span

MAX_SPANS = 512
"""A chunk and a transfer for each 512 tokens of a prompt of 128k."""
MAX_MARKS = 256
"""Tokens whose time is told."""


class Spans:
    """Times that are handed in are the loop's."""

    def __init__(self, worker_id: str, clock: Callable[[], float]) -> None:
        self.began_s = clock()
        """Zero of what is told."""
        self._worker_id = worker_id
        self._clock = clock
        self._spans: list[Span] = []

    def add(
        self, name: str, start_s: float, detail: str = "", times: Sequence[float] = (), end_s: float | None = None
    ) -> None:
        """A bar until `end_s`, default now, with marks at those of `times` that came in it. Of too many bars, only
        `decode`, the last of all, is still told."""
        if len(self._spans) < MAX_SPANS or name == "decode":
            marks = tuple(at - start_s for at in times if at >= start_s)
            end_s = self._clock() if end_s is None else end_s
            span = Span(name, start_s - self.began_s, end_s - self.began_s, detail, self._worker_id, marks)
            self._spans.append(span)

    def add_lent(self, spans: Iterable[Span], called_s: float) -> None:
        """A lender's, who counts from when it was called."""
        offset = called_s - self.began_s
        moved = (dataclasses.replace(s, start_s=s.start_s + offset, end_s=s.end_s + offset) for s in spans)
        self._spans += itertools.islice(moved, max(0, MAX_SPANS - len(self._spans)))

    def told(self) -> tuple[Span, ...]:
        return tuple(self._spans)
