"""One request from arrival to its last token, whatever happens to the workers on the way.

Owns admission, and what follows a refusal or a loss: attempts, the retry budget, poison, deadlines. Does not know text,
how a price is made (cost.py), how a stream works (link.py) or what makes delivery exact (run.py, delivery.py).

Life of a request:

1. admitted (or Overloaded, or RequestQuarantined at once), checked against what the fleet can hold
2. placed, and sent to the decode worker of the cheapest route (placing.py)
3. delivered: each token of each choice exactly once, by (request_id, epoch, choice, first_index)
4. refused or lost: step 2 with a new epoch, elsewhere; delivered tokens are replayed, never repeated to the client
5. its worker drains: an attempt on another one takes it over while it runs (moves.py)
6. ended: finished, failed, or the iterator closed, which cancels it on the workers
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager

from baton.core.config import Config
from baton.core.errors import (
    BatonError,
    DeadlineExceeded,
    Forgotten,
    IntegrityError,
    InternalError,
    InvalidRequest,
    Overloaded,
    PeerLost,
)
from baton.core.messages import Submit, TakeFrom, TokenChunk
from baton.core.metrics import Metrics
from baton.core.request import Request
from baton.core.worker import Role, Route
from baton.router.attempt import Attempt
from baton.router.budget import RetryBudget
from baton.router.decisions import Decider
from baton.router.dice import Dice
from baton.router.fleet import Fleet
from baton.router.link import Work
from baton.router.moves import Moves
from baton.router.placing import REFUSED_WAIT_S, Placing
from baton.router.policy import Policy
from baton.router.quarantine import MAX_CRASHES, Quarantine
from baton.router.run import RETRYABLE, Around, Run
from baton.router.trace import RUNNING, TraceLog, TraceRecord, timeline
from baton.router.waiting import WaitingLine

MAX_ASKED = 8
"""Workers that are asked for a request that another router had begun."""
ASK_WAIT_S = 1.0
"""Longest wait for the stream to one of them."""
MAY_KNOW = "it may run there already"

log = logging.getLogger(__name__)


class Dispatcher:
    """Turns requests into token chunks. One loop; `generate` may run many times at once."""

    def __init__(
        self, fleet: Fleet, policy: Policy, config: Config, metrics: Metrics, traces: TraceLog | None = None,
        dice: Dice | None = None,
    ) -> None:
        """`dice`: what the policy breaks ties with, if its decisions shall be repeatable."""
        router, handoff = config.router, config.handoff
        self.traces = traces or TraceLog()
        self._fleet = fleet
        self._config = router
        self._metrics = metrics
        self._mute_s = handoff.stall_timeout_s
        """A worker that says nothing of a request for so long has failed it."""
        self._live: dict[str, Run] = {}
        self._line = WaitingLine()
        self._placing = Placing(fleet, Decider(policy, router, dice), self._line, config, metrics)
        self._admission, self._health = self._placing.admission, self._placing.health
        self._budget = RetryBudget(router.retry_ratio, router.retry_per_s, metrics)
        self._quarantine = Quarantine(router.quarantine_s, metrics)
        self._moves = Moves(fleet, metrics, self._live.values, self._start_move)
        fleet.on_change = self._moves.look
        fleet.on_report = self._admission.look
        self._around = Around(
            metrics,
            router.client_buffer_tokens,
            config.cluster.drain_timeout_s,
            handoff.peer_timeout_s + handoff.release_timeout_s,
            self._on_first_token,
            self._moves.ended,
        )
        self._epochs = itertools.count(1)

    @property
    def num_inflight(self) -> int:
        return len(self._live)

    def check_early(self, request_id: str, tenant: str, deadline_s: float) -> None:
        """Raises Overloaded for what would be refused whatever it asks."""
        with self._refusals_kept(request_id):
            if len(self._live) >= self._config.max_inflight:
                raise self._too_many()
            self._admission.check_early(tenant, deadline_s)

    def max_model_len(self) -> int:
        """Most tokens, prompt and output, that any known worker holds for one request; 0 while none is known."""
        return self._placing.max_model_len()

    def whereabouts(self, request_id: str) -> str:
        """The worker that speaks for a running request; empty while none does."""
        run = self._live.get(request_id)
        return run.attempt.route.decode if run is not None and run.attempt is not None else ""

    async def generate(
        self, request: Request, last_seen: str | None = None, unknown: Callable[[], Awaitable[None]] | None = None
    ) -> AsyncGenerator[TokenChunk, None]:
        """The tokens of all choices, interleaved: of each choice exactly once and in order. The last chunk of each
        choice has `finish` STOP or LENGTH; it ends when all have ended.

        `last_seen`: the client had begun to read it at a router that is lost to it, and then it ran on this worker (or
        nobody knows where: empty). It goes on where it runs; if that is nowhere it is computed again, to the same
        tokens. All tokens come from the first one on, for text is made of all of them. `unknown` is awaited before it
        is computed because no worker works on it.

        Raises BatonError: Overloaded, InvalidRequest, RequestQuarantined and DeadlineExceeded as they are, PeerLost and
        the like once router.max_attempts are spent. Closing the iterator cancels the request on its workers.
        """
        with self._refusals_kept(request.request_id):
            run = self._admit(request, last_seen)
        run.unknown = unknown
        # The worker ends the request at its deadline; we do, a heartbeat later, if it did not.
        late_at = run.deadline + self._config.heartbeat_s
        timer = asyncio.get_running_loop().call_at(late_at, lambda: run.fail(run.late(), "timeout", "its time is up"))
        outcome: str | None = None
        try:
            while run.delivery.is_open:
                with run.between_attempts():
                    route, resumes = await self._next_route(run, last_seen is not None)
                try:
                    self._dispatch(run, route, resumes)
                    while (chunk := await run.next()) is not None:
                        yield chunk
                except RETRYABLE as e:
                    with run.between_attempts():
                        await self._after_failure(run, e)
        except BatonError as e:
            outcome = e.code
            if not isinstance(e, RETRYABLE):
                self._blame(run, e)
            raise
        finally:
            timer.cancel()
            run.close()
            if self._live.get(request.request_id) is run:
                del self._live[request.request_id]
                self._line.leave(request.request_id)
            if not run.delivery.is_open:
                self._admission.ended(run)
                self._placing.outcomes.ended(run.delivery.num_output_tokens, len(request.choices))
            self._admission.look()
            self.traces.add(self._account(run, outcome or run.delivery.how_it_ended()))

    # ---- admission ----

    @contextmanager
    def _refusals_kept(self, request_id: str) -> Iterator[None]:
        """Who was refused can be told why afterwards, too."""
        try:
            yield
        except BatonError as e:
            self.traces.refuse(request_id, e.message)
            raise

    def _admit(self, request: Request, last_seen: str | None) -> Run:
        before = self._live.get(request.request_id)
        if before is not None and (last_seen is None or before.request.asked != request.asked):
            raise InvalidRequest(f"request {request.request_id} is running. Give each request an id.", "request_id")
        if before is None and len(self._live) >= self._config.max_inflight:
            raise self._too_many()
        self._quarantine.refuse(request)
        run = Run(request, self._around)
        self._placing.check_length(run)
        if last_seen is None:
            self._admission.check(run)
        else:  # it runs, says its client: checked when no worker knows of it
            first = before.attempt.route.decode if before is not None and before.attempt is not None else last_seen
            run.to_ask = [first, *(w for w in self._fleet.talking(Role.DECODE) if w != first)][:MAX_ASKED]
        if before is not None:
            run.let_in = before.let_in
            self._line.leave(request.request_id)
            before.supersede()
        self._live[request.request_id] = run
        self._budget.admitted()
        return run

    def _too_many(self) -> Overloaded:
        return Overloaded(
            f"the router has {len(self._live)} requests, its limit (router.max_inflight). Come back later.",
            retry_after_s=self._admission.retry_after_s(self._admission.tokens / 2),
        )

    # ---- attempts ----

    async def _next_route(self, run: Run, is_resumed: bool) -> tuple[Route, bool]:
        """Where it may run already, and True; else where it shall. Raises Overloaded for what claims to run, is not
        known to any worker, and would not have been let in."""
        known_at = await self._next_to_ask(run)
        if known_at is not None:
            return Route(known_at, None, reason=MAY_KNOW), True
        if is_resumed and not run.let_in:
            if run.unknown is not None:
                await run.unknown()
            self._admission.check(run)
        return await self._placing.place(run), False

    async def _next_to_ask(self, run: Run) -> str | None:
        """A worker that may know of the request already. One that only comes up is waited for, a little: where it ran
        last, it still does."""
        give_up = min(run.deadline, run.arrived + ASK_WAIT_S)
        while run.to_ask:
            worker_id = run.to_ask.pop(0)
            while self._fleet.may_talk_soon(worker_id):
                left_s = give_up - asyncio.get_running_loop().time()
                if left_s <= 0 or not await self._fleet.changed(left_s):
                    break
            if worker_id in self._fleet.talking(Role.DECODE):
                return worker_id
        return None

    def _dispatch(self, run: Run, route: Route, resumes: bool = False) -> None:
        """The next attempt speaks for the request from here on. Raises PeerLost when its worker has just gone.
        `resumes`: it is asked for, and not begun."""
        attempt = self._attempt(run, route, resumes)
        run.begin(attempt)
        run.conclude(attempt.epoch, attempt.decode.capability)
        if not run.delivery.is_open:
            return
        try:
            if resumes:
                attempt.open(run.lacks(attempt), {}, run.hear, run.lose)
            else:
                run.let_in = True
                self._metrics.inc("baton_dispatches_total", prefill="remote" if route.prefill else "local")
                attempt.open(self._submit(run, attempt), self._placing.work(run, route), run.hear, run.lose)
        except PeerLost as e:
            run.fail(e)

    def _start_move(self, run: Run) -> bool:
        """Begin to move it away from where it runs. False: nobody can take it now."""
        source = run.attempt
        assert source is not None, "only what runs moves"
        route = self._placing.place_move(run, source.decode)
        if route is None:
            return False
        move = self._attempt(run, route)
        submit = self._submit(run, move, TakeFrom(source.decode, source.epoch))
        work = {route.decode: Work(context_tokens=run.delivery.num_shared_tokens + run.delivery.num_apart_tokens)}
        try:
            move.open(submit, work, run.hear, run.lose)
        except PeerLost as e:
            log.info("request %s cannot move to %s: %s", run.request.request_id, route.decode, e.message)
            move.close("lose")
            return False
        run.begin_move(move)
        return True

    def _attempt(self, run: Run, route: Route, resumes: bool = False) -> Attempt:
        info = self._fleet.info(route.decode)
        assert info is not None, f"the policy chose {route.decode}, which was not offered"
        return Attempt(run.request.request_id, next(self._epochs), route, info, self._fleet, run.lacks, resumes)

    def _submit(self, run: Run, attempt: Attempt, take_from: TakeFrom | None = None) -> Submit:
        left_s = run.deadline - asyncio.get_running_loop().time()
        crashes_left = max(1, MAX_CRASHES - len(run.aboard))
        route = dataclasses.replace(attempt.route, alternatives=())  # no worker asks what was not chosen
        return Submit(run.delivery.remaining(left_s), route, attempt.epoch, take_from, crashes_left)

    def _on_first_token(self, run: Run, attempt: Attempt) -> None:
        if attempt.resumes:
            run.let_in = True
            self._metrics.inc("baton_resumed_requests_total", lost="router")
        else:
            after_s = asyncio.get_running_loop().time() - attempt.opened_at
            self._placing.outcomes.first_token(attempt.route, after_s)
        self._placing.outcomes.decodes(run.request, attempt.route.decode)
        self._line.placed(run.request.request_id)
        for worker in (attempt.route.decode, attempt.route.prefill and attempt.route.prefill.worker_id):
            if worker:
                self._health.succeeded(worker)
        self._moves.look()

    # ---- after a failure ----

    async def _after_failure(self, run: Run, error: BatonError) -> None:
        """Returns when the next attempt may go. Raises the error once attempts or patience are spent."""
        attempt = run.attempt
        assert attempt is not None, "nothing was sent"
        if attempt.resumes and not attempt.broke and isinstance(error, PeerLost):
            # Its worker gave it up, and its place with it; or it moved, and who took it over is still to be asked.
            run.let_in = run.let_in and isinstance(error, Forgotten)
            return
        if isinstance(error, Overloaded):
            self._note_refusal(run, error)
        else:
            self._blame(run, error)
            await self._note_loss(run, attempt, error)
        log.info("request %s is sent again after attempt %d: %s", run.request.request_id, len(run.records),
                 error.message)
        self._metrics.inc("baton_dispatch_retries_total", reason=error.code)
        run.avoided.update(attempt.avoid)

    def _note_refusal(self, run: Run, error: Overloaded) -> None:
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

    async def _note_loss(self, run: Run, attempt: Attempt, error: BatonError) -> None:
        """Raises the error once attempts are spent, and RequestQuarantined for poison. Waits for the retry budget."""
        run.refused_since = None
        self._line.leave(run.request.request_id)
        run.num_failures += 1
        limit = self._config.max_attempts
        if run.num_failures >= limit:
            raise type(error)(
                f"request {run.request.request_id} failed {limit} times (router.max_attempts); the last: "
                f"{error.message}"
            ) from error
        await self._rule_out_poison(run, attempt)
        if not await self._budget.take(run.deadline):
            raise run.late() from error

    async def _rule_out_poison(self, run: Run, attempt: Attempt) -> None:
        """Before a third worker is given a request under which two streams broke, it must be known whether those were
        crashes; that takes the workers' next word, or `dead_s`."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        lost = [*([attempt.decode.boot_id] if attempt.broke else ()), *attempt.lost_lenders]
        if not attempt.has_last_word and attempt.route.prefill is not None:
            # Who could have told us of them was cut off. A spare was called if those before it crashed.
            called = (lender.boot_id for lender in (attempt.route.prefill, *attempt.route.spares))
            lost += itertools.takewhile(lambda boot_id: self._fleet.crashed(boot_id, now), called)
        run.aboard |= dict.fromkeys(lost, now)
        until = min(run.deadline, now + self._config.dead_s)
        while True:
            known = {boot: self._fleet.crashed(boot, since) for boot, since in run.aboard.items()}
            crashed = [boot for boot, verdict in known.items() if verdict]
            undecided = None in known.values() and len(crashed) < MAX_CRASHES <= len(known)
            if not undecided or loop.time() >= until:
                break
            await self._fleet.changed(min(self._config.heartbeat_s, until - loop.time()))
        run.aboard = {boot: since for boot, since in run.aboard.items() if known[boot] is not False}
        if len(crashed) >= MAX_CRASHES:
            raise self._quarantine.enter(run.request, crashed)
        self._quarantine.refuse(run.request)

    def _blame(self, run: Run, error: BatonError) -> None:
        """Counts it against the workers at fault, if it is a worker's: what a client did wrong, a refusal, or a short
        deadline is not."""
        attempt, now = run.attempt, asyncio.get_running_loop().time()
        if attempt is None:
            return
        mute = isinstance(error, DeadlineExceeded) and run.ttft_s is None and now - attempt.opened_at >= self._mute_s
        if mute or isinstance(error, (PeerLost, IntegrityError, InternalError)):
            for worker_id in attempt.avoid:
                self._health.failed(worker_id, now)

    # ---- the end ----

    def running(self, request_id: str) -> TraceRecord | None:
        """How far a request has come that has not ended; None for any other."""
        run = self._live.get(request_id)
        return None if run is None else self._account(run, RUNNING)

    def _account(self, run: Run, outcome: str) -> TraceRecord:
        total_s = asyncio.get_running_loop().time() - run.arrived
        delivery, attempts = run.delivery, run.attempts()
        return TraceRecord(
            run.request.request_id,
            outcome,
            len(run.request.prompt),
            delivery.num_output_tokens,
            delivery.cached_tokens,
            run.arrived,
            run.ttft_s,
            total_s,
            attempts,
            tuple(run.decisions),
            timeline(attempts, delivery.spans, run.ttft_s, total_s),
        )
