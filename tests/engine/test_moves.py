"""A request that moves: stopped after k tokens and taken up elsewhere with those delivered, it goes on as if nothing
had happened, log-probs included. So do its choices, and so does the same request among others.

Exactly, with the real scheduler and sampler over logits that are a pure function of the tokens in the blocks; and over
the torch runner, whose logits depend a little on how a prompt is cut into chunks.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from baton.core.request import Choice, Request, SampledToken, SamplingParams
from baton.core.sequence import SequenceState, new_sequence
from baton.core.step import Step, StepResult
from baton.engine.block_pool import BlockPool
from baton.engine.sampler import SampledRow, sample
from baton.engine.scheduler import Scheduler
from tests.engine.builders import BLOCK_SIZE, SCOPE, Bench, SlotMemory, limits
from tests.models.reference import BLOCK_SIZE as TORCH_BLOCK_SIZE
from tests.models.reference import open_runner

VOCABULARY = 64
NUM_OUTPUT = 9
PROMPT = (5, 3, 5, 1, 40, 2, 9)

SAMPLINGS = {
    "drawn": SamplingParams(seed=11, logprobs=3),
    "no seed": SamplingParams(top_p=0.9, logprobs=0),
    "penalties": SamplingParams(
        seed=2**63, frequency_penalty=0.9, presence_penalty=0.5, repetition_penalty=1.4, temperature=1.3, logprobs=2
    ),
    "greedy": SamplingParams(temperature=0.0, repetition_penalty=1.2, logit_bias=((7, 1.5), (5, -3.0)), logprobs=5),
}
FILTERED = SamplingParams(seed=3, top_k=20, min_p=0.02, presence_penalty=1.0)


class SampledMemory(SlotMemory):
    """Logits are a pure function of the tokens that are really in the blocks; the sampler is the real one."""

    def execute(self, step: Step) -> StepResult:
        for chunk in step.chunks:
            self.write(chunk.block_table, chunk.start, chunk.token_ids)
        tokens: list[tuple[SampledToken, ...]] = []
        for chunk in step.chunks:
            if not chunk.choices:
                tokens.append(())
                continue
            (outcome,) = sample(_logits(self.read(chunk.block_table, chunk.end)).numpy(), [SampledRow.of(chunk)])
            assert isinstance(outcome, tuple)
            tokens.append(outcome)
        return StepResult(tuple(tokens))


def _logits(tokens: Sequence[int]) -> torch.Tensor:
    key = hashlib.sha256(repr(list(tokens)).encode()).digest()
    rng = np.random.Generator(np.random.Philox(int.from_bytes(key[:8], "little")))
    return torch.from_numpy(rng.normal(0, 2, (1, VOCABULARY)).astype(np.float32))


def bench() -> Bench:
    pool = BlockPool(60, BLOCK_SIZE)
    return Bench(pool, Scheduler(pool, limits(max_chunk_tokens=4), SCOPE), SampledMemory())


def request(sampling: SamplingParams, *choices: Choice) -> Request:
    return Request("r", PROMPT, sampling, choices or (Choice(0),))


def run(where: Bench, *sequences: SequenceState) -> dict[str, list[SampledToken]]:
    """Until all have ended: what each sampled. Leaders are forked."""
    sampled: dict[str, list[SampledToken]] = {s.request_id: [] for s in sequences}
    where.add(*sequences)
    while where.scheduler.has_work:
        for progress in where.commit(where.schedule()):
            sampled[progress.request_id] += progress.new_tokens
            if len(progress.new_tokens) > 1:
                leader = where.held(progress.request_id)
                for child in where.fork(leader, sampled.pop(progress.request_id), NUM_OUTPUT):
                    sampled[child.request_id] = [progress.new_tokens[leader.choices.index(child.choices[0])]]
                    where.add(child)
            elif progress.finish is not None:
                where.scheduler.remove(progress.request_id)
    return sampled


def start(request: Request) -> SequenceState:
    return new_sequence(request, 0, BLOCK_SIZE, NUM_OUTPUT)


def alone(sampling: SamplingParams, choice: int) -> list[SampledToken]:
    return run(bench(), start(request(sampling, Choice(choice))))["r"]


@pytest.mark.parametrize("choice", [0, 3])
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_a_request_that_moves_after_any_token_goes_on_as_if_it_had_stayed(
    sampling: SamplingParams, choice: int
) -> None:
    stayed = alone(sampling, choice)
    assert len(stayed) == NUM_OUTPUT
    assert all(t.logprob is not None for t in stayed)
    for k in range(1, NUM_OUTPUT):
        delivered = tuple(t.token_id for t in stayed[:k])
        moved = run(bench(), start(request(sampling, Choice(choice, delivered))))["r"]
        assert moved == stayed[k:], f"after {k} tokens"


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_each_of_several_choices_is_what_it_is_alone_wherever_it_goes_on(sampling: SamplingParams) -> None:
    together = run(bench(), start(request(sampling, *(Choice(c) for c in range(4)))))
    assert together.keys() == {f"r.{c}" for c in range(4)}
    for c in range(4):
        tokens = together[f"r.{c}"]
        assert tokens == alone(sampling, c)
        delivered = tuple(t.token_id for t in tokens[:3])
        assert run(bench(), start(request(sampling, Choice(c, delivered))))["r"] == tokens[3:]
    if sampling.temperature:
        assert len({tuple(tokens) for tokens in together.values()}) == 4


def test_only_what_was_answered_counts_as_said() -> None:
    """From the definition, so that the border between prompt and output is the request's on all the way."""
    likely = set(PROMPT)

    def answer(border: int) -> list[int]:
        tokens = list(PROMPT)
        for _ in range(NUM_OUTPUT):
            logits = _logits(tokens)[0]
            logits[list(likely)] += 8.0
            for token in set(tokens[border:]):
                logits[token] -= 2.0
            tokens.append(int(logits.argmax()))
        return tokens[len(PROMPT) :]

    bias = tuple((token, 8.0) for token in likely)
    stayed = alone(SamplingParams(temperature=0.0, presence_penalty=2.0, logit_bias=bias), 0)
    assert [t.token_id for t in stayed] == answer(len(PROMPT))
    assert answer(len(PROMPT)) not in (answer(0), answer(len(PROMPT) - 1)), "the border matters"


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_who_else_runs_and_what_is_cached_changes_no_token(sampling: SamplingParams) -> None:
    """Others share its prefix, its seed and its steps, in a pool where somebody has to give way."""
    expected = alone(sampling, 0)
    pool = BlockPool(13, BLOCK_SIZE)
    crowded = Bench(pool, Scheduler(pool, limits(max_step_tokens=5, max_chunk_tokens=3), SCOPE), SampledMemory())
    others = [
        start(dataclasses.replace(request(SAMPLINGS["penalties"]), request_id="before")),
        start(dataclasses.replace(request(FILTERED), request_id="other", prompt=PROMPT[:5])),
    ]
    outputs = run(crowded, *others, start(request(sampling)))
    assert crowded.scheduler.num_preemptions > 0
    assert outputs["r"] == expected


# ---- the torch runner ------------------------------------------------------------------------------------------------


def _serve(model_dir: Path, asked: Request, chunk_tokens: int) -> list[SampledToken]:
    pool = BlockPool(8, TORCH_BLOCK_SIZE)
    scheduler = Scheduler(pool, limits(max_chunk_tokens=chunk_tokens), SCOPE)
    scheduler.add(new_sequence(asked, 0, TORCH_BLOCK_SIZE, NUM_OUTPUT), 0.0)
    sampled: list[SampledToken] = []

    async def run() -> None:
        while (step := scheduler.schedule(0.0)) is not None:
            for progress in scheduler.commit(step, await runner.execute(step), 0.0):
                sampled.extend(progress.new_tokens)

    with open_runner(model_dir, 8) as runner:
        asyncio.run(run())
    return sampled


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_over_the_torch_runner_a_request_that_moves_goes_on_as_if_it_had_stayed(
    tiny_model_dir: Path, sampling: SamplingParams
) -> None:
    prompt = tuple((i * i * 7 + 3 * i + 1) % 64 for i in range(14))
    asked = dataclasses.replace(request(sampling, Choice(2)), prompt=prompt)
    stayed = _serve(tiny_model_dir, asked, 64)
    for k in range(1, NUM_OUTPUT):
        delivered = tuple(t.token_id for t in stayed[:k])
        moved = _serve(tiny_model_dir, dataclasses.replace(asked, choices=(Choice(2, delivered),)), 5)
        assert [t.token_id for t in moved] == [t.token_id for t in stayed[k:]]
        for ours, theirs in zip(moved, stayed[k:], strict=True):
            assert ours.logprob is not None
            assert theirs.logprob is not None
            assert math.isclose(ours.logprob.logprob, theirs.logprob.logprob, abs_tol=1e-4)
            assert [t for t, _ in ours.logprob.top] == [t for t, _ in theirs.logprob.top]
