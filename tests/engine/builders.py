"""A small world for the scheduler: a memory of slots, and a runner whose next token is a hash of the tokens that are
really written there. Stale, missing or foreign KV changes the output, or is seen at once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from baton.core.block_hash import HashScope
from baton.core.request import Choice, Request, SampledToken, SamplingParams
from baton.core.sequence import SequenceState, fork_sequence, new_sequence
from baton.core.step import Progress, Step, StepResult
from baton.engine.block_pool import BlockPool
from baton.engine.scheduler import Scheduler, SchedulerLimits

BLOCK_SIZE = 2
VOCABULARY = 2
SCOPE = HashScope("tiny", "u64", "slots")
SEED_0 = SamplingParams(seed=0)


def next_token(tokens: Sequence[int], seed: int = 0, choice: int = 0, border: int | None = None) -> int:
    """`border`: where the prompt ends, if penalties are on."""
    return hashlib.sha256(repr((list(tokens), seed, choice, border)).encode()).digest()[0] % VOCABULARY


def undisturbed(
    prompt: Sequence[int], num_output_tokens: int, seed: int = 0, choice: int = 0, penalised: bool = False
) -> list[int]:
    """Prompt and output of a run with nobody else around."""
    tokens = list(prompt)
    for _ in range(num_output_tokens):
        tokens.append(next_token(tokens, seed, choice, len(prompt) if penalised else None))
    return tokens


def limits(
    max_step_tokens: int = 64, max_chunk_tokens: int = 64, max_sequences: int = 64, max_waiting: int = 64,
    eos_token_ids: tuple[int, ...] = (),
) -> SchedulerLimits:
    return SchedulerLimits(max_step_tokens, max_chunk_tokens, max_sequences, max_waiting, eos_token_ids)


def sequence(
    request_id: str, prompt: Sequence[int], max_output_tokens: int = 1, *, tenant: str = "",
    sampling: SamplingParams = SEED_0, delivered: Sequence[int] = (), choices: Sequence[int] = (0,),
) -> SequenceState:
    """`delivered` is of an only choice."""
    asked = tuple(Choice(index, tuple(delivered)) for index in choices)
    request = Request(request_id, tuple(prompt), sampling, asked, tenant)
    return new_sequence(request, 0, BLOCK_SIZE, max_output_tokens)


@dataclass
class SlotMemory:
    """The bytes of the pool's blocks: one token per slot."""

    slots: dict[tuple[int, int], int] = field(default_factory=dict)
    before: StepResult | None = None
    """Of the step before."""

    def write(self, table: Sequence[int], start: int, tokens: Sequence[int]) -> None:
        for position, token in enumerate(tokens, start):
            self.slots[table[position // BLOCK_SIZE], position % BLOCK_SIZE] = token

    def read(self, table: Sequence[int], end: int) -> list[int]:
        return [self.slots[table[p // BLOCK_SIZE], p % BLOCK_SIZE] for p in range(end)]

    def execute(self, step: Step) -> StepResult:
        sampled: list[tuple[SampledToken, ...]] = []
        step = step.filled(self.before)
        for chunk in step.chunks:
            self.write(chunk.block_table, chunk.start, chunk.token_ids)
        for chunk in step.chunks:
            read = self.read(chunk.block_table, chunk.end)
            border = None
            if chunk.choices and chunk.sampling.needs_history:
                assert list(chunk.history) == read, "penalties would look at other tokens"
                border = chunk.num_prompt_tokens
            else:
                assert (chunk.history, chunk.num_prompt_tokens) == ((), 0), "nobody asked for these"
            sampled.append(tuple(SampledToken(next_token(read, chunk.seed, c, border)) for c in chunk.choices))
        self.before = StepResult(tuple(sampled))
        return self.before


@dataclass
class Bench:
    """Pool, scheduler and memory, stepped by hand."""

    pool: BlockPool
    scheduler: Scheduler
    memory: SlotMemory = field(default_factory=SlotMemory)

    @classmethod
    def of(cls, num_blocks: int, budgets: SchedulerLimits | None = None) -> Bench:
        pool = BlockPool(num_blocks, BLOCK_SIZE)
        return cls(pool, Scheduler(pool, budgets or limits(), SCOPE))

    def held(self, request_id: str) -> SequenceState:
        seq = self.scheduler.get(request_id)
        assert seq is not None
        return seq

    def add(self, *sequences: SequenceState) -> None:
        for seq in sequences:
            self.scheduler.add(seq, 0.0)

    def schedule(self) -> Step:
        step = self.scheduler.schedule(0.0)
        assert step is not None
        self.pool.check()
        return step

    def commit(self, step: Step) -> tuple[Progress, ...]:
        progress = self.scheduler.commit(step, self.memory.execute(step), 0.0)
        self.pool.check()
        return progress

    def step(self) -> dict[str, tuple[int, int]]:
        """Schedule, execute, commit: the span of each sequence that took part."""
        step = self.schedule()
        self.commit(step)
        return {c.request_id: (c.start, c.end) for c in step.chunks}

    def run(self) -> dict[str, list[int]]:
        """Until all have finished, each removed at its end: the tokens of each."""
        tokens = {}
        for _ in range(1000):
            if not self.scheduler.has_work:
                return tokens
            for progress in self.commit(self.schedule()):
                if progress.finish is not None:
                    tokens[progress.request_id] = self.held(progress.request_id).tokens
                    self.scheduler.remove(progress.request_id)
        raise AssertionError("1000 steps were not enough")

    def fork(self, leader: SequenceState, tokens: Sequence[SampledToken], max_output: int) -> list[SequenceState]:
        """What a worker does with a leader that has ended: each choice goes on from its blocks, the tail copied."""
        children = []
        full, part = divmod(leader.num_computed_tokens, BLOCK_SIZE)
        for index, token in zip(leader.choices, tokens, strict=True):
            blocks = leader.block_table.blocks[:full]
            self.pool.acquire(blocks)
            if part:
                tail = self.pool.allocate(1)
                assert tail is not None, "no block for the tail"
                self.memory.write(tail, 0, self.memory.read(leader.block_table.blocks[full:], part))
                blocks += tail
            children.append(fork_sequence(leader, Choice(index, (token.token_id,)), blocks, max_output))
        self.scheduler.remove(leader.request_id)
        return children

    def received(self, seq: SequenceState, num_computed_tokens: int) -> SequenceState:
        """The sequence as a hand-off leaves it: blocks for all its tokens, the KV of some of them in."""
        blocks = self.pool.allocate(-(-seq.num_tokens // BLOCK_SIZE))
        assert blocks is not None
        self.memory.write(blocks, 0, seq.tokens[:num_computed_tokens])
        seq.block_table.blocks.extend(blocks)
        seq.num_computed_tokens = num_computed_tokens
        return seq
