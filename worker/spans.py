"""The bars of one request, as its decode worker tells them: its own, and its lenders', moved to its time line. Bounded,
whatever the request: the last words carry them all."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence

from baton.core.step import Progress
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
        self._decode_began_s: float | None = None

    def add(self, name: str, start_s: float, detail: str = "", end_s: float | None = None) -> None:
        """A bar until `end_s`, default now. None of too many."""
        if len(self._spans) < MAX_SPANS:
            self._spans.append(self._span(name, start_s, detail, end_s))

    def add_lent(self, spans: Iterable[Span], called_s: float) -> None:
        """A lender's, who counts from when it was called."""
        offset = called_s - self.began_s
        moved = (dataclasses.replace(s, start_s=s.start_s + offset, end_s=s.end_s + offset) for s in spans)
        self._spans += itertools.islice(moved, max(0, MAX_SPANS - len(self._spans)))

    def add_chunk(self, progress: Progress, start_s: float, end_s: float) -> None:
        """Of a prompt that is computed here, in a step."""
        self.add("prefill chunk (local)", start_s, f"{progress.num_computed_tokens - progress.start} tokens", end_s)

    def decode_begins(self, at_s: float | None = None) -> None:
        """Now, or at `at_s`: the KV of the prompt is here."""
        self._decode_began_s = self._clock() if at_s is None else at_s

    def decode_ends(self, num_tokens: int, times: Sequence[float]) -> None:
        """Of one choice, which sampled tokens at these times, and perhaps earlier ones. However many bars there are."""
        if (began_s := self._decode_began_s) is not None:
            marks = tuple(at - began_s for at in times if at > began_s)
            self._spans.append(dataclasses.replace(self._span("decode", began_s, f"{num_tokens} tokens"), marks=marks))

    def told(self) -> tuple[Span, ...]:
        return tuple(self._spans)

    def _span(self, name: str, start_s: float, detail: str, end_s: float | None = None) -> Span:
        end_s = self._clock() if end_s is None else end_s
        return Span(name, start_s - self.began_s, end_s - self.began_s, detail, self._worker_id)
