"""One engine step as plain data: the scheduler writes it, a runner executes it, the scheduler commits it.

step   = core.schedule(now)            # pure: no await, clock, socket or torch
result = await runner.execute(step)    # in the compute thread; the cost model in the simulator
core.commit(step, result, now)         # pure

The next step may be scheduled, and handed to the runner, before the result of this one is known: a chunk of it whose
token is being sampled says by which chunk (`token_from`), and the runner fills it in (`Step.filled`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from baton.core.errors import BatonError
from baton.core.request import FinishReason, SampledToken, SamplingParams

UNKNOWN_TOKEN = -1
"""In the place of a token that the step before is still sampling."""


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
    token_from: int | None = None
    """Index of the chunk in the step before that samples this chunk's only token. `token_ids` is (UNKNOWN_TOKEN,) then,
    and `history` ends before it."""

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)

    def filled(self, before: StepResult | None) -> ScheduledChunk:
        """With its token from the result of the step before. If there is none, because that row failed, with any token:
        the sequence has ended, and nobody looks at this row."""
        if self.token_from is None:
            return self
        assert before is not None, f"{self.request_id} waits for a token, and there was no step before"
        sampled = before.tokens[self.token_from]
        token = sampled[0].token_id if sampled else 0
        history = (*self.history, token) if self.history else ()
        return ScheduledChunk(  # as dataclasses.replace does, three times faster: the engine waits for it
            self.request_id, (token,), self.start, self.block_table, self.choices, self.sampling, self.seed, history,
            self.num_prompt_tokens,
        )


@dataclass(frozen=True, slots=True)
class Step:
    step_id: int
    chunks: tuple[ScheduledChunk, ...]

    def filled(self, before: StepResult | None) -> Step:
        """All tokens known; `before` is the result of the step before."""
        return Step(self.step_id, tuple(c.filled(before) for c in self.chunks))

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
    """Executes steps, strictly one after the other. A step never fails for a bad request: that was refused earlier; an
    exception is a bug and ends the worker."""

    def execute(self, step: Step, on_layers: Callable[[int], None] | None = None) -> Awaitable[StepResult]:
        """Take the step; it begins the moment the one taken before it is done, whether or not anybody has looked at
        that result. `on_layers(n)`, on the event loop and n rising: the step's KV in layers [0, n) is in the blocks."""
        ...

    async def close(self) -> None: ...
