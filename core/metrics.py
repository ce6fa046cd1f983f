"""Every metric's name, in one table. Rooms count with `Metrics.inc` / `set`; a name that is not here is a bug.

Exposition (Prometheus) is the servers' business: `samples()` and `histograms()` give them names, labels and values.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Metric:
    name: str
    kind: Literal["counter", "gauge"]
    help: str
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Histogram:
    name: str
    help: str
    bounds: tuple[float, ...]
    """Upper bounds of the buckets, inclusive and rising; one more bucket, without a bound, follows."""


def _c(name: str, text: str, *labels: str) -> Metric:
    return Metric(name, "counter", text, labels)


def _g(name: str, text: str, *labels: str) -> Metric:
    return Metric(name, "gauge", text, labels)


TABLE = (
    # router
    _c("baton_requests_total", "Requests by how they ended.", "outcome"),
    _c("baton_prompt_tokens_total", "Prompt tokens of finished requests."),
    _c("baton_output_tokens_total", "Output tokens delivered to clients."),
    _c("baton_cached_prompt_tokens_total", "Prompt tokens that were not computed for their request."),
    _c("baton_dispatches_total", "Requests sent to a decode worker, by prefill place.", "prefill"),
    _c("baton_ttft_predictions_total", "First tokens whose time was predicted, by prefill place.", "prefill"),
    _c("baton_ttft_predicted_seconds_total", "What was predicted, from dispatch on.", "prefill"),
    _c("baton_ttft_error_seconds_total", "How far off that was, early or late.", "prefill"),
    _c("baton_routing_regret_seconds_total", "What the other prefill place had promised to save, given when first tokens came.", "prefill"),
    _c("baton_dispatch_retries_total", "Requests sent again after a refusal or a lost worker.", "reason"),
    _c(
        "baton_stale_chunks_total", "Token messages dropped: an older epoch, a duplicate, an unknown request.", "reason"
    ),
    _c("baton_admission_refusals_total", "Requests refused at once, by why.", "reason"),
    _c("baton_circuits_opened_total", "Workers that got no requests for a while: too many of their requests failed.", "worker"),
    _c("baton_retry_waits_total", "Retries after a loss that waited for the retry budget."),
    _c("baton_resumed_requests_total", "Requests gone on with where they ran, by what was lost: their stream, or their router.", "lost"),
    _c("baton_moves_total", "Planned moves of requests off a draining worker, by how they ended.", "end"),
    _c("baton_quarantined_requests_total", "Requests failed as poison: aboard two crashes, or like one that was.", "reason"),
    _c("baton_worker_lost_total", "Workers the router lost: silent for too long, or crashed. Who drained first is not counted.", "role"),
    _c("baton_index_resyncs_total", "Prefix index rebuilt from a snapshot after a gap or a new boot."),
    _g("baton_queued_requests", "Requests that wait in the router for a worker with room."),
    _g("baton_workers", "Workers by role and state.", "role", "state"),
    _g("baton_index_blocks", "Distinct block hashes in the prefix index."),
    _c("baton_index_dropped_total", "(worker, block) pairs that the prefix index dropped because it was full."),
    _g("baton_worker_up", "1: the worker told its counters for this scrape; 0: it did not in time.", "worker", "role"),
    # worker
    _c("baton_steps_total", "Engine steps."),
    _c("baton_step_tokens_total", "Tokens computed, by kind.", "kind"),
    _c("baton_preemptions_total", "Sequences preempted by recompute."),
    _c("baton_fallbacks_total", "Something slower was done instead; each also logs one line.", "kind"),
    _c("baton_refusals_total", "Submits and prefills refused.", "reason"),
    _g("baton_blocks", "The block ledger; the sum is the pool.", "state"),
    _g("baton_ledger_broken", "1: some block has no owner, or too many. The log says which."),
    # hand-off
    _c("baton_leases_total", "Leases by how they ended.", "end"),
    _c("baton_published_blocks_total", "Blocks lent."),
    _c("baton_pulls_total", "Pulls by transport and end.", "transport", "end"),
    _c("baton_pulled_bytes_total", "Bytes that came in over a transport.", "transport"),
    _c("baton_verified_bytes_total", "Pulled bytes whose digest and generation were right."),
    _c("baton_converted_bytes_total", "Of these, converted from the lender's KV format into ours.", "lender", "reader"),
    _c(
        "baton_verified_before_last_chunk_bytes_total",
        "Of these, verified before the lender's last chunk was computed.",
    ),
    _c("baton_integrity_failures_total", "Pulled blocks thrown away.", "reason"),
    _c("baton_quarantined_blocks_total", "Blocks that entered quarantine."),
    _c("baton_fences_total", "Peers fenced because quarantine was over its cap or too old.", "transport"),
    _c("baton_served_bytes_total", "Bytes sent to readers (transports where the lender takes part).", "transport"),
)
BY_NAME = {m.name: m for m in TABLE}

_LATENCY_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
HISTOGRAMS = {
    h.name: h
    for h in (
        Histogram("baton_ttft_seconds", "Time to first token, as the router sees it.", _LATENCY_BOUNDS),
        Histogram("baton_itl_seconds", "Gap between two token messages of one request.", _LATENCY_BOUNDS),
        Histogram("baton_queue_seconds", "Wait in the router for a worker with room, of those that had to.", _LATENCY_BOUNDS),
        Histogram("baton_request_seconds", "Duration of finished requests.", _LATENCY_BOUNDS),
    )
}


def rendered(name: str, labels: Mapping[str, str]) -> str:
    """'name{label="value"}', or the name alone."""
    inside = ",".join(f'{k}="{v}"' for k, v in labels.items())
    return f"{name}{{{inside}}}" if inside else name


class Metrics:
    """Counts of one process. Not thread-safe: count on the event loop."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, tuple[str, ...]], float] = {}
        self._buckets: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

    def inc(self, name: str, amount: float = 1, **labels: str) -> None:
        key = self._key(name, labels)
        self._values[key] = self._values.get(key, 0) + amount

    def set(self, name: str, value: float, **labels: str) -> None:
        self._values[self._key(name, labels)] = value

    def observe(self, name: str, value: float) -> None:
        bounds = HISTOGRAMS[name].bounds
        self._buckets.setdefault(name, [0] * (len(bounds) + 1))[bisect.bisect_left(bounds, value)] += 1
        self._sums[name] = self._sums.get(name, 0.0) + value

    def histograms(self) -> Iterator[tuple[Histogram, list[int], float]]:
        """(histogram, count of each bucket alone, sum of the values) of those that saw a value."""
        for name, counts in sorted(self._buckets.items()):
            yield HISTOGRAMS[name], counts, self._sums[name]

    def value(self, name: str, **labels: str) -> float:
        """With all labels given that sample, with none the sum over all."""
        if labels:
            return self._values.get(self._key(name, labels), 0)
        assert name in BY_NAME, f"{name} is not in core/metrics.py"
        return sum(v for (n, _), v in self._values.items() if n == name)

    def samples(self) -> Iterator[tuple[Metric, dict[str, str], float]]:
        for (name, values), value in sorted(self._values.items()):
            metric = BY_NAME[name]
            yield metric, dict(zip(metric.labels, values, strict=True)), value

    def rendered(self) -> tuple[tuple[str, float], ...]:
        """('name{label="value"}', value) for status messages."""
        return tuple((rendered(metric.name, labels), value) for metric, labels, value in self.samples())

    @staticmethod
    def _key(name: str, labels: dict[str, str]) -> tuple[str, tuple[str, ...]]:
        metric = BY_NAME.get(name)
        assert metric is not None, f"{name} is not in core/metrics.py"
        if not labels and not metric.labels:
            return name, ()
        assert labels.keys() == set(metric.labels), f"{name} has labels {metric.labels}, got {tuple(labels)}"
        return name, tuple([labels[k] for k in metric.labels])
