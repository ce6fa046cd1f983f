"""Prefill and decode that store KV in different element types: the answer is that of a reference which converts at the
same point, and nothing that was converted is ever found in a prefix map."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Sequence

import numpy as np
import pytest

from baton.core.config import Config
from baton.core.request import TokenLogprob
from baton.models.convert import ModelFiles, convert
from tests.e2e.pair import Answer, open_pair, pair_config
from tests.engine.test_host_runner import opened
from tests.kernels.kv_bytes import BLOCK_SIZE, Bytes, read, run_bytes, stored
from tests.models.reference import TinyLlama, chunk, write_tiny_llama

NEW_TOKENS = 32
PAIRS = list(itertools.permutations(("fp32", "bf16", "int8"), 2))
"""(prefill, decode)"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    home = tmp_path_factory.mktemp("converted")
    write_tiny_llama(home / "llama", TinyLlama(head_dim=16, hidden_size=96, intermediate_size=160))
    return convert(home / "llama", home / "cache")


def config_of(lender: str, reader: str, *more: str) -> Config:
    return pair_config(
        "engine.backend=host", "engine.quantization=bf16", f"prefill.kv_dtype={lender}", f"decode.kv_dtype={reader}",
        "handoff.convert_kv=true", "prefill.max_chunk_tokens=32", "decode.max_chunk_tokens=16", *more)


def converted(blocks: Bytes, lender: str, reader: str, head_dim: int) -> Bytes:
    """[num_blocks, block bytes] in the reader's type."""
    runs = blocks.reshape(-1, run_bytes(lender, head_dim))
    return stored(read(runs, lender, head_dim), reader).reshape(len(blocks), -1)


def expected(
    files: ModelFiles, prompt: Sequence[int], lender: str, reader: str, num_tokens: int = NEW_TOKENS
) -> list[tuple[int, float]]:
    """Greedy tokens and their log-probs: the prompt by one runner, and from its first token on by the other, with its
    KV as numpy converts it."""
    num_blocks = -(-(len(prompt) + num_tokens) // BLOCK_SIZE)
    table, filled = tuple(range(num_blocks)), -(-len(prompt) // BLOCK_SIZE)
    answer: list[tuple[int, float]] = []

    def take(logits: np.ndarray) -> None:
        row = logits[0].astype(np.float64)
        answer.append((int(row.argmax()), float(row.max() - np.log(np.exp(row - row.max()).sum()) - row.max())))

    with opened(files, num_blocks, quantization="bf16", kv_dtype=lender) as (runner, memory):
        take(runner.logits([chunk(prompt, 0, table)]))
        lent = memory.reshape(num_blocks, -1)[:filled].copy()
    with opened(files, num_blocks, quantization="bf16", kv_dtype=reader) as (runner, memory):
        memory.reshape(num_blocks, -1)[:filled] = converted(lent, lender, reader, files.spec.head_dim)
        for index in range(1, num_tokens):
            take(runner.logits([chunk([answer[-1][0]], len(prompt) + index - 1, table)]))
    return answer


def said(answer: Answer) -> list[tuple[int, float]]:
    logprobs: list[TokenLogprob] = [p for c in answer.chunks for p in c.logprobs]
    return [(token, logprob.logprob) for token, logprob in zip(answer.tokens, logprobs, strict=True)]


@pytest.mark.parametrize(("lender", "reader"), PAIRS)
def test_a_converted_hand_off_goes_on_from_the_converted_kv_and_caches_none_of_it(
    lender: str, reader: str, files: ModelFiles
) -> None:
    rng = random.Random(5)
    prompts = [[rng.randrange(3, 64) for _ in range(n)] for n in (1, 15, 33, 100)]

    async def answers() -> list[list[tuple[int, float]]]:
        found = []
        async with open_pair(files, config_of(lender, reader)) as pair:
            for prompt in prompts:
                answer = await pair.generate(prompt, NEW_TOKENS, logprobs=0, ignore_eos=True)
                assert answer.cached_tokens == 0
                assert not pair.decode.parts.pool.snapshot().hashes, "converted KV would be taken for computed KV"
                found.append(said(answer))
            metrics = pair.decode.parts.metrics
            assert metrics.value("baton_fallbacks_total") == 0
            came = metrics.value("baton_converted_bytes_total", lender=lender, reader=reader)
            assert came == metrics.value("baton_verified_bytes_total") > 0
        return found

    for prompt, answer in zip(prompts, asyncio.run(answers()), strict=True):
        reference = expected(files, prompt, lender, reader)
        assert [token for token, _ in answer] == [token for token, _ in reference], f"{len(prompt)} prompt tokens"
        np.testing.assert_allclose([p for _, p in answer], [p for _, p in reference], atol=2e-6)
