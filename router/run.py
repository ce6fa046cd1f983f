"""One request under way: what its attempts say, in order of arrival, and what its reader gets.

Owns the buffer between the two, the attempt that speaks for the request, and the one that is taking it over (a planned
move). Does not know how a worker is chosen (placing.py), when a request moves (moves.py), or what follows a loss
(dispatch.py). Everything but `next` is called on the loop and never waits, so that exactness does not depend on how
fast a client reads.

Life of a run: admitted -> `begin` an attempt -> tokens; meanwhile a move may begin, and its first chunk makes it the
attempt that speaks -> lost: `next` raises, the dispatcher begins another -> all choices finished, failed or closed.

While a move is under way, the loss of the attempt it moves is not the end: the word of the move is awaited, bounded by
`word_s`. A move has `move_s` to speak. One that ends without may have taken the request from its source all the same:
then the source must speak within `word_s`, or is lost as well.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from baton.core.block_hash import BlockHash, HashScope
from baton.core.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    Incompatible,
    IntegrityError,
    NotFound,
    Overloaded,
    PeerLost,
    ResumedElsewhere,
)
from baton.core.layout import Capability
from baton.core.messages import Resume, TokenChunk
from baton.core.metrics import Metrics
from baton.core.request import Request
from baton.router.attempt import Attempt
from baton.router.decisions import Decision
from baton.router.delivery import Delivery
from baton.router.trace import RUNNING, AttemptRecord
from baton.router.until import Until

RETRYABLE = (Overloaded, PeerLost, Incompatible, IntegrityError)
"""Said by one worker, these may be different at another."""
MAX_DECISIONS = 8
"""Kept of one request."""


@dataclass(frozen=True, slots=True)
class Around:
    """What all runs of a router share."""

    metrics: Metrics
    buffer_tokens: int
    move_s: float
    word_s: float
    first_token: Callable[[Run, Attempt], None]
    """Called with the first token of each attempt."""
    move_ended: Callable[[Run, Attempt, str], None]
    """Called when a move has ended, and how: "moved", "refused", "lost", "late", "finished", "cancelled"."""


class Run:
    def __init__(self, request: Request, around: Around) -> None:
        loop = asyncio.get_running_loop()
        self.request = request
        self.arrived = loop.time()
        self.deadline = self.arrived + request.deadline_s
        self.delivery = Delivery(request)
        self.attempt: Attempt | None = None
        """The one that speaks for the request; the last one, between two."""
        self.move: Attempt | None = None
        self.records: list[AttemptRecord] = []
        self.decisions: deque[Decision] = deque(maxlen=MAX_DECISIONS)
        """Where it was to go, the newest ones: a request may wait through many."""
        self.ttft_s: float | None = None
        # What the dispatcher remembers from one attempt to the next:
        self.let_in = False
        """It was sent, or a worker works on what another router had sent: it waits in no queue (again)."""
        self.unknown: Callable[[], Awaitable[None]] | None = None
        """Awaited before it is computed, if its client said that it runs and no worker works on it."""
        self.avoided: set[str] = set()
        """Workers that refused or failed this request."""
        self.aboard: dict[str, float] = {}
        """Boots that broke under it and may have crashed, and when (the loop's time)."""
        self.num_failures = 0
        """Attempts that were taken on and then lost."""
        self.refused_since: float | None = None
        """Every worker asked since then had no place for it."""
        self.move_after = 0.0
        """Not before (the loop's time): its last move failed."""
        self.move_elsewhere: set[str] = set()
        """Where it failed to move to. They are asked again when nobody else is left."""
        self.to_ask: list[str] = []
        """Workers that may know of it already: asked in this order before it is computed (again)."""
        self.hashes: dict[tuple[HashScope, int], list[BlockHash]] = {}
        """Of what its choices begin with, by way of hashing."""
        self._around = around
        self._buffer: deque[TokenChunk] = deque()
        self._num_buffered = 0
        self._failure: BatonError | None = None
        """Raised once the buffer is empty."""
        self._superseded: ResumedElsewhere | None = None
        """No attempt begins any more."""
        self._waiting = Until()
        self._loss: BatonError | None = None
        """The attempt is lost; the word of the move decides."""
        self._move_bound: asyncio.TimerHandle | None = None
        """When the move must have spoken."""
        self._source_bound: asyncio.TimerHandle | None = None
        """When its source must have, after a move that failed: again and again, for each word may have been said before
        the move took it from there."""
        self._news: asyncio.Future[None] | None = None

    def late(self) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"request {self.request.request_id} has {self.delivery.num_output_tokens} tokens after its deadline of "
            f"{self.request.deadline_s:g} s. Allow more time, ask for fewer tokens, or add workers."
        )

    @property
    def may_move(self) -> bool:
        """Its attempt streams, and no move of it is under way."""
        attempt = self.attempt
        return attempt is not None and self.move is None and attempt.life.at("streaming")

    def attempts(self) -> tuple[AttemptRecord, ...]:
        """Those that are over, then those under way."""
        under_way = (a for a in (self.attempt, self.move) if a is not None and not a.life.ended)
        return (*self.records, *(self._told(a, RUNNING) for a in under_way))

    # ---- the reader's side ---------------------------------------------------------------------------------------

    async def next(self) -> TokenChunk | None:
        """The next chunk for the client; None: all choices have ended. Raises what the attempt was lost with, once
        everything before it was read. Bounded by `fail` at the deadline, which whoever made the run sees to."""
        while not self._buffer:
            if self._failure is not None:
                raise self._failure
            if not self.delivery.is_open:
                return None
            self._news = asyncio.get_running_loop().create_future()
            try:
                await self._news
            finally:
                self._news = None
        chunk = self._buffer.popleft()
        self._num_buffered -= len(chunk.token_ids)
        return chunk

    @contextmanager
    def between_attempts(self) -> Iterator[None]:
        """Around each wait in which no attempt speaks. A run that is superseded leaves it with that error."""
        with self._waiting:
            if self._superseded is not None:
                raise self._superseded
            yield

    def begin(self, attempt: Attempt) -> None:
        self.attempt = attempt
        self._failure = None

    def begin_move(self, move: Attempt) -> None:
        self.move = move
        self._await_move(self._around.move_s)

    def fail(self, error: BatonError, event: str = "lose", why: str = "") -> None:
        """No attempt goes on; the reader hears the error, unless everything is there for it to read. Their workers are
        told at once, however slowly it reads."""
        self._end_all(event, error.code, why=why)
        if self._failure is None and self.delivery.is_open:
            self._failure = error
        self._wake()

    def supersede(self) -> None:
        """Another run of the same request speaks to its client: this one ends, wherever it is. What streams is left to
        the worker's log, where the other one finds it."""
        error = ResumedElsewhere(f"the client of request {self.request.request_id} reads on over another connection.")
        if self.attempt is not None:
            self.attempt.runs_on = self.attempt.life.at("streaming")
        self._superseded = error
        self.fail(error, "cancel")
        self._waiting.end(error)

    def close(self) -> None:
        """The reader has all it wants: what still runs for it is cancelled."""
        self._end_all("cancel", Cancelled.code)

    def conclude(self, epoch: int, capability: Capability) -> None:
        """Choices whose tokens already end them, on such a worker, are finished: it died before it could say so."""
        for chunk in self.delivery.conclude(epoch, capability):
            self._put(chunk)

    def lacks(self, attempt: Attempt) -> Resume:
        """How to ask the attempt's worker for the rest."""
        lacking = tuple((answer.index, len(answer.tokens)) for answer in self.delivery.unfinished)
        return Resume(self.request.request_id, attempt.epoch, self.request.asked, lacking)

    # ---- the workers' side ---------------------------------------------------------------------------------------

    def hear(self, attempt: Attempt, chunk: TokenChunk) -> None:
        """A chunk of the attempt that speaks, or of the move."""
        error = attempt.failure(chunk)
        if attempt is self.move:
            if error is not None and not isinstance(error, ResumedElsewhere):
                self.end_move("refused", error)
                return
            self._switch()
        assert attempt is self.attempt, f"epoch {attempt.epoch} of {attempt.request_id} is closed and still heard"
        if error is not None:
            self._lost(error)
            return
        if self._source_bound is not None:
            self._await_source()
        try:
            fresh = self.delivery.accept(chunk)
        except PeerLost as e:
            self._lost(e)
            return
        if fresh is None:
            self._around.metrics.inc("baton_stale_chunks_total", reason="duplicate")
            return
        if fresh.token_ids and self.ttft_s is None:
            self.ttft_s = asyncio.get_running_loop().time() - self.arrived
        if fresh.token_ids and attempt.streams():
            self._around.first_token(self, attempt)
        self._put(fresh)
        if not self.delivery.is_open:
            attempt.has_last_word = True
            self._end_all("finish", self.delivery.how_it_ended(), "finished")

    def lose(self, attempt: Attempt, error: BatonError) -> None:
        """The stream to the attempt's worker is gone."""
        if attempt is self.move:
            self.end_move("lost", error)
        else:
            self._lost(error)

    def end_move(self, end: str, error: BatonError | None = None) -> None:
        """The move is over and has not spoken. If its source is lost already, so is the request's attempt; else that
        must speak soon: the move may have got further than we heard."""
        move, self.move = self.move, None
        assert move is not None, "no move is under way"
        self._disarm_move()
        event = {"refused": "refuse", "lost": "lose"}.get(end, "cancel")
        self._record(move, event, error.code if error else end, "the move took too long")
        if self._loss is not None:
            loss, self._loss = self._loss, None
            self.fail(loss)
        elif self._source_bound is not None and isinstance(error, NotFound):
            self._source_is_silent()  # an earlier move has taken it from there
        elif self._source_bound is None:
            self._await_source()
        self._around.move_ended(self, move, end)

    # ---- inside --------------------------------------------------------------------------------------------------

    def _switch(self) -> None:
        """The move has spoken: it is the attempt from now on, and what the source still says is stale."""
        move, self.move, self._loss = self.move, None, None
        assert move is not None, "no move is under way"
        self._disarm_move()
        self._disarm_source()
        self._record(self.attempt, "move", "moved", "another worker has taken it over")
        self.attempt = move
        self._around.move_ended(self, move, "moved")

    def _lost(self, error: BatonError) -> None:
        attempt = self.attempt
        assert attempt is not None, "nothing was lost"
        self._disarm_source()
        if isinstance(error, RETRYABLE):
            self.conclude(attempt.epoch, attempt.decode.capability)
        event = "refuse" if isinstance(error, Overloaded) and attempt.life.at("sent") else "lose"
        if not self.delivery.is_open:
            self._end_all(event, error.code, "finished")
        elif self.move is not None and isinstance(error, RETRYABLE):
            self._loss = error
            self._record(attempt, event, error.code)
            self._await_move(self._around.word_s)
        else:
            self.fail(error, event, "the router does not believe what it says")

    def _await_source(self) -> None:
        self._disarm_source()
        self._source_bound = asyncio.get_running_loop().call_later(self._around.word_s, self._source_is_silent)

    def _source_is_silent(self) -> None:
        assert self.attempt is not None, "a move began without a source"
        self._lost(
            PeerLost(f"{self.attempt.route.decode} has said nothing of request {self.request.request_id} since its "
                     "move failed. It is sent to another worker.")
        )

    def _await_move(self, seconds: float) -> None:
        self._disarm_move()
        self._move_bound = asyncio.get_running_loop().call_later(seconds, self.end_move, "late")

    def _put(self, chunk: TokenChunk) -> None:
        limit = self._around.buffer_tokens
        if self._failure is not None:
            return
        if self._num_buffered + len(chunk.token_ids) > limit:
            self._failure = Cancelled(
                f"request {self.request.request_id} was cancelled: its client left more than {limit} tokens unread. "
                "Read faster, or raise router.client_buffer_tokens."
            )
            self._end_all("cancel", Cancelled.code, why="the client reads too slowly")
        else:
            self._buffer.append(chunk)
            self._num_buffered += len(chunk.token_ids)
        self._wake()

    def _end_all(self, event: str, outcome: str, move_end: str = "cancelled", why: str = "") -> None:
        self._loss = None
        self._disarm_source()
        self._disarm_move()
        move, self.move = self.move, None
        if move is not None:
            self._record(move, "cancel", move_end, "the request has ended")
        self._record(self.attempt, event, outcome, why)
        if move is not None:
            self._around.move_ended(self, move, move_end)

    def _disarm_source(self) -> None:
        if self._source_bound is not None:
            self._source_bound.cancel()
            self._source_bound = None

    def _disarm_move(self) -> None:
        if self._move_bound is not None:
            self._move_bound.cancel()
            self._move_bound = None

    def _record(self, attempt: Attempt | None, event: str, outcome: str, why: str = "") -> None:
        if attempt is None or attempt.life.ended:
            return
        attempt.close(event, why)
        self.records.append(self._told(attempt, outcome))

    def _told(self, attempt: Attempt, outcome: str) -> AttemptRecord:
        start_s, now_s = attempt.opened_at - self.arrived, asyncio.get_running_loop().time() - self.arrived
        return AttemptRecord(attempt.epoch, attempt.route, start_s, now_s, outcome)

    def _wake(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)
