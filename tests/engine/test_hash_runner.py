"""The hash model's runner: its tokens are the pure function of the request if, and only if, the KV in the blocks is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from baton.core.request import Choice, Request, SampledToken, SamplingParams
from baton.core.step import ScheduledChunk, Step
from baton.engine.hash_runner import HashRunner, StepCosts
from baton.kv_transfer.memory import KVMemory
from baton.models.hash_model import Answer, expected, layout
from baton.sim.loop import SimLoop, run

BLOCK = 2
SAMPLING = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=2, frequency_penalty=0.5)
REQUEST = Request("r", (5, 6, 7, 8, 9), SAMPLING, (Choice(0), Choice(2)))
TABLE = (3, 9, 1, 4, 0, 7)
FREE = StepCosts(0.0, 0.0, 0.0)
Damage = Callable[[memoryview], None]


def chunk(tokens: list[int], start: int, end: int, choices: tuple[int, ...]) -> ScheduledChunk:
    history = tuple(tokens[:end]) if choices else ()
    return ScheduledChunk(
        "r", tuple(tokens[start:end]), start, TABLE, choices, REQUEST.sampling, REQUEST.seed, history,
        len(REQUEST.prompt) if choices else 0,
    )


def filled_memory(head_dim: int) -> memoryview:
    memory = KVMemory(10, layout(BLOCK, head_dim).block_bytes, shared=False)
    memory.buffer[:] = b"\xa5" * len(memory.buffer)
    return memory.buffer


def generate(
    chunk_tokens: int = 5, choice: int = 0, head_dim: int = 1, damage: Damage = lambda _: None
) -> list[SampledToken]:
    """The output through blocks, the prompt in chunks; `damage` is done to the blocks after the first token."""

    async def main() -> list[SampledToken]:
        memory = filled_memory(head_dim)
        runner = HashRunner(memory, layout(BLOCK, head_dim), FREE)
        tokens, computed, output = list(REQUEST.prompt), 0, list[SampledToken]()
        while len(output) < REQUEST.sampling.max_tokens:
            end = min(computed + chunk_tokens, len(tokens))
            one = chunk(tokens, computed, end, (choice,) if end == len(tokens) else ())
            (sampled,) = (await runner.execute(Step(1, (one,)))).tokens
            computed = end
            for token in sampled:
                if not output:
                    damage(memory)
                tokens.append(token.token_id)
                output.append(token)
        return output

    return asyncio.run(main())


def right(choice: int = 0, head_dim: int = 1) -> Answer:
    return {a.index: a for a in expected(REQUEST, 100, head_dim)}[choice]


@pytest.mark.parametrize("head_dim", [1, 3])
@pytest.mark.parametrize("chunk_tokens", [1, 2, 3, 5])
def test_tokens_do_not_depend_on_chunks_or_on_what_was_in_the_blocks(chunk_tokens: int, head_dim: int) -> None:
    for choice in (0, 2):
        assert tuple(generate(chunk_tokens, choice, head_dim)) == right(choice, head_dim).tokens


@pytest.mark.parametrize("head_dim", [1, 3])
def test_each_single_byte_of_key_or_value_in_either_layer_changes_the_tokens(head_dim: int) -> None:
    correct, size = right(0, head_dim).tokens, layout(BLOCK, head_dim).block_bytes
    filled = 2 * size  # the prompt's two full blocks
    for byte in range(filled):
        block, offset = divmod(byte, size)

        def flip(memory: memoryview, at: int = TABLE[block] * size + offset) -> None:
            memory[at] ^= 1

        wrong = generate(head_dim=head_dim, damage=flip)
        assert wrong[0] == correct[0], "the damage came after it"
        assert tuple(wrong) != correct, f"byte {offset} of block {block} is not read"


def test_blocks_that_changed_places_change_the_tokens() -> None:
    size = layout(BLOCK).block_bytes

    def swap(memory: memoryview) -> None:
        a, b = (slice(block * size, (block + 1) * size) for block in TABLE[:2])
        memory[a], memory[b] = bytes(memory[b]), bytes(memory[a])

    assert tuple(generate(damage=swap)) != right().tokens


def test_an_unfilled_tail_is_zeroed_whatever_was_there() -> None:
    async def main() -> bytes:
        memory, shape = filled_memory(1), layout(BLOCK)
        await HashRunner(memory, shape, FREE).execute(Step(1, (chunk([5, 6, 7], 0, 3, ()),)))
        tail = memory[TABLE[1] * shape.block_bytes :][: shape.block_bytes]
        return b"".join(bytes(tail[at + 8 : at + 16]) for at in range(0, shape.block_bytes, 16))

    assert asyncio.run(main()) == bytes(32)


def test_layers_are_done_one_after_the_other_and_each_takes_its_share_of_the_time() -> None:
    size = layout(BLOCK).block_bytes
    told: list[tuple[int, float, bool]] = []

    async def main(loop: SimLoop) -> float:
        memory = filled_memory(1)
        runner = HashRunner(memory, layout(BLOCK), StepCosts(1.0, 0.1, 0.01))
        runner.slowness = 2.0

        def on_layers(done: int) -> None:
            upper = bytes(memory[TABLE[0] * size + size // 2 :][: size // 2])
            told.append((done, loop.time(), any(upper)))

        await runner.execute(Step(1, (chunk([5, 6, 7], 0, 3, ()),)), on_layers)
        return loop.time()

    total = 2 * (1.0 + 0.3 + 0.03)
    assert run(1, main) == pytest.approx(total)
    assert told == [(1, pytest.approx(total / 2), False), (2, pytest.approx(total), True)]


def test_one_chunk_samples_for_several_choices() -> None:
    async def main() -> tuple[SampledToken, ...]:
        runner = HashRunner(filled_memory(1), layout(BLOCK), FREE)
        (tokens,) = (await runner.execute(Step(1, (chunk(list(REQUEST.prompt), 0, 5, (0, 2)),)))).tokens
        return tokens

    assert asyncio.run(main()) == tuple(a.tokens[0] for a in expected(REQUEST, 100))
