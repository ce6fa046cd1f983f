"""The source's side of a planned move: a request that runs here goes to a peer, KV and all, and is forgotten here only
when the peer has acknowledged it.

 1. the running sequence of one choice is paused at the next step boundary
 2. its blocks beyond what the peer holds are lent and published, the tail with its filled length; HandoffState follows
 3. the peer releases the lease: that is the acknowledgement. When all choices of the request are released, it is gone
 4. the call is closed, the lease ends otherwise, or the peer takes longer than `peer_timeout_s`: every choice resumes
    where it paused, and a late release hears that the lease is not good
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

from baton.core.errors import NotFound
from baton.core.handoff import Accepted, Alive, ChoiceState, Lease, PrefillCall, PrefillEvent
from baton.core.worker import Span
from baton.worker.lending import LentSequence
from baton.worker.parts import WorkerParts

if TYPE_CHECKING:
    from baton.worker.intake import Intake


class Giving:
    """One TAKE_OVER call: one choice of one request."""

    def __init__(self, parts: WorkerParts, call: PrefillCall, intake: Intake) -> None:
        """Raises NotFound when that choice does not run here now."""
        assert call.running is not None, "a take-over names the running attempt"
        self._parts = parts
        self._call = call
        self._intake = intake
        self._answer = intake.running(call.running.choice)
        self._ended = asyncio.Event()
        self._released = False
        now = parts.clock()
        self._lease: Lease = parts.leases.grant(call, parts.worker_id, parts.boot_id, now, self._on_lease_end)
        self._answer.take_back = self._abandon
        assert self._answer.seq is not None, "a running answer has a sequence"
        self._out = LentSequence(parts, call, self._answer.seq, self._lease)

    async def events(self) -> AsyncGenerator[PrefillEvent, None]:
        """Accepted, Published, HandoffState; then it stays open until the lease has ended."""
        parts, out = self._parts, self._out
        seq, arrived_s = out.seq, parts.clock()
        try:
            yield Accepted(self._lease)
            pausing = asyncio.ensure_future(self._intake.pause(self._answer))
            try:
                while not (await asyncio.wait([pausing], timeout=parts.handoff.alive_interval_s))[0]:
                    yield Alive(parts.steps.steps)
            finally:
                pausing.cancel()
            if not pausing.result() or self._answer.finish is not None or not self._intake.life.at("moving_out"):
                raise NotFound(f"request {self._call.request.request_id} has ended on {parts.worker_id}")
            out.life.on("pause")
            span = Span("paused for its move", 0.0, parts.clock() - arrived_s, worker=parts.worker_id)
            for published in out.publish(seq.num_computed_tokens, span, last=True):
                yield published
            first_told = len(self._call.request.choices[0].delivered)
            state = ChoiceState(
                self._answer.choice.index,
                tuple(seq.tokens[seq.num_prompt_tokens :]),
                self._answer.logprobs_from(first_told),
            )
            yield out.state((state,), seq.num_computed_tokens, 0, (span,))
            async with asyncio.timeout(parts.handoff.peer_timeout_s):
                await self._ended.wait()
        except TimeoutError:
            return
        finally:
            self._abandon()  # nothing, if it was released
            out.life.on("give" if self._released and out.life.at("paused") else "end")

    def _abandon(self) -> None:
        self._parts.leases.abandon(self._lease.lease_id, self._parts.clock())

    def _on_lease_end(self, how: str) -> None:
        self._released = how == "released"
        self._ended.set()
        # Not now: we are in the middle of the lease table.
        asyncio.get_running_loop().call_soon(self._intake.given, self._answer, self._released)
