"""Disaggregated = aggregated = transformers, token for token: the promise of the whole house, on the real model.

Greedy, fp32. `transformers` runs live here; nothing is compared with a recording.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from baton.core.config import Config
from baton.models.catalog import ModelFiles
from tests.e2e.pair import forget_cache, open_pair, pair_config

pytestmark = [pytest.mark.model, pytest.mark.slow]

ONE_PASS = (10, 15, 16, 17, 31, 32, 33, 48, 64, 100, 127, 128, 200, 256, 300, 400, 512, 700, 1000, 1500)
MATRIX = (10, 16, 33, 130, 257, 600)
NEW_TOKENS = 16


def english(tokenizer: Tokenizer, num_tokens: int, skip: int = 0) -> list[int]:
    """A prompt of real prose with exactly so many tokens: our own design paper, from another place each time."""
    text = (Path(__file__).parents[2] / "docs" / "design.md").read_text()
    ids: list[int] = tokenizer.encode(text).ids
    return ids[skip : skip + num_tokens]


def prompts(files: ModelFiles, lengths: tuple[int, ...]) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(files.directory / "tokenizer.json"))
    return [english(tokenizer, n, skip=7 * i) for i, n in enumerate(lengths)]


def transformers_greedy(hf_model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    with torch.inference_mode():
        ids = hf_model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=num_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
    return [int(t) for t in ids[0, len(prompt) :]]


def test_disaggregated_aggregated_and_transformers_give_the_same_tokens(model_files: ModelFiles, hf_model: Any) -> None:
    cases = prompts(model_files, ONE_PASS)

    async def both() -> list[tuple[list[int], list[int]]]:
        answers = []
        async with open_pair(model_files, pair_config("engine.num_blocks=512")) as pair:
            for prompt in cases:
                apart = await pair.generate(prompt, NEW_TOKENS, ignore_eos=True)
                # The decode worker holds this prompt now: forget it, so that it is really computed here.
                forget_cache(pair.decode)
                together = await pair.generate(prompt, NEW_TOKENS, local=True, ignore_eos=True)
                assert together.cached_tokens == 0
                forget_cache(pair.decode)
                answers.append((apart.tokens, together.tokens))
            assert pair.decode.parts.metrics.value("baton_fallbacks_total") == 0
        return answers

    for prompt, (apart, together) in zip(cases, asyncio.run(both()), strict=True):
        reference = transformers_greedy(hf_model, prompt, NEW_TOKENS)
        assert apart == reference, f"disaggregated differs at {len(prompt)} prompt tokens"
        assert together == reference, f"aggregated differs at {len(prompt)} prompt tokens"


@pytest.fixture(scope="module")
def matrix_reference(model_files: ModelFiles, hf_model: Any) -> list[tuple[list[int], list[int]]]:
    return [(p, transformers_greedy(hf_model, p, NEW_TOKENS)) for p in prompts(model_files, MATRIX)]


@pytest.mark.parametrize("chunk_tokens", [16, 128, 2048])
@pytest.mark.parametrize("transport", ["tcp", "shm", "nixl"])
def test_tokens_are_the_same_over_every_transport_and_chunk_size(
    transport: str, chunk_tokens: int, model_files: ModelFiles, matrix_reference: list[tuple[list[int], list[int]]]
) -> None:
    config = pair_config(
        f'handoff.transports=["{transport}"]',
        f"prefill.max_chunk_tokens={chunk_tokens}",
        f"prefill.max_step_tokens={chunk_tokens}",
    )

    async def run() -> list[list[int]]:
        async with open_pair(model_files, config) as pair:
            answers = [await pair.generate(prompt, NEW_TOKENS, ignore_eos=True) for prompt, _ in matrix_reference]
            metrics = pair.decode.parts.metrics
            assert metrics.value("baton_fallbacks_total") == 0
            assert metrics.value("baton_pulled_bytes_total", transport=transport) > 0
        return [a.tokens for a in answers]

    assert asyncio.run(run()) == [reference for _, reference in matrix_reference]


def test_preempted_sequences_give_the_same_tokens(
    model_files: ModelFiles, matrix_reference: list[tuple[list[int], list[int]]]
) -> None:
    """Six requests at once on a decode pool that cannot hold them all to their end."""
    config = pair_config("engine.num_blocks=46", "decode.max_chunk_tokens=64")
    short = [(p[:200], n) for p, n in matrix_reference]

    async def run(config: Config, together: bool) -> tuple[list[list[int]], float]:
        async with open_pair(model_files, config) as pair:
            calls = [pair.generate(p, 48, local=True, ignore_eos=True) for p, _ in short]
            answers = await asyncio.gather(*calls) if together else [await call for call in calls]
            return [a.tokens for a in answers], pair.decode.parts.metrics.value("baton_preemptions_total")

    undisturbed, none = asyncio.run(run(pair_config("engine.num_blocks=512"), together=False))
    preempted, some = asyncio.run(run(config, together=True))
    assert none == 0
    assert some > 0
    assert preempted == undisturbed


def test_a_prefix_hit_moves_only_the_missing_blocks(model_files: ModelFiles, hf_model: Any) -> None:
    (prompt,) = prompts(model_files, (500,))
    first, second = prompt[:320], prompt
    layout = model_files.spec.layout(16, "fp32")

    async def run() -> tuple[list[int], list[float], int]:
        async with open_pair(model_files, pair_config()) as pair:
            moved = []
            for p in (first, second):
                before = pair.decode.parts.metrics.value("baton_pulled_bytes_total", transport="tcp")
                answer = await pair.generate(p, NEW_TOKENS, ignore_eos=True)
                moved.append(pair.decode.parts.metrics.value("baton_pulled_bytes_total", transport="tcp") - before)
            return answer.tokens, moved, answer.cached_tokens

    tokens, moved, cached = asyncio.run(run())
    assert tokens == transformers_greedy(hf_model, second, NEW_TOKENS)
    assert moved == [20 * layout.block_bytes, (layout.num_blocks_for(500) - 20) * layout.block_bytes]
    assert cached == 320


def test_kv_moves_while_prefill_computes(model_files: ModelFiles) -> None:
    """2,048 tokens in 8 chunks: at least 70 % of the bytes are verified before the last chunk's compute ends."""
    (prompt,) = prompts(model_files, (2048,))
    config = pair_config("prefill.max_chunk_tokens=256", "prefill.max_step_tokens=256")

    async def run() -> tuple[float, float]:
        async with open_pair(model_files, config) as pair:
            await pair.generate(prompt, 2, ignore_eos=True)
            metrics = pair.decode.parts.metrics
            return metrics.value("baton_verified_before_last_chunk_bytes_total"), metrics.value(
                "baton_verified_bytes_total"
            )

    early, verified = asyncio.run(run())
    assert verified == 128 * model_files.spec.layout(16, "fp32").block_bytes
    assert early / verified >= 0.7
