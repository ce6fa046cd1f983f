"""The simulated runner: its tokens are the pure function of the request if, and only if, the KV in the blocks is."""

from __future__ import annotations

import dataclasses

import pytest

from baton.core.request import Request, SamplingParams
from baton.core.step import ScheduledChunk, Step
from baton.kv_transfer.memory import KVMemory
from baton.sim.hash_model import EOS, expected
from baton.sim.loop import SimLoop, run
from baton.sim.runner import Costs, SimRunner, layout

BLOCK = 2
REQUEST = Request("r", (5, 6, 7, 8, 9), SamplingParams(max_tokens=6, ignore_eos=True))
TABLE = (3, 9, 1, 4, 0, 7)


def chunk(tokens: tuple[int, ...], start: int, samples: bool) -> ScheduledChunk:
    return ScheduledChunk("r", tokens, start, TABLE, samples, REQUEST.sampling, REQUEST.seed)


def generate(chunk_tokens: int, damage: tuple[int, int] | None = None) -> list[int]:
    """The output through blocks, the prompt in chunks; `damage` = (block, byte) is flipped after the prompt."""

    async def main(loop: SimLoop) -> list[int]:
        memory = KVMemory(10, layout(BLOCK).block_bytes, shared=False)
        memory.buffer[:] = b"\xa5" * len(memory.buffer)
        runner, tokens, computed = SimRunner(memory, BLOCK, Costs()), list(REQUEST.prompt), 0
        while len(tokens) < len(REQUEST.prompt) + REQUEST.sampling.max_tokens:
            end = min(computed + chunk_tokens, len(tokens))
            one = chunk(tuple(tokens[computed:end]), computed, end == len(tokens))
            (token,) = (await runner.execute(Step(1, (one,)))).token_ids
            computed = end
            if token is not None:
                tokens.append(token)
                if damage is not None and len(tokens) == len(REQUEST.prompt) + 1:
                    memory.block(damage[0])[damage[1]] ^= 1
        return tokens[len(REQUEST.prompt) :]

    return run(1, main)


@pytest.mark.parametrize("chunk_tokens", [1, 2, 3, 5])
def test_tokens_do_not_depend_on_chunks_or_on_what_was_in_the_blocks(chunk_tokens: int) -> None:
    assert tuple(generate(chunk_tokens)) == expected(REQUEST, 100)[0]


@pytest.mark.parametrize("block", TABLE[:2])
@pytest.mark.parametrize("byte", [0, 4, 8, 17, 31])
def test_one_wrong_byte_of_key_or_value_changes_the_tokens(block: int, byte: int) -> None:
    right = generate(5)
    wrong = generate(5, (block, byte))
    assert wrong[0] == right[0], "the damage came after it"
    assert wrong != right


def test_an_expected_answer_ends_as_a_worker_would_end_it() -> None:
    request = dataclasses.replace(REQUEST, sampling=SamplingParams(max_tokens=500))
    tokens, finish = expected(request, 1000)
    assert (finish, tokens.index(EOS)) == ("stop", len(tokens) - 1)
    assert expected(request, len(REQUEST.prompt) + 3) == (tokens[:3], "length")
    stop = dataclasses.replace(REQUEST, sampling=SamplingParams(max_tokens=500, stop_token_ids=(tokens[1],)))
    assert expected(stop, 1000)[1] == "stop"


def test_a_step_takes_the_time_its_tokens_and_context_cost() -> None:
    async def main(loop: SimLoop) -> float:
        runner = SimRunner(KVMemory(10, layout(BLOCK).block_bytes, shared=False), BLOCK, Costs(1.0, 0.1, 0.01))
        runner.slowness = 2.0
        await runner.execute(Step(1, (chunk((5, 6, 7), 0, False),)))
        return loop.time()

    assert run(1, main) == pytest.approx(2 * (1.0 + 0.3 + 0.03))
