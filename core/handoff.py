"""The baton itself: what a prefill worker lends and the state that changes hands. The protocol, with states,
deadlines and owners, is docs/protocol.md.

Life of a lease: granted (Accepted) -> blocks published chunk by chunk -> renewed by the reader's heartbeats ->
released by the reader, or expired. The lender holds the blocks until then; nobody ever writes into another
worker's memory.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from baton.core.errors import Incompatible
from baton.core.layout import HANDOFF_VERSION
from baton.core.request import FinishReason, Request, SampledToken, SamplingParams, TokenLogprob
from baton.core.worker import Span, WorkerInfo


class LendMode(enum.StrEnum):
    """Whose blocks a call asks for."""

    COMPUTE = "compute"
    """Prefill -> decode: compute this prompt, lend me its KV as it is done."""
    CACHED = "cached"
    """Any holder: lend me what your cache has of these tokens; compute nothing."""
    TAKE_OVER = "take_over"
    """Planned move: stop the request that runs on you, lend me all of it, and forget it when I release the lease."""


@dataclass(frozen=True, slots=True)
class LentBlock:
    """One block of a sequence in the lender's pool, full or (the last one) filled up to `num_tokens`."""

    index: int
    """Position in the sequence's block table."""
    block_id: int
    generation: int
    """Counts the block's owners in the lender's pool. If it moved, the block is somebody else's now."""
    digest: bytes
    """xxh3_128 of the published layers' bytes of this block, unfilled tail included (a fresh tail is zeroed, so it is
    defined)."""
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part of a lease. Which tokens it covers is known from the first version; one rank covers all."""

    rank: int
    worker_id: str
    boot_id: str
    token_start: int
    token_end: int


@dataclass(frozen=True, slots=True)
class Lease:
    """A lender's promise to hold blocks still. Renew well before `ttl_s` has passed since the last renewal."""

    lease_id: str
    request_id: str
    epoch: int
    ttl_s: float
    shards: tuple[Shard, ...]


@dataclass(frozen=True, slots=True)
class RunningAttempt:
    """What a take-over is aimed at: how the lender knows the request that runs on it."""

    router_id: str
    epoch: int
    choice: int


@dataclass(frozen=True, slots=True)
class PrefillCall:
    """Reader -> lender: lend me the KV of this request."""

    request: Request
    """TAKE_OVER: with the one choice that is taken."""
    epoch: int
    """The reader's attempt."""
    reader: str
    """worker_id of the reader; its pulls name it."""
    held_blocks: int
    """Leading full blocks that the reader already holds: they are neither published nor moved."""
    lease_ttl_s: float
    mode: LendMode = LendMode.COMPUTE
    running: RunningAttempt | None = None
    """Set with TAKE_OVER."""
    holder: WorkerInfo | None = None
    """With COMPUTE: who has more of the prompt's KV than the lender, which pulls it from there first."""
    router_id: str = ""
    """Whose attempt it is: that router is told when the lender's load shows it."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """First event of a Prefill stream: the lease is granted, and empty."""

    lease: Lease


@dataclass(frozen=True, slots=True)
class Layers:
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Published:
    """These blocks are complete, or `layers` of them are, and may be pulled now."""

    lease_id: str
    rank: int
    blocks: tuple[LentBlock, ...]
    span: Span
    """The chunk that completed them, in the lender's seconds since the call arrived."""
    last: bool
    """All is published."""
    layers: Layers | None = None
    """None: all layers. The last chunk of a prompt is published as its layers are done: a block is complete when the
    ranges published for it cover all layers; they never overlap."""


@dataclass(frozen=True, slots=True)
class FirstToken:
    """Sampled at prefill, one for each choice. Sent before the last blocks have moved: the client need not wait for
    them."""

    choice: int
    index: int
    token: SampledToken


@dataclass(frozen=True, slots=True)
class Alive:
    """Nothing new, but the lender's step loop still turns (`steps` so far)."""

    steps: int


@dataclass(frozen=True, slots=True)
class ChoiceState:
    """Where one answer stands."""

    index: int
    output: tuple[int, ...]
    """All its output tokens so far: delivered ones plus what the lender sampled."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of the last so many output tokens, if asked for: at least of those that may not be delivered yet."""
    next_draw: int = 0
    """The sampler's counter stands at (index, num_prompt_tokens + len(output), next_draw)."""
    finish: FinishReason | None = None
    """STOP if its last token ended it; whether the length is used up, the reader knows."""
    grammar: bytes = b""
    """State of a structured output's matcher, as its own room encodes it; empty: none."""
    draft: bytes = b""
    """State of a drafter, as its own room encodes it; empty: none."""


@dataclass(frozen=True, slots=True)
class HandoffState:
    """The whole state of a request between two workers. Last event of a Prefill stream.

    Penalties need no counts of their own: they follow from the output and from `num_prompt_tokens`, the border.
    """

    version: int
    request_id: str
    epoch: int
    tenant: str
    sampling: SamplingParams
    """With the seed that was used, never None."""
    num_prompt_tokens: int
    choices: tuple[ChoiceState, ...]
    num_computed_tokens: int
    """Tokens whose KV is in the lease."""
    cached_tokens: int
    """Usage: prompt tokens found in the lender's own prefix cache."""
    deadline_s: float
    """What is left of it, as the lender counts."""
    spans: tuple[Span, ...] = ()
    converted: bool = False
    """SequenceState.converted, which a planned move carries along."""

    def check(self) -> None:
        """Raise Incompatible for a version this build does not know."""
        if self.version != HANDOFF_VERSION:
            raise Incompatible(
                f"the hand-off state of request {self.request_id} has version {self.version}, this worker knows "
                f"{HANDOFF_VERSION}. Run the same Baton version on both pools, or roll the older one forward first."
            )


PrefillEvent = Accepted | Published | FirstToken | Alive | HandoffState


@dataclass(frozen=True, slots=True)
class ReleaseAnswer:
    """`good`: the lease was never expired and no lent block changed its generation. If False, the puller throws
    away what it pulled under this lease and recomputes."""

    good: bool
    reason: str = ""
