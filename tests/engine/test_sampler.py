"""The sampler: exact distribution, filters against a naive reference, and a choice that depends on nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.core.errors import InternalError
from baton.core.request import SampledToken, SamplingParams, TokenLogprob
from baton.engine.sampler import SampledRow, adjusted, candidates, sample, uniform

GREEDY = SamplingParams(temperature=0.0)


def sampled(logits: torch.Tensor, rows: Sequence[SampledRow]) -> list[tuple[SampledToken, ...]]:
    """None of the rows may fail."""
    outcomes = sample(logits.numpy(), rows)
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


@settings(max_examples=300)
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


# ---- bias and penalties ----------------------------------------------------------------------------------------------

penalties = st.builds(
    SamplingParams,
    temperature=st.just(0.0),
    frequency_penalty=st.sampled_from([0.0, -2.0, 0.3, 2.0]),
    presence_penalty=st.sampled_from([0.0, -1.5, 0.7, 2.0]),
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.3, 10.0]),
    logit_bias=st.dictionaries(st.integers(0, 9), st.sampled_from([-100.0, -0.5, 1.0, 100.0])).map(
        lambda bias: tuple(bias.items())
    ),
)


def naive_penalties(logits: list[float], row: SampledRow) -> list[float]:
    """The definition, token by token."""
    s, prompt, output = row.sampling, row.history[: row.num_prompt_tokens], row.history[row.num_prompt_tokens :]
    result = []
    for token, logit in enumerate(logits):
        logit += dict(s.logit_bias).get(token, 0.0)
        if token in prompt or token in output:
            logit = logit / s.repetition_penalty if logit > 0 else logit * s.repetition_penalty
        logit -= s.frequency_penalty * output.count(token)
        logit -= s.presence_penalty * (token in output)
        result.append(logit)
    return result


@settings(max_examples=300)
@given(
    st.lists(st.integers(-8, 8), min_size=8, max_size=8), penalties,
    st.lists(st.integers(0, 7), max_size=9), st.lists(st.integers(0, 7), max_size=9),
)
def test_bias_and_penalties_are_what_a_naive_reference_makes_of_them(
    whole: list[int], sampling: SamplingParams, prompt: list[int], output: list[int]
) -> None:
    logits = [x / 2 for x in whole]
    row = SampledRow(sampling, 1, 1, (0,), (*prompt, *output), len(prompt))
    expected = naive_penalties(logits, row)
    np.testing.assert_allclose(adjusted(np.array(logits, dtype=np.float32), row), expected, rtol=1e-12)
    near = [i for i, x in enumerate(expected) if x > max(expected) - 1e-9]
    assert ids(torch.tensor([logits]), [row])[0] in near, "greedy is the largest of what is left"


@pytest.mark.parametrize("penalty", [0.5, 1.0001, 1.3, 10.0])
def test_the_repetition_penalty_is_the_one_of_transformers(penalty: float) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    rng = np.random.Generator(np.random.Philox(3))
    logits = torch.from_numpy(rng.normal(0, 4, (1, 200)).astype(np.float32))
    history = tuple(int(t) for t in rng.integers(0, 200, 90))
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([history]), logits.clone())
    row = SampledRow(SamplingParams(repetition_penalty=penalty), 1, 91, (0,), history, 50)
    np.testing.assert_allclose(adjusted(logits[0].numpy(), row), theirs[0].numpy(), rtol=1e-6)


def test_penalties_and_bias_change_what_is_drawn_too() -> None:
    logits = torch.zeros(1, 4)
    banned = SamplingParams(logit_bias=((0, -100.0), (1, -100.0), (2, -100.0)))
    assert {ids(logits, [SampledRow(banned, seed, 1)])[0] for seed in range(50)} == {3}
    tired = SamplingParams(presence_penalty=2.0, temperature=0.01)
    said = SampledRow(tired, 5, 4, (0,), (3, 0, 1, 2), 1)
    assert ids(logits, [said]) == [3], "3 is in the prompt alone"


def test_a_bias_on_a_token_the_model_does_not_have_changes_nothing() -> None:
    row = SampledRow(SamplingParams(temperature=0.0, logit_bias=((4, 100.0), (2**31 - 1, 100.0))), 1, 1)
    assert ids(torch.tensor([[0.0, 1.0, 0.5, 0.2]]), [row]) == [1]


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 100.0])
def test_extreme_penalties_neither_fail_nor_warn(temperature: float) -> None:
    sampling = SamplingParams(temperature=temperature, repetition_penalty=5e-324, logprobs=2, top_p=0.9)
    logits = torch.tensor([[3e38, -3e38, 1.0, -math.inf]])
    (token,) = sampled(logits, [SampledRow(sampling, 1, 5, (0,), (0, 1, 2, 3), 2)])[0]
    assert token.token_id in (0, 2), "both are as large as can be now"


# ---- log-probs -------------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(st.lists(st.integers(-6, 6), min_size=1, max_size=30), st.integers(0, 20), st.sampled_from([0.0, 1.5]))
def test_logprobs_are_a_softmax_of_the_raw_logits_and_the_top_falls(
    whole: list[int], num_top: int, temperature: float
) -> None:
    logits = torch.tensor([[x / 3 for x in whole]])
    expected = torch.log_softmax(logits[0].double(), -1).tolist()
    sampling = SamplingParams(
        temperature=temperature, logprobs=num_top, top_k=3, repetition_penalty=2.0, logit_bias=((0, 5.0),)
    )
    (token,) = sampled(logits, [SampledRow(sampling, 1, 4, (0,), (0,), 1)])[0]
    assert token.logprob is not None
    assert token.logprob.logprob == pytest.approx(expected[token.token_id], abs=1e-6)
    order = sorted(range(len(whole)), key=lambda t: (-whole[t], t))[:num_top]
    assert [t for t, _ in token.logprob.top] == order
    assert [x for _, x in token.logprob.top] == pytest.approx([expected[t] for t in order], abs=1e-6)


def test_logprobs_of_a_large_vocabulary_have_exactly_as_many_entries_as_asked_for() -> None:
    logits = torch.from_numpy(np.random.Generator(np.random.Philox(5)).normal(0, 3, (1, 50_000)).astype(np.float32))
    logits[0, [7, 40_000, 123]] = 20.0
    (token,) = sampled(logits, [SampledRow(SamplingParams(temperature=0.0, logprobs=20), 1, 1)])[0]
    assert token.logprob is not None
    assert len(token.logprob.top) == 20
    assert [t for t, _ in token.logprob.top[:3]] == [7, 123, 40_000], "equals by id"
    assert token.logprob.logprob == token.logprob.top[0][1]


def test_who_asks_for_no_logprobs_gets_none_and_who_asks_for_none_beside_gets_its_own() -> None:
    logits = torch.zeros(3, 4)
    asked = [SamplingParams(logprobs=n) for n in (None, 0, 1)]
    tokens = [row[0].logprob for row in sampled(logits, [SampledRow(s, 1, 1) for s in asked])]
    assert tokens[0] is None
    assert tokens[1] == TokenLogprob(float(np.float32(math.log(0.25))))
    assert tokens[2] == TokenLogprob(float(np.float32(math.log(0.25))), ((0, float(np.float32(math.log(0.25)))),))


# ---- several choices -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling", [SamplingParams(logprobs=2), SamplingParams(top_p=0.5, frequency_penalty=1.0), GREEDY], ids=str
)
def test_a_choice_gets_what_it_gets_without_the_others(sampling: SamplingParams) -> None:
    logits = torch.linspace(0, 3, 500)[None]
    history, choices = (1, 2, 3) if sampling.needs_history else (), (0, 1, 3, 7)
    (together,) = sampled(logits, [SampledRow(sampling, 9, 3, choices, history, 3)])
    alone = [sampled(logits, [SampledRow(sampling, 9, 3, (c,), history, 3)])[0][0] for c in choices]
    assert list(together) == alone
    assert (len(set(together)) > 1) == (sampling.temperature > 0), "each draws for itself"


# ---- logits that are no numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(logprobs=3)], ids=["greedy", "drawn"])
def test_a_row_that_is_no_number_fails_alone(rubbish: float, sampling: SamplingParams) -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]] * 3)
    if rubbish == -math.inf:
        logits[1] = rubbish
    else:
        logits[1, 2] = rubbish
    rows = [SampledRow(sampling, seed, 7) for seed in range(3)]
    first, bad, last = sample(logits.numpy(), rows)
    assert isinstance(bad, InternalError)
    assert "position 7" in bad.message
    assert [first, last] == sampled(logits[[0, 2]], [rows[0], rows[2]])
