"""The step loop on the host kernels: real threads, steps that overlap, and the bits that each sequence gets alone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path

from baton.core.metrics import Metrics
from baton.core.request import Choice, Request, SampledToken, SamplingParams
from baton.core.sequence import SequenceState, new_sequence
from baton.core.step import Progress, Runner
from baton.engine.block_pool import BlockPool
from baton.engine.scheduler import Scheduler, SchedulerLimits
from baton.worker.steps import StepLoop
from tests.engine.builders import SCOPE
from tests.engine.test_runners import host_runner
from tests.models.reference import BLOCK_SIZE, TinyLlama, write_tiny_llama

NUM_BLOCKS, MAX_TOKENS = 16, 60
STOP = (0, 32)
"""One token in 32 ends the sequences that ask for it: nobody knows when."""


def asked(index: int) -> SequenceState:
    prompt = tuple((index * 11 + j * (index + 3)) % 64 for j in range(3 + 7 * index))
    penalty, stop = (1.0, 1.5)[index % 2], STOP if index % 3 else ()
    sampling = SamplingParams(
        seed=index, temperature=1.5, ignore_eos=True, repetition_penalty=penalty, stop_token_ids=stop, logprobs=1
    )
    return new_sequence(Request(f"r{index}", prompt, sampling, (Choice(0),)), 0, BLOCK_SIZE, MAX_TOKENS)


async def outputs(runner: Runner, sequences: Sequence[SequenceState]) -> dict[str, list[SampledToken]]:
    pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE)
    heard: dict[str, list[SampledToken]] = {seq.request_id: [] for seq in sequences}
    left, over = set(heard), asyncio.Event()
    # Small chunks, so that prompts are computed beside decodes; few blocks, so that some are preempted.
    steps = StepLoop(Scheduler(pool, SchedulerLimits(24, 16, 8, 8), SCOPE), runner, Metrics(), pool.check)

    def listen(progress: Progress, started: float) -> None:
        heard[progress.request_id] += progress.new_tokens
        if progress.finish is not None:
            assert progress.error is None
            left.remove(progress.request_id)
            steps.remove(progress.request_id)
            if not left:
                over.set()

    turning = asyncio.create_task(steps.run())
    for seq in sequences:
        steps.add(seq, listen)
    async with asyncio.timeout(60):
        await over.wait()
        while list(steps.scheduler.sequences()):  # their last rows may be void, and under way
            await asyncio.sleep(0.01)
    assert pool.ledger().active == 0
    assert len(sequences) == 1 or steps.scheduler.num_preemptions, "blocks were to be few"
    turning.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await turning
    return heard


def test_overlapping_steps_give_each_sequence_the_bits_it_gets_alone(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "llama", TinyLlama(head_dim=16))
    alone: dict[str, list[SampledToken]] = {}
    for index in range(8):
        with host_runner(tmp_path, NUM_BLOCKS) as runner:
            alone |= asyncio.run(outputs(runner, [asked(index)]))
    with host_runner(tmp_path, NUM_BLOCKS) as runner:
        together = asyncio.run(outputs(runner, [asked(index) for index in range(8)]))
    assert together == alone
    lengths = {len(tokens) for tokens in alone.values()}
    assert max(lengths) == MAX_TOKENS
    assert min(lengths) < MAX_TOKENS, "somebody must end unforeseen"
