"""The runner on host kernels: against torch's in every format and instruction set, and bit for bit against itself in
whatever chunks, batches and threads."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from baton.core.config import EngineConfig
from baton.core.errors import SetupError
from baton.core.layout import KVLayout
from baton.core.request import SampledToken, SamplingParams
from baton.core.step import Step, StepResult
from baton.engine.backend import NUMERICS_VERSION, Backend, choose_backend
from baton.engine.host_runner import HostRunner, rope_frequencies
from baton.engine.sampler import Logits
from baton.kernels.host import library
from baton.kernels.reference import rope_tables
from baton.models.convert import ModelFiles, convert
from baton.models.packed import quantise_int4
from baton.models.weights import Array, map_arrays, weights_of, write_weights
from tests.kernels.formats import int8_weights
from tests.models.reference import BLOCK_SIZE, TinyLlama, chunk, every_logit, executed, open_runner, write_tiny_llama
from tests.models.reference import shuffled_tables as tables_of

TOKENS = [(i * i * 7 + 3 * i + 1) % 64 for i in range(100)]
Bytes = NDArray[np.uint8]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """No size is a multiple of 64, all that int4 needs are of 32."""
    home = tmp_path_factory.mktemp("tiny")
    write_tiny_llama(home / "llama", TinyLlama(head_dim=16, hidden_size=96, intermediate_size=160))
    return convert(home / "llama", home / "cache")


def new_runner(
    files: ModelFiles, num_blocks: int, *, threads: int = 1, rubbish: int = 0xFF, **engine: Any
) -> tuple[HostRunner, Bytes]:
    """And its memory, which begins as rubbish that would be seen: not a number in every float format."""
    chosen = EngineConfig.model_validate({"backend": "host", "quantization": "fp32", **engine})
    backend = choose_backend(chosen, files.spec.head_dim)
    layout = files.spec.layout(BLOCK_SIZE, backend.kv_dtype)
    memory = library.aligned(num_blocks * layout.block_bytes)
    memory[:] = rubbish
    return HostRunner(files, memory.data, layout, threads, backend), memory


@contextlib.contextmanager
def opened(files: ModelFiles, num_blocks: int, **how: Any) -> Iterator[tuple[HostRunner, Bytes]]:
    """new_runner, closed in the end."""
    runner, memory = new_runner(files, num_blocks, **how)
    try:
        yield runner, memory
    finally:
        asyncio.run(runner.close())


def logits_of_all(runner: HostRunner, tokens: Sequence[int], blocks: tuple[int, ...]) -> Logits:
    """[num_tokens, vocab_size]: each token is a chunk of its own, all in one step, so that all rows are sampled."""
    return runner.logits([chunk([t], i, blocks) for i, t in enumerate(tokens)])


# ---- against torch ---------------------------------------------------------------------------------------------------

ERRORS = {  # (weights, KV) -> root mean square error of a logit, as a share of their spread: 1.5 times the measured
    ("fp32", "fp32"): 3e-6,
    ("fp32", "bf16"): 0.025,
    ("fp32", "int8"): 0.05,
    ("bf16", "bf16"): 0.03,
    ("int8", "bf16"): 0.10,
    ("int8", "int8"): 0.11,
    ("int4", "bf16"): 0.092,
}


@pytest.fixture(scope="module")
def expected(files: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Logits]:
    """What plain torch makes of TOKENS, in fp32, with weights that went through a format: [num_tokens, vocab_size]."""

    @functools.cache
    def logits(weights: str) -> Logits:
        directory = tmp_path_factory.mktemp(weights) / "model"
        shutil.copytree(files.directory, directory)
        arrays = map_arrays(files.directory / "weights.safetensors")
        parts = {
            name: rows
            for whole, weight in weights_of(files.spec).items()
            for name, rows in zip(
                [name for name, _ in weight.parts],
                np.split(arrays[whole], np.cumsum([shape[0] for _, shape in weight.parts])[:-1]), strict=True)
        }
        write_weights(directory / "weights.safetensors", files.spec, lambda part: rounded(part, parts[part], weights))
        with open_runner(directory, 20) as runner:
            found: Logits = every_logit(runner, TOKENS, tables_of([len(TOKENS)], 20)[0]).numpy()
        assert np.abs(found).max() > 1, "logits near zero would agree with anything"
        return found

    return logits


def rounded(part: str, rows: Array, weights: str) -> Array:
    """What a format keeps of a part."""
    if rows.ndim == 1 or part == "embed" or weights == "fp32":
        return rows
    if weights == "bf16":
        return torch.from_numpy(rows.copy()).bfloat16().float().numpy()
    if weights == "int8" or part == "lm_head":
        return int8_weights(rows)
    four = quantise_int4(rows)
    values = four.nibbles.reshape(*four.scale.shape, 32) * four.scale[..., None] - four.minimum[..., None]
    return values.reshape(rows.shape)


@pytest.mark.parametrize("isa", library.ISAS)
@pytest.mark.parametrize(("weights", "kv"), ERRORS)
def test_logits_are_near_those_of_torch_with_the_same_weights(
    weights: str, kv: str, isa: str, files: ModelFiles, expected: Callable[[str], Logits]
) -> None:
    if isa not in library.isas():
        pytest.skip(f"this CPU has no {isa}")
    theirs = expected(weights)
    with opened(files, 20, quantization=weights, kv_dtype=kv, isa=isa) as (runner, _):
        ours = logits_of_all(runner, TOKENS, tables_of([len(TOKENS)], 20)[0])
    error = np.sqrt(np.mean((ours - theirs) ** 2)) / theirs.std()
    assert error < ERRORS[weights, kv]


@pytest.mark.parametrize("isa", library.ISAS)
@pytest.mark.parametrize("tiny", [TinyLlama(tied=True, head_dim=16), TinyLlama(num_kv_heads=4, head_dim=32)])
def test_other_shapes_are_near_torch_too(tiny: TinyLlama, isa: str, tmp_path: Path) -> None:
    if isa not in library.isas():
        pytest.skip(f"this CPU has no {isa}")
    write_tiny_llama(tmp_path / "llama", tiny)
    files = convert(tmp_path / "llama", tmp_path / "cache")
    blocks = tables_of([len(TOKENS)], 20)[0]
    with open_runner(files.directory, 20) as theirs, opened(files, 20, isa=isa) as (ours, _):
        np.testing.assert_allclose(
            logits_of_all(ours, TOKENS, blocks), every_logit(theirs, TOKENS, blocks).numpy(), atol=3e-5)


def test_angles_are_those_of_the_reference() -> None:
    for head_dim, theta in ((64, 1e5), (128, 5e5), (16, 5000.0)):
        angles = np.float32(8191) * rope_frequencies(head_dim, theta)
        cos, _ = rope_tables(torch.tensor([8191]), head_dim, theta)
        np.testing.assert_allclose(np.cos(angles), cos[0, 0].numpy(), atol=1e-6)


# ---- bit for bit -----------------------------------------------------------------------------------------------------


def random_batches(
    runner: HostRunner, sequences: Sequence[Sequence[int]], tables: Sequence[tuple[int, ...]], rng: random.Random
) -> Iterator[list[tuple[int, int, Logits]]]:
    """Compute the sequences in random chunks and random company; of each batch, (sequence, position, logits) of the
    last row of each chunk that is sampled."""
    done = [0] * len(sequences)
    while left := [s for s, tokens in enumerate(sequences) if done[s] < len(tokens)]:
        chosen = rng.sample(left, rng.randint(1, len(left)))
        chunks = []
        for s in chosen:
            size = 1 if rng.random() < 0.5 else rng.randint(1, len(sequences[s]) - done[s])
            chunks.append(chunk(sequences[s][done[s] : done[s] + size], done[s], tables[s], samples=rng.random() < 0.8))
            done[s] += size
        sampled = [s for s, c in zip(chosen, chunks, strict=True) if c.choices]
        yield [(s, done[s] - 1, row) for s, row in zip(sampled, runner.logits(chunks), strict=True)]


def check_mixes(files: ModelFiles, vocabulary: int, lengths: Sequence[int], num_batches: int, **engine: Any) -> None:
    """Each row's logits in so many random batches for each of three teams are, bit for bit, those it gets when each
    token of its sequence is a batch of its own."""
    rng = random.Random(11)
    sequences = [[rng.randrange(vocabulary) for _ in range(n)] for n in lengths]
    num_blocks = sum(-(-n // BLOCK_SIZE) for n in lengths)

    def new_tables() -> list[tuple[int, ...]]:
        free = rng.sample(range(num_blocks), num_blocks)
        return [tuple(free.pop() for _ in range(-(-n // BLOCK_SIZE))) for n in lengths]

    with opened(files, num_blocks, **engine) as (runner, _):
        alone = [
            np.concatenate([runner.logits([chunk([t], i, table)]) for i, t in enumerate(tokens)])
            for tokens, table in zip(sequences, new_tables(), strict=True)
        ]
    for threads in (1, 2, 3):
        with opened(files, num_blocks, threads=threads, **engine) as (runner, memory):
            left = num_batches
            while left > 0:
                memory[:] = 0xFF
                for batch in random_batches(runner, sequences, new_tables(), rng):
                    left -= 1
                    for sequence, position, logits in batch:
                        np.testing.assert_array_equal(logits, alone[sequence][position])


@pytest.mark.parametrize("isa", library.ISAS)
@pytest.mark.parametrize(("weights", "kv"), [("fp32", "fp32"), ("bf16", "bf16"), ("int8", "int8"), ("int4", "bf16")])
def test_a_row_gets_the_same_bits_in_any_batch(weights: str, kv: str, isa: str, files: ModelFiles) -> None:
    if isa not in library.isas():
        pytest.skip(f"this CPU has no {isa}")
    check_mixes(files, 64, (1, 15, 17, 40, 70), 40, quantization=weights, kv_dtype=kv, isa=isa)


@pytest.mark.parametrize("threads", [1, 3, 4, 5])
@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_more_rows_than_a_product_takes_at_once_get_the_same_bits(
    weights: str, threads: int, files: ModelFiles
) -> None:
    """1,100 rows in one step are three chunks of rows in a product (kChunkRows in csrc/program.h is 512), or three
    shares of three threads (csrc/step.h), of 384 rows but for the last."""
    rng = random.Random(5)
    tokens = [rng.randrange(64) for _ in range(1100)]
    blocks = tables_of([len(tokens)], 200)[0]
    with opened(files, 200, quantization=weights, threads=threads) as (runner, _):
        whole = runner.logits([chunk(tokens, 0, blocks)]).copy()
        for first in range(0, len(tokens), 100):
            parts = runner.logits([chunk(tokens[first : first + 100], first, blocks)])
        np.testing.assert_array_equal(whole, parts)


@pytest.mark.model
@pytest.mark.parametrize(("weights", "kv"), [("bf16", "bf16"), ("bf16", "int8"), ("int8", "bf16"), ("int8", "int8")])
def test_the_real_model_gives_the_same_bits_in_any_batch(weights: str, kv: str, model_files: ModelFiles) -> None:
    """240 batches."""
    check_mixes(model_files, 49152, (3, 33, 50, 130), 80, quantization=weights, kv_dtype=kv)


@pytest.mark.model
def test_the_real_model_says_in_fp32_what_it_says_in_torch(model_files: ModelFiles) -> None:
    """Greedy, 64 steps, two prompts decoded together."""
    from tests.models.reference import generate

    prompts = [[1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47], [504, 2365, 33]]
    tables = tables_of([100, 100], 16)
    with open_runner(model_files.directory, 16) as torch_runner, opened(model_files, 16) as (runner, _):
        assert generate(runner, prompts, 64, tables) == generate(torch_runner, prompts, 64, tables)


# ---- as a runner -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", ["fp32", "bf16", "int8"])
def test_the_bytes_of_a_tail_block_depend_on_its_tokens_alone(kv: str, files: ModelFiles) -> None:
    """Slots after the last token are zero, whatever the block held; a second chunk does not clear the first."""
    images = []
    for rubbish in (0, 0x42):
        with opened(files, 2, rubbish=rubbish, kv_dtype=kv) as (runner, memory):
            runner.logits([chunk(TOKENS[:18], 0, (1, 0), samples=False)])
            runner.logits([chunk(TOKENS[18:20], 18, (1, 0), samples=False)])
            images.append(memory.tobytes())
    assert images[0] == images[1]
    layout = files.spec.layout(BLOCK_SIZE, kv)
    assert np.all(filled_slots(images[0], layout) == [True] * 4 + [False] * 12)


def filled_slots(image: bytes, layout: KVLayout) -> NDArray[np.bool_]:
    """[layer, kv_head, K|V, token] of block 0: whether anything is there."""
    runs = np.frombuffer(image, np.uint8)[: layout.block_bytes].reshape(*layout.block_shape[:3], -1)
    values = runs.shape[-1] - (4 * layout.block_size if layout.dtype == "int8" else 0)
    filled = np.any(runs[..., :values].reshape(*layout.block_shape[:4], -1), axis=-1)
    if layout.dtype == "int8":
        scales = runs[..., values:].reshape(*layout.block_shape[:4], 4).any(axis=-1)
        assert (scales == filled).all(), "a scale without values, or values without one"
    return np.asarray(filled, np.bool_)


def test_tokens_come_only_for_chunks_that_sample_and_in_order(files: ModelFiles) -> None:
    cases = [*zip((10, 11, 12), tables_of([10, 11, 12], 8), strict=True)]
    with opened(files, 8) as (runner, _):
        wanted = [int(logits_of_all(runner, TOKENS[:n], t)[-1].argmax()) for n, t in cases]
        step = Step(1, tuple(chunk(TOKENS[:n], 0, t, samples=n != 11) for n, t in cases))
        result = executed(runner, step)
    assert result.tokens == ((SampledToken(wanted[0]),), (), (SampledToken(wanted[2]),))


def test_sampling_gives_what_it_gives_of_torchs_logits(files: ModelFiles) -> None:
    sampling = SamplingParams(temperature=4.0, top_p=0.95)
    steps = [Step(0, (chunk(TOKENS[:30], 0, (0, 1), sampling, seed),)) for seed in range(20)]
    with opened(files, 2) as (ours, _), open_runner(files.directory, 2) as theirs:
        mine = [executed(ours, step).tokens[0][0].token_id for step in steps]
        assert mine == [executed(theirs, step).tokens[0][0].token_id for step in steps]
    assert len(set(mine)) > 3, "seeds must matter"


@pytest.mark.parametrize("samples", [True, False])
def test_the_event_loop_hears_of_layers_in_order_and_before_the_result(samples: bool, files: ModelFiles) -> None:
    async def run(runner: HostRunner) -> list[tuple[int, bool]]:
        heard: list[tuple[int, bool]] = []
        loop = asyncio.get_running_loop()
        step = Step(0, (chunk(TOKENS[:5], 0, (2,), samples=samples), chunk(TOKENS[:9], 0, (1,), samples=False)))
        await runner.execute(step, lambda n: heard.append((n, asyncio.get_running_loop() is loop)))
        return heard

    with opened(files, 4) as (runner, _):
        assert asyncio.run(run(runner)) == [(1, True), (2, True)]


@pytest.mark.parametrize("isa", library.ISAS)
@pytest.mark.parametrize("k_or_v", [0, 1])
@pytest.mark.parametrize("kv", ["fp32", "bf16", "int8"])
def test_a_sequence_whose_kv_is_no_number_fails_alone(kv: str, k_or_v: int, isa: str, files: ModelFiles) -> None:
    if isa not in library.isas():
        pytest.skip(f"this CPU has no {isa}")

    async def run(runner: HostRunner, memory: Bytes) -> tuple[StepResult, StepResult]:
        await runner.execute(Step(0, tuple(chunk(TOKENS[:9], 0, (b,), samples=False) for b in range(2))))
        step = Step(1, (chunk(TOKENS[9:10], 9, (0,)), chunk(TOKENS[9:10], 9, (1,)), chunk(TOKENS[:3], 0, (2,))))
        sound = await runner.execute(step)
        layout = files.spec.layout(BLOCK_SIZE, kv)
        dim, (token, size) = files.spec.head_dim, {"fp32": (4, 4), "bf16": (4, 2), "int8": (BLOCK_SIZE, 1)}[kv]
        first = layout.block_bytes + k_or_v * layout.run_bytes + token * dim * size
        memory[first : first + 4] = 0xFF  # where they are int8 the first token's scale, else values of the fifth
        return sound, await runner.execute(step)

    with opened(files, 4, kv_dtype=kv, isa=isa) as (runner, memory):
        sound, spoiled = asyncio.run(run(runner, memory))
    assert not sound.failed
    assert [*spoiled.failed] == [1]
    assert spoiled.tokens == (sound.tokens[0], (), sound.tokens[2])


@pytest.mark.parametrize("isa", library.ISAS)
@pytest.mark.parametrize(("weights", "kv"), [("fp32", "fp32"), ("bf16", "bf16"), ("int8", "int8"), ("int4", "bf16")])
def test_a_token_that_the_vocabulary_lacks_fails_its_sequence_alone(
    weights: str, kv: str, isa: str, files: ModelFiles
) -> None:
    if isa not in library.isas():
        pytest.skip(f"this CPU has no {isa}")
    sound = [chunk(TOKENS[:9], 0, (0,)), chunk(TOKENS[:20], 0, (1, 2))]
    strange = [chunk([1, token, 2], 0, (3 + i,)) for i, token in enumerate((64, -1, 2_000_000_000))]
    step = Step(0, (strange[0], sound[0], strange[1], sound[1], strange[2]))
    with opened(files, 6, threads=2, quantization=weights, kv_dtype=kv, isa=isa) as (runner, _):
        wanted = runner.logits(sound)
        found = runner.logits(step.chunks)
        result = executed(runner, step)
    np.testing.assert_array_equal(found[[1, 3]], wanted)
    assert np.isnan(found[[0, 2, 4]]).all()
    assert [*result.failed] == [0, 2, 4]
    assert all("not finite" in str(error) for error in result.failed.values())


def test_a_caller_who_leaves_does_not_stop_the_step_that_the_next_one_stands_on(files: ModelFiles) -> None:
    async def left(runner: HostRunner) -> StepResult:
        gone = asyncio.ensure_future(runner.execute(Step(0, (chunk(TOKENS[:30], 0, (0, 1), samples=False),))))
        gone.cancel()
        return await runner.execute(Step(1, (chunk(TOKENS[30:32], 30, (0, 1)),)))

    with opened(files, 2) as (runner, _):
        wanted = executed(runner, Step(0, (chunk(TOKENS[:32], 0, (0, 1)),)))
    with opened(files, 2) as (runner, _):
        assert asyncio.run(left(runner)) == wanted


def steps_in_a_row() -> list[Step]:
    """The first one's token is chosen in Python; the others are put when the one before has a result."""
    sampling = SamplingParams(temperature=0.0, presence_penalty=1.0)
    first = dataclasses.replace(chunk([1, 2, 3], 0, (0,), sampling), history=(1, 2, 3), num_prompt_tokens=3)
    return [Step(0, (first,)), *(
        Step(n, (dataclasses.replace(first, token_ids=(-1,), start=2 + n, token_from=0),)) for n in (1, 2))]


@pytest.mark.parametrize("leave", [False, True])
def test_who_closes_at_any_moment_waits_for_every_step_also_for_one_that_waits_for_a_token(
    leave: bool, files: ModelFiles
) -> None:
    async def run(turns: int) -> list[StepResult]:
        runner, _ = new_runner(files, 1, threads=2)
        given = [asyncio.ensure_future(runner.execute(step)) for step in steps_in_a_row()]
        for _ in range(turns):
            await asyncio.sleep(0)
        if leave:
            for one in given:
                one.cancel()
        await runner.close()
        assert not runner._works, "closed with a step under way"
        return [one.result() for one in given if not one.cancelled()]

    results = [asyncio.run(run(turns)) for turns in range(0, 200, 4)]
    assert leave or all(result == results[0] for result in results)


def test_who_closes_in_another_loop_waits_for_what_the_line_has_alone(files: ModelFiles) -> None:
    """Nobody can go on with the others."""
    async def left(runner: HostRunner) -> None:
        for step in steps_in_a_row():
            runner.execute(step)

    for _ in range(10):
        with opened(files, 2) as (runner, _):
            asyncio.run(left(runner))


def test_one_row_gives_every_choice_its_own_token(files: ModelFiles) -> None:
    sampling = SamplingParams(temperature=5.0)
    leader = dataclasses.replace(chunk(TOKENS[:20], 0, (0, 1), sampling, seed=4), choices=(0, 1, 2, 3))
    with opened(files, 2) as (runner, _):
        (tokens,) = executed(runner, Step(0, (leader,))).tokens
    assert len({t.token_id for t in tokens}) > 1


# ---- the choice ------------------------------------------------------------------------------------------------------


def test_what_computes_is_said_in_full_so_that_only_equals_are_paired() -> None:
    chosen = choose_backend(EngineConfig(quantization="int8", isa="scalar"), 64)
    assert chosen == Backend("host", "int8", "bf16", "scalar")
    assert chosen.numerics == f"host{NUMERICS_VERSION}-int8-scalar"
    assert choose_backend(EngineConfig(backend="torch"), 64).numerics == "torch-fp32"
    unasked = choose_backend(EngineConfig(isa="scalar"), 64)
    assert unasked == Backend("host", "bf16", "bf16", "scalar")


def test_auto_computes_with_torch_what_the_host_kernels_cannot_and_says_why() -> None:
    chosen = choose_backend(EngineConfig(), 8)
    assert (chosen.name, chosen.kv_dtype) == ("torch", "fp32")
    assert "multiples of 16" in chosen.fallback
    with pytest.raises(SetupError, match="multiples of 16"):
        choose_backend(EngineConfig(backend="host"), 8)
    with pytest.raises(SetupError, match="multiples of 16"):
        choose_backend(EngineConfig(quantization="int8"), 8)


def test_auto_takes_torch_where_the_host_kernels_have_plain_c_alone_and_nobody_asked_for_what_torch_lacks() -> None:
    there = ("scalar",)
    chosen = choose_backend(EngineConfig(), 64, there)
    assert (chosen.name, chosen.kv_dtype) == ("torch", "fp32")
    assert "plain C" in chosen.fallback
    for asked in (EngineConfig(backend="host"), EngineConfig(isa="scalar"), EngineConfig(quantization="int8")):
        assert choose_backend(asked, 64, there).name == "host"


def test_torch_is_not_asked_for_formats_that_it_does_not_compute() -> None:
    with pytest.raises(SetupError, match=r"fp32 alone, not with bf16 weights and bf16 KV"):
        choose_backend(EngineConfig(backend="torch", quantization="bf16"), 64)
