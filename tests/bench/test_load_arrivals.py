"""When requests are meant to leave: each process has the rate and the burstiness it promises, and a seed fixes it."""

from __future__ import annotations

import random
import statistics
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.bench.load.arrivals import Process, arrivals
from baton.core.errors import SetupError

MANY_S = 20_000.0
TEXTS = ["constant", "poisson", "gamma:cv=3", "gamma:cv=0.25", "onoff:on_s=2,off_s=8"]


def schedule(text: str, rate: float = 2.0, duration_s: float = MANY_S, seed: int = 1) -> list[float]:
    return arrivals(Process.parse(text), rate, duration_s, random.Random(seed))


@given(text=st.sampled_from(TEXTS), rate=st.floats(0.1, 50), duration_s=st.floats(0.1, 20), seed=st.integers(0, 9))
def test_a_schedule_ascends_within_its_duration_and_repeats_with_its_seed(
    text: str, rate: float, duration_s: float, seed: int
) -> None:
    times = schedule(text, rate, duration_s, seed)
    assert times == sorted(times)
    assert all(0 <= at_s < duration_s for at_s in times)
    assert times == schedule(text, rate, duration_s, seed)


@pytest.mark.parametrize("text", TEXTS)
def test_every_process_has_the_mean_rate_it_was_given(text: str) -> None:
    assert len(schedule(text)) / MANY_S == pytest.approx(2.0, rel=0.06)


def test_constant_arrivals_are_equally_far_apart_and_do_not_drift() -> None:
    assert schedule("constant", 3.0, 1.0) == [0, 1 / 3, 2 / 3]
    assert schedule("constant", 10.0)[123_456] == 12_345.6


@pytest.mark.parametrize(
    ("text", "cv"), [("poisson", 1.0), ("gamma:cv=1", 1.0), ("gamma:cv=3", 3.0), ("gamma:cv=0.25", 0.25)]
)
def test_gaps_vary_as_much_as_was_asked(text: str, cv: float) -> None:
    gaps = [later - earlier for earlier, later in pairwise(schedule(text))]
    assert statistics.pstdev(gaps) / statistics.fmean(gaps) == pytest.approx(cv, rel=0.05)


def test_onoff_sends_nothing_in_its_silences() -> None:
    within = [at_s % 10 for at_s in schedule("onoff:on_s=2,off_s=8")]
    assert max(within) < 2
    assert min(within) < 0.01
    assert max(within) > 1.99


@pytest.mark.parametrize(
    "text",
    ["", "pareto", "poisson:cv=2", "gamma", "gamma:cv=0", "gamma:cv=x", "gamma:cv=inf", "onoff:on_s=2",
     "onoff:on_s=2,off_s=-1"],
)
def test_a_process_that_is_none_is_named_in_one_sentence(text: str) -> None:
    with pytest.raises(SetupError, match="arrivals"):
        Process.parse(text)
