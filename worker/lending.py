"""The lender's side of a hand-off, one object per Prefill call (docs/protocol.md, "Lending on the lender").

`ComputeLending`: a prompt computed here, published as it grows.
 1. accepted: an empty lease is granted; a prefix that another holder has may be pulled first; the sequence waits
 2. computing: after each committed chunk its full blocks are lent and published, with digest and generation; of the
    last chunk, the layers as they are done
 3. first tokens are sampled: they go out before anything else; the rest is published; HandoffState follows
 4. lent: the sequence has left the scheduler, the lease alone holds the blocks until release or expiry

`CachedLending`: what the prefix map has, published in slices; nothing is computed.

If the reader goes away before HandoffState is out, the work ends and the lease is abandoned; a reader of the cache
stays until it has released.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from dataclasses import replace

from baton.core.errors import BatonError, DeadlineExceeded
from baton.core.handoff import (
    Accepted,
    Alive,
    ChoiceState,
    FirstToken,
    HandoffState,
    Layers,
    Lease,
    LentBlock,
    PrefillCall,
    PrefillEvent,
    Published,
)
from baton.core.layout import HANDOFF_VERSION
from baton.core.machines import LENDING, Life
from baton.core.request import Choice, FinishReason, SampledToken
from baton.core.sequence import SequenceState
from baton.core.step import Progress, ScheduledChunk
from baton.core.worker import Span, WorkerInfo
from baton.kv_transfer.digest import digest
from baton.worker.fetch import fetch_prefix
from baton.worker.parts import WorkerParts

SLICE_BLOCKS = 32
"""Most blocks in one Published: their digests are computed in one turn of the event loop."""


class LentSequence:
    """The part that all lendings share: blocks of one sequence go out under one lease, each once per layer."""

    def __init__(self, parts: WorkerParts, call: PrefillCall, seq: SequenceState, lease: Lease) -> None:
        self.parts = parts
        self.call = call
        self.seq = seq
        self.lease = lease
        self.life = Life(LENDING)
        self.arrived_s = parts.clock()
        self.num_published = call.held_blocks
        """Leading blocks that are published whole, or that the reader has."""
        self._layers_out = 0
        """Of the blocks behind these, layers that are published already."""

    def publish(self, num_tokens: int, span: Span, last: bool) -> Iterator[Published]:
        """KV of the first `num_tokens` is complete: the full blocks of it go, with `last` also the tail. They are lent
        now, because the next turn may take them from the sequence; digests are computed as the events are taken,
        SLICE_BLOCKS at a time. Raises NotFound when the lease has ended."""
        end = self.parts.blocks_for(num_tokens) if last else num_tokens // self.parts.pool.block_size
        layers = Layers(self._layers_out, self.parts.num_layers) if self._layers_out else None
        self._layers_out = 0
        lent = self._lend(end, num_tokens)
        self.num_published = max(end, self.num_published)
        return self._told(lent, span, last, layers)

    def publish_layers(self, num_tokens: int, num_layers: int, span: Span) -> Iterator[Published]:
        """KV of the first `num_tokens`, tail included, is complete in layers [0, num_layers)."""
        layers = Layers(self._layers_out, num_layers)
        self._layers_out = num_layers
        return self._told(self._lend(self.parts.blocks_for(num_tokens), num_tokens), span, False, layers)

    def _lend(self, end: int, num_tokens: int) -> list[LentBlock]:
        """Pinned from now on; without digests."""
        self.life.on("publish")
        parts, size, lent = self.parts, self.parts.pool.block_size, []
        for index in range(self.num_published, end):
            block = self.seq.block_table.blocks[index]
            filled = min(size, num_tokens - index * size)
            one = LentBlock(index, block, parts.pool.generation(block), b"", filled)
            parts.leases.add(self.lease.lease_id, one)
            lent.append(one)
        return lent

    def _told(self, lent: list[LentBlock], span: Span, last: bool, layers: Layers | None) -> Iterator[Published]:
        parts, lease_id = self.parts, self.lease.lease_id
        lo, hi = parts.part_of(layers.start, layers.end) if layers else (0, parts.memory.block_bytes)
        for start in range(0, len(lent), SLICE_BLOCKS):
            some = lent[start : start + SLICE_BLOCKS]
            blocks = tuple(replace(b, digest=digest(parts.memory.block(b.block_id)[lo:hi])) for b in some)
            yield Published(lease_id, 0, blocks, span, last and start + SLICE_BLOCKS >= len(lent), layers)
        if last and not lent:
            yield Published(lease_id, 0, (), span, last=True)

    def state(
        self, choices: tuple[ChoiceState, ...], num_computed_tokens: int, cached_tokens: int, spans: tuple[Span, ...]
    ) -> HandoffState:
        request, used_s = self.call.request, self.parts.clock() - self.arrived_s
        return HandoffState(
            version=HANDOFF_VERSION,
            request_id=request.request_id,
            epoch=self.call.epoch,
            tenant=request.tenant,
            sampling=request.sampling,
            num_prompt_tokens=len(request.prompt),
            choices=choices,
            num_computed_tokens=num_computed_tokens,
            cached_tokens=cached_tokens,
            deadline_s=max(0.0, request.deadline_s - used_s),
            spans=spans,
            converted=self.seq.converted,
        )


class ComputeLending:
    def __init__(
        self, parts: WorkerParts, call: PrefillCall, seq: SequenceState, lease: Lease, taken: Callable[[], None]
    ) -> None:
        """`taken` is called once, when our load shows the work, or it is over."""
        self._parts = parts
        self._call = call
        self._seq = seq
        self._taken = taken
        self._out = LentSequence(parts, call, seq, lease)
        self._events: asyncio.Queue[Iterable[PrefillEvent] | BatonError] = asyncio.Queue()
        """What is to be said, in order."""
        self._first_start: int | None = None
        self._spans: list[Span] = []
        self._layers_began = False
        self._layer_times: list[float] = []
        """When layers of the last chunk were published, as spans count."""

    async def events(self) -> AsyncGenerator[PrefillEvent, None]:
        """The Prefill stream. Closing it before HandoffState ends the work and the lease."""
        parts, handed = self._parts, False
        # A timer that speaks through the queue: a timeout around a yield would cancel whoever reads us.
        late = DeadlineExceeded(f"prefill of {self._call.request.request_id} took longer than its deadline")
        timer = asyncio.get_running_loop().call_later(self._call.request.deadline_s, self._give_up, late)
        fetching: asyncio.Task[None] | None = None
        try:
            if self._call.holder is None:
                self._begin()
            else:
                self._out.life.on("fetch")
                fetching = asyncio.get_running_loop().create_task(self._fetch_and_begin(self._call.holder))
            yield Accepted(self._out.lease)
            while not handed:
                events = await self._next_events()
                if isinstance(events, BatonError):
                    raise events
                for event in events:
                    handed = isinstance(event, HandoffState)
                    yield event
        finally:
            timer.cancel()
            if fetching is not None:
                fetching.cancel()
            self._tell_taken()
            parts.steps.remove(self._seq.request_id)
            self._out.life.on("hand" if handed else "end")
            if not handed:
                parts.leases.abandon(self._out.lease.lease_id, parts.clock())

    def _give_up(self, error: BatonError) -> None:
        """Whether or not the reader reads: the work ends, and the lease."""
        self._parts.steps.remove(self._seq.request_id)
        self._parts.leases.abandon(self._out.lease.lease_id, self._parts.clock())
        self._events.put_nowait(error)

    def _begin(self) -> None:
        self._parts.steps.add(self._seq, self._on_progress, self._on_layers)
        self._tell_taken()

    def _tell_taken(self) -> None:
        taken, self._taken = self._taken, lambda: None
        taken()

    async def _fetch_and_begin(self, holder: WorkerInfo) -> None:
        await fetch_prefix(self._parts, self._call.request, self._call.epoch, holder)
        spent_s, who = self._parts.clock() - self._out.arrived_s, self._parts.worker_id
        self._spans.append(Span("fetch prefix", 0.0, spent_s, f"from {holder.worker_id}", who))
        self._out.life.on("fetched")
        try:
            self._begin()
        except BatonError as e:
            self._events.put_nowait(e)

    async def _next_events(self) -> Iterable[PrefillEvent] | BatonError:
        try:
            async with asyncio.timeout(self._parts.handoff.alive_interval_s):
                return await self._events.get()
        except TimeoutError:
            return (Alive(self._parts.steps.steps),)

    def _on_layers(self, chunk: ScheduledChunk, num_layers: int) -> None:
        """The last chunk's KV is in these layers: they may go, in `layer_parts` parts. The last part waits for the
        commit."""
        total, parts = self._parts.num_layers, self._parts.handoff.layer_parts
        if num_layers >= total or num_layers * parts // total == (num_layers - 1) * parts // total:
            return
        now_s = self._parts.clock() - self._out.arrived_s
        span = Span(f"layers to {num_layers}", now_s, now_s)
        self._layer_times.append(now_s)
        if not self._layers_began:  # what was cached or computed before is whole
            self._layers_began = True
            self._say(lambda: self._out.publish(chunk.start, span, last=False))
        self._say(lambda: self._out.publish_layers(chunk.end, num_layers, span))

    def _on_progress(self, progress: Progress, started: float) -> None:
        start_s, end_s = started - self._out.arrived_s, self._parts.steps.landed_s - self._out.arrived_s
        if progress.error is not None:
            self._events.put_nowait(progress.error)
            return
        if self._first_start is None:
            self._first_start = progress.start
            waited_s = self._spans[-1].end_s if self._spans else 0.0
            self._spans.append(Span("prefill queue", waited_s, start_s, worker=self._parts.worker_id))
        tokens = progress.num_computed_tokens - progress.start
        marks = tuple(at - start_s for at in self._layer_times)
        detail = f"{tokens} tokens from {progress.start}"
        span = Span("prefill chunk", start_s, end_s, detail, self._parts.worker_id, marks)
        self._spans.append(span)
        if not progress.new_tokens:
            self._say(lambda: self._out.publish(progress.num_computed_tokens, span, last=False))
            return
        fresh = self._fresh(progress)
        firsts = [FirstToken(choice.index, len(choice.delivered), token) for choice, token in fresh]
        self._events.put_nowait(firsts)
        self._say(lambda: self._out.publish(progress.num_computed_tokens, span, last=True))
        self._events.put_nowait((self._state(progress, fresh),))

    def _say(self, make: Callable[[], Iterable[PrefillEvent]]) -> None:
        try:
            self._events.put_nowait(make())
        except BatonError as e:
            self._events.put_nowait(e)

    def _fresh(self, progress: Progress) -> list[tuple[Choice, SampledToken]]:
        """First tokens that are news: when several answers go on, those that have begun only need the prompt."""
        choices = self._call.request.choices
        pairs = zip(choices, progress.new_tokens, strict=True)
        return [(c, t) for c, t in pairs if len(choices) == 1 or not c.delivered]

    def _state(self, progress: Progress, fresh: list[tuple[Choice, SampledToken]]) -> HandoffState:
        scheduler, news = self._parts.steps.scheduler, {choice.index: token for choice, token in fresh}
        choices = []
        for choice in self._call.request.choices:
            token = news.get(choice.index)
            if token is None:
                choices.append(ChoiceState(choice.index, choice.delivered))
                continue
            logprobs = (token.logprob,) if token.logprob else ()
            stops = scheduler.finish_of(self._seq, token.token_id) is FinishReason.STOP
            finish = FinishReason.STOP if stops else None  # whether the length is used up, the reader knows
            choices.append(ChoiceState(choice.index, (*choice.delivered, token.token_id), logprobs, finish=finish))
        return self._out.state(
            tuple(choices), progress.num_computed_tokens, self._first_start or 0, tuple(self._spans)
        )


class CachedLending:
    """Its call stays open until the release: whoever closes it before, even one who never heard of the lease, ends the
    lease with it."""

    def __init__(self, parts: WorkerParts, call: PrefillCall, seq: SequenceState) -> None:
        self._parts = parts
        self._seq = seq
        self._ended = asyncio.Event()
        lease = parts.leases.grant(call, parts.worker_id, parts.boot_id, parts.clock(), lambda how: self._ended.set())
        self._out = LentSequence(parts, call, seq, lease)

    async def events(self) -> AsyncGenerator[PrefillEvent, None]:
        out, parts = self._out, self._parts
        try:
            published = self._lend()
            yield Accepted(out.lease)
            for event in published:
                yield event
            yield out.state((), out.num_published * parts.pool.block_size, 0, ())
            out.life.on("hand")
            await self._ended.wait()  # the lease has a deadline
        finally:
            if not out.life.at("lent"):
                out.life.on("end")
            parts.leases.abandon(out.lease.lease_id, parts.clock())  # nothing, if it was released

    def _lend(self) -> Iterable[Published]:
        """From now on the lease alone holds the blocks, however slowly the reader reads."""
        parts, seq, size = self._parts, self._seq, self._parts.pool.block_size
        blocks = parts.pool.match(parts.steps.scheduler.hashes(seq, seq.num_tokens // size))
        if self._out.num_published >= len(blocks):
            return ()
        parts.pool.acquire(blocks)
        seq.block_table.blocks.extend(blocks)
        try:
            now_s = parts.clock() - self._out.arrived_s
            span = Span("lend cached", now_s, now_s, f"{len(blocks)} blocks", parts.worker_id)
            return self._out.publish(len(blocks) * size, span, last=True)
        finally:
            parts.pool.release(blocks)
            seq.block_table.blocks.clear()
