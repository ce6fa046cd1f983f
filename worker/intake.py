"""The decode side of a request: one `Intake` per submit (docs/protocol.md, "Request on the decode worker").

 1. submitted: the cached prefix is pinned and credit for the rest reserved, or the submit is refused
 2. called: Prefill goes to the routed worker
 3. bound: at the first publish the credit becomes destination blocks; chunks are pulled while the next is computed
 4. the first token is forwarded as soon as it comes
 5. handed: all blocks verified, the lease released as good: they enter the prefix map
 6. running: the scheduler has the sequence; each step's token goes to the router
 7. ended: `end` is the one way out, whatever happened

When prefill or a pull fails, the verified prefix is kept and the sequence goes to our own scheduler: a counted
fallback with the same tokens. Without a prefill worker in the route steps 2 to 5 do not happen.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass

from baton.core.errors import BatonError, Cancelled, DeadlineExceeded, InternalError, Overloaded
from baton.core.handoff import FirstToken, HandoffState
from baton.core.messages import Submit, TokenChunk
from baton.core.metrics import Metrics
from baton.core.request import FinishReason
from baton.core.sequence import SequenceState
from baton.core.services import Dial
from baton.core.step import Progress
from baton.core.worker import Span, WorkerInfo
from baton.engine.block_pool import BlockPool, Credit
from baton.kv_transfer.puller import Puller
from baton.worker.handoff import Handoff
from baton.worker.outbox import Outbox
from baton.worker.steps import StepLoop

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class IntakeParts:
    """What every Intake of a worker shares."""

    worker_id: str
    steps: StepLoop
    pool: BlockPool
    block_bytes: int
    puller: Puller
    dial: Dial
    metrics: Metrics
    clock: Callable[[], float]
    peer_timeout_s: float
    stall_timeout_s: float
    lease_ttl_s: float
    release_timeout_s: float
    strict: bool
    ended: Callable[[Intake], None]
    """Called once, when the intake holds nothing any more."""
    spawn: Callable[[Coroutine[None, None, None]], None]
    """Run to completion in the background, owned by the node."""


class Intake:
    """From submit to the last chunk. `begin` starts it; `end` may be called at any moment, once or often."""

    def __init__(self, parts: IntakeParts, submit: Submit, seq: SequenceState, outbox: Outbox) -> None:
        self.submit = submit
        self.seq = seq
        self.outbox = outbox
        self._parts = parts
        self._started_s = parts.clock()
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        """The request's deadline."""
        self._ended = False
        self._credit: Credit | None = None
        self.in_scheduler = False
        """The scheduler holds the blocks from here on."""
        self._delivered = len(submit.request.delivered)
        self._said_last = False
        self._verified: set[int] = set()
        """Indices in the block table whose KV is ours: held before, or pulled and verified."""
        self._num_held = 0
        self._spans: list[Span] = []
        self._handed = False
        self._remote_cached = 0
        self._decode_started_s: float | None = None

    # ---- life ----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Raises Overloaded when there is no credit or no place in the queue; nothing is held then."""
        if self.submit.route.prefill is None:
            self._to_scheduler()
        else:
            self._call(self.submit.route.prefill)
        late = DeadlineExceeded("the request's deadline passed before it was finished")
        self._timer = asyncio.get_running_loop().call_later(self.submit.request.deadline_s, self.end, late)

    def _call(self, lender: WorkerInfo) -> None:
        parts, seq = self._parts, self.seq
        hashes = parts.steps.scheduler.hashes(seq, (seq.num_tokens - 1) // parts.pool.block_size)
        held = parts.pool.match(hashes)
        parts.pool.acquire(held)
        needed = -(-(seq.num_tokens + 1) // parts.pool.block_size) - len(held)
        # Sequences that already wait for blocks come first, or a stream of credits would starve them.
        if needed + parts.steps.scheduler.num_blocks_wanted <= parts.pool.num_available:
            self._credit = parts.pool.reserve(needed)
        if self._credit is None:
            parts.pool.release(held)
            raise Overloaded(
                f"{parts.worker_id} has {parts.pool.num_available} blocks available, the prompt needs {needed}. "
                "Try again later, or add decode workers."
            )
        seq.block_table.blocks.extend(held)
        self._num_held = len(held)
        self._verified.update(range(len(held)))
        self._task = asyncio.get_running_loop().create_task(self._hand_over(lender))
        self._task.add_done_callback(self._on_task_done)

    def end(self, error: BatonError | None = None, finish: FinishReason | None = None) -> None:
        """The one path for end, cancel, deadline, lost router and bugs: everything held goes back, and the router
        hears the last word (unless its stream is closed)."""
        if self._ended:
            return
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()
        parts = self._parts
        if self.seq.finish is not None:
            error, finish = None, self.seq.finish  # all its tokens are out, only their KV was still moving
        if self._task is not None:
            self._task.cancel()
        if self.in_scheduler:
            parts.steps.remove(self.seq.request_id)
        self._last_word(error, finish)
        if self._task is None or self._task.done():
            self._give_back()

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        if self._ended:
            self._give_back()
        if not task.cancelled() and task.exception() is not None:
            request_id = self.submit.request.request_id
            log.error("hand-off of %s failed with a bug", request_id, exc_info=task.exception())
            self.end(InternalError(f"the hand-off of {request_id} failed; the worker's log says why."))

    def _give_back(self) -> None:
        """Blocks and credit, unless the scheduler has the sequence and gives them back itself. Destinations of pulls
        that are not terminal are in quarantine by now: giving our reference back does not free them."""
        if not self.in_scheduler:
            self._parts.pool.release(self.seq.block_table.blocks)
            self.seq.block_table.blocks.clear()
            self._drop_credit()
            self._parts.steps.wake()
        self._parts.ended(self)

    def _drop_credit(self) -> None:
        if self._credit is not None:
            self._parts.pool.drop(self._credit)
            self._credit = None

    # ---- remote prefill ------------------------------------------------------------------------------------------

    async def _hand_over(self, lender: WorkerInfo) -> None:
        failure: BatonError | None = None
        try:
            await Handoff(self, self._parts, lender).run()
        except BatonError as e:
            failure = e
        if self._ended:
            return  # a task group that is cancelled while it fails raises the failure: `_on_task_done` cleans up
        if failure is not None:
            self._fall_back(failure)
            return
        if self.seq.finish is None:
            self._to_scheduler()
            return
        # The first token was the last: the KV still serves whoever asks next.
        full = self.seq.num_computed_tokens // self._parts.pool.block_size
        for index, block_hash in enumerate(self._parts.steps.scheduler.hashes(self.seq, full)):
            if index >= self._num_held:
                self._parts.pool.publish(self.seq.block_table.blocks[index], block_hash)
        self.end(finish=self.seq.finish)

    def _fall_back(self, cause: BatonError) -> None:
        """Prefill here, from the verified prefix on. The blocks after it go back (those still being written to are in
        quarantine and stay there)."""
        parts, seq = self._parts, self.seq
        if seq.finish is not None:
            self.end(finish=seq.finish)  # the first token was the last: nothing is left to compute
            return
        kind = f"local_prefill_{cause.code}"
        parts.metrics.inc("baton_fallbacks_total", kind=kind)
        log.warning("request %s: prefill falls back to this worker: %s", self.submit.request.request_id, cause.message)
        if parts.strict:
            self.end(cause)
            return
        good, limit = 0, min(len(seq.block_table.blocks), (seq.num_tokens - 1) // parts.pool.block_size)
        while good < limit and good in self._verified:
            good += 1
        parts.pool.release(seq.block_table.blocks[good:])
        del seq.block_table.blocks[good:]
        self._drop_credit()
        seq.num_computed_tokens = good * parts.pool.block_size
        self._to_scheduler()

    def _to_scheduler(self) -> None:
        try:
            self._parts.steps.add(self.seq, self._on_progress)
        except Overloaded as e:
            if self._task is None:
                raise
            self.end(e)
            return
        self.in_scheduler = True
        self._decode_started_s = self._parts.clock()
        self._parts.steps.wake()

    # ---- called by the hand-off ----------------------------------------------------------------------------------

    def bind(self) -> None:
        """First publish: credit becomes blocks."""
        assert self._credit is not None, "bound twice"
        self.seq.block_table.blocks.extend(self._parts.pool.bind(self._credit))
        self._credit = None

    def is_bound(self) -> bool:
        return self._credit is None

    @property
    def num_held(self) -> int:
        return self._num_held

    def verified(self, indices: set[int]) -> None:
        self._verified |= indices

    def is_verified(self, num_blocks: int) -> bool:
        """Every one of the first blocks is ours."""
        return self._verified.issuperset(range(num_blocks))

    def forget_received(self) -> None:
        """The lease was not good: only what we held before is ours."""
        self._verified = set(range(self._num_held))

    def first_token(self, event: FirstToken) -> None:
        """Forward it at once, before the KV is in. Whether it was the last is known here, too: the lender may be gone
        before it can say so."""
        if event.index != self._delivered or event.index != self.seq.num_output_tokens:
            raise InternalError(f"first token has index {event.index}, expected {self._delivered}")
        self.seq.tokens.append(event.token_id)
        self._emit(event.index, (event.token_id,))
        self._parts.steps.wake()
        self.outbox.flush()
        self.seq.finish = self._parts.steps.scheduler.finish_of(self.seq, event.token_id)

    def span(self, name: str, start_s: float, detail: str = "") -> None:
        """Record a bar from loop time `start_s` until now."""
        self._spans.append(Span(name, start_s - self._started_s, self._parts.clock() - self._started_s, detail))

    def foreign_spans(self, state: HandoffState, called_s: float) -> None:
        """The lender's bars, moved to our time line by when we called, and what it had cached beyond our own."""
        self._handed = True
        offset = called_s - self._started_s
        self._spans += [Span(s.name, s.start_s + offset, s.end_s + offset, s.detail) for s in state.spans]
        self._remote_cached = max(0, state.cached_tokens - self._num_held * self._parts.pool.block_size)
        if self.seq.finish is not None:
            self._last_word(None, self.seq.finish)  # the answer is complete; only its KV still moves

    # ---- tokens --------------------------------------------------------------------------------------------------

    def _on_progress(self, progress: Progress, started: float) -> None:
        if progress.new_token is None:
            self.span("prefill chunk (local)", started, f"{progress.num_computed_tokens - progress.start} tokens")
            return
        if progress.finish is None:
            self._emit(progress.num_output_tokens - 1, (progress.new_token,))
        else:
            self.end(finish=progress.finish)

    def _emit(self, first_index: int, token_ids: tuple[int, ...]) -> None:
        self.outbox.put(
            TokenChunk(
                self.submit.request.request_id,
                self.submit.epoch,
                first_index,
                token_ids,
                cached_tokens=self._cached_tokens(),
            )
        )
        self._delivered = first_index + len(token_ids)

    def _cached_tokens(self) -> int:
        held = self._num_held * self._parts.pool.block_size
        cached = held + self._remote_cached if self._handed else max(held, self.seq.num_cached_tokens)
        return min(cached, self.seq.num_prompt_tokens)

    def _last_word(self, error: BatonError | None, finish: FinishReason | None) -> None:
        if self._said_last:
            return
        self._said_last = True
        if self._decode_started_s is not None:
            steps = self.seq.num_output_tokens - len(self.submit.request.delivered)
            self.span("decode", self._decode_started_s, f"{steps} tokens")
        first = self._delivered
        rest = tuple(self.seq.tokens[self.seq.num_prompt_tokens + first :]) if finish is not None else ()
        if error is not None:
            finish = FinishReason.CANCELLED if isinstance(error, Cancelled) else FinishReason.ERROR
        self.outbox.put(
            TokenChunk(
                self.submit.request.request_id,
                self.submit.epoch,
                first,
                rest,
                finish,
                error_code=error.code if error else "",
                error_message=error.message if error else "",
                cached_tokens=self._cached_tokens(),
                spans=tuple(self._spans),
            )
        )
        self.outbox.flush()
