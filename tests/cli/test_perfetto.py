"""The file that `baton trace --out` writes: valid trace events, and bars that only contain each other."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from baton.cli.perfetto import trace_file
from baton.wire.admin_pb2 import RequestTrace

NS = 1e-9


def trace(request_id: str = "r", arrived_s: float = 100.0, **counts: int) -> RequestTrace:
    return RequestTrace(request_id=request_id, arrived_s=arrived_s, zero_s=0.01, total_s=1.0, **counts)


def relay() -> RequestTrace:
    told = trace(prompt_tokens=900, cached_tokens=0, output_tokens=3)
    told.spans.add(name="router queue", start_s=-0.01, end_s=0.0, detail="p0 -> d0: 0.1 s")
    told.spans.add(name="prefill queue", start_s=0.001, end_s=0.01, worker="p0")
    told.spans.add(name="prefill chunk", start_s=0.01, end_s=0.11, worker="p0", detail="512 tokens from 0")
    told.spans.add(name="prefill chunk", start_s=0.11, end_s=0.21, worker="p0", marks=[0.05, 0.08])
    told.spans.add(name="transfer", start_s=0.11, end_s=0.15, worker="d0", detail="32 blocks")
    told.spans.add(name="transfer", start_s=0.13, end_s=0.16, worker="d0")
    told.spans.add(name="first token", start_s=0.21, end_s=0.21)
    told.spans.add(name="decode", start_s=0.22, end_s=0.9, worker="d0", marks=[0.2, 0.4, 0.68])
    return told


def events(*traces: RequestTrace) -> list[dict[str, Any]]:
    """After a trip through JSON, each with what its kind must have."""
    found: list[dict[str, Any]] = json.loads(json.dumps(trace_file(traces)))["traceEvents"]
    for event in found:
        assert {"ph", "ts", "pid", "tid", "name"} <= set(event), event
        assert event["ph"] in ("M", "X", "i")
        assert event["ts"] >= 0
        assert event["ph"] != "X" or event["dur"] >= 0
        assert event["ph"] != "i" or event["s"] == "t"
    named = {e["pid"] for e in found if e["name"] == "process_name"}
    lanes = {(e["pid"], e["tid"]) for e in found if e["name"] == "thread_name"}
    assert {e["pid"] for e in found} == named, "every process has a name"
    assert {(e["pid"], e["tid"]) for e in found if e["ph"] != "M"} <= lanes, "every track has a name"
    return found


def check_nesting(found: list[dict[str, Any]]) -> None:
    lanes: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for e in found:
        if e["ph"] == "X":
            start = round(e["ts"] * 1e3)
            lanes.setdefault((e["pid"], e["tid"]), []).append((start, start + round(e["dur"] * 1e3)))
    for bars in lanes.values():
        open_until: list[int] = []
        for start, end in sorted(bars, key=lambda bar: (bar[0], -bar[1])):
            while open_until and open_until[-1] <= start:
                open_until.pop()
            assert not open_until or end <= open_until[-1], "two bars of one track overlap"
            open_until.append(end)


def where(found: list[dict[str, Any]], name: str) -> list[tuple[str, str]]:
    """(process, track) of each event of that name."""
    processes = {e["pid"]: e["args"]["name"] for e in found if e["name"] == "process_name"}
    tracks = {e["tid"]: e["args"]["name"] for e in found if e["name"] == "thread_name"}
    return [(processes[e["pid"]], tracks[e["tid"]]) for e in found if e["name"] == name and e["ph"] != "M"]


def test_each_bar_is_on_a_track_of_whoever_spent_the_time() -> None:
    found = events(relay())
    check_nesting(found)
    assert where(found, "r") == [("router", "request")]
    assert where(found, "router queue") == [("router", "router queue")]
    assert where(found, "prefill chunk") == [("p0", "prefill chunk")] * 2
    assert where(found, "decode") == [("d0", "decode")]
    assert where(found, "first token") == [("router", "first token")]
    (whole,) = (e for e in found if e["name"] == "r")
    assert (whole["ts"], whole["dur"]) == (0.0, 1e6)
    assert whole["args"] == {"request": "r", "prompt_tokens": 900, "cached_tokens": 0, "output_tokens": 3}
    (queue,) = (e for e in found if e["name"] == "prefill queue")
    assert (queue["ts"], queue["dur"]) == (11_000.0, 9_000.0)


def test_transfers_at_the_same_time_stand_side_by_side() -> None:
    assert where(events(relay()), "transfer") == [("d0", "transfer"), ("d0", "transfer (2)")]


def test_marks_are_steps_within_the_decoding_and_moments_within_a_chunk() -> None:
    found = events(relay())
    steps = [e for e in found if e["name"] == "step"]
    assert [e["dur"] for e in steps] == [200_000.0, 200_000.0, 280_000.0]
    assert where(found, "step") == where(found, "decode") * 3
    published = [e for e in found if e["name"] == "published"]
    assert [(e["ph"], e["ts"]) for e in published] == [("i", 170_000.0), ("i", 200_000.0)]


def test_several_requests_share_one_time_axis() -> None:
    later = trace("later", arrived_s=100.5)
    found = events(relay(), later)
    check_nesting(found)
    assert where(found, "later") == [("router", "request (2)")]
    assert [e["ts"] for e in found if e["name"] == "later"] == [500_000.0]
    after = events(relay(), trace("after", arrived_s=101.5))
    assert where(after, "after") == [("router", "request")]


def test_nothing_recorded_is_an_empty_file() -> None:
    assert {e["ph"] for e in events()} == {"M"}


SPAN = st.tuples(
    st.sampled_from(["transfer", "decode", "prefill chunk", "first token"]), st.sampled_from(["", "d0"]),
    st.floats(-1, 3), st.floats(0, 2), st.lists(st.floats(-1, 3), max_size=4),
)  # fmt: skip


@given(st.lists(st.tuples(st.floats(0, 5), st.lists(SPAN, max_size=6)), max_size=4))
def test_bars_only_contain_each_other_whatever_the_workers_said(
    drawn: list[tuple[float, list[tuple[str, str, float, float, list[float]]]]],
) -> None:
    traces = []
    for number, (arrived_s, spans) in enumerate(drawn):
        told = trace(f"r{number}", 100.0 + arrived_s)
        for name, worker, start_s, length_s, marks in spans:
            told.spans.add(name=name, start_s=start_s, end_s=start_s + length_s, worker=worker, marks=sorted(marks))
        traces.append(told)
    check_nesting(events(*traces))
