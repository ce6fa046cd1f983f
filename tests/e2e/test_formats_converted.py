"""Prefill and decode that store KV in different element types: the answer is that of a reference which converts at the
same point, and nothing that was converted is ever found in a prefix map."""

from __future__ import annotations

import asyncio
import itertools
import random
import re
from collections.abc import Sequence
from pathlib import Path

import httpx
import numpy as np
import pytest

from baton.core.config import Config
from baton.core.request import Choice, TokenLogprob
from baton.core.sequence import fork_sequence, new_sequence
from baton.models.convert import ModelFiles, convert
from tests.cli.test_serve import READY, serving
from tests.e2e.pair import Answer, open_pair, pair_config, request_of
from tests.e2e.test_tokens import prompts as english
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


@pytest.mark.parametrize("other", ["int8", "bf16"])
def test_what_was_converted_stays_out_of_the_prefix_map_of_whoever_it_moves_to(other: str, files: ModelFiles) -> None:
    """Between two that store KV alike a move changes no bit, also of an answer that began with converted KV."""
    rng = random.Random(6)
    prompt = [rng.randrange(3, 64) for _ in range(50)]

    async def run() -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
        config = config_of("bf16", "int8")
        async with open_pair(files, config, config_of("bf16", other)) as pair:
            assert pair.other is not None
            moved = await pair.moved(prompt, NEW_TOKENS, pair.other, 9, logprobs=0, ignore_eos=True)
            stayed = await pair.generate(prompt, NEW_TOKENS, logprobs=0, ignore_eos=True)
            for node in (pair.decode, pair.other.decode):
                assert not node.parts.pool.snapshot().hashes
            return said(moved), said(stayed)

    moved, stayed = asyncio.run(run())
    assert moved == stayed if other == "int8" else moved[:9] == stayed[:9]


def test_a_converted_sequence_that_is_preempted_is_computed_anew_and_cached_like_any_other(files: ModelFiles) -> None:
    rng = random.Random(7)
    prompts = [[rng.randrange(3, 64) for _ in range(n)] for n in (33, 70, 100)]

    async def run() -> int:
        config = config_of("bf16", "int8", "engine.num_blocks=16")
        async with open_pair(files, config) as pair:
            metrics = pair.decode.parts.metrics
            for _ in range(30):  # whether all are there at once, and one must go, is chance
                await asyncio.gather(*(pair.generate(p, 50, ignore_eos=True) for p in prompts))
                if metrics.value("baton_preemptions_total"):
                    break
            assert metrics.value("baton_preemptions_total") > 0
            assert pair.decode.parts.metrics.value("baton_converted_bytes_total") > 0
            return len(pair.decode.parts.pool.snapshot().hashes)

    assert asyncio.run(run()) > 0


def test_the_answers_that_fork_from_a_converted_prompt_are_converted_too() -> None:
    leader = new_sequence(request_of([1, 2, 3], 4), 1, BLOCK_SIZE, 4)
    assert not fork_sequence(leader, Choice(0), [], 4).converted
    leader.converted = True
    assert fork_sequence(leader, Choice(0), [], 4).converted


# ---- the real model --------------------------------------------------------------------------------------------------


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize(("lender", "reader"), [("bf16", "int8"), ("int8", "bf16")])
def test_the_real_model_goes_on_from_the_converted_kv(lender: str, reader: str, model_files: ModelFiles) -> None:
    cases = english(model_files, (17, 130, 300))

    async def answers() -> list[list[int]]:
        config = config_of(lender, reader, "prefill.max_chunk_tokens=128", 'handoff.transports=["shm"]')
        async with open_pair(model_files, config) as pair:
            found = [(await pair.generate(prompt, NEW_TOKENS, ignore_eos=True)).tokens for prompt in cases]
            assert pair.decode.parts.metrics.value("baton_fallbacks_total") == 0
            assert pair.decode.parts.metrics.value("baton_converted_bytes_total") > 0
            return found

    for prompt, tokens in zip(cases, asyncio.run(answers()), strict=True):
        assert tokens == [token for token, _ in expected(model_files, prompt, lender, reader)]


@pytest.mark.model
@pytest.mark.slow
def test_a_stack_whose_decode_workers_store_int8_and_prefill_workers_bf16_knows_its_capitals(
    model_dir: Path, tmp_path: Path
) -> None:
    sets = ("engine.quantization=bf16", "decode.kv_dtype=int8", "handoff.convert_kv=true", "engine.num_blocks=128",
            "router.local_prefill_max_tokens=0")
    with serving(tmp_path, "--pool", "local", *(part for one in sets for part in ("--set", one))) as stack:
        found = re.search(r"HTTP +(http://[\d.:]+)/v1", stack.read_until(READY))
        assert found
        body = {"model": "smollm2-135m", "prompt": "The capital of France is", "max_tokens": 6, "temperature": 0}
        reply = httpx.post(f"{found[1]}/v1/completions", json=body, timeout=120)
        assert "Paris" in reply.json()["choices"][0]["text"]
        metrics = httpx.get(f"{found[1]}/metrics", timeout=10).text
        came = re.findall(r'baton_converted_bytes_total{[^}]*lender="bf16",reader="int8"[^}]*} ([\d.e+]+)', metrics)
        assert came
        assert float(came[0]) > 0
