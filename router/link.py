"""One worker's stream: what is sent up it, what comes down, and who is waiting for it.

Owns the worker's state as docs/protocol.md has it (core/machines.py, WORKER), and the work dispatched to it. It knows
neither prompts nor other workers.

Life of a link:

1. CONNECTING: dials with back-off; the first message brings the worker's prefix map.
2. READY: each message refreshes liveness, load, index and the subscriptions, and never waits for any of them.
3. SUSPECT: nothing heard for `suspect_s`, or work and no engine step for `stall_timeout_s`: it speaks, but stands
   still. A message ends the one, a step (or no work left) the other.
4. DRAINING, as long as the worker says so.
5. The stream broke (CONNECTING): dialling goes on, and the next Hello asks for the rest of every subscription. If the
   address refuses, or another boot answers there, the worker crashed. Then, or after RESUME_S, or when it ended in
   order or fell silent, every subscription fails with PeerLost.
6. DEAD, and counted as lost, after `dead_s` without a word, on a stream or with none that opens. A word revives it.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from baton.core.block_hash import BlockHash
from baton.core.config import RouterConfig
from baton.core.errors import BatonError, PeerLost
from baton.core.machines import WORKER, Life
from baton.core.messages import (
    Cancel,
    Hello,
    KVEvents,
    KVSnapshot,
    Resume,
    StepMessage,
    Submit,
    TokenChunk,
    UpMessage,
)
from baton.core.metrics import Metrics
from baton.core.services import Dial
from baton.core.worker import Ledger, WorkerInfo, WorkerLoad
from baton.router.index import PrefixIndex

log = logging.getLogger(__name__)

BACKOFF_FIRST_S = 0.05
RESUME_S = 1.0
"""Longest that requests wait for a broken stream to come back, if the worker remembers them for so long."""
BACKOFF_MAX_S = 2.0

Key = tuple[str, int]
"""(request_id, epoch)."""


class _Unbelievable(PeerLost):
    """What came over the stream cannot be. It is opened anew."""


class _OtherBoot(PeerLost):
    """Who answers is not who was asked: that one is gone, and all that ran on it."""


class WorkerState(enum.StrEnum):
    """See docs/protocol.md, "Worker as R sees it"."""

    CONNECTING = "connecting"
    READY = "ready"
    SUSPECT = "suspect"
    DRAINING = "draining"
    DEAD = "dead"


_STATES = {state.value: state for state in WorkerState}


@dataclass(frozen=True, slots=True, eq=False)
class Subscription:
    """Who hears of one attempt of one request. All are called on the loop and must not wait."""

    request_id: str
    epoch: int
    put: Callable[[TokenChunk], None]
    fail: Callable[[BatonError], None]
    """No more chunks will come: the stream is gone. At most once."""
    lacks: Callable[[], Resume]
    """How to ask for the rest, on another stream to the same worker."""


class UpQueue:
    """The upward half of one stream, as the iterator a `WorkerService.stream` reads. Cancels go first; a cancel whose
    submit is still here takes it out, and neither is sent."""

    def __init__(self, hello: Hello) -> None:
        self._urgent: deque[UpMessage] = deque([hello])
        self._submits: dict[Key, Submit] = {}
        self._news = asyncio.Event()
        self._closed = False

    def put(self, message: Submit | Resume | Cancel) -> None:
        if isinstance(message, Submit):
            self._submits[message.request.request_id, message.epoch] = message
        elif isinstance(message, Resume) or self._submits.pop((message.request_id, message.epoch), None) is None:
            self._urgent.append(message)
        self._news.set()

    def close(self) -> None:
        """Ends the iteration; what was not sent is dropped."""
        self._closed = True
        self._news.set()

    def __aiter__(self) -> AsyncIterator[UpMessage]:
        return self

    async def __anext__(self) -> UpMessage:
        while not self._closed:
            if self._urgent:
                return self._urgent.popleft()
            if self._submits:
                return self._submits.pop(next(iter(self._submits)))
            self._news.clear()
            await self._news.wait()
        raise StopAsyncIteration


@dataclass(frozen=True, slots=True)
class Work:
    """What one attempt brings to one worker."""

    prefill_tokens: int = 0
    """To compute there. 0: the prompt is computed elsewhere."""
    prefill_pairs: int = 0
    """(query, key) pairs of these."""
    context_tokens: int = 0
    """Of its sequences, once they decode there. 0: they decode elsewhere."""
    hashes: Sequence[BlockHash] = ()
    """Of the blocks it will hold once it has computed the prompt."""


@dataclass(slots=True)
class InFlight:
    """Work this router dispatched to one worker that the worker's own load does not cover yet. The worker says when it
    does, attempt by attempt: nothing counts twice, and nothing is lost between."""

    works: dict[int, Work] = field(default_factory=dict)
    """By epoch."""
    queued_prefill_tokens: int = 0
    queued_prefill_pairs: int = 0
    context_tokens: int = 0

    @property
    def num_sequences(self) -> int:
        return len(self.works)

    def add(self, epoch: int, work: Work) -> None:
        self.works[epoch] = work
        self._sum(work, 1)

    def settle(self, epoch: int) -> None:
        """The worker's load covers it, its first token is out, or its attempt ended. Settled work is no error."""
        work = self.works.pop(epoch, None)
        if work is not None:
            self._sum(work, -1)

    def _sum(self, work: Work, sign: int) -> None:
        self.queued_prefill_tokens += sign * work.prefill_tokens
        self.queued_prefill_pairs += sign * work.prefill_pairs
        self.context_tokens += sign * work.context_tokens


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all links of a router share."""

    dial: Dial
    index: PrefixIndex
    config: RouterConfig
    metrics: Metrics
    router_id: str
    changed: Callable[[], None]
    """Called when a worker's state changed, or what is known of its crash."""
    crashed: Callable[[str], None]
    """Called with the boot id of a worker that is now known to have crashed."""
    stall_timeout_s: float
    reported: Callable[[Link], None]
    """Called after everything that one message said was taken in."""


class Link:
    """One incarnation of one worker. `run` is its only task; everything else is called on the same loop."""

    def __init__(self, info: WorkerInfo, around: Surroundings, past_boots: tuple[str, ...] = ()) -> None:
        self.info = info
        self.past_boots = past_boots
        """Earlier boots of this worker: a registry that still lists one is behind."""
        self.was_ready = False
        self.load = WorkerLoad()
        self.ledger: Ledger | None = None
        self.in_flight = InFlight()
        self.pairs: tuple[tuple[str, str, float], ...] = ()
        """As in StepMessage.pair_bandwidth."""
        self.bandwidth: Mapping[str, float] = {}
        """Of these, by peer."""
        self._around = around
        self._up: UpQueue | None = None
        self._life = Life(WORKER)
        self._now = asyncio.get_running_loop().time
        self.heard = self._moved_on = self._now()
        """When it last spoke; when its engine last did a step, or had nothing to do."""
        self._broke = False
        """Its stream broke and nothing was heard since: it may have crashed."""
        self._alive = False
        """It was READY, and has not been counted as lost since."""
        self._grave: asyncio.TimerHandle | None = None
        """Without a stream: when the silence has been too long."""
        self._subscriptions: dict[str, Subscription] = {}
        self._patience: asyncio.TimerHandle | None = None
        """Without a stream: when subscriptions have waited too long for the next one."""

    @property
    def silent_s(self) -> float:
        return self._now() - self.heard

    @property
    def state(self) -> WorkerState:
        if self._life.state == "ready" and (self.silent_s >= self._around.config.suspect_s or self._stands_still):
            self._life.on("doubt")
        return _STATES[self._life.state]

    @property
    def talks(self) -> bool:
        """A message can be sent to it."""
        return self._up is not None and self._synced

    @property
    def num_requests(self) -> int:
        """Requests of this router that are on this worker."""
        return len(self._subscriptions)

    def send(self, message: Submit | Resume | Cancel) -> None:
        """Queue a message; raises PeerLost without a stream, but not for a cancel: who has unsubscribed is not in the
        next Hello, and that ends it."""
        if self._up is not None:
            self._up.put(message)
        elif not isinstance(message, Cancel):
            raise PeerLost(f"the stream to {self.info.worker_id} is not open. Try another worker.")

    def subscribe(self, subscription: Subscription) -> None:
        """It hears of its attempt until `unsubscribe`, or until the worker is given up. One attempt of a request at a
        time. Raises PeerLost without a stream."""
        request_id = subscription.request_id
        assert request_id not in self._subscriptions, f"{request_id} is already waited for on {self.info.worker_id}"
        if self._up is None:
            raise PeerLost(f"the stream to {self.info.worker_id} is not open. Try another worker.")
        self._subscriptions[request_id] = subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        if self._subscriptions.get(subscription.request_id) is subscription:
            del self._subscriptions[subscription.request_id]

    def answered_since(self, when: float) -> bool | None:
        """Was it alive after `when` (the loop's time), and has its stream not broken since? None: too early to say."""
        if self.state is WorkerState.DEAD:
            return False
        return True if self.heard > when and not self._broke else None

    @property
    def _stands_still(self) -> bool:
        return self.heard - self._moved_on > self._around.stall_timeout_s

    @property
    def _synced(self) -> bool:
        """A stream is open, and its prefix map is in the index."""
        return self._life.at("ready", "suspect", "draining")

    async def run(self) -> None:
        """Keep a stream open, for ever; cancelling ends it."""
        try:
            await self._keep_dialling()
        finally:
            self._stay_up()

    async def _keep_dialling(self) -> None:
        backoff_s = BACKOFF_FIRST_S
        while True:
            why = "the router goes away or follows another boot"
            may_resume = False
            try:
                await self._session()
                why = "the worker closed it"
                if self._life.at("draining"):
                    self._alive = False  # it left in order: that is no loss
            except TimeoutError:
                why = f"nothing was heard within {self._around.config.dead_s:g} s"
                self._declare_dead_if_silent()
            except _OtherBoot as e:
                why = str(e)
            except (BatonError, OSError) as e:
                why = str(e)
                may_resume = self._broke or isinstance(e, _Unbelievable)
            finally:
                was_synced = self._synced
                self._break(f"the stream to {self.info.worker_id} ended: {why}", may_resume)
            if was_synced:
                log.warning("the stream to %s ended: %s", self.info.worker_id, why)
            backoff_s = BACKOFF_FIRST_S if was_synced else min(2 * backoff_s, BACKOFF_MAX_S)
            await asyncio.sleep(backoff_s)

    async def _session(self) -> None:
        """One stream, from Hello to its end. Raises what broke it; TimeoutError: no prefix map or no word for
        `dead_s`."""
        loop, dead_s = asyncio.get_running_loop(), self._around.config.dead_s
        running = tuple(subscription.lacks() for subscription in self._subscriptions.values())
        up = self._up = UpQueue(Hello(self._around.router_id, running))
        stream = self._around.dial(self.info).stream(up)
        heard_before = self.heard
        try:
            async with asyncio.timeout(dead_s) as silence:
                async for message in stream:
                    self._take(message)
                    if self._synced:  # until then the deadline is that of the prefix map
                        silence.reschedule(loop.time() + dead_s)
        except (_Unbelievable, _OtherBoot, TimeoutError):
            raise
        except (PeerLost, OSError):
            self._note_break(refused=self.heard == heard_before)
            raise
        finally:
            up.close()
            if isinstance(stream, AsyncGenerator):
                await stream.aclose()

    def _note_break(self, refused: bool) -> None:
        """The stream broke under us: it neither ended in good order, nor fell silent, nor did we give it up."""
        if refused and self._broke:
            self._crashed()
        elif self._synced:
            self._broke = True

    def _take(self, message: StepMessage) -> None:
        """Everything one message says. Raises PeerLost when the stream can no longer be believed."""
        if message.boot_id != self.info.boot_id:
            if self._broke:
                self._crashed()
            raise _OtherBoot(
                f"boot {message.boot_id} of {self.info.worker_id} answered for boot {self.info.boot_id}"
            )
        before = self.state
        now = self.heard = asyncio.get_running_loop().time()
        self._broke = False
        if self._patience is not None:
            self._stop_waiting()
            self._around.metrics.inc("baton_resumed_requests_total", len(self._subscriptions), lost="stream")
        if self._life.at("dead"):
            self._life.on("open")
        is_idle = message.load.num_running + message.load.num_waiting == 0
        if is_idle or message.load.steps != self.load.steps or not self._synced:
            self._moved_on = now
        self.load = message.load
        if message.ledger is not None:
            self.ledger, self.pairs = message.ledger, message.pair_bandwidth
            self.bandwidth = {peer: bytes_per_s for peer, _, bytes_per_s in self.pairs}
        for epoch in message.taken:
            self.in_flight.settle(epoch)
        for chunk in message.chunks:
            self._deliver(chunk)
        if message.snapshot is not None:
            self._resync(message.snapshot)
        self._follow_state()
        if self._synced:
            self._follow(message.kv_events)
        self._around.reported(self)
        if self.state is not before:
            self._around.changed()

    def _follow_state(self) -> None:
        """What its newest load says of its state."""
        life, draining = self._life, self.load.draining
        if life.at("suspect") and not self._stands_still and not draining:
            life.on("word")
        if life.at("ready", "suspect") and draining:
            life.on("drain")
        elif life.at("draining") and not draining:
            life.on("resume")

    def _crashed(self) -> None:
        self._broke = False
        self._around.crashed(self.info.boot_id)

    def _resync(self, snapshot: KVSnapshot) -> None:
        if self.was_ready or self.past_boots:
            self._around.metrics.inc("baton_index_resyncs_total")
        self.was_ready = self._alive = True
        self._stay_up()
        self._around.index.apply_snapshot(self.info.worker_id, self.info.boot_id, snapshot)
        if self._life.at("connecting"):
            self._life.on("snapshot")

    def _follow(self, changes: tuple[KVEvents, ...]) -> None:
        for events in changes:
            if not self._around.index.apply(self.info.worker_id, self.info.boot_id, events):
                raise _Unbelievable(f"KV events before {events.seq} of {self.info.worker_id} are missing")

    def _deliver(self, chunk: TokenChunk) -> None:
        subscription = self._subscriptions.get(chunk.request_id)
        if subscription is None or subscription.epoch != chunk.epoch:
            reason = "unknown" if subscription is None else "epoch"
            self._around.metrics.inc("baton_stale_chunks_total", reason=reason)
        else:
            subscription.put(chunk)

    def lose(self) -> None:
        """Its death is certain: count it, once for each time it was READY."""
        if self._alive:
            self._alive = False
            self._around.metrics.inc("baton_worker_lost_total", role=self.info.role.value)

    def replaced(self) -> None:
        """The registry lists another boot of it. Unless it had fallen silent before, it crashed."""
        self.lose()
        if self._broke or self.state is WorkerState.READY:
            self._crashed()

    def _declare_dead_if_silent(self) -> None:
        """If it was alive and `dead_s` have passed without a word; before they have, look again when they will."""
        self._stay_up()
        loop, dead_at = asyncio.get_running_loop(), self.heard + self._around.config.dead_s
        if self._alive and loop.time() < dead_at:
            self._grave = loop.call_at(dead_at, self._declare_dead_if_silent)
        elif self._alive:
            self.lose()
            if self._life.at("ready"):
                self._life.on("doubt")
            self._life.on("bury")
            self._around.index.drop(self.info.worker_id)
            log.warning("%s is dead: nothing heard for %.1f s", self.info.worker_id, self.silent_s)
            self._around.changed()

    def _stay_up(self) -> None:
        if self._grave is not None:
            self._grave.cancel()
            self._grave = None

    def _break(self, why: str, may_resume: bool) -> None:
        """The stream is gone; its requests wait for the next one, if it may come."""
        self._up = None
        if self._synced:
            self._life.on("break")
            self._declare_dead_if_silent()
        self.in_flight = InFlight()
        if not may_resume:
            self._give_up(why)
        elif self._subscriptions and self._patience is None:
            wait_s = min(RESUME_S, self._around.config.orphan_window_s / 2)
            self._patience = asyncio.get_running_loop().call_later(wait_s, self._give_up, why)
        self._around.changed()

    def _give_up(self, why: str) -> None:
        """Its requests go elsewhere."""
        self._stop_waiting()
        lost, self._subscriptions = self._subscriptions, {}
        for subscription in lost.values():
            subscription.fail(PeerLost(f"{why}. Its requests go to other workers."))

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
