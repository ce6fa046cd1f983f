from __future__ import annotations

from baton.cli.waterfall import FOLD_ABOVE, waterfall
from baton.core.worker import Span

RELAY = (
    Span("decode", 0.30, 1.00, "31 tokens"),
    Span("queue", 0.00, 0.05),
    Span("prefill chunk", 0.05, 0.15, "512 tokens"),
    Span("prefill chunk", 0.15, 0.30, "300 tokens"),
    Span("transfer", 0.15, 0.20, "shm, 12 blocks"),
    Span("first token", 0.30, 0.30),
)


def bar_of(line: str, name: str) -> tuple[int, int]:
    """Columns [start, end) of a row's bar."""
    assert line.startswith(name)
    cells = [i for i, c in enumerate(line) if c in "█◆#*"]
    return cells[0], cells[-1] + 1


def test_bars_stand_in_the_order_in_which_things_began() -> None:
    names = [line.split("  ")[0].strip() for line in waterfall(RELAY)[1:]]
    assert names == ["queue", "prefill chunk", "transfer", "prefill chunk", "first token", "decode"]


def test_what_ran_at_the_same_time_overlaps_and_what_followed_does_not() -> None:
    _, queue, first, transfer, second, token, decode = waterfall(RELAY)
    assert bar_of(queue, "queue")[1] <= bar_of(first, "prefill chunk")[0]
    start, end = bar_of(second, "prefill chunk")
    assert start <= bar_of(transfer, "transfer")[0] < bar_of(transfer, "transfer")[1] < end
    assert bar_of(token, "first token")[1] - bar_of(token, "first token")[0] == 1
    assert bar_of(decode, "decode")[1] - bar_of(decode, "decode")[0] > 5 * (
        bar_of(queue, "queue")[1] - bar_of(queue, "queue")[0]
    )


def test_durations_and_details_are_on_their_row() -> None:
    rows = waterfall(RELAY)
    assert "1000 ms" in rows[0]
    assert "150 ms" in rows[4]
    assert rows[4].endswith("300 tokens")
    assert rows[3].endswith("shm, 12 blocks")


def test_no_line_is_wider_than_asked() -> None:
    long = Span("a span with quite a long name", 0.0, 1.0, "and a detail that says far more than fits " * 3)
    for width in (40, 80, 120):
        assert all(len(line) <= width for line in waterfall((*RELAY, long), width))


def test_many_spans_of_one_name_share_a_row() -> None:
    steps = tuple(Span("step", i / 10, (i + 0.5) / 10) for i in range(FOLD_ABOVE + 1))
    rows = waterfall(steps)[1:]
    assert len(rows) == 1
    assert f"{FOLD_ABOVE + 1} times" in rows[0]
    assert "450 ms" in rows[0]


def test_time_before_zero_is_on_the_axis_too() -> None:
    rows = waterfall((Span("router", -0.5, 0.0), Span("worker", 0.0, 0.5)))
    assert "1000 ms" in rows[0]
    assert bar_of(rows[1], "router")[1] == bar_of(rows[2], "worker")[0]


def test_a_request_without_spans_says_so() -> None:
    assert waterfall(()) == ["(nothing was recorded for this request)"]


def test_a_plain_terminal_gets_plain_characters() -> None:
    assert all(line.isascii() for line in waterfall(RELAY, ascii_only=True))
