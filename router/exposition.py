"""Prometheus text of core/metrics.py: the router's own samples, and those that its workers told, with `worker` and
`role` added. Names and help are in that table; this only writes the format down."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from baton.core.messages import WorkerStatus
from baton.core.metrics import BY_NAME, Metrics
from baton.core.worker import WorkerInfo

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SAMPLE = re.compile(r'(\w+)(?:\{(.*)\})?')
_LABEL = re.compile(r'(\w+)="([^"]*)"')

Told = Sequence[tuple[WorkerInfo, WorkerStatus | None]]
"""Each worker that was asked, and its answer; None: none came in time."""
Sample = tuple[str, dict[str, str], float]


def exposition(metrics: Metrics, told: Told = ()) -> bytes:
    registry = CollectorRegistry()
    registry.register(_Samples(metrics, told))
    return generate_latest(registry)


def worker_samples(told: Told) -> Iterator[Sample]:
    """(name, labels, value) of every worker. What is not in the table is left out: another version's worker has it."""
    for info, status in told:
        who = {"worker": info.worker_id, "role": info.role.value}
        yield "baton_worker_up", who, float(status is not None)
        for rendered, value in status.counters if status else ():
            match = _SAMPLE.fullmatch(rendered)
            if match is not None and match[1] in BY_NAME:
                yield match[1], dict(_LABEL.findall(match[2] or "")) | who, value


class _Samples(Collector):
    def __init__(self, metrics: Metrics, told: Told) -> None:
        self._metrics = metrics
        self._told = told

    def collect(self) -> Iterator[Metric]:
        own = ((metric.name, labels, value) for metric, labels, value in self._metrics.samples())
        yield from _families([*own, *worker_samples(self._told)])
        for histogram, counts, total in self._metrics.histograms():
            family = HistogramMetricFamily(histogram.name, histogram.help)
            buckets, so_far = [], 0
            for bound, count in zip((*map(str, histogram.bounds), "+Inf"), counts, strict=True):
                so_far += count
                buckets.append((bound, so_far))
            family.add_metric([], buckets, total)
            yield family


def _families(samples: Iterable[Sample]) -> Iterator[Metric]:
    """One family for each name, whoever counted."""
    families: dict[str, Metric] = {}
    for name, labels, value in samples:
        if name not in families:
            kind = CounterMetricFamily if BY_NAME[name].kind == "counter" else GaugeMetricFamily
            families[name] = kind(name, BY_NAME[name].help)
        families[name].add_sample(name, labels, value)
    yield from families.values()
