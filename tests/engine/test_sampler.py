"""The sampler: exact distribution, filters against a naive reference, and a choice that depends on nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.core.request import SampledToken, SamplingParams
from baton.engine.sampler import SampledRow, candidates, sample, uniform

GREEDY = SamplingParams(temperature=0.0)


def sampled(logits: torch.Tensor, rows: Sequence[SampledRow]) -> list[tuple[SampledToken, ...]]:
    """None of the rows may fail."""
    outcomes = sample(logits, rows)
    tokens = [outcome for outcome in outcomes if isinstance(outcome, tuple)]
    assert len(tokens) == len(outcomes), outcomes
    return tokens


def ids(logits: torch.Tensor, rows: Sequence[SampledRow]) -> list[int]:
    """Of the first choice of each row."""
    return [tokens[0].token_id for tokens in sampled(logits, rows)]


def draws(logits: list[float], sampling: SamplingParams, num: int) -> np.ndarray:
    """How often each token came, over `num` seeds."""
    rows = [SampledRow(sampling, seed, 3) for seed in range(num)]
    return np.bincount(ids(torch.tensor([logits]).expand(num, -1), rows), minlength=len(logits))


def naive(logits: list[float], sampling: SamplingParams) -> dict[int, float]:
    """The definition, token by token: id -> probability."""
    top = max(logits)
    left = {i: math.exp(min(0.0, (x - top) / sampling.temperature)) for i, x in enumerate(logits)}
    order = sorted(left, key=lambda i: (-left[i], i))
    if sampling.top_k:
        order = order[: sampling.top_k]
    if sampling.top_p < 1.0:
        total, mass, nucleus = sum(left[i] for i in order), 0.0, []
        for i in order:
            nucleus.append(i)
            mass += left[i]
            if mass >= sampling.top_p * total:
                break
        order = nucleus
    order = [i for i in order if left[i] >= sampling.min_p]
    total = sum(left[i] for i in order)
    return {i: left[i] / total for i in order}


def test_temperature_zero_takes_the_largest_and_of_equals_the_first() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [9.0, 1.0, 2.0]])
    assert ids(logits, [SampledRow(GREEDY, 1, 1), SampledRow(GREEDY, 2, 2)]) == [1, 0]


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=2.0, top_k=3),
        SamplingParams(top_p=0.7),
        SamplingParams(min_p=0.2),
        SamplingParams(temperature=1.5, top_k=4, top_p=0.9, min_p=0.1),
    ],
    ids=str,
)
def test_tokens_come_as_often_as_the_formula_says(sampling: SamplingParams) -> None:
    """Chi-squared with at most 5 degrees of freedom: above 26 comes once in 10,000 (fixed seeds: never by chance)."""
    logits, num = [1.0, 0.0, 2.0, -1.0, 1.5, 0.3], 4000
    counts, expected = draws(logits, sampling, num), naive(logits, sampling)
    assert set(np.flatnonzero(counts)) == set(expected)
    assert sum((counts[i] - num * p) ** 2 / (num * p) for i, p in expected.items()) < 26


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(-6, 6), min_size=1, max_size=12),
    st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.25, 1.0, 3.0]),
        top_k=st.integers(0, 13),
        # Halves of these have no exact sum in common: a tie between mass and top_p is decided by rounding.
        top_p=st.sampled_from([1e-9, 0.317, 0.713, 0.9871, 1.0]),
        min_p=st.sampled_from([0.0, 0.0531, 0.477, 1.0]),
    ),
)
def test_filters_keep_what_a_naive_reference_keeps(whole: list[int], sampling: SamplingParams) -> None:
    logits = [float(x) for x in whole]  # few values: ties are common
    kept, weights = candidates(np.array(logits, dtype=np.float32), sampling)
    expected = naive(logits, sampling)
    assert kept.tolist() == sorted(expected)
    np.testing.assert_allclose(weights / weights.sum(), [expected[i] for i in sorted(expected)], rtol=1e-9)


def test_a_large_vocabulary_is_filtered_as_the_reference_does() -> None:
    logits = np.random.Generator(np.random.Philox(5)).normal(0, 3, 5000).astype(np.float32)
    for sampling in (SamplingParams(top_p=0.95), SamplingParams(top_k=50, top_p=0.8), SamplingParams(min_p=0.05)):
        assert candidates(logits, sampling)[0].tolist() == sorted(naive(logits.tolist(), sampling))


def test_seed_and_position_decide_and_nothing_else_does() -> None:
    logits = torch.zeros(1, 1000)
    row = SampledRow(SamplingParams(), 2**64 - 1, 17)
    first = ids(logits, [row])
    assert ids(logits, [row]) == first
    others = [SampledRow(SamplingParams(), seed, 3) for seed in range(7)]
    assert ids(logits.expand(8, -1), [*others[:4], row, *others[4:]])[4] == first[0]
    assert ids(logits, [SampledRow(SamplingParams(), 2**64 - 1, 18)]) != first
    assert ids(logits, [SampledRow(SamplingParams(), 2**64 - 2, 17)]) != first


def test_draws_of_all_counters_are_apart_and_uniform() -> None:
    values = [uniform(s, p, c, d) for s in range(8) for p in range(8) for c in range(4) for d in range(8)]
    assert len(set(values)) == len(values)
    assert all(0.0 <= v < 1.0 for v in values)
    counts = np.histogram(values, bins=16, range=(0, 1))[0]
    assert ((counts - len(values) / 16) ** 2 / (len(values) / 16)).sum() < 45  # 15 degrees: once in 10,000


def philox(counter: list[int], key: list[int]) -> int:
    """First word of Philox 4x64-10, from the paper (Salmon et al. 2011, section 3.3)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        product0, product1 = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(product1 >> 64) ^ c[1] ^ k[0], product1 % 2**64, (product0 >> 64) ^ c[3] ^ k[1], product0 % 2**64]
        k = [(k[0] + 0x9E3779B97F4A7C15) % 2**64, (k[1] + 0xBB67AE8584CAA73B) % 2**64]
    return c[0]


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 2, 2**64 - 1])
def test_the_random_numbers_are_philox_at_seed_and_position(seed: int) -> None:
    """From the definition, so that another library version or platform cannot change a retried request's tokens."""
    for position, choice, draw in ((0, 0, 0), (8191, 0, 0), (5, 1, 2)):
        # numpy counts up before it generates.
        expected = philox([draw + 1, 0, choice, position], [seed, 0]) >> 11
        assert uniform(seed, position, choice, draw) == expected * 2.0**-53


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-3, 100.0])
def test_extreme_temperatures_neither_fail_nor_warn(temperature: float) -> None:
    logits = torch.tensor([[1e30, -1e30, 5.0, 1e30]])
    token = ids(logits, [SampledRow(SamplingParams(temperature=temperature, top_p=0.5, top_k=2), 1, 1)])[0]
    assert token in (0, 3)


def test_logits_of_minus_infinity_are_never_drawn() -> None:
    logits = [-math.inf, 0.0, -math.inf, 0.0]
    assert set(np.flatnonzero(draws(logits, SamplingParams(temperature=100.0), 200))) == {1, 3}
