"""Recorded traces: both formats read as they are, plain or gzipped, and replayed without making bursts of their own."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.bench.load.traces import Traced, read_trace, replayed, spread
from baton.core.config import data_dir
from baton.core.errors import SetupError

HERE = Path(__file__).parent / "traces"
PUBLIC = {  # requests, seconds
    "mooncake_conversation_trace.jsonl.gz": (12_031, 3537),
    "mooncake_synthetic_trace.jsonl.gz": (3_993, 1022),
    "azure2023_conv.csv.gz": (19_366, 3502),
}


def test_a_mooncake_trace_is_read_with_its_blocks() -> None:
    first, *_, last = read_trace(HERE / "mooncake.jsonl")
    assert first == Traced(0.0, 1300, 20, (0, 1, 2))
    assert last == Traced(pytest.approx(6.107), 2048, 12, (0, 1, 2, 6))


def test_an_azure_trace_is_read_over_midnight_to_a_tenth_of_a_microsecond() -> None:
    trace = read_trace(HERE / "azure.csv")
    assert [(r.prompt_tokens, r.output_tokens, r.blocks) for r in trace] == [(374, 44, ()), (396, 109, ()), (12, 1, ())]
    assert [r.at_s for r in trace] == pytest.approx([0, 0.25, 2.5000005], abs=1e-8)


@pytest.mark.parametrize("name", ["mooncake.jsonl", "azure.csv"])
def test_a_gzipped_trace_is_the_same_trace(name: str, tmp_path: Path) -> None:
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress((HERE / name).read_bytes()))
    assert read_trace(packed) == read_trace(HERE / name)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_the_public_traces_are_read_whole(name: str) -> None:
    data = data_dir()
    if data is None or not (data / "traces" / name).is_file():
        pytest.skip(f"{name} is not under $BATON_DATA/traces (default ../shared/traces)")
    trace = read_trace(data / "traces" / name)
    num_requests, span_s = PUBLIC[name]
    assert len(trace) == num_requests
    assert trace[-1].at_s == pytest.approx(span_s, abs=1)
    assert all(r.prompt_tokens > 0 for r in trace)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("prompt,answer\n1,2\n", "begins with neither"),
        ("", "begins with neither"),
        ('{"timestamp": 0}\n', "not of its format"),
        ('{"timestamp": 0, "input_length": 1\n', "not of its format"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no request"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n", "not of its format"),
    ],
)
def test_a_file_that_is_no_trace_is_named_in_one_sentence(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "trace").write_text(content)
    with pytest.raises(SetupError, match=says):
        read_trace(tmp_path / "trace")


@pytest.mark.parametrize("name", ["missing.jsonl", "broken.jsonl.gz"])
def test_a_file_that_cannot_be_read_is_named_too(name: str, tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl.gz").write_text("not gzip")
    with pytest.raises(SetupError, match="cannot read the trace"):
        read_trace(tmp_path / name)


def test_requests_of_one_instant_are_spread_up_to_the_next_and_lone_ones_stay() -> None:
    trace = read_trace(HERE / "mooncake.jsonl")
    placed = spread(trace, random.Random(3))
    times = [r.at_s for r in placed]
    assert times == sorted(times)
    assert len(set(times)) == 5
    assert all(0 <= at_s < 3.053 for at_s in times[:3])
    assert times[3:] == pytest.approx([3.053, 6.107])
    assert [r.blocks for r in placed] == [r.blocks for r in trace]


@given(st.lists(st.integers(0, 5), min_size=1).map(sorted), st.integers(0, 9))
def test_spreading_loses_nobody_and_moves_nobody_past_the_next_instant(instants: list[int], seed: int) -> None:
    trace = [Traced(float(at), 1, 1) for at in instants]
    placed = [r.at_s for r in spread(trace, random.Random(seed))]
    assert placed == sorted(placed)
    assert len(placed) == len(trace)
    later = {at: min((other for other in instants if other > at), default=at) for at in instants}
    assert all(at <= moved <= later[at] for at, moved in zip(instants, placed, strict=True))


def test_a_replay_keeps_the_shape_of_bursts_at_the_rate_that_was_asked() -> None:
    trace = [Traced(at_s, 1, 1) for at_s in (0.0, 1.0, 1.5, 8.0, 10.0)]
    assert [r.at_s for r in replayed(trace, 0.0, None, 9.0)] == [0, 1, 1.5, 8]
    assert [r.at_s for r in replayed(trace, 0.0, 5.0, 100.0)] == pytest.approx([0, 0.1, 0.15, 0.8, 1.0])
    assert [r.at_s for r in replayed(trace, 1.2, None, 7.0)] == pytest.approx([0.3, 6.8])
