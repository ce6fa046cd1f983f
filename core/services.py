"""The doors between processes, as plain async objects. `wire/` puts gRPC behind them, `sim/network.py` the
simulated network; callers cannot tell.

Rules for every implementation: a lost peer raises PeerLost, a refused call the BatonError it was refused with, a
unary call past `timeout_s` DeadlineExceeded. Closing an iterator (aclose, or cancelling its reader) ends the call
on the other side too.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from baton.core.handoff import PrefillCall, PrefillEvent, ReleaseAnswer
from baton.core.messages import StepMessage, UpMessage, WorkerStatus
from baton.core.worker import WorkerInfo


class WorkerService(Protocol):
    """What a worker serves: the same five calls for both roles, at the server and at a client of it."""

    def stream(self, up: AsyncIterator[UpMessage]) -> AsyncIterator[StepMessage]:
        """The multiplexed stream of one router. What was submitted on it outlives it by `router.orphan_window_s`."""
        ...

    def prefill(self, call: PrefillCall) -> AsyncIterator[PrefillEvent]:
        """Lend the KV of a request, by `call.mode`: Accepted, then Published / FirstToken / Alive, then HandoffState.

        Raises Overloaded when refused, NotFound for a take-over of what does not run here. If the caller goes away
        before HandoffState, the work stops and the lease ends; afterwards the lease lives until `lease` releases it or
        it expires. A take-over's call stays open until then: closing it gives the request back to the lender.
        """
        ...

    async def lease(self, lease_id: str, release: bool, timeout_s: float) -> ReleaseAnswer:
        """Renew a lease, or release it for good. Releasing an unknown lease answers good=False."""
        ...

    async def drain(self, on: bool, timeout_s: float) -> WorkerStatus:
        """Take nothing new from now on (or again, with `on` False), and tell every router so: they move away what runs
        here. Answers at once with what is left; drained when no request runs and nothing is lent."""
        ...

    async def status(self, timeout_s: float) -> WorkerStatus:
        """Identity, load, ledger, counters."""
        ...


class Dial(Protocol):
    """How to reach a worker: injected, so that production code runs on the simulated network."""

    def __call__(self, info: WorkerInfo) -> WorkerService: ...
