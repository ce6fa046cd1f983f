"""Every format of weights and KV, end to end: disaggregated = aggregated = moved = preempted, token for token and
log-prob for log-prob; and what a worker says of what it computes with."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Any

import pytest

from baton.core.config import Config
from baton.core.layout import difference
from baton.core.request import TokenLogprob
from baton.core.worker import Role
from baton.engine.backend import NUMERICS_VERSION
from baton.models.convert import ModelFiles, convert
from tests.e2e.pair import open_pair, pair_config, running_node, said, said_every_way
from tests.models.reference import TinyLlama, write_tiny_llama

FORMATS = [("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "int8"), ("int8", "bf16"), ("int8", "int8"), ("int4", "bf16")]
"""(weights, KV)"""
NEW_TOKENS = 48
MOVED_AT = 11


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    home = tmp_path_factory.mktemp("formats")
    write_tiny_llama(home / "llama", TinyLlama(head_dim=16, hidden_size=96, intermediate_size=160))
    return convert(home / "llama", home / "cache")


def config_of(weights: str, kv: str, *more: str) -> Config:
    chosen = ["engine.backend=host", f"engine.quantization={weights}", f"engine.kv_dtype={kv}"]
    return pair_config(*chosen, "prefill.max_chunk_tokens=32", "decode.max_chunk_tokens=16", *more)


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "kv"), FORMATS)
def test_apart_together_moved_and_preempted_give_the_same_tokens_and_log_probs(
    weights: str, kv: str, files: ModelFiles
) -> None:
    rng = random.Random(5)
    prompts = [[rng.randrange(3, 64) for _ in range(n)] for n in (1, 15, 33, 70, 100)]
    sampling: dict[str, Any] = {"logprobs": 2, "temperature": 0.8, "seed": 9, "ignore_eos": True}

    async def one_by_one() -> list[list[tuple[int, TokenLogprob]]]:
        config = config_of(weights, kv, "engine.threads=2")
        async with open_pair(files, config, other=config_of(weights, kv)) as pair:
            return await said_every_way(pair, prompts, NEW_TOKENS, MOVED_AT, **sampling)

    async def at_once() -> list[list[tuple[int, TokenLogprob]]]:
        async with open_pair(files, config_of(weights, kv, "engine.num_blocks=16")) as pair:
            calls = [pair.generate(prompt, NEW_TOKENS, local=True, **sampling) for prompt in prompts]
            answers = await asyncio.gather(*calls)
            assert pair.decode.parts.metrics.value("baton_preemptions_total") > 0
        return [said(answer, NEW_TOKENS) for answer in answers]

    alone = asyncio.run(one_by_one())
    assert asyncio.run(at_once()) == alone


def test_workers_of_different_formats_are_no_peers_and_the_difference_has_a_name(files: ModelFiles) -> None:
    async def capabilities() -> list[str | None]:
        found = []
        for config in (config_of("bf16", "bf16"), config_of("int8", "bf16"), config_of("bf16", "int8")):
            async with running_node(files, config, Role.DECODE, lambda info: pytest.fail("nobody is called")) as node:
                found.append(node.info.capability)
        return [difference(found[0], other) for other in found]

    same, weights, kv = asyncio.run(capabilities())
    assert same is None
    assert weights is not None
    assert weights.startswith(f"numerics: host{NUMERICS_VERSION}-bf16-")
    assert kv == "layout.dtype: bf16 vs int8 (handoff.convert_kv lets them pair)"


def test_a_model_that_the_host_kernels_do_not_take_runs_on_torch_and_the_fallback_is_counted_and_logged(
    tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    home = tmp_path_factory.mktemp("odd")
    write_tiny_llama(home / "llama", TinyLlama())
    odd = convert(home / "llama", home / "cache")

    async def run() -> tuple[str, float, list[int]]:
        async with open_pair(odd, pair_config()) as pair:
            answer = await pair.generate([5, 6, 7], 3, ignore_eos=True)
            counted = pair.decode.parts.metrics.value("baton_fallbacks_total", kind="torch_runner")
            return pair.decode.info.capability.numerics, counted, answer.tokens

    with caplog.at_level(logging.WARNING):
        numerics, counted, tokens = asyncio.run(run())
    assert (numerics, counted, len(tokens)) == ("torch-fp32", 1, 3)
    assert len([r for r in caplog.records if "plain torch computes" in r.message]) == 2, "one line per worker"
