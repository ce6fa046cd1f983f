"""One engine step as plain data: the scheduler writes it, a runner executes it, the scheduler commits it.

step   = core.schedule(now)            # pure: no await, clock, socket or torch
result = await runner.execute(step)    # torch in one thread; the cost model in the simulator
core.commit(step, result, now)         # pure
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from baton.core.errors import BatonError
from baton.core.request import FinishReason, SampledToken, SamplingParams


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """Rows [start, start + len(token_ids)) of one sequence. KV of these tokens is written through `block_table`;
    attention reads positions [0, start + len(token_ids))."""

    request_id: str
    token_ids: tuple[int, ...]
    start: int
    block_table: tuple[int, ...]
    """Covers at least start + len(token_ids) tokens."""
    choices: tuple[int, ...]
    """Not empty: the last row is the sequence's last known token, and each of these choices samples its next token
    from it. One, except at the end of a prompt with several answers."""
    sampling: SamplingParams
    seed: int
    """Key of the counter-based sampler (Request.seed). The counter is (choice, position, draw); position is
    start + len(token_ids): that of the token to be sampled."""
    history: tuple[int, ...] = ()
    """All tokens up to `end`, if it samples and sampling.needs_history; else empty."""
    num_prompt_tokens: int = 0
    """How many of `history` are the prompt: penalties treat the two differently."""

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
    """Sampled tokens, aligned with Step.chunks, and within each with its `choices`."""

    tokens: tuple[tuple[SampledToken, ...], ...]
    failed: Mapping[int, BatonError] = field(default_factory=dict)
    """Index of a chunk that should have sampled and could not (its logits are no numbers) -> why. It has no tokens;
    the other chunks are sound."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What a committed step did to one sequence."""

    request_id: str
    epoch: int
    start: int
    num_computed_tokens: int
    new_tokens: tuple[SampledToken, ...]
    """One for each choice of the sequence, if it sampled. The token of an only choice has output index
    num_output_tokens - 1; a sequence of several choices ends here, and each goes on as a sequence of its own."""
    num_output_tokens: int
    finish: FinishReason | None
    error: BatonError | None = None
    """Why, if `finish` is ERROR: this one sequence cannot go on."""


class Runner(Protocol):
    """Executes steps, strictly one after the other. `execute` never raises for a bad request: that was refused
    earlier; an exception here is a bug and ends the worker."""

    async def execute(self, step: Step, on_layers: Callable[[int], None] | None = None) -> StepResult:
        """`on_layers(n)`, on the event loop and n rising: the step's KV in layers [0, n) is in the blocks."""
        ...

    async def close(self) -> None: ...
