"""The baton itself: what a prefill worker lends and the state that changes hands. The protocol, with states,
deadlines and owners, is docs/protocol.md.

Life of a lease: granted (Accepted) -> blocks published chunk by chunk -> renewed by the reader's heartbeats ->
released by the reader, or expired. The lender holds the blocks until then; nobody ever writes into another
worker's memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.core.errors import Incompatible
from baton.core.request import FinishReason, Request
from baton.core.worker import Span

HANDOFF_VERSION = 1


@dataclass(frozen=True, slots=True)
class LentBlock:
    """One block of a sequence in the lender's pool, full or (the last one) filled up to `num_tokens`."""

    index: int
    """Position in the sequence's block table."""
    block_id: int
    generation: int
    """Counts the block's owners in the lender's pool. If it moved, the block is somebody else's now."""
    digest: bytes
    """xxh3_128 of the whole block's bytes, unfilled tail included (a fresh tail is zeroed, so it is defined)."""
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
class PrefillCall:
    """Decode -> prefill: compute this prompt, lend me its KV."""

    request: Request
    epoch: int
    reader: str
    """worker_id of the decode worker; its pulls name it."""
    held_blocks: int
    """Leading full blocks that the reader already holds: they are neither published nor moved."""
    lease_ttl_s: float


@dataclass(frozen=True, slots=True)
class Accepted:
    """First event of a Prefill stream: the lease is granted, and empty."""

    lease: Lease


@dataclass(frozen=True, slots=True)
class Published:
    """These blocks are complete and may be pulled now."""

    lease_id: str
    rank: int
    blocks: tuple[LentBlock, ...]
    span: Span
    """The chunk that completed them, in the lender's seconds since the call arrived."""
    last: bool
    """The whole prompt is published."""


@dataclass(frozen=True, slots=True)
class FirstToken:
    """Sampled at prefill. Sent before the last blocks have moved: the client need not wait for them."""

    index: int
    token_id: int


@dataclass(frozen=True, slots=True)
class Alive:
    """Nothing new, but the lender's step loop still turns (`steps` so far)."""

    steps: int


@dataclass(frozen=True, slots=True)
class HandoffState:
    """The whole state of a request between two workers. Last event of a Prefill stream.

    The sampler needs no more than this: its counter is (choice, position, draw), so position says it all.
    """

    version: int
    request_id: str
    epoch: int
    num_prompt_tokens: int
    output: tuple[int, ...]
    """All output tokens so far: Request.delivered plus what the lender sampled."""
    num_computed_tokens: int
    """Tokens whose KV is in the lease."""
    finish: FinishReason | None
    """STOP if the lender sampled a stop token; whether the length is used up, the reader knows."""
    cached_tokens: int
    """Of these, found in the lender's own prefix cache."""
    spans: tuple[Span, ...] = ()

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
