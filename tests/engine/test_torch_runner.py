"""The runner against transformers on random tiny models, and against itself: chunking, paging, batching."""

from __future__ import annotations

import asyncio
import dataclasses
import weakref
from pathlib import Path

import pytest
import torch

from baton.core.request import SampledToken, SamplingParams
from baton.core.step import Step, StepResult
from baton.engine.torch_runner import TorchRunner
from baton.models.convert import convert, open_converted
from tests.models.reference import (
    TinyLlama,
    chunk,
    every_logit,
    executed,
    generate,
    open_runner,
    shuffled_tables,
    transformers_logits,
    write_tiny_llama,
)

TOKENS = [(i * i * 7 + 3 * i + 1) % 64 for i in range(100)]


@pytest.mark.parametrize(
    "tiny",
    [
        TinyLlama(),
        TinyLlama(tied=True, seed=1),
        TinyLlama(num_kv_heads=1, seed=2),
        TinyLlama(num_kv_heads=4, head_dim=None, seed=3),
        TinyLlama(shards=3, seed=4),
    ],
    ids=["grouped", "tied", "one-kv-head", "no-groups-default-head-dim", "shards"],
)
def test_logits_equal_transformers_at_every_position(tiny: TinyLlama, tmp_path: Path) -> None:
    theirs = write_tiny_llama(tmp_path / "llama", tiny)
    assert (tmp_path / "llama/model.safetensors.index.json").exists() == (tiny.shards > 1)
    model_dir = convert(tmp_path / "llama", tmp_path / "cache").directory
    expected = transformers_logits(theirs, TOKENS)
    assert expected.abs().max() > 1, "logits near zero would agree with anything"
    with open_runner(model_dir, 20) as runner:
        ours = every_logit(runner, TOKENS, shuffled_tables([len(TOKENS)], 20)[0])
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 16, 64, 65, 100])
def test_a_prompt_in_chunks_gives_what_it_gives_in_one(tiny_model_dir: Path, chunk_tokens: int) -> None:
    with open_runner(tiny_model_dir, 20) as runner:
        blocks = shuffled_tables([len(TOKENS)], 20)[0]
        expected = every_logit(runner, TOKENS, blocks)[-1]
    with open_runner(tiny_model_dir, 20) as runner:
        for start in range(0, len(TOKENS), chunk_tokens):
            last = start + chunk_tokens >= len(TOKENS)
            logits = runner.logits((chunk(TOKENS[start : start + chunk_tokens], start, blocks, samples=last),))
            assert (logits is None) == (not last)
    assert logits is not None
    torch.testing.assert_close(logits[0], expected, atol=1e-5, rtol=1e-5)


def test_decodes_and_prefills_of_all_lengths_in_one_step_do_not_see_each_other(tiny_model_dir: Path) -> None:
    """Rows that decode over short and long contexts, two chunks of equal length, one that is not sampled."""
    contexts, news = [0, 1, 15, 16, 17, 90, 40, 0], [1, 1, 1, 1, 1, 1, 33, 33]
    lengths = [context + new for context, new in zip(contexts, news, strict=True)]
    prompts = [[(t * (i + 3) + i) % 64 for t in range(length)] for i, length in enumerate(lengths)]
    tables = shuffled_tables(lengths, 40)
    with open_runner(tiny_model_dir, 40) as runner:
        alone = torch.stack([every_logit(runner, p, t)[-1] for p, t in zip(prompts, tables, strict=True)])
    with open_runner(tiny_model_dir, 40) as runner:
        for prompt, context, blocks in zip(prompts, contexts, tables, strict=True):
            if context:
                runner.logits((chunk(prompt[:context], 0, blocks, samples=False),))
        chunks = [chunk(p[c:], c, t) for p, c, t in zip(prompts, contexts, tables, strict=True)]
        chunks[6] = dataclasses.replace(chunks[6], choices=())
        together = runner.logits(tuple(chunks))
    assert together is not None
    torch.testing.assert_close(together, alone[[0, 1, 2, 3, 4, 5, 7]], atol=1e-5, rtol=1e-5)


def test_a_cached_prefix_in_shared_blocks_gives_the_same_tokens(tiny_model_dir: Path) -> None:
    first, second = [*TOKENS[:32], 5, 6], [*TOKENS[:32], 9]
    with open_runner(tiny_model_dir, 8) as runner:
        expected = every_logit(runner, second, (0, 1, 2))[-1]
        runner.logits((chunk(first, 0, (3, 4, 5)),))
        hit = runner.logits((chunk(second[32:], 32, (3, 4, 6)),))
    assert hit is not None
    torch.testing.assert_close(hit[0], expected, atol=1e-5, rtol=1e-5)


def test_the_bytes_of_a_tail_block_depend_on_its_tokens_alone(tiny_model_dir: Path) -> None:
    """Slots after the last token are zero, whatever the block held; a second chunk does not clear the first."""
    layout = open_converted(tiny_model_dir).spec.layout(16)
    images = []
    for rubbish in (0, 0x42):
        memory = bytearray([rubbish]) * (2 * layout.block_bytes)
        runner = TorchRunner(tiny_model_dir, memoryview(memory), 2, layout, threads=1)
        runner.logits((chunk(TOKENS[:18], 0, (1, 0), samples=False),))
        runner.logits((chunk(TOKENS[18:20], 18, (1, 0), samples=False),))
        images.append(bytes(memory))
        tail = torch.frombuffer(memory, dtype=torch.float32).view(2, *layout.block_shape)[0]
        assert tail[..., :4, :].all(), "a slot that was written is zero"
        assert not tail[..., 4:, :].any()
        del tail
        asyncio.run(runner.close())
    assert images[0] == images[1]


def test_tokens_come_only_for_chunks_that_sample_and_in_order(tiny_model_dir: Path) -> None:
    cases = [*zip((10, 11, 12), shuffled_tables([10, 11, 12], 8), strict=True)]
    with open_runner(tiny_model_dir, 8) as runner:
        expected = [int(every_logit(runner, TOKENS[:n], t)[-1].argmax()) for n, t in cases]
        step = Step(1, tuple(chunk(TOKENS[:n], 0, t, samples=n != 11) for n, t in cases))
        result = executed(runner, step)
    assert result.tokens == ((SampledToken(expected[0]),), (), (SampledToken(expected[2]),))


def test_a_sampled_token_does_not_depend_on_the_rest_of_the_batch(tiny_model_dir: Path) -> None:
    sampling = SamplingParams(temperature=1.0, top_p=0.9)
    tables = shuffled_tables([30, 20, 30], 12)
    mine = [chunk(TOKENS[:30], 0, tables[0], sampling, seed) for seed in range(40)]
    other = chunk(TOKENS[40:60], 0, tables[1], sampling, seed=3)
    with open_runner(tiny_model_dir, 12) as runner:

        async def run() -> tuple[list[SampledToken], list[SampledToken]]:
            alone = [(await runner.execute(Step(0, (c,)))).tokens[0][0] for c in mine]
            crowded = [(await runner.execute(Step(0, (other, c, other)))).tokens[1][0] for c in mine]
            return alone, crowded

        alone, crowded = asyncio.run(run())
    assert alone == crowded
    assert len(set(alone)) > 3, "seeds must matter"


@pytest.mark.parametrize("samples", [True, False])
def test_each_layer_is_told_once_its_kv_is_in_the_blocks(tiny_model_dir: Path, samples: bool) -> None:
    """Told in the compute thread first, so that what is in the blocks can be looked at before more is written."""
    layout = open_converted(tiny_model_dir).spec.layout(16)
    memory = bytearray(2 * layout.block_bytes)
    blocks = torch.frombuffer(memory, dtype=torch.float32).view(2, *layout.block_shape)
    runner = TorchRunner(tiny_model_dir, memoryview(memory), 2, layout, threads=1)
    seen: list[tuple[int, list[bool]]] = []
    piece = chunk(TOKENS[:18], 0, (1, 0), samples=samples)

    def look(num_layers: int) -> None:
        seen.append((num_layers, [bool(blocks[1, layer].all()) for layer in range(2)]))

    with torch.inference_mode():
        runner.logits((piece,), look)
    assert seen == [(1, [True, False]), (2, [True, True])]
    asyncio.run(runner.close())


def test_the_event_loop_hears_of_layers_in_order_and_before_the_result(tiny_model_dir: Path) -> None:
    async def run(runner: TorchRunner) -> list[tuple[int, bool]]:
        heard: list[tuple[int, bool]] = []
        loop = asyncio.get_running_loop()
        step = Step(0, (chunk(TOKENS[:5], 0, (2,)), chunk(TOKENS[:9], 0, (1,), samples=False)))
        await runner.execute(step, lambda n: heard.append((n, asyncio.get_running_loop() is loop)))
        return heard

    with open_runner(tiny_model_dir, 4) as runner:
        assert asyncio.run(run(runner)) == [(1, True), (2, True)]


def test_a_sequence_whose_kv_is_no_number_fails_alone(tiny_model_dir: Path) -> None:
    layout = open_converted(tiny_model_dir).spec.layout(16)
    memory = bytearray(4 * layout.block_bytes)
    blocks = torch.frombuffer(memory, dtype=torch.float32).view(4, *layout.block_shape)
    runner = TorchRunner(tiny_model_dir, memoryview(memory), 4, layout, threads=1)

    async def run() -> tuple[StepResult, StepResult]:
        await runner.execute(Step(0, tuple(chunk(TOKENS[:9], 0, (b,), samples=False) for b in range(2))))
        step = Step(1, (chunk(TOKENS[9:10], 9, (0,)), chunk(TOKENS[9:10], 9, (1,)), chunk(TOKENS[:3], 0, (2,))))
        sound = await runner.execute(step)
        blocks[1, 0, 0, 0, 4] = torch.nan
        return sound, await runner.execute(step)

    sound, spoiled = asyncio.run(run())
    assert not sound.failed
    assert [*spoiled.failed] == [1]
    assert spoiled.tokens == (sound.tokens[0], (), sound.tokens[2])
    asyncio.run(runner.close())


def test_one_row_gives_every_choice_its_own_token(tiny_model_dir: Path) -> None:
    sampling = SamplingParams(temperature=5.0, logprobs=1)
    leader = dataclasses.replace(chunk(TOKENS[:20], 0, (0, 1), sampling, seed=4), choices=(0, 1, 2, 3))
    alone = [dataclasses.replace(leader, choices=(c,)) for c in leader.choices]

    async def run(runner: TorchRunner) -> tuple[list[SampledToken], list[SampledToken]]:
        together = (await runner.execute(Step(0, (leader,)))).tokens[0]
        return [*together], [(await runner.execute(Step(0, (c,)))).tokens[0][0] for c in alone]

    with open_runner(tiny_model_dir, 4) as runner:
        together, each = asyncio.run(run(runner))
    assert together == each
    assert len({t.token_id for t in together}) > 1


def test_close_waits_for_the_step_and_lets_go_of_the_memory(tiny_model_dir: Path) -> None:
    layout = open_converted(tiny_model_dir).spec.layout(16)
    view = memoryview(bytearray(8 * layout.block_bytes))
    runner = TorchRunner(tiny_model_dir, view, 8, layout, threads=1)
    held = weakref.ref(view)  # torch keeps the object but no export of it: nothing would stop its owner unmapping it
    del view

    async def run() -> None:
        step = runner.execute(Step(0, (chunk(TOKENS[:100], 0, tuple(range(7))),)))
        await asyncio.sleep(0)
        assert held() is not None
        await runner.close()
        assert len((await step).tokens[0]) == 1

    asyncio.run(run())
    assert held() is None


def test_generation_through_shuffled_tables_equals_transformers(tmp_path: Path) -> None:
    theirs = write_tiny_llama(tmp_path / "llama", TinyLlama(seed=9))
    model_dir = convert(tmp_path / "llama", tmp_path / "cache").directory
    prompts = [TOKENS[i : i + n] for i, n in enumerate((1, 15, 16, 17, 60))]
    with open_runner(model_dir, 40) as runner:
        ours = generate(runner, prompts, 20, shuffled_tables([len(p) + 20 for p in prompts], 40), chunk_tokens=16)
    for prompt, output in zip(prompts, ours, strict=True):
        expected = transformers_logits(theirs, [*prompt, *output])[len(prompt) - 1 : -1].argmax(-1).tolist()
        assert output == expected
