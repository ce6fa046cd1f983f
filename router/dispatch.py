"""One request from arrival to its last token, whatever happens to the workers on the way.

Owns attempts: epochs, exactly-once delivery, refusals, lost workers, deadlines. Does not know text, how a price is
made, or how a stream works.

Life of a request:

1. admitted (or Overloaded at once), checked against what the fleet can hold
2. placed: hashed once, priced, and sent to the decode worker of the cheapest route; waits, bounded, for a ready worker
   and behind those that were refused before (waiting.py)
3. delivered: each token exactly once, by (request_id, epoch, first_index)
4. refused or lost: step 2 with a new epoch, elsewhere; delivered tokens are replayed, never repeated to the client
5. ended: finished, failed, or the iterator closed, which cancels it on the worker
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from baton.core.block_hash import BlockHash, HashScope, block_hashes
from baton.core.config import Config
from baton.core.errors import (
    BatonError,
    DeadlineExceeded,
    Incompatible,
    IntegrityError,
    InvalidRequest,
    Overloaded,
    PeerLost,
    from_code,
)
from baton.core.layout import Capability
from baton.core.messages import Cancel, Submit, TokenChunk
from baton.core.metrics import Metrics
from baton.core.request import FinishReason, Request
from baton.core.worker import Role, Route
from baton.router.delivery import Delivery
from baton.router.fleet import Fleet, context_limit
from baton.router.link import Subscription
from baton.router.policy import Candidate, Candidates, Facts, Policy
from baton.router.trace import Attempt, TraceLog, TraceRecord, timeline
from baton.router.waiting import WaitingLine

log = logging.getLogger(__name__)

PLACE_WAIT_S = 10.0
"""Longest wait for a decode worker to become ready; then the client can go elsewhere."""
REFUSED_WAIT_S = 60.0
"""Longest wait for a place while workers are ready and have none."""
PAUSE_FIRST_S = 0.05
PAUSE_MAX_S = 1.0
"""Pause before workers that all refused are asked again; doubles with each attempt."""

RETRYABLE = (Overloaded, PeerLost, Incompatible, IntegrityError)
"""Said by one worker, these may be different at another."""


class NobodyReady(PeerLost):
    """There is no decode worker to wait for. To clients a PeerLost: the fault is the fleet's, not the load's."""


@dataclass(slots=True)
class _Run:
    """One request under way."""

    request: Request
    arrived: float
    deadline: float
    delivery: Delivery
    epoch: int = 0
    avoided: set[str] = field(default_factory=set)
    """Workers that refused or failed this request."""
    hashes: dict[tuple[HashScope, int], list[BlockHash]] = field(default_factory=dict)
    num_failures: int = 0
    """Attempts that were taken on and then lost."""
    refused_since: float | None = None
    """Every worker asked since then had no place for it."""
    suspect: str = ""
    """Whom to avoid if this attempt fails."""
    settled: bool = True
    """Its dispatched work is shown by the workers' own reports."""
    capability: Capability | None = None
    """Of the last decode worker: what would have ended the request there."""
    ttft_s: float | None = None
    attempts: list[Attempt] = field(default_factory=list)

    def concluded(self) -> Iterator[TokenChunk]:
        return self.delivery.conclude(self.epoch, self.capability) if self.capability is not None else iter(())


class Dispatcher:
    """Turns requests into token chunks. One loop; `generate` may run many times at once."""

    def __init__(
        self, fleet: Fleet, policy: Policy, config: Config, metrics: Metrics, traces: TraceLog | None = None
    ) -> None:
        self.traces = traces or TraceLog()
        self._fleet = fleet
        self._policy = policy
        self._config = config
        self._metrics = metrics
        self._live: dict[str, _Run] = {}
        self._line = WaitingLine()
        self._epochs = itertools.count(1)
        """Never the same twice: a request id may come again while chunks of its last use are on their way."""

    @property
    def num_inflight(self) -> int:
        return len(self._live)

    def max_model_len(self) -> int:
        """Most tokens, prompt and output, that any known worker holds for one request; 0 while none is known."""
        return max((context_limit(c) for c in self._fleet.capabilities()), default=0)

    async def generate(self, request: Request) -> AsyncGenerator[TokenChunk, None]:
        """The request's tokens, each exactly once and in order; the last chunk has `finish` STOP or LENGTH.

        Raises BatonError: Overloaded, InvalidRequest and DeadlineExceeded as they are, PeerLost and the like once
        router.max_attempts are spent. Closing the iterator cancels the request on its worker.
        """
        run = self._admit(request)
        outcome: str | None = None
        try:
            while run.delivery.is_open:
                route = await self._place(run)
                for chunk in run.concluded():
                    yield chunk
                if not run.delivery.is_open:
                    break
                try:
                    with self._attempt(run, route) as chunks:
                        while run.delivery.is_open:
                            fresh = self._take(run, route, await chunks.next())
                            if fresh is not None:
                                yield fresh
                except RETRYABLE as e:
                    for chunk in run.concluded():
                        yield chunk
                    if run.delivery.is_open:
                        self._after_failure(run, e)
        except BatonError as e:
            outcome = e.code
            raise
        finally:
            del self._live[request.request_id]
            self._line.leave(request.request_id)
            self._record(run, outcome or run.delivery.how_it_ended())

    # ---- admission ----

    def _admit(self, request: Request) -> _Run:
        limit = self._config.router.max_inflight
        if len(self._live) >= limit:
            raise Overloaded(f"the router has {limit} requests, its limit (router.max_inflight). Come back later.")
        if request.request_id in self._live:
            raise InvalidRequest(f"request {request.request_id} is running. Give each request an id.", "request_id")
        now = asyncio.get_running_loop().time()
        run = _Run(request, now, now + request.deadline_s, Delivery(request))
        self._check_length(run)
        self._live[request.request_id] = run
        return run

    def _check_length(self, run: _Run) -> None:
        limit = self.max_model_len()
        if limit and len(run.request.prompt) + 1 > limit:
            raise InvalidRequest(
                f"the prompt has {len(run.request.prompt)} tokens; with at least one token of output that is more than "
                f"the {limit} any worker holds. Shorten the prompt.",
                "prompt",
            )

    # ---- placing ----

    async def _place(self, run: _Run) -> Route:
        """The next attempt's route. Waits up to PLACE_WAIT_S for somebody to take it, and for its turn."""
        loop = asyncio.get_running_loop()
        await self._turn(run)
        give_up = min(run.deadline, loop.time() + PLACE_WAIT_S)
        while True:
            if loop.time() >= run.deadline:
                raise self._too_late(run)
            self._check_length(run)
            route = self._price(run)
            if route is not None:
                run.epoch = next(self._epochs)
                info = self._fleet.info(route.decode)
                assert info is not None, f"the policy chose {route.decode}, which was not offered"
                run.capability = info.capability
                return route
            left = give_up - loop.time()
            if run.avoided:
                await self._pause(run)
                await self._turn(run)
            elif left <= 0 or not await self._fleet.changed(left):
                if loop.time() >= run.deadline:
                    raise self._too_late(run)
                raise (Overloaded if self._fleet.ready else NobodyReady)(
                    f"no decode worker can take request {run.request.request_id}: {self._roll_call()}. "
                    "Try again later; `baton status` shows the workers."
                )

    async def _turn(self, run: _Run) -> None:
        """Let those go first who were refused before. Who was running goes on at once: he has waited already."""
        give_up = min(run.deadline, (run.refused_since or run.arrived) + REFUSED_WAIT_S)
        if run.num_failures or await self._line.turn(run.request.request_id, give_up):
            return
        if give_up >= run.deadline:
            raise self._too_late(run)
        raise Overloaded(
            f"request {run.request.request_id} waited {REFUSED_WAIT_S:g} s behind others that the workers have no "
            "place for. Try again later, or add workers."
        )

    async def _pause(self, run: _Run) -> None:
        """Everybody asked has said no. Then all of them may be asked again."""
        left_s = run.deadline - asyncio.get_running_loop().time()
        pause_s = min(left_s, PAUSE_FIRST_S * 2 ** min(len(run.attempts), 10), PAUSE_MAX_S)
        if run.refused_since is not None and not run.num_failures:
            self._line.refused(run.request.request_id)
        await asyncio.sleep(pause_s)
        run.avoided.clear()

    def _price(self, run: _Run) -> Route | None:
        held = self._held_blocks(run)

        def able(role: Role) -> list[Candidate]:
            return [
                c
                for c in self._fleet.candidates(role, held)
                if c.info.worker_id not in run.avoided and context_limit(c.info.capability) > run.delivery.longest
            ]

        candidates = Candidates(able(Role.DECODE), able(Role.PREFILL), self._fleet.fits)
        return self._policy.price(Facts(len(run.delivery.remaining(0).shared)), candidates)

    def _held_blocks(self, run: _Run) -> dict[str, int]:
        """Leading blocks of the prompt on each worker. Hashed once per request and way of hashing (one, in a fleet of
        one model); workers that hash differently cannot hold each other's hashes."""
        held: dict[str, int] = {}
        for fleet_scope, block_size in self._fleet.scopes():
            scope = dataclasses.replace(fleet_scope, tenant_salt=run.request.tenant)
            if (scope, block_size) not in run.hashes:
                run.hashes[scope, block_size] = block_hashes(scope, run.request.prompt, block_size)
            held |= self._fleet.index.match(run.hashes[scope, block_size])
        return held

    def _roll_call(self) -> str:
        states = [f"{w.info.worker_id} is {w.state}" for w in self._fleet.workers() if w.info.role is Role.DECODE]
        return ", ".join(states) or "none has been registered"

    def _too_late(self, run: _Run) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"request {run.request.request_id} has {run.delivery.num_output_tokens} tokens after its deadline of "
            f"{run.request.deadline_s:g} s. Allow more time, ask for fewer tokens, or add workers."
        )

    # ---- one attempt ----

    @contextmanager
    def _attempt(self, run: _Run, route: Route) -> Iterator[Subscription]:
        """Submitted on entry; on exit nothing of the attempt is left here, and unless the worker ended it, nothing
        on the worker either."""
        loop, key = asyncio.get_running_loop(), (run.request.request_id, run.epoch)
        run.suspect, run.settled = route.decode, False
        chunks = self._fleet.subscribe(route.decode, *key)
        # The worker ends the request at its deadline; we do, a heartbeat later, if it did not.
        timer = loop.call_at(run.deadline + self._config.router.heartbeat_s, chunks.fail, self._too_late(run))
        start, outcome = loop.time(), None
        try:
            self._submit(run, route)
            yield chunks
        except BatonError as e:
            outcome = e.code
            raise
        finally:
            timer.cancel()
            self._fleet.unsubscribe(route.decode, chunks)
            self._settle(run, route)
            if not chunks.ended:
                self._fleet.send(route.decode, Cancel(*key))
            outcome = outcome or run.delivery.how_it_ended()
            run.attempts.append(Attempt(run.epoch, route, start - run.arrived, loop.time() - run.arrived, outcome))

    def _submit(self, run: _Run, route: Route) -> None:
        key = (run.request.request_id, run.epoch)
        left_s = run.deadline - asyncio.get_running_loop().time()
        request = run.delivery.remaining(left_s)
        self._fleet.send(route.decode, Submit(request, route, run.epoch))
        held = self._held_blocks(run)
        computing = route.prefill or self._fleet.info(route.decode)
        assert computing is not None, f"{route.decode} has a stream and no info"
        cached = held.get(computing.worker_id, 0) * computing.capability.layout.block_size
        self._fleet.charge(computing.worker_id, key, max(1, len(request.shared) - cached))
        if route.prefill is not None:
            self._fleet.charge(route.decode, key, 0)
        self._metrics.inc("baton_dispatches_total", prefill="remote" if route.prefill else "local")

    def _settle(self, run: _Run, route: Route) -> None:
        if not run.settled:
            run.settled = True
            key = (run.request.request_id, run.epoch)
            self._fleet.settle(route.decode, key)
            if route.prefill is not None:
                self._fleet.settle(route.prefill.worker_id, key)

    def _take(self, run: _Run, route: Route, chunk: TokenChunk) -> TokenChunk | None:
        """What of a chunk the client gets. Raises what the worker ended the attempt with, or PeerLost for a gap."""
        if chunk.finish is FinishReason.CANCELLED:
            why = chunk.error_message or "it is going away"
            raise PeerLost(f"{route.decode} cancelled request {run.request.request_id}: {why}.")
        if chunk.finish is FinishReason.ERROR:
            error = from_code(chunk.error_code, chunk.error_message)
            if route.prefill is not None and isinstance(error, (PeerLost, Incompatible, IntegrityError)):
                run.suspect = route.prefill.worker_id  # the decode worker is well enough to say so
            raise error
        fresh = run.delivery.accept(chunk)
        if fresh is None:
            self._metrics.inc("baton_stale_chunks_total", reason="duplicate")
        elif fresh.token_ids:
            if not run.settled:
                self._line.placed(run.request.request_id)
            self._settle(run, route)
            if run.ttft_s is None:
                run.ttft_s = asyncio.get_running_loop().time() - run.arrived
        return fresh

    def _after_failure(self, run: _Run, error: BatonError) -> None:
        """Raises the error once attempts or patience are spent; else the next attempt may go."""
        if isinstance(error, Overloaded):
            self._note_refusal(run, error)
        else:
            self._note_loss(run, error)
        request_id, number = run.request.request_id, len(run.attempts)
        log.info("request %s is sent again after attempt %d: %s", request_id, number, error.message)
        self._metrics.inc("baton_dispatch_retries_total", reason=error.code)
        run.avoided.add(run.suspect)

    def _note_refusal(self, run: _Run, error: Overloaded) -> None:
        """A refusal costs no attempt: nothing was lost, and a place may be free in a moment. Raises it when the
        request has waited REFUSED_WAIT_S for one."""
        now = asyncio.get_running_loop().time()
        if run.refused_since is None:
            run.refused_since = now
        if now - run.refused_since >= REFUSED_WAIT_S:
            raise Overloaded(
                f"request {run.request.request_id} was refused for {REFUSED_WAIT_S:g} s by every worker asked; "
                f"the last: {error.message}"
            ) from error

    def _note_loss(self, run: _Run, error: BatonError) -> None:
        """Raises the error once attempts are spent."""
        run.refused_since = None
        self._line.leave(run.request.request_id)
        run.num_failures += 1
        limit = self._config.router.max_attempts
        if run.num_failures >= limit:
            raise type(error)(
                f"request {run.request.request_id} failed {limit} times (router.max_attempts); the last: "
                f"{error.message}"
            ) from error

    # ---- the end ----

    def _record(self, run: _Run, outcome: str) -> None:
        total_s = asyncio.get_running_loop().time() - run.arrived
        self.traces.add(
            TraceRecord(
                run.request.request_id,
                outcome,
                len(run.request.prompt),
                run.delivery.num_output_tokens,
                run.delivery.cached_tokens,
                run.ttft_s,
                total_s,
                tuple(run.attempts),
                timeline(run.attempts, run.delivery.spans, run.ttft_s, total_s),
            )
        )
