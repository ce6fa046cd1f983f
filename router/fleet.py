"""The workers a router knows: discovery, one stream each, and what may be asked of whom.

Owns the links, the prefix index and the list of pairs that do not fit. Does not know prices or retries.

Life of a worker here:

1. The registry lists it: a link is opened. Errors and empty lists remove nobody.
2. The registry lists a new boot: the old link ends, its requests fail with PeerLost, everything said about it is void.
3. It has been unreachable for FORGET_S and a registry that lists others does not list it: forgotten.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from baton.core.block_hash import HashScope
from baton.core.config import Config
from baton.core.errors import BatonError, PeerLost
from baton.core.layout import PROTOCOL_VERSION, Capability, difference
from baton.core.messages import Cancel, Submit, WorkerStatus
from baton.core.metrics import Metrics
from baton.core.services import Dial
from baton.core.worker import Ledger, Role, WorkerInfo, WorkerLoad
from baton.router.index import PrefixIndex
from baton.router.link import Key, Link, Subscription, Surroundings, WorkerState
from baton.router.policy import Candidate

log = logging.getLogger(__name__)

DISCOVER_TIMEOUT_S = 5.0
STATUS_TIMEOUT_S = 0.5
"""Longest that whoever reads counters waits for one worker."""
FORGET_S = 60.0
MAX_PAST_BOOTS = 16
MAX_CRASHES = 256
"""Crashed boots remembered."""


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker as `baton status` shows it."""

    info: WorkerInfo
    state: WorkerState
    load: WorkerLoad
    ledger: Ledger | None
    num_requests: int
    """Of this router, on this worker."""
    queued_prefill_tokens: int
    """Reported, plus dispatched since."""
    indexed_blocks: int
    silent_s: float
    refused: tuple[tuple[str, str], ...]
    """(peer, why) of each worker that it is never paired with, of either role, and of this router if it is not asked at
    all."""


def _candidate(link: Link, held_blocks: int) -> Candidate:
    load, in_flight = link.load, link.in_flight
    return Candidate(
        link.info,
        load,
        held_blocks,
        load.queued_prefill_tokens + in_flight.queued_prefill_tokens,
        load.num_running + load.num_waiting + in_flight.num_sequences,
        link.bandwidth,
    )


def _speaks_ours(worker: WorkerInfo) -> bool:
    return PROTOCOL_VERSION in worker.capability.protocol_versions


def _in_order(one: WorkerInfo, other: WorkerInfo) -> tuple[WorkerInfo, WorkerInfo]:
    """Prefill before decode, else by name: a pair is compared, logged and shown one way round."""
    key = (one.role is not Role.PREFILL, one.worker_id), (other.role is not Role.PREFILL, other.worker_id)
    return (one, other) if key[0] <= key[1] else (other, one)


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
        self._discover = discover
        self._config = config
        self._metrics = metrics
        stall_s = config.handoff.stall_timeout_s
        self._around = Surroundings(
            dial, self.index, config.router, metrics, router_id, self._notify, self._note_crash, stall_s,
            lambda: self.on_report(),
        )
        self.on_change: Callable[[], None] = lambda: None
        """Called, on the loop, whenever some worker's state changed."""
        self.on_report: Callable[[], None] = lambda: None
        """Called, on the loop, with every word of a worker: it may have got room."""
        self._links: dict[str, Link] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._differences: dict[tuple[str, str], str | None] = {}
        self._change = asyncio.Event()
        self._scopes: tuple[tuple[HashScope, int], ...] | None = None
        self._crashes: OrderedDict[str, None] = OrderedDict()
        self._registry_failing = False

    # ---- what is known ----

    def workers(self) -> tuple[WorkerView, ...]:
        """Every known worker, by id."""
        return tuple(self._view(self._links[worker_id]) for worker_id in sorted(self._links))

    def info(self, worker_id: str) -> WorkerInfo | None:
        link = self._links.get(worker_id)
        return link.info if link else None

    def capabilities(self, role: Role = Role.DECODE) -> tuple[Capability, ...]:
        """Of every known worker of that role, ready or not: limits do not change because a stream broke."""
        return tuple(link.info.capability for link in self._links.values() if link.info.role is role)

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

    def candidates(self, role: Role, held_blocks: Mapping[str, int]) -> list[Candidate]:
        """READY workers of a role, with load as of now. `held_blocks`: of one prompt, by worker."""
        return [
            _candidate(link, held_blocks.get(worker_id, 0))
            for worker_id, link in self._links.items()
            if link.info.role is role and link.state is WorkerState.READY and _speaks_ours(link.info)
        ]

    def holders(self, held_blocks: Mapping[str, int]) -> list[Candidate]:
        """Workers of either role that can lend what they hold, the one that holds most first. A draining one can."""
        found = [
            _candidate(self._links[worker_id], num_blocks)
            for worker_id, num_blocks in held_blocks.items()
            if self._links[worker_id].state in (WorkerState.READY, WorkerState.DRAINING)
        ]
        return sorted(found, key=lambda c: -c.held_blocks)

    def draining(self) -> list[WorkerInfo]:
        return [link.info for link in self._links.values() if link.state is WorkerState.DRAINING]

    def fits(self, one: WorkerInfo, other: WorkerInfo) -> bool:
        """May either of them lend to the other?"""
        return self._difference(one, other) is None

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

    def send(self, worker_id: str, message: Submit | Cancel) -> None:
        """Queue a message up the worker's stream. Raises PeerLost when a submit has no stream to go on."""
        link = self._links.get(worker_id)
        if link is not None:
            link.send(message)
        elif isinstance(message, Submit):
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

    def charge(self, worker_id: str, key: Key, prefill_tokens: int) -> None:
        """Count dispatched work from now on: `prefill_tokens` to compute there, or (0) a sequence to decode there."""
        link = self._links.get(worker_id)
        if link is not None:
            link.in_flight.add(key, prefill_tokens, asyncio.get_running_loop().time())

    def settle(self, worker_id: str, key: Key) -> None:
        """The worker's own reports cover this work now, or it is over."""
        link = self._links.get(worker_id)
        if link is not None:
            link.in_flight.settle(key)

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
                    known.info = info
                    self._notice(info)
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
        self._links[link.info.worker_id] = link
        self._tasks[link.info.worker_id] = tasks.create_task(link.run(), name=f"stream to {link.info.worker_id}")

    def _close(self, worker_id: str) -> None:
        """End a link; its requests fail as soon as its task is cancelled."""
        link = self._links.pop(worker_id)
        self._tasks.pop(worker_id).cancel()
        self.index.drop(worker_id)
        self._notice(link.info)

    def _notice(self, info: WorkerInfo) -> None:
        """A worker came, went or changed: what was derived from it is derived again."""
        self._scopes = None
        self._differences = {pair: why for pair, why in self._differences.items() if info.boot_id not in pair}
        self._notify()

    # ---- helpers of the above ----

    def _notify(self) -> None:
        self._change.set()
        self._change = asyncio.Event()
        self._observe()

        self.on_change()

    def _note_crash(self, boot_id: str) -> None:
        self._crashes[boot_id] = None
        while len(self._crashes) > MAX_CRASHES:
            self._crashes.popitem(last=False)
        self._notify()

    def _observe(self) -> None:
        counts = {(role, state): 0 for role in Role for state in WorkerState}
        for link in self._links.values():
            counts[link.info.role, link.state] += 1
        for (role, state), count in counts.items():
            self._metrics.set("baton_workers", count, role=role.value, state=state.value)
        self._metrics.set("baton_index_blocks", self.index.num_blocks)

    def _difference(self, one: WorkerInfo, other: WorkerInfo) -> str | None:
        pair = (one.boot_id, other.boot_id)
        if pair not in self._differences:
            first, second = _in_order(one, other)
            why = difference(first.capability, second.capability)
            self._differences[pair] = self._differences[pair[::-1]] = why
            if why is not None:
                log.warning("%s and %s are never paired: %s", first.worker_id, second.worker_id, why)
        return self._differences[pair]

    def _view(self, link: Link) -> WorkerView:
        others = (other.info for other in self._links.values() if other is not link)
        reasons = ((other.worker_id, self._difference(link.info, other)) for other in others)
        refused = [(name, why) for name, why in reasons if why is not None]
        if not _speaks_ours(link.info):
            theirs = list(link.info.capability.protocol_versions)
            refused.append((self._around.router_id, f"protocol_versions: {theirs} vs [{PROTOCOL_VERSION}]"))
        return WorkerView(
            link.info,
            link.state,
            link.load,
            link.ledger,
            link.num_requests,
            link.load.queued_prefill_tokens + link.in_flight.queued_prefill_tokens,
            self.index.num_held(link.info.worker_id),
            link.silent_s,
            tuple(sorted(refused)),
        )
