"""One hand-off, seen from the decode side: the Prefill call of an `Intake`, its pulls, and the lease behind them.

 1. the call is made; the lender accepts and grants a lease, which is renewed as long as this lives
 2. each publish is checked (new blocks, inside our table) and pulled while the next chunk is computed
 3. the first token and the state go to the intake as they come
 4. whole? every block below num_computed_tokens verified, the tokens as sent; then the lease is released, and the
    answer says whether it was good throughout

Whatever fails, the lender hears of it in the background, and the intake knows which blocks are verified.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from baton.core.errors import BatonError, DeadlineExceeded, IntegrityError, PeerLost
from baton.core.handoff import (
    Accepted,
    Alive,
    FirstToken,
    HandoffState,
    Lease,
    PrefillCall,
    PrefillEvent,
    Published,
)
from baton.core.services import WorkerService
from baton.core.worker import WorkerInfo

if TYPE_CHECKING:
    from baton.worker.intake import Intake, IntakeParts

log = logging.getLogger(__name__)


class Handoff:
    """The Prefill call of one Intake: reads its events, pulls what is published, renews the lease, releases it."""

    def __init__(self, intake: Intake, parts: IntakeParts, lender: WorkerInfo) -> None:
        self._intake = intake
        self._parts = parts
        self._lender = lender
        self._service: WorkerService = parts.dial(lender)
        self._lease: Lease | None = None
        self._state: HandoffState | None = None
        self._called_s = parts.clock()
        self._moved_on_s = self._called_s
        """When the lender's engine was last seen to do something."""
        self._lender_steps = -1
        self._published: set[int] = set()
        self._verified_bytes = 0

    async def run(self) -> None:
        """Until the sequence's KV is here, verified and released. Raises the BatonError that broke the hand-off; the
        intake then knows what was verified."""
        parts, intake, submit = self._parts, self._intake, self._intake.submit
        call = PrefillCall(submit.request, submit.epoch, parts.worker_id, intake.num_held, parts.lease_ttl_s)
        try:
            failure = await self._drive(self._service.prefill(call))
            if failure is not None:
                raise failure
            state, lease = self._complete()
            await self._release(lease)
            intake.seq.num_computed_tokens = state.num_computed_tokens
        except BaseException:
            parts.spawn(self._release_quietly())  # in the background: a lost lender must not hold up the fallback
            raise

    def _complete(self) -> tuple[HandoffState, Lease]:
        """Raise IntegrityError unless what was handed over is whole: a lender that leaves something out is caught
        here, not by wrong tokens."""
        state, seq = self._state, self._intake.seq
        assert state is not None, "the stream was read to its end"
        num_known = seq.num_prompt_tokens + len(self._intake.submit.request.delivered)
        needed = -(-num_known // seq.block_table.block_size)
        faults = [
            ("no lease", self._lease is None),
            (f"{state.num_computed_tokens} of {num_known} tokens", state.num_computed_tokens != num_known),
            ("not every block", not self._intake.is_verified(needed)),
            ("other output tokens than it sent", list(state.output) != seq.tokens[seq.num_prompt_tokens :]),
        ]
        wrong = [what for what, is_so in faults if is_so]
        if wrong or self._lease is None:
            raise IntegrityError(f"{self._lender.worker_id} handed over {', '.join(wrong)}. It is computed again here.")
        return state, self._lease

    async def _drive(self, events: AsyncIterator[PrefillEvent]) -> BatonError | None:
        """Read, pull and renew side by side; the first failure ends them all and is returned."""
        failure: BatonError | None = None
        try:
            async with asyncio.TaskGroup() as tasks:
                renewal = tasks.create_task(self._renew())
                async with asyncio.TaskGroup() as pulls:
                    await self._read(events, pulls)
                renewal.cancel()
        except* BatonError as group:
            failure = _first(group)
        return failure

    async def _read(self, events: AsyncIterator[PrefillEvent], tasks: asyncio.TaskGroup) -> None:
        """All events until HandoffState, each within peer_timeout_s of the one before."""
        try:
            while self._state is None:
                try:
                    async with asyncio.timeout(self._parts.peer_timeout_s):
                        event = await anext(events)
                except TimeoutError:
                    silent = f"{self._lender.worker_id} said nothing for {self._parts.peer_timeout_s} s"
                    raise DeadlineExceeded(silent) from None
                except StopAsyncIteration:
                    raise PeerLost(f"{self._lender.worker_id} ended the prefill without its state") from None
                self._on_event(event, tasks)
        finally:
            close = getattr(events, "aclose", None)
            if close is not None:
                await close()

    def _on_event(self, event: PrefillEvent, tasks: asyncio.TaskGroup) -> None:
        now = self._parts.clock()
        if not isinstance(event, Alive) or event.steps != self._lender_steps:
            self._moved_on_s = now
        match event:
            case Accepted(lease):
                self._lease = lease
            case Published():
                self._on_published(event, tasks)
            case FirstToken():
                self._intake.first_token(event)
            case HandoffState():
                event.check()
                self._state = event
                self._intake.foreign_spans(event, self._called_s)
            case Alive(steps):
                self._lender_steps = steps
                if now - self._moved_on_s > self._parts.stall_timeout_s:
                    raise PeerLost(
                        f"{self._lender.worker_id} lives, but completed no step for {self._parts.stall_timeout_s} s"
                    )

    def _on_published(self, event: Published, tasks: asyncio.TaskGroup) -> None:
        intake = self._intake
        if not intake.is_bound():
            intake.bind()
        indices = {b.index for b in event.blocks}
        room = range(intake.num_held, len(intake.seq.block_table.blocks))
        if len(indices) < len(event.blocks) or indices & self._published or any(i not in room for i in indices):
            raise IntegrityError(
                f"{self._lender.worker_id} published blocks {sorted(indices)}, expected new ones in {room}"
            )
        self._published |= indices
        if event.last:
            self._parts.metrics.inc("baton_verified_before_last_chunk_bytes_total", self._verified_bytes)
        if event.blocks:
            tasks.create_task(self._pull(event))

    async def _pull(self, event: Published) -> None:
        table, started = self._intake.seq.block_table.blocks, self._parts.clock()
        destination = [table[b.index] for b in event.blocks]
        transport = await self._parts.puller.connect(self._lender)
        await self._parts.puller.pull(self._lender, event.lease_id, event.blocks, destination)
        self._intake.verified({b.index for b in event.blocks})
        self._verified_bytes += self._parts.block_bytes * len(event.blocks)
        self._intake.span("transfer", started, f"{len(event.blocks)} blocks over {transport}")

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._parts.lease_ttl_s / 3)
            if self._lease is not None:
                try:
                    answer = await self._service.lease(self._lease.lease_id, False, self._parts.release_timeout_s)
                except BatonError as e:
                    log.info("renewing a lease at %s failed: %s", self._lender.worker_id, e.message)
                    continue
                if not answer.good:
                    raise PeerLost(f"{self._lender.worker_id} ended the lease: {answer.reason}")

    async def _release(self, lease: Lease) -> None:
        """Learn whether the lease was good throughout. A lost lender leaves the digests to decide."""
        try:
            answer = await self._service.lease(lease.lease_id, True, self._parts.release_timeout_s)
        except (PeerLost, DeadlineExceeded) as e:
            self._parts.metrics.inc("baton_fallbacks_total", kind="release_unanswered")
            log.warning("%s did not answer the release (%s); every digest was right", self._lender.worker_id, e.message)
            return
        if not answer.good:
            self._intake.forget_received()
            self._parts.metrics.inc("baton_integrity_failures_total", reason="lease")
            raise PeerLost(f"the lease at {self._lender.worker_id} was not good throughout: {answer.reason}")

    async def _release_quietly(self) -> None:
        """After a failure the lender should not wait for its lease to expire."""
        if self._lease is not None:
            try:
                await self._service.lease(self._lease.lease_id, True, self._parts.release_timeout_s)
            except BatonError as e:
                log.info("releasing a lease at %s failed: %s", self._lender.worker_id, e.message)


def _first(group: BaseExceptionGroup[BatonError]) -> BatonError:
    """The failure that came first, out of nested task groups."""
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
