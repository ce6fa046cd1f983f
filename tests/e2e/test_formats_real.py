"""The promise of equal bits on the real model: however a request is computed, its tokens and log-probs are the same."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from baton.core.config import Config
from baton.models.convert import ModelFiles
from tests.e2e.pair import open_pair, pair_config, said, said_every_way
from tests.e2e.test_tokens import prompts

pytestmark = pytest.mark.model

LENGTHS = (14, 47, 130)
NEW_TOKENS = 36
MOVED_AT = 5
TOO_FEW_BLOCKS = 7
"""The first two prompts fit, and then their answers do not: one of the two is preempted."""
SAMPLING: dict[str, Any] = {"logprobs": 1, "temperature": 0.8, "seed": 9, "ignore_eos": True}


@pytest.mark.parametrize("weights", ["bf16", "int8"])
@pytest.mark.parametrize("kv", ["bf16", "int8"])
def test_apart_together_chunked_moved_and_preempted_on_one_to_three_threads(
    weights: str, kv: str, model_files: ModelFiles
) -> None:
    """Prefill in chunks of 48 and decode's own in chunks of 16, over tcp; the move goes from two threads to three."""
    cases = prompts(model_files, LENGTHS)

    def config(threads: int, num_blocks: int = 24) -> Config:
        return pair_config(
            "engine.backend=host", f"engine.quantization={weights}", f"engine.kv_dtype={kv}",
            f"engine.num_blocks={num_blocks}", f"engine.threads={threads}", "prefill.max_chunk_tokens=48",
            "decode.max_chunk_tokens=16")

    async def run() -> None:
        async with open_pair(model_files, config(2), other=config(3)) as pair:
            alone = await said_every_way(pair, cases, NEW_TOKENS, MOVED_AT, **SAMPLING)
        async with open_pair(model_files, config(1, TOO_FEW_BLOCKS)) as pair:
            calls = (pair.generate(p, NEW_TOKENS, local=True, **SAMPLING) for p in cases[:2])
            answers = await asyncio.gather(*calls)
            assert pair.decode.parts.metrics.value("baton_preemptions_total") > 0
        assert [said(answer, NEW_TOKENS) for answer in answers] == alone[:2]

    asyncio.run(run())
