"""A request's spans as bars on one time axis, in plain text: what waited, what ran, and what ran at the same time.

Knows spans only; where they come from and what they mean is the caller's business.
"""

from __future__ import annotations

from collections.abc import Sequence

from baton.core.worker import Span

FOLD_ABOVE = 8
"""More spans of one name than this share a row: a thousand decode steps are one bar, a few chunks are a few."""

DURATION = 10
"""Columns for a row's time."""

_BLOCKS = ("█", "◆")
_ASCII = ("#", "*")


def waterfall(spans: Sequence[Span], width: int = 100, ascii_only: bool = False) -> list[str]:
    """Lines of at most `width` columns, in the order in which things began. The axis starts with the first span."""
    if not spans:
        return ["(nothing was recorded for this request)"]
    rows = sorted(_rows(spans), key=lambda row: (row[1][0].start_s, row[1][0].end_s))
    begin = min(s.start_s for s in spans)
    total = max(max(s.end_s for s in spans) - begin, 1e-9)
    details = [_detail(group) for _, group in rows]
    names = min(max(len(name) for name, _ in rows), width // 4)
    bar_width = max(width - names - 2 - DURATION - 2 - min(max(map(len, details)), width // 3), 10)
    lines = [f"{'':{names}}  0{_seconds(total):>{bar_width - 1}}"[:width]]
    for (name, group), detail in zip(rows, details, strict=True):
        bar = _bar(
            [(s.start_s - begin, s.end_s - begin) for s in group], total, bar_width, _ASCII if ascii_only else _BLOCKS
        )
        busy = sum(s.end_s - s.start_s for s in group)
        lines.append(f"{name[:names]:{names}}  {bar}{_seconds(busy):>{DURATION}}  {detail}"[:width].rstrip())
    return lines


def _rows(spans: Sequence[Span]) -> list[tuple[str, list[Span]]]:
    """One row per span; one row per name where there are too many of it."""
    by_name: dict[str, list[Span]] = {}
    for span in sorted(spans, key=lambda s: s.start_s):
        by_name.setdefault(span.name, []).append(span)
    rows = []
    for name, group in by_name.items():
        rows += [(name, group)] if len(group) > FOLD_ABOVE else [(name, [span]) for span in group]
    return rows


def _detail(group: Sequence[Span]) -> str:
    return group[0].detail if len(group) == 1 else f"{len(group)} times"


def _bar(pieces: Sequence[tuple[float, float]], total: float, width: int, marks: tuple[str, str]) -> str:
    """Every piece is at least one cell wide; an event without duration has a mark of its own."""
    cells = [" "] * width
    for start, end in pieces:
        first = min(round(start / total * width), width - 1)
        last = max(first + 1, round(end / total * width))
        cells[first:last] = (marks[0] if end > start else marks[1]) * (last - first)
    return "".join(cells)


def _seconds(value: float) -> str:
    if value == 0:
        return ""
    return f"{value:.2f} s" if value >= 10 else f"{value * 1e3:.0f} ms" if value >= 0.01 else f"{value * 1e3:.2f} ms"
