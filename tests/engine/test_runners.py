"""What every runner does with steps that are given to it before the ones before them are done."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from baton.core.config import EngineConfig
from baton.core.request import SamplingParams
from baton.core.step import UNKNOWN_TOKEN, Runner, ScheduledChunk, Step, StepResult
from baton.engine.backend import choose_backend
from baton.engine.hash_runner import HashRunner, StepCosts
from baton.engine.host_runner import HostRunner
from baton.kernels.host import library
from baton.models.convert import convert
from baton.models.hash_model import layout
from tests.models.reference import BLOCK_SIZE, TinyLlama, chunk, open_runner, write_tiny_llama

PROMPT = [(i * i * 7 + 3 * i + 1) % 64 for i in range(20)]
FRESH = [token for token in range(64) if token not in PROMPT]
PENALISED = SamplingParams(
    temperature=0.0, logprobs=2, repetition_penalty=4.0,
    logit_bias=((FRESH[0], 90.0), (FRESH[1], 60.0), (FRESH[2], 40.0)),
)
"""A real model says each of the fresh ones once, if it is told what it said before."""
PLAIN = SamplingParams(temperature=30.0, top_k=40)
PLAIN_WITH_LOGPROBS = SamplingParams(temperature=30.0, top_k=40, logprobs=1)
NUM_BLOCKS = 4
Open = Callable[[], contextlib.AbstractContextManager[Runner]]


@contextlib.contextmanager
def hash_runner() -> Iterator[Runner]:
    shape = layout(BLOCK_SIZE)
    runner = HashRunner(memoryview(bytearray(NUM_BLOCKS * shape.block_bytes)), shape, StepCosts(0.0, 0.0, 0.0))
    yield runner
    asyncio.run(runner.close())


@contextlib.contextmanager
def host_runner(home: Path, num_blocks: int = NUM_BLOCKS) -> Iterator[Runner]:
    files = convert(home / "llama", home / "cache")
    backend = choose_backend(EngineConfig(backend="host", quantization="fp32"), 16)
    shape = files.spec.layout(BLOCK_SIZE, backend.kv_dtype)
    memory = library.aligned(num_blocks * shape.block_bytes)
    runner = HostRunner(files, memory.data, shape, 2, backend)
    yield runner
    asyncio.run(runner.close())


@pytest.fixture(scope="module", params=["hash", "torch", "host"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Open:
    if request.param == "hash":
        return hash_runner
    home = tmp_path_factory.mktemp("tiny")
    write_tiny_llama(home / "llama", TinyLlama(head_dim=16))
    if request.param == "host":
        return lambda: host_runner(home)
    return lambda: open_runner(convert(home / "llama", home / "cache").directory, NUM_BLOCKS)


def row(
    sampling: SamplingParams, tokens: Sequence[int], start: int, table: tuple[int, ...], token_from: int | None = None
) -> ScheduledChunk:
    """The chunk from `start` on; `tokens` are all that are known."""
    piece = tokens[start:] if token_from is None else (UNKNOWN_TOKEN,)
    bare = chunk(piece, start, table, sampling, seed=5)
    if not sampling.needs_history:
        return dataclasses.replace(bare, token_from=token_from)
    return dataclasses.replace(bare, history=tuple(tokens), num_prompt_tokens=len(PROMPT), token_from=token_from)


async def one_after_the_other(runner: Runner, sampling: SamplingParams, num_tokens: int) -> list[int]:
    tokens = list(PROMPT)
    start = 0
    for _ in range(num_tokens):
        ((sampled,),) = (await runner.execute(Step(0, (row(sampling, tokens, start, (2, 0)),)))).tokens
        start = len(tokens)
        tokens.append(sampled.token_id)
    return tokens


async def given_together(runner: Runner, steps: Sequence[Step]) -> list[StepResult]:
    return await asyncio.gather(*(runner.execute(step) for step in steps))


@pytest.mark.parametrize("sampling", [PENALISED, PLAIN, PLAIN_WITH_LOGPROBS], ids=["penalised", "plain", "logprobs"])
def test_steps_given_together_run_in_order_and_find_the_tokens_of_the_step_before(
    sampling: SamplingParams, opened: Open
) -> None:
    other = chunk(PROMPT[:7], 0, (3,), samples=False)
    with opened() as runner:
        expected = asyncio.run(one_after_the_other(runner, sampling, 3))
        steps = [
            Step(1, (other, row(sampling, PROMPT, 0, (1, 0)))),
            Step(2, (row(sampling, PROMPT, 20, (1, 0), token_from=1), other)),
            # By now a token of its own is known to the scheduler, which would leave it to the history.
            Step(3, (other, row(sampling, expected[:21], 21, (1, 0), token_from=0))),
        ]
        results = asyncio.run(given_together(runner, steps))
    sampled = [tokens[0].token_id for result in results for tokens in result.tokens if tokens]
    assert sampled == expected[len(PROMPT) :]
    assert len(set(sampled)) > 1, "or any token would do"
