"""One cell of the policy tables: what clients saw of one policy on one trace, and what routers counted.

Owns the figures and how they are made of what was seen. Does not know in which world that was: world.py's, on virtual
time, or processes.py's, on real.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field

from baton.core.metrics import rendered

KINDS = ("remote", "local")
"""Of a dispatch: with a hand-off, or without."""

Counts = Mapping[str, float]
"""Value of each of the routers' metrics, summed over routers, by its rendered name."""


@dataclass(frozen=True, slots=True)
class Cell:
    """Seconds are the trace's, after its time was stretched to the load."""

    num_requests: int
    num_failed: int
    hit: float
    """Prompt tokens that no worker computed, over all prompt tokens."""
    mean_ttft_s: float
    p50_ttft_s: float
    p99_ttft_s: float
    imbalance: float
    """Busy seconds of the busiest prefill worker over the mean."""
    util: float
    """Mean share of the replay in which prefill workers computed."""
    mean_tpot_s: float
    """Of requests with more than one token of output."""
    took_s: float
    local: float
    """Share of dispatches without a hand-off."""
    regret_s: float | None
    """For each first token: by how much the way that was rejected, a hand-off or none, had promised better than what
    came (router/outcomes.py). None: the policy predicts nothing."""
    regret_remote_s: float | None
    """Of those with a hand-off."""
    regret_local_s: float | None
    prediction_error_s: float | None
    """For each first token: how far off its predicted time was, early or late."""
    failure: str = ""
    """What the first request that failed was told."""


@dataclass(slots=True)
class Seen:
    """By the clients of one replay."""

    grain: int
    """Tokens of the trace in one of the replay."""
    pace: float
    """Seconds of the trace in one of the replay's clock."""
    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    """Of a token of the trace."""
    errors: list[str] = field(default_factory=list)

    async def read(self, asked_s: float, answer: AsyncIterator[int]) -> None:
        """One answer to its end, as numbers of tokens. `asked_s`: by the running loop's clock."""
        loop = asyncio.get_running_loop()
        first_s = last_s = 0.0
        num_tokens = 0
        try:
            async for more in answer:
                if more:
                    last_s = loop.time()
                    first_s = first_s if num_tokens else last_s
                    num_tokens += more
        except Exception as e:
            self.errors.append(repr(e))
            return
        assert num_tokens, "an answer ended well without a token"
        self.ttft_s.append((first_s - asked_s) * self.pace)
        if num_tokens > 1:
            self.tpot_s.append((last_s - first_s) * self.pace / ((num_tokens - 1) * self.grain))

    def cell(self, hit: float, busy_s: Sequence[float], took_s: float, counts: Counts) -> Cell:
        """`busy_s`: of each prefill worker, by the replay's clock, as `took_s` and what was counted."""
        ttft_s = sorted(self.ttft_s) or [float("nan")]
        mean_busy_s = statistics.fmean(busy_s)
        remote, local = (counts.get(_of("baton_dispatches_total", kind), 0.0) for kind in KINDS)
        return Cell(
            num_requests=len(self.ttft_s) + len(self.errors),
            num_failed=len(self.errors),
            hit=hit,
            mean_ttft_s=statistics.fmean(ttft_s),
            p50_ttft_s=at(ttft_s, 0.5),
            p99_ttft_s=at(ttft_s, 0.99),
            imbalance=max(busy_s) / mean_busy_s if mean_busy_s else 1.0,
            util=mean_busy_s / took_s,
            mean_tpot_s=statistics.fmean(self.tpot_s) if self.tpot_s else 0.0,
            took_s=took_s * self.pace,
            local=local / max(1.0, remote + local),
            regret_s=self._counted("baton_routing_regret_seconds_total", KINDS, counts),
            regret_remote_s=self._counted("baton_routing_regret_seconds_total", KINDS[:1], counts),
            regret_local_s=self._counted("baton_routing_regret_seconds_total", KINDS[1:], counts),
            prediction_error_s=self._counted("baton_ttft_error_seconds_total", KINDS, counts),
            failure=next(iter(self.errors), ""),
        )

    def _counted(self, name: str, kinds: Sequence[str], counts: Counts) -> float | None:
        """Seconds for each first token that was predicted."""
        predicted = sum(counts.get(_of("baton_ttft_predictions_total", kind), 0.0) for kind in kinds)
        seconds = sum(counts.get(_of(name, kind), 0.0) for kind in kinds)
        return seconds * self.pace / predicted if predicted else None


def _of(name: str, kind: str) -> str:
    return rendered(name, {"prefill": kind})


def at(values: Sequence[float], share: float) -> float:
    """The value that `share` of the sorted ones are below."""
    return values[min(len(values) - 1, int(share * len(values)))]
