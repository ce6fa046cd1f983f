"""The model of a worker's steps: what it says, and what it learns from steps it is shown."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from baton.core.request import SamplingParams
from baton.core.step import ScheduledChunk, Step
from baton.core.step_model import StepFit, StepModel, StepWork, pairs

FAST = StepModel(0.002, 2e-5, 3e-9, 1e-4, 2e-8)
"""Twenty-five times faster per prompt token than the prior."""


def seconds(model: StepModel, work: StepWork) -> float:
    return (
        model.step_s + work.prefill_tokens * model.token_s + work.prefill_pairs * model.pair_s
        + work.decode_rows * model.row_s + work.context_tokens * model.context_s
    )


def prefill_work(rng: random.Random) -> StepWork:
    cached, tokens = rng.choice((0, 512, 4096, 16384)), rng.randrange(2, 512)
    return StepWork(tokens, pairs(cached, tokens))


def decode_work(rng: random.Random) -> StepWork:
    rows = rng.randrange(1, 65)
    return StepWork(0, 0, rows, rows * rng.randrange(100, 8000))


def mixed_work(rng: random.Random) -> StepWork:
    if rng.random() < 0.4:
        return decode_work(rng)
    one, other = prefill_work(rng), decode_work(rng)
    return StepWork(one.prefill_tokens, one.prefill_pairs, other.decode_rows, other.context_tokens)


def noisy(rng: random.Random, true_s: float) -> float:
    return true_s * rng.uniform(0.9, 1.1)


def shown(fit: StepFit, true: StepModel, works: Iterator[StepWork], rng: random.Random) -> StepModel:
    for work in works:
        fit.observe(work, noisy(rng, seconds(true, work)))
        fit.model  # noqa: B018  (a worker asks as it goes: predictions, and so what is clipped, follow)
    return fit.model


def close(one: StepModel, other: StepModel, share: float) -> bool:
    names = ("step_s", "token_s", "pair_s", "row_s", "context_s")
    return all(getattr(one, n) == pytest.approx(getattr(other, n), rel=share) for n in names)


def test_prefill_in_chunks_is_the_sum_of_its_steps() -> None:
    model = StepModel(1.0, 0.1, 0.01, 0, 0)
    steps = [StepWork(4, pairs(10, 4)), StepWork(4, pairs(14, 4)), StepWork(1, pairs(18, 1))]
    assert model.prefill_s(10, 9, 4) == pytest.approx(sum(seconds(model, work) for work in steps))
    assert pairs(2, 3) == 3 + 4 + 5


def test_a_queue_shares_its_steps() -> None:
    model = StepModel(1.0, 0.1, 0.01, 0, 0)
    assert model.queue_s(8, 20, 4) == pytest.approx(2 * 1.0 + 8 * 0.1 + 20 * 0.01)


def test_work_is_counted_by_what_a_chunk_does() -> None:
    def chunk(start: int, num_tokens: int, samples: bool) -> ScheduledChunk:
        return ScheduledChunk("r", (1,) * num_tokens, start, (), (0,) if samples else (), SamplingParams(), 0)

    step = Step(1, (chunk(9, 1, True), chunk(99, 1, True), chunk(3, 2, True), chunk(7, 1, False)))
    assert StepWork.of(step) == StepWork(3, 4 + 5 + 8, 2, 10 + 100)


@pytest.mark.parametrize("seed", range(3))
def test_the_coefficients_of_noisy_steps_are_found(seed: int) -> None:
    rng = random.Random(seed)
    model = shown(StepFit(), FAST, (mixed_work(rng) for _ in range(400)), rng)
    assert close(model, FAST, 0.5), model
    for work in (StepWork(512, pairs(0, 512)), StepWork(512, pairs(16384, 512)), StepWork(0, 0, 32, 64_000)):
        assert seconds(model, work) == pytest.approx(seconds(FAST, work), rel=0.06)


def test_the_prior_is_soon_forgotten_whatever_the_speed() -> None:
    for factor in (0.001, 30.0):
        true = StepModel(*(factor * c for c in (0.005, 5e-4, 5e-8, 5e-4, 5e-8)))
        rng = random.Random(1)
        model = shown(StepFit(), true, (mixed_work(rng) for _ in range(60)), rng)
        work = StepWork(300, pairs(2000, 300))
        assert seconds(model, work) == pytest.approx(seconds(true, work), rel=0.1), factor


def test_a_change_of_speed_is_followed() -> None:
    rng = random.Random(2)
    fit = StepFit()
    shown(fit, FAST, (mixed_work(rng) for _ in range(300)), rng)
    slow = StepModel(*(20 * c for c in (FAST.step_s, FAST.token_s, FAST.pair_s, FAST.row_s, FAST.context_s)))
    model = shown(fit, slow, (mixed_work(rng) for _ in range(120)), rng)
    work = StepWork(512, pairs(0, 512))
    assert seconds(model, work) == pytest.approx(seconds(slow, work), rel=0.1)
    model = shown(fit, FAST, (mixed_work(rng) for _ in range(120)), rng)
    assert seconds(model, work) == pytest.approx(seconds(FAST, work), rel=0.1)


def test_a_stall_is_not_a_speed() -> None:
    rng = random.Random(3)
    fit = StepFit()
    before = shown(fit, FAST, (mixed_work(rng) for _ in range(300)), rng)
    fit.observe(mixed_work(rng), 30.0)
    work = StepWork(512, pairs(0, 512))
    assert seconds(fit.model, work) == pytest.approx(seconds(before, work), rel=0.1)


def test_no_coefficient_is_ever_negative() -> None:
    for seed in range(40):
        rng = random.Random(seed)
        fit = StepFit()
        for _ in range(60):
            fit.observe(mixed_work(rng), rng.expovariate(100))
            m = fit.model
            assert min(m.step_s, m.token_s, m.pair_s, m.row_s, m.context_s) >= 0


def test_tiny_suffixes_do_not_make_prefill_look_slow() -> None:
    """A decode worker computes suffixes of a few tokens, in which the step's base is most of the time."""
    rng = random.Random(4)
    true = StepModel(0.01, 1e-4, 1e-8, 1e-4, 1e-8)
    works = (StepWork(n, pairs(500, n)) for n in (rng.randrange(2, 24) for _ in range(300)))
    model = shown(StepFit(), true, works, rng)
    assert model.prefill_s(0, 512, 512) == pytest.approx(true.prefill_s(0, 512, 512), rel=0.5)
    naive_s = 512 * true.prefill_s(500, 12, 512) / 12
    assert naive_s > 5 * model.prefill_s(0, 512, 512)


def test_a_worker_that_only_prefills_expects_decode_rows_to_cost_like_its_tokens() -> None:
    rng = random.Random(5)
    model = shown(StepFit(), FAST, (prefill_work(rng) for _ in range(300)), rng)
    assert (model.num_prefill_steps, model.num_decode_steps) == (300, 0)
    assert model.row_s == pytest.approx(model.token_s, rel=0.6)
    assert model.decode_step_s(10, 10_000) < 3 * FAST.decode_step_s(10, 10_000)


def test_a_worker_that_only_decodes_expects_prompt_tokens_to_cost_like_its_rows() -> None:
    rng = random.Random(6)
    model = shown(StepFit(), FAST, (decode_work(rng) for _ in range(300)), rng)
    assert (model.num_prefill_steps, model.num_decode_steps) == (0, 300)
    assert model.token_s == pytest.approx(FAST.row_s, rel=0.6)


def test_decoding_does_not_unlearn_the_prefill_speed() -> None:
    rng = random.Random(7)
    fit = StepFit()
    shown(fit, FAST, (prefill_work(rng) for _ in range(200)), rng)
    model = shown(fit, FAST, (decode_work(rng) for _ in range(3000)), rng)
    assert model.prefill_s(0, 512, 512) == pytest.approx(FAST.prefill_s(0, 512, 512), rel=0.1)


def test_steps_without_duration_say_nothing() -> None:
    fit = StepFit()
    fit.observe(StepWork(10, 55), 0.0)
    assert fit.model == StepModel()
