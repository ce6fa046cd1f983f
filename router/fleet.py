"""The workers a router knows: discovery, one stream each, and what may be asked of whom.

Owns the links, the prefix index, what is on its way to be held, and the order in which workers are offered. Does not
know prices or retries. What it is asked for each request costs no more with more workers.

Life of a worker here:

1. The registry lists it: a link is opened. Errors and empty lists remove nobody.
2. The registry lists a new boot: the old link ends, its requests fail with PeerLost, everything said about it is void.
3. It has been unreachable for FORGET_S and a registry that lists others does not list it: forgotten.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from baton.core.block_hash import HashScope
from baton.core.config import Config
from baton.core.errors import BatonError, PeerLost
from baton.core.layout import PROTOCOL_VERSION, Capability
from baton.core.messages import Cancel, Resume, Submit, WorkerStatus
from baton.core.metrics import Metrics
from baton.core.services import Dial
from baton.core.worker import Ledger, Role, WorkerInfo, WorkerLoad
from baton.router.coming import Coming
from baton.router.index import PrefixIndex
from baton.router.kinds import Kinds
from baton.router.link import Link, Subscription, Surroundings, Work, WorkerState
from baton.router.policy import Candidate
from baton.router.shortlist import MAX_EQUAL, MAX_LOOKED_AT, Order, shortlist, standing_s

log = logging.getLogger(__name__)

DISCOVER_TIMEOUT_S = 5.0
STATUS_TIMEOUT_S = 0.5
"""Longest that whoever reads counters waits for one worker."""
FORGET_S = 60.0
MANY, OBSERVE_S = 256, 0.1
"""Of so many workers, all are looked at for the gauges no oftener than this and with each poll of the registry. Of
fewer, at each change."""
MAX_PAST_BOOTS = 16
OFFERED_WHOLE = 32
"""Workers known, of both roles: so many are all offered. Of more, a shortlist (shortlist.py)."""
MAX_HOLDERS = 16
"""Lenders of a prefix offered, those that hold most."""
NONE_HELD: Mapping[str, int] = MappingProxyType({})
MAX_CRASHES = 256
"""Crashed boots remembered."""


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker as `baton status` shows it."""

    info: WorkerInfo
    state: WorkerState
    load: WorkerLoad
    ledger: Ledger | None
    pairs: tuple[tuple[str, str, float], ...]
    """(peer, transport, measured bytes/s) of those it has pulled from."""
    num_requests: int
    """Of this router, on this worker."""
    queued_prefill_tokens: int
    """Reported, plus dispatched since."""
    indexed_blocks: int
    silent_s: float
    refused: tuple[tuple[str, str], ...]
    """(peer, why) of each worker that it is never paired with, of either role, and of this router if it is not asked at
    all."""


def _candidate(link: Link, held_blocks: int = 0, expected_blocks: int = 0) -> Candidate:
    load, sent = link.load, link.in_flight
    return Candidate(
        link.info,
        load,
        held_blocks,
        load.queued_prefill_tokens + sent.queued_prefill_tokens,
        load.num_running + load.num_waiting + load.num_arriving + sent.num_sequences,
        link.bandwidth,
        load.queued_prefill_pairs + sent.queued_prefill_pairs,
        load.context_tokens + sent.context_tokens,
        link.silent_s,
        max(held_blocks, expected_blocks),
    )


def _speaks_ours(worker: WorkerInfo) -> bool:
    return PROTOCOL_VERSION in worker.capability.protocol_versions


def context_limit(capability: Capability) -> int:
    """Most tokens, prompt and output, of one sequence on such a worker."""
    return min(capability.max_model_len, capability.num_blocks * capability.layout.block_size)


class Fleet:
    """`run` is the owner of every stream; the rest is called from the same loop and never waits, except `changed`."""

    def __init__(
        self,
        discover: Callable[[], Awaitable[Sequence[WorkerInfo]]],
        dial: Dial,
        config: Config,
        metrics: Metrics,
        router_id: str,
    ) -> None:
        self.index = PrefixIndex()
        self.coming = Coming()
        self._discover = discover
        self._config = config
        self._metrics = metrics
        stall_s = config.handoff.stall_timeout_s
        self._around = Surroundings(
            dial, self.index, config.router, metrics, router_id, self._notify, self._note_crash, stall_s,
            self._heard,
        )
        self.on_change: Callable[[], None] = lambda: None
        """Called, on the loop, whenever some worker's state changed."""
        self.on_report: Callable[[], None] = lambda: None
        """Called, on the loop, with every word of a worker: it may have got room."""
        self._links: dict[str, Link] = {}
        self._boots: dict[str, Link] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._kinds = Kinds()
        self._orders: dict[tuple[Role, int], Order] = {}
        self._change = asyncio.Event()
        self._scopes: tuple[tuple[HashScope, int], ...] | None = None
        self._longest: int | None = None
        self._said_drain: dict[str, None] = {}
        self.num_changes = 0
        """Grows with everything that is heard of or sent to some worker."""
        self._num_dropped = 0
        self._observed_at = -math.inf
        self._crashes: OrderedDict[str, None] = OrderedDict()
        self._registry_failing = False

    # ---- what is known ----

    def workers(self) -> tuple[WorkerView, ...]:
        """Every known worker, by id."""
        return tuple(self._view(self._links[worker_id]) for worker_id in sorted(self._links))

    def info(self, worker_id: str) -> WorkerInfo | None:
        link = self._links.get(worker_id)
        return link.info if link else None

    def max_model_len(self) -> int:
        """Most tokens, prompt and output, that any known decode worker holds for one request, ready or not: limits do
        not change because a stream broke. 0 while none is known."""
        if self._longest is None:
            decode = (link.info for link in self._links.values() if link.info.role is Role.DECODE)
            self._longest = max((context_limit(info.capability) for info in decode), default=0)
        return self._longest

    @property
    def ready(self) -> bool:
        """Can a request be served now? One decode worker is enough: it can prefill alone."""
        decode = (link for link in self._links.values() if link.info.role is Role.DECODE)
        return any(link.state is WorkerState.READY and _speaks_ours(link.info) for link in decode)

    def scopes(self) -> tuple[tuple[HashScope, int], ...]:
        """(scope, block size) of each way in which known workers hash blocks."""
        if self._scopes is None:
            capabilities = [link.info.capability for link in self._links.values()]
            self._scopes = tuple(dict.fromkeys((HashScope.of(c), c.layout.block_size) for c in capabilities))
        return self._scopes

    def candidates(
        self, role: Role, held: Mapping[str, int], coming: Mapping[str, int] = NONE_HELD,
        able: Callable[[Candidate], bool] = lambda _: True, has_room: Callable[[Candidate], bool] | None = None,
        home: str = "",
    ) -> list[Candidate]:
        """READY workers of a role that are `able`, with load as of now: all of them; or of too many a shortlist, if
        `has_room` says who is preferred. `held`, `coming`: leading blocks of one prompt, by worker and by boot.
        `home` is always offered, if it can be."""

        def offer(link: Link) -> Candidate | None:
            info = link.info
            if info.role is not role or link.state is not WorkerState.READY or not _speaks_ours(info):
                return None
            candidate = _candidate(link, held.get(info.worker_id, 0), coming.get(info.boot_id, 0))
            return candidate if able(candidate) else None

        if has_room is None or len(self._links) <= OFFERED_WHOLE:
            return [c for link in self._links.values() if (c := offer(link)) is not None]
        orders = [order for (of, _), order in self._orders.items() if of is role]
        chosen = shortlist(orders, self._having(role, held, coming), offer, has_room)
        at_home = offer(self._links[home]) if home in self._links else None
        return chosen if at_home is None or at_home in chosen else [*chosen, at_home]

    def holders(self, held: Mapping[str, int]) -> list[Candidate]:
        """Workers of either role that can lend what they hold, the one that holds most first. A draining one can."""
        able = (WorkerState.READY, WorkerState.DRAINING)
        links = (link for worker_id in held if (link := self._links[worker_id]).state in able)
        return [_candidate(link, held[link.info.worker_id]) for link in itertools.islice(links, MAX_HOLDERS)]

    def _having(self, role: Role, held: Mapping[str, int], coming: Mapping[str, int]) -> Iterator[Link]:
        """Who holds something of the prompt, or will, most first; few of those that hold equally much."""
        for links, blocks in ((self._links, held), (self._boots, coming)):
            equal, depth = 0, 0
            for name, num_blocks in itertools.islice(blocks.items(), MAX_LOOKED_AT):
                link = links.get(name)
                if link is not None and link.info.role is role:
                    equal, depth = (equal + 1 if num_blocks == depth else 1), num_blocks
                    if equal <= MAX_EQUAL:
                        yield link

    def talking(self, role: Role) -> list[str]:
        """worker_ids of a role that a message can be sent to now, whether they take new requests or not."""
        return [worker_id for worker_id, link in self._links.items() if link.info.role is role and link.talks]

    def may_talk_soon(self, worker_id: str) -> bool:
        """Its stream is being opened; also when the registry was not read yet."""
        link = self._links.get(worker_id)
        return not self._links if link is None else link.state is WorkerState.CONNECTING

    def draining(self) -> list[WorkerInfo]:
        """Who said so and has not gone back on it."""
        links = (self._links.get(worker_id) for worker_id in self._said_drain)
        found = [link.info for link in links if link is not None and link.state is WorkerState.DRAINING]
        self._said_drain = dict.fromkeys(info.worker_id for info in found)
        return found

    def fits(self, one: WorkerInfo, other: WorkerInfo) -> bool:
        """May either of them lend to the other?"""
        return self._kinds.difference(one, other) is None

    def crashed(self, boot_id: str, since: float) -> bool | None:
        """Is that boot known to have crashed: its stream broke, and then its address refused or another boot was there?
        False: it answered after `since` (the loop's time), or what became of it is another thing (it fell silent, it is
        forgotten). None: not known yet."""
        if boot_id in self._crashes:
            return True
        link = next((link for link in self._links.values() if link.info.boot_id == boot_id), None)
        return False if link is None or link.answered_since(since) is not None else None

    async def changed(self, timeout_s: float) -> bool:
        """Wait until some worker became able or unable to take requests; False: nothing happened in that time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._change.wait()
        except TimeoutError:
            return False
        return True

    async def statuses(self) -> tuple[tuple[WorkerInfo, WorkerStatus | None], ...]:
        """Every known worker, by id, with what it says of itself now; None: it did not within STATUS_TIMEOUT_S."""
        infos = [self._links[worker_id].info for worker_id in sorted(self._links)]
        return tuple(zip(infos, await asyncio.gather(*map(self._status, infos)), strict=True))

    async def _status(self, info: WorkerInfo) -> WorkerStatus | None:
        try:
            async with asyncio.timeout(STATUS_TIMEOUT_S):
                status = await self._around.dial(info).status(STATUS_TIMEOUT_S)
        except (BatonError, OSError, TimeoutError) as e:
            log.debug("%s does not tell its counters: %s", info.worker_id, e)
            return None
        return status if status.info.boot_id == info.boot_id else None

    # ---- what is sent ----

    def send(self, worker_id: str, message: Submit | Resume | Cancel) -> None:
        """Queue a message up the worker's stream. Raises PeerLost when it has no stream to go on, and is no cancel."""
        link = self._links.get(worker_id)
        if link is not None:
            link.send(message)
        elif not isinstance(message, Cancel):
            raise PeerLost(f"{worker_id} is not known. Try another worker.")

    def subscribe(self, worker_id: str, subscription: Subscription) -> None:
        """It hears of its attempt, in order of arrival. Raises PeerLost for a worker that is unknown or has no
        stream."""
        link = self._links.get(worker_id)
        if link is None:
            raise PeerLost(f"{worker_id} is not known. Try another worker.")
        link.subscribe(subscription)

    def unsubscribe(self, worker_id: str, subscription: Subscription) -> None:
        link = self._links.get(worker_id)
        if link is not None:
            link.unsubscribe(subscription)

    def charge(self, worker_id: str, epoch: int, work: Work) -> None:
        """Count dispatched work from now on."""
        link = self._links.get(worker_id)
        if link is not None:
            link.in_flight.add(epoch, work)
            self._touch(link)
            if work.hashes:
                self.coming.expect(link.info.boot_id, epoch, work.hashes)

    def settle(self, worker_id: str, epoch: int) -> None:
        """The worker's own reports cover this work now, or it is over."""
        self.coming.settle(epoch)
        link = self._links.get(worker_id)
        if link is not None:
            link.in_flight.settle(epoch)
            self._touch(link)

    # ---- discovery ----

    async def run(self) -> None:
        """Follow the registry and hold a stream to each worker until cancelled; then every stream is closed."""
        try:
            async with asyncio.TaskGroup() as tasks:
                while True:
                    self._learn(await self._poll(), tasks)
                    self._observe()
                    await asyncio.sleep(self._config.cluster.registry_poll_s)
        finally:
            self._tasks.clear()

    async def _poll(self) -> Sequence[WorkerInfo]:
        try:
            async with asyncio.timeout(DISCOVER_TIMEOUT_S):
                found = await self._discover()
        except (BatonError, OSError, TimeoutError) as e:
            if not self._registry_failing:
                log.warning("the registry does not answer (%s); known workers stay", e or "timed out")
            self._registry_failing = True
            return ()
        if self._registry_failing:
            log.warning("the registry answers again")
        self._registry_failing = False
        return found

    def _learn(self, listed: Sequence[WorkerInfo], tasks: asyncio.TaskGroup) -> None:
        for info in listed:
            known = self._links.get(info.worker_id)
            if known is None:
                self._open(Link(info, self._around), tasks)
            elif info.boot_id == known.info.boot_id:
                if info != known.info:  # the same boot in another role
                    self._kinds.forget(info.boot_id)
                    known.info = info
                    self._notice(info)
                    self._touch(known)
            elif info.boot_id not in known.past_boots:
                known.replaced()
                past = (*known.past_boots, known.info.boot_id)[-MAX_PAST_BOOTS:]
                self._close(info.worker_id)
                self._open(Link(info, self._around, past), tasks)
        if listed:
            names = {info.worker_id for info in listed}
            for worker_id in [w for w in self._links if w not in names]:
                link = self._links[worker_id]
                if link.state in (WorkerState.CONNECTING, WorkerState.DEAD) and link.silent_s > FORGET_S:
                    log.warning("%s is forgotten: unreachable for %.0f s, not registered", worker_id, link.silent_s)
                    self._close(worker_id)

    def _open(self, link: Link, tasks: asyncio.TaskGroup) -> None:
        self._notice(link.info)
        self._links[link.info.worker_id] = self._boots[link.info.boot_id] = link
        self._tasks[link.info.worker_id] = tasks.create_task(link.run(), name=f"stream to {link.info.worker_id}")

    def _close(self, worker_id: str) -> None:
        """End a link; its requests fail as soon as its task is cancelled."""
        link = self._links.pop(worker_id)
        del self._boots[link.info.boot_id]
        self._tasks.pop(worker_id).cancel()
        self.index.drop(worker_id)
        self._notice(link.info)
        self._kinds.forget(link.info.boot_id)

    def _notice(self, info: WorkerInfo) -> None:
        """A worker came, went or changed: what was derived from it is derived again."""
        self._scopes = self._longest = None
        for order in self._orders.values():
            order.forget(info.worker_id)
        self._notify()

    # ---- helpers of the above ----

    def _notify(self) -> None:
        self.num_changes += 1
        self._change.set()
        self._change = asyncio.Event()
        if len(self._links) < MANY or asyncio.get_running_loop().time() - self._observed_at >= OBSERVE_S:
            self._observe()
        self.on_change()

    def _heard(self, link: Link) -> None:
        if link.load.draining:
            self._said_drain[link.info.worker_id] = None
        self._touch(link)
        self.on_report()

    def _touch(self, link: Link) -> None:
        """Its load has changed: it stands elsewhere among its like."""
        self.num_changes += 1
        if _speaks_ours(link.info):
            key = link.info.role, self._kinds.of(link.info)
            if key not in self._orders:
                self._orders[key] = Order(lambda link: standing_s(_candidate(link)), self._around.router_id)
            self._orders[key].touch(link)

    def _note_crash(self, boot_id: str) -> None:
        self._crashes[boot_id] = None
        while len(self._crashes) > MAX_CRASHES:
            self._crashes.popitem(last=False)
        self._notify()

    def _observe(self) -> None:
        self._observed_at = asyncio.get_running_loop().time()
        counts = {(role, state): 0 for role in Role for state in WorkerState}
        for link in self._links.values():
            counts[link.info.role, link.state] += 1
        for (role, state), count in counts.items():
            self._metrics.set("baton_workers", count, role=role.value, state=state.value)
        self._metrics.set("baton_index_blocks", self.index.num_blocks)
        self._metrics.inc("baton_index_dropped_total", self.index.num_dropped - self._num_dropped)
        self._num_dropped = self.index.num_dropped

    def _view(self, link: Link) -> WorkerView:
        others = (other.info for other in self._links.values() if other is not link)
        reasons = ((other.worker_id, self._kinds.difference(link.info, other)) for other in others)
        refused = [(name, why) for name, why in reasons if why is not None]
        if not _speaks_ours(link.info):
            theirs = list(link.info.capability.protocol_versions)
            refused.append((self._around.router_id, f"protocol_versions: {theirs} vs [{PROTOCOL_VERSION}]"))
        return WorkerView(
            link.info,
            link.state,
            link.load,
            link.ledger,
            link.pairs,
            link.num_requests,
            link.load.queued_prefill_tokens + link.in_flight.queued_prefill_tokens,
            self.index.num_held(link.info.worker_id),
            link.silent_s,
            tuple(sorted(refused)),
        )
