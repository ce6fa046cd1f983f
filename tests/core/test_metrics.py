"""Counters and gauges of one process: known names, whole label sets, sums."""

from __future__ import annotations

import re

import pytest

from baton.core.metrics import BY_NAME, TABLE, Metrics


def test_samples_with_different_labels_are_counted_apart_and_summed_without() -> None:
    metrics = Metrics()
    metrics.inc("baton_pulls_total", transport="tcp", end="done")
    metrics.inc("baton_pulls_total", 2, end="failed", transport="tcp")
    assert metrics.value("baton_pulls_total", transport="tcp", end="done") == 1
    assert metrics.value("baton_pulls_total", transport="shm", end="done") == 0
    assert metrics.value("baton_pulls_total") == 3


def test_a_gauge_is_what_it_was_last_set_to() -> None:
    metrics = Metrics()
    metrics.set("baton_index_blocks", 5)
    metrics.set("baton_index_blocks", 2)
    assert metrics.value("baton_index_blocks") == 2


@pytest.mark.parametrize("labels", [{}, {"kind": "x", "more": "y"}, {"king": "x"}])
def test_a_label_too_few_or_too_many_is_a_bug(labels: dict[str, str]) -> None:
    with pytest.raises(AssertionError, match="has labels"):
        Metrics().inc("baton_fallbacks_total", **labels)


def test_a_name_outside_the_table_is_a_bug() -> None:
    metrics = Metrics()
    with pytest.raises(AssertionError, match=r"not in core/metrics\.py"):
        metrics.inc("baton_typo_total")
    with pytest.raises(AssertionError, match=r"not in core/metrics\.py"):
        metrics.value("baton_typo_total")


def test_samples_are_rendered_sorted_and_with_their_labels() -> None:
    metrics = Metrics()
    metrics.inc("baton_steps_total", 3)
    metrics.set("baton_blocks", 7, state="free")
    metrics.set("baton_blocks", 1, state="active")
    assert metrics.rendered() == (
        ('baton_blocks{state="active"}', 1), ('baton_blocks{state="free"}', 7), ("baton_steps_total", 3),
    )
    assert [(m.name, labels) for m, labels, _ in metrics.samples()][0] == ("baton_blocks", {"state": "active"})


def test_the_table_follows_the_exposition_formats_manners() -> None:
    assert len(BY_NAME) == len(TABLE), "a name is in the table twice"
    for metric in TABLE:
        assert re.fullmatch(r"baton_[a-z_]+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert metric.help.endswith("."), metric.name
