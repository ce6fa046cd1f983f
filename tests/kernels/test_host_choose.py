"""How C makes tokens of logits: the sampler of the engine is the oracle, token by token."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from numpy.typing import NDArray

from baton.core.request import SampledToken, SamplingParams
from baton.engine.sampler import SampledRow, sample, uniform
from baton.kernels.host import library

Floats = NDArray[np.float32]


@pytest.fixture(params=library.ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    if request.param not in library.isas():
        pytest.skip(f"this CPU has no {request.param}")
    name: str = request.param
    return name


def chosen(isa: str, logits: Floats, how: SamplingParams, seed: int, position: int = 3, choice: int = 0) -> int:
    asked = library.Choice(seed, position, how.temperature, how.top_p, how.min_p, how.top_k, choice)
    token: int = library.load().baton_choose(
        isa.encode(), logits.ctypes.data, len(logits), int(logits.argmax()), asked)
    return token


def expected(logits: Floats, how: SamplingParams, seed: int) -> int:
    ((token,),) = sample(logits[None], [SampledRow(how, seed, 3)])  # type: ignore[misc]
    assert isinstance(token, SampledToken)
    return token.token_id


FILTERS = [
    SamplingParams(),
    SamplingParams(top_k=1),
    SamplingParams(top_k=40),
    SamplingParams(top_p=0.9),
    SamplingParams(min_p=0.05),
    SamplingParams(top_k=100, top_p=0.7, min_p=0.01),
    SamplingParams(top_k=10**6, top_p=0.999),
]


@pytest.mark.parametrize("temperature", [0.0, 0.05, 0.7, 1.0, 30.0])
@pytest.mark.parametrize("how", FILTERS, ids=[f"k{h.top_k}-p{h.top_p}-m{h.min_p}" for h in FILTERS])
@pytest.mark.parametrize("vocab_size", [7, 1000, 9001])
def test_every_draw_is_the_engine_s(vocab_size: int, how: SamplingParams, temperature: float, isa: str) -> None:
    how = dataclasses.replace(how, temperature=temperature)
    logits = (np.random.default_rng(vocab_size).standard_normal((4, vocab_size)) * 3).astype(np.float32)
    for seed in range(20):
        row = logits[seed % 4]
        assert chosen(isa, row, how, seed) == expected(row, how, seed)


def test_the_draw_is_that_of_its_counter(isa: str) -> None:
    """Of tokens that are all as likely, it says where it lies."""
    flat = np.zeros(1 << 16, np.float32)
    for seed, position, choice in [(0, 0, 0), (1, 5, 0), (2**64 - 1, 7, 3), (2**63 + 1, 2**31, 1)]:
        wanted = int(uniform(seed, position, choice) * len(flat))
        assert chosen(isa, flat, SamplingParams(), seed, position, choice) == wanted


THREE_OF_TEN = [SamplingParams(top_k=3), SamplingParams(top_p=0.29), SamplingParams(top_k=5, top_p=0.5)]


@pytest.mark.parametrize("how", THREE_OF_TEN, ids=["top_k", "top_p", "both"])
def test_of_equals_the_filters_keep_the_first(how: SamplingParams, isa: str) -> None:
    flat = np.zeros(10, np.float32)
    assert {chosen(isa, flat, how, seed) for seed in range(60)} == {0, 1, 2}


def test_what_cannot_be_does_not_come(isa: str) -> None:
    logits = np.full(300, -np.inf, np.float32)
    logits[[5, 299]] = (1.0, 1.5)
    assert {chosen(isa, logits, SamplingParams(temperature=2.0), seed) for seed in range(60)} == {5, 299}


@pytest.mark.parametrize("temperature", [1e-300, 1e-38, 1e-6])
def test_next_to_no_temperature_leaves_the_greatest(temperature: float, isa: str) -> None:
    logits = np.random.default_rng(2).standard_normal(500).astype(np.float32)
    how = SamplingParams(temperature=temperature)
    assert {chosen(isa, logits, how, seed) for seed in range(20)} == {int(logits.argmax())}
