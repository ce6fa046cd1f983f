"""What is made of several runs: the quietest of its attempts, and a curve of a system's repeats."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from baton.bench.load.interference import Disturbance, Point, curve, mixed
from baton.bench.load.plan import Session
from baton.bench.load.prose import Prose
from baton.bench.load.run import quietest


def kept(others: list[float | None], attempts: int) -> tuple[int, list[float]]:
    """Which attempt is reported, and what all were disturbed by; `others` is what each would see."""
    made: list[int] = []

    async def once(number: int) -> dict[str, Any]:
        made.append(number)
        seen = others[number]
        return {"number": number, "cpu_cores": None if seen is None else {"others": seen}}

    run = asyncio.run(quietest(once, attempts))
    assert made == list(range(len(made)))
    return run["number"], run["attempts_others_cores"]


@pytest.mark.parametrize(
    ("others", "attempts", "number", "made"),
    [
        ([0.9, 0.0], 1, 0, [0.9]),
        ([0.05, 0.0], 3, 0, [0.05]),
        ([0.9, 0.05, 0.0], 3, 1, [0.9, 0.05]),
        ([0.9, 0.3, 0.6], 3, 1, [0.9, 0.3, 0.6]),
        ([None, 0.0], 3, 0, [0.0]),
    ],
)
def test_the_quietest_attempt_is_kept_and_a_quiet_one_ends_them(
    others: list[float | None], attempts: int, number: int, made: list[float]
) -> None:
    assert kept(others, attempts) == (number, made)


def run(rate: float, itl: float, ttft: float | None) -> dict[str, Any]:
    def label(measure: str, seen: float | None) -> dict[str, Any]:
        spread = None if seen is None else {"p50": seen / 2, "p99": seen}
        return {"itl_s": None, "ttft_s": None, measure: spread, "goodput_rate": 1.5}

    labels = {"decode": label("itl_s", itl), "long": label("ttft_s", ttft)}
    return {"long_rate": rate, "cpu_cores": {"others": itl}, "labels": labels}


def test_a_curve_has_a_point_per_rate_with_a_value_per_repeat() -> None:
    runs = [run(0.5, 0.5, 2.0), run(0.0, 0.25, None), run(0.5, 1.5, 4.0), run(0.0, 0.125, None)]
    assert curve(runs) == [
        Point(0.0, [125, 62.5], [250, 125], [], [1.5, 1.5], [0.25, 0.125]),
        Point(0.5, [250, 750], [500, 1500], [2000, 4000], [1.5, 1.5], [0.5, 1.5]),
    ]


def plan(rate: float, seed: str) -> list[Session]:
    return mixed(Disturbance(decode_rate=2.0), rate, 10.0, Prose.estimated(1.0), seed)


def test_the_decode_load_is_even_and_the_same_however_many_long_prompts_come() -> None:
    alone, beside = plan(0.0, "a"), plan(0.5, "a")
    decode = [s for s in beside if s.label == "decode"]
    assert [s.at_s for s in alone] == [s.at_s for s in decode] == [n / 2 for n in range(20)]
    assert decode == alone
    long = [s for s in beside if s.label == "long"]
    assert {s.turns[0].prompt_tokens for s in long} == {2048}
    assert len(long) > 0
    assert {s.turns[0].text for s in plan(0.5, "b")}.isdisjoint(s.turns[0].text for s in beside)
