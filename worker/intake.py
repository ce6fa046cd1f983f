"""The decode side of a request: one `Intake` per submit (docs/protocol.md, "Request on the decode worker").

 1. submitted: the cached prefix is held and the rest reserved, or the submit is refused
 2. fetched, if another holder has more of the prefix; called: Prefill goes to the routed worker, then to the spares
 3. bound: at the first publish the credit becomes destination blocks; parts are pulled while the rest is computed
 4. first tokens are forwarded as soon as they come
 5. handed: all verified, the lease released as good: several choices fork, an only one goes on in its blocks
 6. running: the scheduler has the sequences; each step's tokens go to the router
 7. ended: `end` is the one way out, whatever happened

A planned move replaces 2 to 5: the request that runs on a peer is taken over with its KV, its prefix first while it
still runs there. When every prefill worker of the route has failed, the router is asked to choose again, and what was
verified stays cached. Without a prefill worker in the route, the prompt is computed here.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Sequence

from baton.core.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    IntegrityError,
    InternalError,
    NotFound,
    Overloaded,
    RetryRoute,
)
from baton.core.handoff import FirstToken, HandoffState, PrefillCall
from baton.core.machines import DECODE_REQUEST, Life
from baton.core.messages import Submit, TokenChunk
from baton.core.request import Choice, FinishReason, Request, SampledToken, TokenLogprob
from baton.core.sequence import SequenceState, fork_sequence
from baton.core.step import Progress
from baton.core.worker import WorkerInfo
from baton.worker.answer import Answer
from baton.worker.arrival import Arrival
from baton.worker.fetch import fetch_prefix
from baton.worker.handoff import Handoff
from baton.worker.parts import WorkerParts
from baton.worker.spans import Spans
from baton.worker.taking import Taken, take_over
from baton.worker.token_log import TokenLog

log = logging.getLogger(__name__)


class Intake:
    """From submit to the last chunk. `begin` starts it; `end` may be called at any moment, once or often."""

    def __init__(
        self, parts: WorkerParts, submit: Submit, leader: SequenceState, log: TokenLog, ended: Callable[[Intake], None]
    ) -> None:
        """`leader`: what all choices begin with; of an only choice, its sequence. `ended` is called once, when nothing
        is held any more."""
        self.submit = submit
        self.log = log
        self.life = Life(DECODE_REQUEST)
        self._parts = parts
        self.leader = leader
        self._ended = ended
        self.answers = {c.index: Answer(c) for c in submit.request.choices}
        self._arrivals: list[Arrival] = []
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        """The request's deadline."""
        self._lost_lenders: list[str] = []
        self._spans = Spans(parts.worker_id, parts.clock)
        self._num_held = 0
        self._remote_cached: int | None = None

    # ---- life ----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Raises Overloaded when there is no room or no place in the queue; nothing is held then."""
        submit, loop = self.submit, asyncio.get_running_loop()
        if submit.take_from is not None:
            self.life.on("take")
            self._task = loop.create_task(take_over(self, self._parts, submit.take_from))
        elif submit.route.prefill is not None:
            arrival = self.arrive(self.leader)
            self._num_held = arrival.num_held
            self.life.on("call")
            self._task = loop.create_task(self._hand_over(arrival))
        elif submit.route.holder is not None:
            self.life.on("fetch")
            self._task = loop.create_task(self._fetch_and_run(submit.route.holder))
        else:
            self._run_leader()
        if self._task is not None:
            self._task.add_done_callback(self._on_task_done)
        late = DeadlineExceeded("the request's deadline passed before it was finished")
        self._timer = loop.call_later(submit.request.deadline_s, self.end, late)

    @property
    def request(self) -> Request:
        """As others hear of it: with the seed that is used, and what is left of its time."""
        asked = self.submit.request
        left_s = max(0.001, asked.deadline_s - (self._parts.clock() - self._spans.began_s))
        return dataclasses.replace(asked, sampling=asked.seeded_sampling, deadline_s=left_s)

    def arrive(self, seq: SequenceState, may_grow: bool = False) -> Arrival:
        """Room for a sequence, and for what its choices need beside it once they go apart: a copy of the partial tail
        for each but one, or a first block of their own."""
        arrival = Arrival(self._parts, seq, may_grow)
        is_aligned = seq.num_tokens % self._parts.pool.block_size == 0
        arrival.reserve(len(seq.choices) - (0 if is_aligned else 1))
        self._arrivals.append(arrival)
        return arrival

    def end(self, error: BatonError | None = None, event: str = "end") -> None:
        """The one path for end, cancel, deadline, lost router and bugs: everything held goes back, and the router
        hears the last word (now, or if it comes back for it)."""
        if self.life.ended:
            return
        self.life.on(event)
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
        for answer in self.answers.values():
            answer.take_back()
        for request_id in self._engine_ids():
            self._parts.steps.remove(request_id)
        self._last_words(error)
        if self._task is None or self._task.done() or self._task is asyncio.current_task():
            self._give_back()

    def _engine_ids(self) -> list[str]:
        """Everything the scheduler may know of us; it ignores the rest."""
        return [self.leader.request_id, *(a.seq.request_id for a in self.answers.values() if a.seq is not None)]

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        if self.life.ended:
            self._give_back()
        if not task.cancelled() and task.exception() is not None:
            request_id = self.submit.request.request_id
            log.error("hand-off of %s failed with a bug", request_id, exc_info=task.exception())
            self.end(InternalError(f"the hand-off of {request_id} failed; the worker's log says why."))

    def _give_back(self) -> None:
        """What the scheduler does not have. Destinations of pulls that are not terminal are in quarantine by now:
        giving our reference back does not free them."""
        for arrival in self._arrivals:
            arrival.give_back()
        self._arrivals.clear()
        self._ended(self)

    # ---- local prefill -------------------------------------------------------------------------------------------

    async def _fetch_and_run(self, holder: WorkerInfo) -> None:
        try:
            await fetch_prefix(self._parts, self.request, self.submit.epoch, holder)
            self.span("fetch prefix", self._spans.began_s, f"from {holder.worker_id}")
            self.life.on("fetched")
            self._run_leader()
        except BatonError as e:
            self.end(e)

    def _run_leader(self) -> None:
        """What all choices begin with is computed here. Raises Overloaded."""
        only = self._only()
        self._parts.steps.add(self.leader, self._on_progress_of(only) if only else self._on_leader_progress)
        if only is not None:
            only.seq = self.leader
        self.life.on("run")
        self._spans.decode_begins()

    def _on_leader_progress(self, progress: Progress, started: float) -> None:
        if progress.error is not None:
            self.end(progress.error)
            return
        self._spans.add_chunk(progress, started, self._parts.steps.landed_s)
        if not progress.new_tokens:
            return
        for answer, token in zip(self.answers.values(), progress.new_tokens, strict=True):
            if not answer.choice.delivered:
                self._first(answer, token)
        self._spans.decode_begins()
        self._fork(self.leader, self.leader.block_table.blocks)
        self._parts.steps.remove(self.leader.request_id)
        self._end_if_over()

    # ---- remote prefill ------------------------------------------------------------------------------------------

    async def _hand_over(self, arrival: Arrival) -> None:
        """Try the route's prefill workers in turn, with what was verified kept."""
        route = self.submit.route
        assert route.prefill is not None, "nobody to call"
        failure: BatonError | None = None
        for lender in (route.prefill, *route.spares):
            try:
                if failure is not None:
                    self._try_next(arrival, failure)
                await self._hand_over_from(lender, arrival)
            except BatonError as e:
                if self.life.ended:
                    return  # a task group that is cancelled while it fails raises the failure
                failure = e
                self.life.on("bad" if self.life.at("handed") else "fail")
                if self._is_complete() or len(self._lost_lenders) >= self.submit.crashes_left or not self._arrivals:
                    break
            else:
                return
        assert failure is not None, "the loop ends with a return or a failure"
        self._on_no_lender_left(arrival, failure)

    def _try_next(self, arrival: Arrival, cause: BatonError) -> None:
        request_id = self.submit.request.request_id
        self._parts.metrics.inc("baton_fallbacks_total", kind=f"spare_{cause.code}")
        log.warning("request %s: another prefill worker is called: %s", request_id, cause.message)
        self.life.on("spare")
        try:
            arrival.start_over()
        except BatonError:
            self._arrivals.remove(arrival)
            raise

    async def _hand_over_from(self, lender: WorkerInfo, arrival: Arrival) -> None:
        parts = self._parts
        call = PrefillCall(
            self.request, self.submit.epoch, parts.worker_id, arrival.num_held, parts.handoff.lease_ttl_s,
            holder=self.submit.route.holder, router_id=self.log.outbox.router_id,
        )
        handoff = Handoff(parts, lender, call, arrival, self)
        try:
            state = await handoff.run()
        except BatonError:
            if handoff.broke:
                self._lost_lenders.append(lender.boot_id)
            raise
        self._check_output(state)
        self.life.on("hand")
        await handoff.release()
        self.life.on("good")
        self.leader.num_computed_tokens = state.num_computed_tokens
        arrival.publish()
        self._start_answers(arrival)

    def _check_output(self, state: HandoffState) -> None:
        """The lender's state must be what it streamed."""
        for choice in state.choices:
            answer = self.answers[choice.index]
            if choice.output != (*answer.choice.delivered, *answer.first):
                raise IntegrityError(f"choice {choice.index} was handed over with other tokens than were sent")

    def _on_no_lender_left(self, arrival: Arrival, cause: BatonError) -> None:
        """The router chooses again; a route without prefill worker is always taken."""
        if self._is_complete():
            self._end_if_over()  # the first tokens were the last: nothing is left to compute
            return
        self._parts.metrics.inc("baton_fallbacks_total", kind=f"reroute_{cause.code}")
        log.warning("request %s: no prefill worker is left: %s", self.submit.request.request_id, cause.message)
        if arrival in self._arrivals:
            arrival.publish()  # what was verified serves the next attempt from the cache
        if self._parts.handoff.strict:
            self.end(cause)
            return
        self.end(RetryRoute(f"every prefill worker of the route failed; the last: {cause.message}"), "retry")

    def _start_answers(self, arrival: Arrival) -> None:
        """Everything is here and ours."""
        self._spans.decode_begins()
        only = self._only()
        if only is None:
            self._fork(self.leader, arrival.blocks)
        elif only.finish is None:
            self._arrivals.remove(arrival)
            arrival.hand_out()
            only.seq = self.leader
            self._parts.steps.add(self.leader, self._on_progress_of(only))
        self._end_if_over()
        if arrival in self._arrivals:
            self._arrivals.remove(arrival)
            arrival.give_back()

    def _fork(self, leader: SequenceState, blocks: list[int]) -> None:
        """Each choice goes on as a sequence of its own: full blocks shared, the partial tail the first one's, copied
        for the others into blocks that were reserved for it. Without one, the tail is computed again."""
        parts, size, computed = self._parts, self._parts.pool.block_size, leader.num_computed_tokens
        full = computed // size
        reserved = list(blocks[full:])
        tail = reserved.pop(0) if computed % size else None
        for number, answer in enumerate(a for a in self.answers.values() if a.finish is None):
            own = list(blocks[:full])
            if tail is not None and number == 0:
                own.append(tail)
            elif reserved:
                own.append(reserved.pop())
            parts.pool.acquire(own)
            if tail is not None and len(own) == full:
                own.extend(parts.pool.allocate(1) or ())
            choice = Choice(answer.choice.index, (*answer.choice.delivered, *answer.first))
            answer.seq = seq = fork_sequence(leader, choice, own, leader.max_output_tokens)
            if tail is not None and len(own) == full:
                seq.num_computed_tokens = full * size
            elif tail is not None and own[full] != tail:
                parts.memory.block(own[full])[:] = parts.memory.block(tail)
            try:
                parts.steps.add(seq, self._on_progress_of(answer))
            except BatonError as e:
                parts.pool.release(own)
                self.end(e)
                return

    # ---- planned move: here from a peer (worker/taking.py) -------------------------------------------------------

    def adopt(self, taken: Sequence[Taken]) -> None:
        """The peer has forgotten them: they are ours now. The router is told what the client may not have yet."""
        self.life.on("hand")
        self.life.on("good")
        self._spans.decode_begins()
        for one in taken:
            answer, seq, (came,) = one.answer, one.arrival.seq, one.state.choices
            seq.tokens[seq.num_prompt_tokens :] = came.output
            held = one.arrival.num_held * self._parts.pool.block_size  # shared, perhaps: not to be written again
            seq.num_computed_tokens = max(one.state.num_computed_tokens, held)
            answer.seq = seq
            answer.came_with(came.output, came.logprobs)
            self._arrivals.remove(one.arrival)
            one.arrival.hand_out()
            self._parts.steps.add(seq, self._on_progress_of(answer))
            if came.output[answer.sent :]:
                self._say(answer, came.output[answer.sent :], answer.logprobs_from(answer.sent))
        self.log.flush()

    # ---- planned move: from here to a peer (worker/giving.py) ----------------------------------------------------

    def running(self, choice: int) -> Answer:
        """Raises NotFound if it does not run here, Overloaded while it is still arriving."""
        answer = self.answers.get(choice)
        if answer is not None and answer.seq is None and answer.finish is None and not self.life.ended:
            raise Overloaded(f"request {self.submit.request.request_id} is still arriving here. Ask again.")
        if answer is None or answer.seq is None or answer.finish is not None or answer.paused:
            raise NotFound(f"choice {choice} of request {self.submit.request.request_id} does not run here now")
        return answer

    async def pause(self, answer: Answer) -> bool:
        """Stop it at the next step boundary; False: it ended before. `given` follows."""
        assert answer.seq is not None, "only what runs is paused"
        if self.life.ended or answer.finish is not None:
            return False
        if self.life.at("running"):
            self.life.on("move")
        answer.paused = True
        return await self._parts.steps.pause(answer.seq.request_id) and answer.finish is None

    def given(self, answer: Answer, acknowledged: bool) -> None:
        """A paused answer's lease has ended. The last acknowledged one ends us; if one is not, all go on."""
        if not self.life.at("moving_out") or not answer.paused:
            return
        answer.given = acknowledged
        if not acknowledged:
            self.life.on("abandon")
            for one in self.answers.values():
                if one.paused and one.seq is not None:
                    one.take_back()  # nobody may read what it goes on to write
                    one.paused = one.given = False
                    self._parts.steps.resume(one.seq.request_id)
        elif all(a.given or a.said_last for a in self.answers.values()):
            self.end(Cancelled("the peer that took it over speaks for it now"), "release")

    # ---- called by the hand-off ----------------------------------------------------------------------------------

    def published(self) -> None:
        if self.life.at("called"):
            self.life.on("publish")

    def first_token(self, event: FirstToken) -> None:
        """Forward it at once, before the KV is in. Whether it was the last is known here, too: the lender may be gone
        before it can say so."""
        answer = self.answers.get(event.choice)
        if answer is not None and answer.first:
            return  # a spare's: the same token again
        if answer is None or event.index != answer.sent:
            raise IntegrityError(f"a first token of choice {event.choice} at index {event.index} was not asked for")
        if self._only() is answer:
            self.leader.tokens.append(event.token.token_id)
        self._first(answer, event.token)
        self._parts.steps.wake()
        self.log.flush()

    def state_came(self, state: HandoffState, called_s: float) -> None:
        """The lender's bars, moved to our time line by when we called, and what it had cached beyond our own."""
        self._spans.add_lent(state.spans, called_s)
        self._remote_cached = max(0, state.cached_tokens - self._num_held * self._parts.pool.block_size)
        self._say_finished()  # an answer may be complete; only its KV still moves
        self.log.flush()

    def span(self, name: str, start_s: float, detail: str = "") -> None:
        """Record a bar from loop time `start_s` until now."""
        self._spans.add(name, start_s, detail)

    # ---- tokens --------------------------------------------------------------------------------------------------

    def _only(self) -> Answer | None:
        """The answer, if there is just one."""
        return next(iter(self.answers.values())) if len(self.answers) == 1 else None

    def _is_complete(self) -> bool:
        return all(a.finish is not None for a in self.answers.values())

    def _first(self, answer: Answer, token: SampledToken) -> None:
        """The first token of a choice, from a prompt that was computed here or elsewhere."""
        finish = self._parts.steps.scheduler.finish_of(self.leader, token.token_id)
        if finish is None and len(answer.choice.delivered) + 1 >= self.leader.max_output_tokens:
            finish = FinishReason.LENGTH
        answer.finish, answer.first = finish, (token.token_id,)
        answer.sampled(token, self._parts.clock())
        self._say(answer, answer.first, (token.logprob,) if token.logprob else ())

    def _on_progress_of(self, answer: Answer) -> Callable[[Progress, float], None]:
        def listen(progress: Progress, started: float) -> None:
            landed_s = self._parts.steps.landed_s
            if progress.start < self.leader.num_prompt_tokens:
                self._spans.add_chunk(progress, started, landed_s)
                if not answer.token_times:
                    self._spans.decode_begins(landed_s)
            if progress.error is not None:
                self.end(progress.error)
            elif progress.new_tokens:
                (token,) = progress.new_tokens
                answer.sampled(token, landed_s)
                answer.finish = progress.finish
                logprobs = (token.logprob,) if token.logprob else ()
                if answer.finish is None:
                    self._say(answer, (token.token_id,), logprobs)
                    return
                self._parts.steps.remove(progress.request_id)
                self._say_last(answer, (token.token_id,), logprobs)
                self._end_if_over()

        return listen

    def _say_finished(self) -> None:
        for answer in self.answers.values():
            if answer.finish is not None:
                self._say_last(answer)

    def _end_if_over(self) -> None:
        self._say_finished()
        if all(a.said_last for a in self.answers.values()):
            self.end()

    def _say(
        self, answer: Answer, token_ids: tuple[int, ...], logprobs: tuple[TokenLogprob, ...] = (),
        finish: FinishReason | None = None, error: BatonError | None = None,
    ) -> None:
        is_last_word = finish is not None and (error is not None or all(a.said_last for a in self.answers.values()))
        self.log.say(
            TokenChunk(
                self.submit.request.request_id,
                self.log.epoch,
                answer.sent,
                token_ids,
                finish,
                answer.choice.index,
                logprobs,
                lost_lenders=tuple(self._lost_lenders) if error else (),
                error_code=error.code if error else "",
                error_message=error.message if error else "",
                cached_tokens=self._cached_tokens(),
                spans=self._spans.told() if is_last_word else (),
            )
        )
        answer.sent += len(token_ids)

    def _say_last(
        self, answer: Answer, token_ids: tuple[int, ...] = (), logprobs: tuple[TokenLogprob, ...] = ()
    ) -> None:
        if answer.said_last:
            return
        answer.said_last = True
        self._spans.decode_ends(answer.sent + len(token_ids) - len(answer.choice.delivered), answer.token_times)
        self._say(answer, token_ids, logprobs, answer.finish)

    def _last_words(self, error: BatonError | None) -> None:
        """Of an end that is none of the answers' own."""
        self._say_finished()
        left = [a for a in self.answers.values() if not a.said_last]
        if left:
            assert error is not None, f"{self.submit.request.request_id} ends with answers under way, and no reason"
            finish = FinishReason.CANCELLED if isinstance(error, Cancelled) else FinishReason.ERROR
            self._say(left[0], (), (), finish, error)
            for answer in left:
                answer.said_last = True
        self.log.flush()

    def _cached_tokens(self) -> int:
        held = self._num_held * self._parts.pool.block_size
        local = max(held, self.leader.num_cached_tokens)
        cached = local if self._remote_cached is None else held + self._remote_cached
        return min(cached, self.leader.num_prompt_tokens)
