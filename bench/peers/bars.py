"""What Baton must reach beside its peers, and whether it does.

A bar is a ratio to a peer in the same run. Where the machine itself does not allow that ratio, 80 % of the roofline is
enough: the bar is whichever is easier to reach. Both are shown.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from baton.bench.load.report import Json
from baton.bench.peers.rows import Row

ROOFLINE_SHARE = 0.8
APART = "baton bf16 1P+1D"


@dataclass(frozen=True, slots=True)
class Bar:
    row: str
    system: str
    peer: str
    factor: float
    """On the peer's figure: at least so much where more is better, at most so much where less is."""


BARS = (
    Bar("prefill_512", "baton bf16", "vllm bf16", 1.1),
    Bar("prefill_2048", "baton bf16", "vllm bf16", 1.4),
    Bar("prefill_512", "baton int8", "vllm bf16", 1.8),
    Bar("prefill_2048", "baton int8", "vllm bf16", 2.0),
    Bar("decode_1", "baton bf16", "llama.cpp BF16", 1.0),
    Bar("decode_1", "baton bf16", "vllm bf16", 1.8),
    Bar("decode_1", "baton int8", "llama.cpp Q8_0", 1.25),
    Bar("decode_1", "baton int4", "llama.cpp Q4_0", 1.25),
    Bar("out_8", "baton bf16", "vllm bf16", 2.0),
    Bar("out_8", "baton bf16", "llama.cpp BF16", 2.5),
    Bar("out_32", "baton bf16", "vllm bf16", 1.6),
    Bar("out_32", "baton bf16", "llama.cpp BF16", 2.5),
    Bar("out_8", "baton int8", "vllm bf16", 2.6),
    Bar("out_32", "baton int8", "vllm bf16", 2.4),
    Bar("prefix_hit", "baton bf16", "llama.cpp BF16", 1.0),
    Bar("start", "baton bf16", "llama.cpp BF16", 1.5),
    Bar("start", "baton bf16", "vllm bf16", 0.1),
    Bar("memory", APART, "vllm bf16", 0.4),
    Bar("itl_long", APART, "vllm bf16", 0.25),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    bar: Bar
    ratio: float
    """Of Baton's figure to the peer's: the median over rounds, each with its own neighbour."""
    needed: float
    """What the peer's figure asks for, in the row's unit."""
    by_roofline: float | None
    """What 80 % of the roofline asks for; None where there is no such limit."""
    reached: float
    met: bool


def values(samples: Sequence[Json], system: str, row: str) -> list[float]:
    """One per round in which it was measured without a failure."""
    return list(by_round(samples, system, row).values())


def by_round(samples: Sequence[Json], system: str, row: str) -> dict[int, float]:
    return {
        s["round"]: s["value"]
        for s in samples
        if (s["system"], s["row"]) == (system, row) and s["value"] is not None
    }


def verdicts(
    samples: Sequence[Json], rows: Mapping[str, Row], rooflines: Mapping[tuple[str, str], float]
) -> Iterator[Verdict]:
    """Of the bars whose two sides were measured. `rooflines`: (system, row) -> the limit in the row's unit."""
    for bar in BARS:
        mine, theirs = (by_round(samples, system, bar.row) for system in (bar.system, bar.peer))
        together = sorted(mine.keys() & theirs.keys())
        if not together:
            continue
        higher = rows[bar.row].higher_is_better
        limit = rooflines.get((bar.system, bar.row))
        needed = bar.factor * statistics.median(theirs[n] for n in together)
        by_roofline = None if limit is None else limit * ROOFLINE_SHARE if higher else limit / ROOFLINE_SHARE
        reached = statistics.median(mine[n] for n in together)
        yield Verdict(
            bar,
            statistics.median(mine[n] / theirs[n] for n in together),
            needed,
            by_roofline,
            reached,
            enough(reached, easier(needed, by_roofline, higher), higher),
        )


def easier(needed: float, by_roofline: float | None, higher_is_better: bool) -> float:
    if by_roofline is None:
        return needed
    return min(needed, by_roofline) if higher_is_better else max(needed, by_roofline)


def enough(reached: float, bar: float, higher_is_better: bool) -> bool:
    return reached >= bar if higher_is_better else reached <= bar
