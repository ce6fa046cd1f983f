"""The arithmetic: latencies from when a request was meant to leave, what counts in the window, which rate is good."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.bench.load.record import Record, Slo
from baton.bench.load.report import (
    Window,
    in_flight,
    largest_within,
    measured,
    percentile,
    row,
    spread,
    table,
    tokens_within,
    warnings,
)

WINDOW = Window(100.0, 10.0)


def record(intended_s: float = 101.0, **changes: Any) -> Record:
    """Sent 0.25 s late; first event after 1 s, the next after 0.5 and 1.5 s; ends with the last."""
    events = [intended_s + after_s for after_s in (1.0, 1.5, 3.0)]
    plain = Record("requests", 0, intended_s, 8, 3, intended_s + 0.25, events, intended_s + 3.0, finish="length")
    return dataclasses.replace(plain, **changes)


def failed(intended_s: float, error: str) -> Record:
    return record(intended_s, event_s=[], error=error, message=f"{error} because")


def test_every_latency_counts_from_the_intended_send_time() -> None:
    seen = record()
    assert seen.ttft_s == 1.0
    assert seen.e2e_s == 3.0
    assert seen.late_s == 0.25
    late = record(sent_s=101.75)
    assert (late.ttft_s, late.e2e_s) == (1.0, 3.0), "a client that is later has not seen a faster server"


def test_gaps_and_the_mean_per_token_leave_the_first_token_out() -> None:
    assert list(record().gaps_s()) == [0.5, 1.5]
    assert record().tpot_s == 1.0
    assert record(usage_output_tokens=5).tpot_s == 0.5, "an event may carry several tokens"
    assert record(event_s=[102.0]).tpot_s is None
    assert record(event_s=[]).ttft_s is None


def test_tokens_are_those_that_were_billed_else_one_per_event() -> None:
    assert record().output_tokens == 3
    assert record(usage_output_tokens=7).output_tokens == 7
    assert record(usage_output_tokens=0).output_tokens == 0


@pytest.mark.parametrize(
    ("slo", "kept"),
    [
        (Slo(), True),
        (Slo(ttft_s=1.0), True),
        (Slo(ttft_s=0.99), False),
        (Slo(tpot_s=1.0, itl_s=1.5), True),
        (Slo(tpot_s=0.99), False),
        (Slo(itl_s=1.49), False),
    ],
)
def test_a_request_keeps_the_slo_only_with_all_of_its_limits(slo: Slo, kept: bool) -> None:
    assert slo.kept(record()) is kept
    assert not slo.kept(failed(101.0, "timeout"))
    assert not slo.kept(record(end_s=None))


@given(values=st.lists(st.floats(0, 1e6), min_size=2, max_size=40))
def test_percentiles_are_linear_between_neighbours(values: list[float]) -> None:
    oracle = statistics.quantiles(values, n=100, method="inclusive")
    for percent in (1, 50, 90, 99):
        assert percentile(sorted(values), percent) == pytest.approx(oracle[percent - 1])
    assert percentile(sorted(values), 100) == max(values)


def test_a_spread_of_nothing_is_nothing_rather_than_zero() -> None:
    assert spread([]) is None
    assert spread([3.0]) == {"count": 1, "mean": 3.0, "p50": 3.0, "p90": 3.0, "p99": 3.0, "max": 3.0}


def test_latencies_are_of_requests_meant_to_leave_in_the_window() -> None:
    records = [record(99.9), record(100.0), record(109.9), record(110.0)]
    seen = measured(records, WINDOW, Slo())
    assert seen["requests"]["sent"] == seen["ttft_s"]["count"] == 2
    assert seen["offered_rate"] == 0.2
    assert seen["itl_s"]["count"] == 4


def test_throughput_is_what_came_out_during_the_window_whoever_asked() -> None:
    before, within, after = record(98.0), record(104.0), record(108.5)
    assert [tokens_within(r, WINDOW) for r in (before, within, after)] == [1, 3, 1]
    assert tokens_within(record(108.5, usage_output_tokens=6), WINDOW) == 2
    seen = measured([before, within, after], WINDOW, Slo())
    assert seen["output_tokens_per_s"] == 0.5
    assert seen["achieved_rate"] == 0.2, "the first ended in it, the last did not"


def test_requests_in_flight_are_counted_during_the_window_alone() -> None:
    def flight(sent_s: float, end_s: float) -> Record:
        return record(sent_s, sent_s=sent_s, end_s=end_s)

    assert in_flight([], WINDOW) == {"mean": 0, "max": 0}
    follows = [flight(101.0, 102.0), flight(102.0, 103.0)]
    assert in_flight(follows, WINDOW) == {"mean": pytest.approx(0.2), "max": 1}
    across = [flight(95.0, 101.0), flight(100.5, 102.5), flight(109.0, 120.0), flight(111.0, 112.0), flight(1.0, 99.0)]
    assert in_flight(across, WINDOW) == {"mean": pytest.approx(0.4), "max": 2}
    assert in_flight([record(sent_s=None), record(end_s=None)], WINDOW) == {"mean": 0, "max": 0}


def test_failures_are_counted_by_kind_and_miss_the_slo() -> None:
    records = [record(101.0), failed(102.0, "http 429"), failed(103.0, "http 429"), failed(104.0, "broken")]
    seen = measured(records, WINDOW, Slo(ttft_s=5.0))
    assert seen["requests"] == {
        "sent": 4,
        "ok": 1,
        "errors": {"http 429": 2, "broken": 1},
        "first_messages": {"http 429": "http 429 because", "broken": "broken because"},
    }
    assert (seen["goodput_rate"], seen["slo_share"]) == (0.1, 0.25)
    assert seen["ttft_s"]["count"] == 1


def test_late_sends_are_reported_and_no_reason_to_leave_a_request_out() -> None:
    seen = measured([record(101.0), record(102.0, sent_s=102.005), record(103.0, sent_s=None)], WINDOW, Slo())
    assert seen["client"]["late_sends"] == 1
    assert seen["client"]["late_s"]["max"] == 0.25
    assert seen["requests"]["sent"] == 3


def run(rate: float, share: float | None) -> dict[str, Any]:
    return {"rate": rate, "slo_share": share}


def test_the_largest_rate_within_the_slo_is_the_last_before_the_first_miss() -> None:
    assert largest_within([run(4, 0.3), run(1, 1.0), run(2, 0.9), run(8, 1.0)], 0.9) == 2
    assert largest_within([run(1, 0.5), run(2, 1.0)], 0.9) is None
    assert largest_within([run(1, None)], 0.9) is None


def test_a_run_that_is_less_than_it_looks_says_so() -> None:
    slow = record(101.0, prompt_tokens=16, usage_output_tokens=2)
    seen = measured([slow, failed(102.0, "connect")], WINDOW, Slo())
    seen["cpu_cores"] = {"client": 0.1, "server": 1.0, "others": 0.7, "others_worst_second": 1.0}
    text = "\n".join(warnings(seen))
    for part in ("1 x connect", "connect because", "1 answers ended before", "16 tokens on average, 8 were wanted",
                 "2 requests left late, the worst by 250 ms", "0.70 cores"):  # fmt: skip
        assert part in text
    assert not warnings(measured([record(sent_s=101.0, usage_output_tokens=3)], WINDOW, Slo()))


def test_the_table_has_a_row_per_run_and_dashes_where_nothing_was_seen() -> None:
    runs = [measured(records, WINDOW, Slo()) for records in ([record()], [])]
    head, full, empty = table([row({**run, "cpu_cores": None}) for run in runs])
    assert "1000.0 / 1000.0 ms" in full
    assert "1/1" not in full
    assert empty.split().count("-") == 4
    assert len(head) == len(full) == len(empty)
