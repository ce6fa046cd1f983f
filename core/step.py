"""One engine step as plain data: the scheduler writes it, a runner executes it, the scheduler commits it.

step   = core.schedule(now)            # pure: no await, clock, socket or torch
result = await runner.execute(step)    # torch in one thread; the cost model in the simulator
core.commit(step, result, now)         # pure
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from baton.core.request import FinishReason, SamplingParams


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """Rows [start, start + len(token_ids)) of one sequence. KV of these tokens is written through `block_table`;
    attention reads positions [0, start + len(token_ids))."""

    request_id: str
    token_ids: tuple[int, ...]
    start: int
    block_table: tuple[int, ...]
    """Covers at least start + len(token_ids) tokens."""
    samples: bool
    """The last row is the sequence's last known token: sample the next one."""
    sampling: SamplingParams
    seed: int
    """Key of the counter-based sampler (Request.seed). The counter's position is start + len(token_ids): the
    position of the token to be sampled."""

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Step:
    step_id: int
    chunks: tuple[ScheduledChunk, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(c.token_ids) for c in self.chunks)


@dataclass(frozen=True, slots=True)
class StepResult:
    """Sampled tokens, aligned with Step.chunks; None where `samples` was False."""

    token_ids: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Progress:
    """What a committed step did to one sequence."""

    request_id: str
    epoch: int
    start: int
    num_computed_tokens: int
    new_token: int | None
    """Its output index is num_output_tokens - 1."""
    num_output_tokens: int
    finish: FinishReason | None


class Runner(Protocol):
    """Executes steps, strictly one after the other. `execute` never raises for a bad request: that was refused
    earlier; an exception here is a bug and ends the worker."""

    async def execute(self, step: Step) -> StepResult: ...

    async def close(self) -> None: ...
