"""The prefill side of a hand-off: one `Lending` per Prefill call (docs/protocol.md, "Request on the prefill worker").

 1. accepted: the sequence waits in the scheduler; an empty lease is granted
 2. computing: after each committed chunk its full blocks are lent and published, with digest and generation
 3. the first token is sampled: it goes out before anything else; the tail block is published; HandoffState follows
 4. lent: the sequence has left the scheduler, the lease alone holds the blocks until release or expiry

If the reader goes away before step 3 is out, the sequence is removed and the lease abandoned.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from baton.core.errors import BatonError, DeadlineExceeded
from baton.core.handoff import (
    HANDOFF_VERSION,
    Accepted,
    Alive,
    FirstToken,
    HandoffState,
    Lease,
    LentBlock,
    PrefillCall,
    PrefillEvent,
    Published,
)
from baton.core.request import FinishReason
from baton.core.sequence import SequenceState
from baton.core.step import Progress
from baton.core.worker import Span
from baton.engine.block_pool import BlockPool
from baton.kv_transfer.digest import digest
from baton.kv_transfer.lease import LeaseTable
from baton.kv_transfer.memory import KVMemory
from baton.worker.steps import StepLoop


@dataclass(frozen=True, slots=True)
class LenderParts:
    """What every Lending of a worker shares."""

    steps: StepLoop
    pool: BlockPool
    memory: KVMemory
    leases: LeaseTable
    clock: Callable[[], float]
    alive_interval_s: float


class Lending:
    def __init__(self, parts: LenderParts, call: PrefillCall, seq: SequenceState, lease: Lease) -> None:
        self._parts = parts
        self._call = call
        self._seq = seq
        self._lease = lease
        self._arrived_s = parts.clock()
        self._events: asyncio.Queue[PrefillEvent | BatonError] = asyncio.Queue()
        self._published_blocks = call.held_blocks
        self._first_start: int | None = None
        self._spans: list[Span] = []

    async def events(self) -> AsyncGenerator[PrefillEvent, None]:
        """The Prefill stream. Closing it before HandoffState ends the work and the lease."""
        parts, handed = self._parts, False
        # A timer that speaks through the queue: a timeout around a yield would cancel whoever reads us.
        late = DeadlineExceeded(f"prefill of {self._call.request.request_id} took longer than its deadline")
        timer = asyncio.get_running_loop().call_later(self._call.request.deadline_s, self._events.put_nowait, late)
        try:
            parts.steps.add(self._seq, self._on_progress)
            yield Accepted(self._lease)
            while not handed:
                event = await self._next_event()
                if isinstance(event, BatonError):
                    raise event
                handed = isinstance(event, HandoffState)
                yield event
        finally:
            timer.cancel()
            parts.steps.remove(self._seq.request_id)
            if not handed:
                parts.leases.abandon(self._lease.lease_id, parts.clock())

    async def _next_event(self) -> PrefillEvent | BatonError:
        try:
            async with asyncio.timeout(self._parts.alive_interval_s):
                return await self._events.get()
        except TimeoutError:
            return Alive(self._parts.steps.steps)

    def _on_progress(self, progress: Progress, started: float) -> None:
        start_s, now_s = started - self._arrived_s, self._parts.clock() - self._arrived_s
        if self._first_start is None:
            self._first_start = progress.start
            self._spans.append(Span("prefill queue", 0.0, start_s))
        tokens = progress.num_computed_tokens - progress.start
        span = Span("prefill chunk", start_s, now_s, f"{tokens} tokens from {progress.start}")
        self._spans.append(span)
        done = progress.new_token is not None
        try:
            blocks = self._lend(progress.num_computed_tokens, include_tail=done)
        except BatonError as e:
            self._events.put_nowait(e)
            return
        if progress.new_token is not None:
            self._events.put_nowait(FirstToken(progress.num_output_tokens - 1, progress.new_token))
        if blocks or done:
            self._events.put_nowait(Published(self._lease.lease_id, 0, tuple(blocks), span, last=done))
        if done:
            self._events.put_nowait(self._state(progress))
            self._parts.steps.remove(self._seq.request_id)

    def _lend(self, num_computed_tokens: int, include_tail: bool) -> list[LentBlock]:
        """Lend the blocks that this chunk completed. Raises when the lease has ended meanwhile."""
        parts, size = self._parts, self._parts.pool.block_size
        end = -(-num_computed_tokens // size) if include_tail else num_computed_tokens // size
        lent = []
        for index in range(self._published_blocks, end):
            block = self._seq.block_table.blocks[index]
            one = LentBlock(
                index=index,
                block_id=block,
                generation=parts.pool.generation(block),
                digest=digest(parts.memory.block(block)),
                num_tokens=min(size, num_computed_tokens - index * size),
            )
            parts.leases.add(self._lease.lease_id, one)
            lent.append(one)
        self._published_blocks = max(end, self._published_blocks)
        return lent

    def _state(self, progress: Progress) -> HandoffState:
        return HandoffState(
            version=HANDOFF_VERSION,
            request_id=self._call.request.request_id,
            epoch=self._call.epoch,
            num_prompt_tokens=self._seq.num_prompt_tokens,
            output=tuple(self._seq.tokens[self._seq.num_prompt_tokens :]),
            num_computed_tokens=progress.num_computed_tokens,
            finish=progress.finish if progress.finish is FinishReason.STOP else None,
            cached_tokens=self._first_start or 0,
            spans=tuple(self._spans),
        )
