"""Prometheus text of core/metrics.py. Names and help are in that table; this only writes the format down."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from baton.core.metrics import Metrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def exposition(metrics: Metrics) -> bytes:
    registry = CollectorRegistry()
    registry.register(_Samples(metrics))
    return generate_latest(registry)


class _Samples(Collector):
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for metric, labels, value in self._metrics.samples():
            if metric.name not in families:
                kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
                families[metric.name] = kind(metric.name, metric.help, labels=metric.labels)
            families[metric.name].add_metric([labels[name] for name in metric.labels], value)
        yield from families.values()
        for histogram, counts, total in self._metrics.histograms():
            family = HistogramMetricFamily(histogram.name, histogram.help)
            buckets, so_far = [], 0
            for bound, count in zip((*map(str, histogram.bounds), "+Inf"), counts, strict=True):
                so_far += count
                buckets.append((bound, so_far))
            family.add_metric([], buckets, total)
            yield family
