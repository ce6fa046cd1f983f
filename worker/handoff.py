"""One hand-off, seen from the reader: the Prefill call, its pulls, and the lease behind them. The same for all three
modes (core/handoff.py, LendMode).

 1. the call is made; the lender accepts and grants a lease, which is renewed as long as this lives
 2. each publish is checked by the arrival and pulled while the lender goes on
 3. first tokens and the state go to the listener as they come
 4. `run` returns when all is here and verified; then `release` asks whether the lease was good throughout

Whatever fails, the lender hears of it in the background, and the arrival knows which blocks are verified.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from baton.core.errors import BatonError, DeadlineExceeded, Incompatible, IntegrityError, PeerLost
from baton.core.handoff import (
    Accepted,
    Alive,
    FirstToken,
    HandoffState,
    Lease,
    LendMode,
    PrefillCall,
    PrefillEvent,
    Published,
)
from baton.core.layout import difference, stored_alike
from baton.core.services import WorkerService
from baton.core.worker import WorkerInfo
from baton.worker.arrival import Arrival
from baton.worker.parts import WorkerParts

log = logging.getLogger(__name__)


class Listener(Protocol):
    """Who called: hears things while they happen."""

    def published(self) -> None:
        """Something may be pulled now."""

    def first_token(self, event: FirstToken) -> None: ...

    def state_came(self, state: HandoffState, called_s: float) -> None: ...

    def span(self, name: str, start_s: float, detail: str = "") -> None: ...


class Silent:
    """A listener for calls that nobody waits for token by token."""

    def published(self) -> None:
        """Nobody to tell."""

    def first_token(self, event: FirstToken) -> None:
        raise IntegrityError(f"a first token of choice {event.choice}, of a call that computes nothing")

    def state_came(self, state: HandoffState, called_s: float) -> None:
        """Nobody to tell."""

    def span(self, name: str, start_s: float, detail: str = "") -> None:
        """Nobody to tell."""


class Handoff:
    def __init__(
        self, parts: WorkerParts, lender: WorkerInfo, call: PrefillCall, arrival: Arrival, listener: Listener
    ) -> None:
        """Raises Incompatible when the two workers do not fit, whatever the router thought."""
        why = difference(lender.capability, parts.capability)
        if why is not None:
            raise Incompatible(f"{parts.worker_id} cannot use KV of {lender.worker_id}: {why}")
        self._converts = not stored_alike(lender.capability, parts.capability)
        if self._converts and call.mode is LendMode.CACHED:
            raise Incompatible(f"KV of {lender.worker_id} would be converted, and {parts.worker_id} caches none such.")
        self.broke = False
        """The connection to the lender broke under the call."""
        self._parts = parts
        self._lender = lender
        self._call = call
        self._arrival = arrival
        self._listener = listener
        self._service: WorkerService = parts.dial(lender)
        self._lease: Lease | None = None
        self._state: HandoffState | None = None
        self._called_s = parts.clock()
        self._moved_on_s = self._called_s
        """When the lender's engine was last seen to do something."""
        self._lender_steps = -1
        self._verified_bytes = 0
        self._events = self._service.prefill(call)
        self._closing = False

    async def run(self) -> HandoffState:
        """Until everything is here and verified. Raises the BatonError that broke the hand-off; the lease is released
        then, and the arrival knows what was verified."""
        try:
            failure = await self._driven()
            if failure is not None:
                raise failure
            return self._complete()
        except BaseException:
            self.give_up()
            raise

    def give_up(self) -> None:
        """Let the lender know that we want no more, without waiting for it. The end of a call that is still open ends
        its lease; the release of a take-over would be the acknowledgement."""
        computes = self._call.mode is LendMode.COMPUTE
        self._parts.spawn(self._release_quietly() if computes else self._close())

    async def release(self) -> None:
        """Learn whether the lease was good throughout: raises PeerLost if not, and the arrival forgets what came. A
        lost lender leaves the digests to decide."""
        assert self._lease is not None, "only a complete hand-off is released"
        try:
            answer = await self._service.lease(self._lease.lease_id, True, self._parts.handoff.release_timeout_s)
        except (PeerLost, DeadlineExceeded) as e:
            self._parts.metrics.inc("baton_fallbacks_total", kind="release_unanswered")
            log.warning("%s did not answer the release (%s); every digest was right", self._lender.worker_id, e.message)
            return
        except BaseException:
            self.give_up()
            raise
        finally:
            self._parts.spawn(self._close())
        if not answer.good:
            self._arrival.distrust()
            self._parts.metrics.inc("baton_integrity_failures_total", reason="lease")
            raise PeerLost(f"the lease at {self._lender.worker_id} was not good throughout: {answer.reason}")

    def _complete(self) -> HandoffState:
        """Raise IntegrityError unless what was handed over is whole: a lender that leaves something out is caught
        here, not by wrong tokens."""
        state, call, request = self._state, self._call, self._call.request
        assert state is not None, "the stream was read to its end"
        size, num_shared = self._parts.pool.block_size, len(request.shared)
        covered = state.num_computed_tokens
        asked = [c.index for c in request.choices]
        faults = [
            ("no lease", self._lease is None),
            ("not every block", self._arrival.num_verified() < self._parts.blocks_for(covered)),
            ("another prompt", state.num_prompt_tokens != len(request.prompt) or state.tenant != request.tenant),
            ("other parameters", state.sampling != request.sampling),
        ]
        if call.mode is LendMode.CACHED:
            faults.append((f"{covered} of {num_shared} tokens", covered % size != 0 or covered > num_shared))
        else:
            told = [c.output[: len(d.delivered)] == d.delivered
                    for c, d in zip(state.choices, request.choices, strict=False)]
            faults += [
                ("other choices", [c.index for c in state.choices] != asked),
                ("other tokens than were delivered", not all(told)),
            ]
        if call.mode is LendMode.COMPUTE:
            faults.append((f"{covered} of {num_shared} tokens", covered != num_shared))
        if call.mode is LendMode.TAKE_OVER:
            known = state.num_prompt_tokens + sum(len(c.output) for c in state.choices)
            faults.append((f"{covered} of {known} tokens", not covered < known))
        wrong = [what for what, is_so in faults if is_so]
        if wrong:
            self._parts.metrics.inc("baton_integrity_failures_total", reason="incomplete")
            raise IntegrityError(f"{self._lender.worker_id} handed over {', '.join(wrong)}. It is not used.")
        return state

    async def _driven(self) -> BatonError | None:
        """In a task of its own: one whose TaskGroup fails while it is cancelled may forget the cancel, and one whose
        TaskGroup fails as it ends may stay half cancelled, so that its next time-out kills it (Python 3.11.2)."""
        me, driving = asyncio.current_task(), asyncio.create_task(self._drive())
        assert me is not None
        num_cancels = me.cancelling()
        failure = await driving
        if me.cancelling() > num_cancels:
            raise asyncio.CancelledError
        return failure

    async def _drive(self) -> BatonError | None:
        """Read, pull and renew side by side; the first failure ends them all and is returned."""
        failure: BatonError | None = None
        try:
            async with asyncio.TaskGroup() as tasks:
                renewal = tasks.create_task(self._renew())
                async with asyncio.TaskGroup() as pulls:
                    await self._read(pulls)
                renewal.cancel()
        except* BatonError as group:
            failure = _first(group)
        return failure

    async def _read(self, tasks: asyncio.TaskGroup) -> None:
        """All events until HandoffState, each within peer_timeout_s of the one before. The call ends then if it
        computed something; if it lends what was there, it stays open until the release."""
        silence_s = self._parts.handoff.peer_timeout_s
        try:
            while self._state is None:
                try:
                    async with asyncio.timeout(silence_s):
                        event = await anext(self._events)
                except TimeoutError:
                    raise DeadlineExceeded(f"{self._lender.worker_id} said nothing for {silence_s} s") from None
                except StopAsyncIteration:
                    raise PeerLost(f"{self._lender.worker_id} ended the call without its state") from None
                except PeerLost:
                    self.broke = True
                    raise
                self._on_event(event, tasks)
        finally:
            if self._state is None or self._call.mode is LendMode.COMPUTE:
                await self._close()

    async def _close(self) -> None:
        if self._closing:
            return
        self._closing = True
        close = getattr(self._events, "aclose", None)
        if close is not None:
            await close()

    def _on_event(self, event: PrefillEvent, tasks: asyncio.TaskGroup) -> None:
        now, stall_s = self._parts.clock(), self._parts.handoff.stall_timeout_s
        if not isinstance(event, Alive) or event.steps != self._lender_steps:
            self._moved_on_s = now
        match event:
            case Accepted(lease):
                self._lease = lease
            case Published():
                self._on_published(event, tasks)
            case FirstToken():
                self._listener.first_token(event)
            case HandoffState():
                event.check()
                self._state = event
                self._arrival.seq.converted |= event.converted
                self._listener.state_came(event, self._called_s)
            case Alive(steps):
                self._lender_steps = steps
                if now - self._moved_on_s > stall_s:
                    raise PeerLost(f"{self._lender.worker_id} lives, but completed no step for {stall_s} s")

    def _on_published(self, event: Published, tasks: asyncio.TaskGroup) -> None:
        destination = self._arrival.announce(event)
        self._listener.published()
        if event.last:
            self._parts.metrics.inc("baton_verified_before_last_chunk_bytes_total", self._verified_bytes)
        if event.blocks:
            tasks.create_task(self._pull(event, destination))

    async def _pull(self, event: Published, destination: list[int]) -> None:
        parts, started = self._parts, self._parts.clock()
        theirs = self._lender.capability.layout
        part = theirs.part_of(event.layers.start, event.layers.end) if event.layers else None
        landings = parts.landings if self._converts else None
        transport = await (landings or parts.puller).connect(self._lender)
        num_bytes = len(event.blocks) * (theirs.block_bytes if part is None else part[1] - part[0])
        detail = f"{len(event.blocks)} blocks, {num_bytes / 1e6:.2f} MB from {self._lender.worker_id} over {transport}"
        if event.layers:
            detail += f", layers {event.layers.start} to {event.layers.end}"
        if landings is not None:
            self._arrival.seq.converted = True  # before a byte of it is there
            await landings.pull(self._lender, event, destination)
            detail += f", converted from {theirs.dtype} to {parts.capability.layout.dtype}"
        else:
            await parts.puller.pull(self._lender, event.lease_id, event.blocks, destination, part)
        self._arrival.verified(event)
        self._verified_bytes += num_bytes
        self._listener.span("transfer", started, detail)

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._call.lease_ttl_s / 3)
            if self._lease is not None:
                timeout_s = self._parts.handoff.release_timeout_s
                try:
                    answer = await self._service.lease(self._lease.lease_id, False, timeout_s)
                except BatonError as e:
                    log.info("renewing a lease at %s failed: %s", self._lender.worker_id, e.message)
                    continue
                if not answer.good:
                    raise PeerLost(f"{self._lender.worker_id} ended the lease: {answer.reason}")

    async def _release_quietly(self) -> None:
        """After a failure the lender should not wait for its lease to expire."""
        if self._lease is None:
            return
        try:
            await self._service.lease(self._lease.lease_id, True, self._parts.handoff.release_timeout_s)
        except BatonError as e:
            log.info("releasing a lease at %s failed: %s", self._lender.worker_id, e.message)


def _first(group: BaseExceptionGroup[BatonError]) -> BatonError:
    """The failure that came first, out of nested task groups."""
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
