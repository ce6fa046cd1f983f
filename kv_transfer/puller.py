"""The reader's side of docs/protocol.md, table "Pull": blocks (or one part of each) in,
verified, or not at all.

Owns every pull of this worker, the quarantine, and what was measured about each peer. Does not know requests,
sequences or what the blocks mean.

Life of a pull and of its destination blocks (core/machines.py, PULL):
1. MOVING: the transport may write at any time; the blocks belong to the pull.
2. DONE by the transport -> CHECKING, in the same loop turn -> VERIFIED: the blocks are the caller's.
3. FAILED by the transport, or a digest differs: terminal too; the caller throws the blocks away.
4. deadline or cancellation while the transport is still MOVING: the blocks enter quarantine *before* the caller
   hears of it, because late bytes may land in them for as long as the peer is frozen.
5. `run`, a timer, looks at the quarantine: terminal -> the blocks return; too old, or too many -> the peer is fenced
   and then they return. It never waits for the next request to do so.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from baton.core.config import HandoffConfig
from baton.core.errors import BatonError, DeadlineExceeded, Incompatible, IntegrityError, PeerLost
from baton.core.handoff import LentBlock
from baton.core.machines import PULL, Life
from baton.core.metrics import Metrics
from baton.core.worker import WorkerInfo
from baton.kv_transfer.choose import Figure, Handshake
from baton.kv_transfer.digest import digest
from baton.kv_transfer.memory import KVMemory
from baton.kv_transfer.transport import Pull, PullOrder, PullRefused, PullState, Transport

log = logging.getLogger("baton.kv_transfer")

FENCE_PAUSE_FIRST_S = 1.0
FENCE_PAUSE_MAX_S = 60.0
"""Pause after a fence that failed, before it is tried again; doubles each time."""


class QuarantinePins(Protocol):
    """The block pool, as far as quarantine goes: a pinned block is given to nobody, whoever lets go of it."""

    def quarantine(self, block: int) -> None: ...

    def unquarantine(self, block: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Link:
    """What is known about one boot of one peer."""

    peer_id: str
    boot_id: str
    figures: tuple[Figure, ...]
    """Every common transport as measured; the first is in use."""

    @property
    def transport(self) -> str:
        return self.figures[0].transport

    @property
    def bytes_per_s(self) -> float:
        return self.figures[0].bytes_per_s


@dataclass(slots=True, eq=False)
class _Transfer:
    """A pull and the blocks it owns until it is terminal."""

    pull: Pull
    peer_id: str
    transport: str
    life: Life = field(default_factory=lambda: Life(PULL))
    quarantined_at: float = 0.0
    """Loop time; only while it is quarantined."""

    def hear(self) -> bool:
        """Whether the transport has ended it; then its life goes on."""
        if self.pull.state is PullState.MOVING:
            return False
        self.life.on("land" if self.pull.state is PullState.DONE else "error")
        return True


class Puller:
    """All pulls of one worker. Owns the transports from construction to close()."""

    def __init__(
        self,
        memory: KVMemory,
        transports: Mapping[str, Transport],
        quarantine: QuarantinePins,
        config: HandoffConfig,
        metrics: Metrics,
    ) -> None:
        self._memory = memory
        self._transports = transports
        self._pins = quarantine
        self._config = config
        self._metrics = metrics
        self._handshake = Handshake(memory, transports, config, metrics)
        self._links: dict[str, Link] = {}
        self._connecting: dict[str, tuple[str, asyncio.Task[Link]]] = {}
        """Per peer, the newest boot that was asked for, and its handshake."""
        self._handshakes: set[asyncio.Task[Link]] = set()
        """All that have not ended, those with older boots included."""
        self._transfers: dict[int, _Transfer] = {}
        """By id(): every pull that is MOVING, quarantined ones included."""
        self._pinned: Counter[int] = Counter()
        """Quarantined transfers per block: two parts of one block may be late at once."""
        self._fencing: dict[tuple[str, str], asyncio.Task[None]] = {}
        """(transport, peer) -> the fence under way."""
        self._unfenced: dict[tuple[str, str], tuple[float, float]] = {}
        """(transport, peer) whose fence failed -> (not before, pause): when it is tried again."""
        self._closed = False

    # ---- connecting ----------------------------------------------------------------------------------------------

    async def connect(self, peer: WorkerInfo) -> str:
        """Measure this boot of the peer, once, and return the name of the transport chosen.

        Raises PeerLost or Incompatible; then the next call measures again. Calls for one peer share one handshake.
        Takes no deadline of its own beyond the handshake's (2 x peer_timeout_s per transport).
        """
        return (await self._link(peer)).transport

    async def _link(self, peer: WorkerInfo) -> Link:
        if self._closed:
            raise PeerLost("this worker is closing its transfers.")
        link = self._links.get(peer.worker_id)
        if link is not None and link.boot_id == peer.boot_id:
            return link
        boot_id, task = self._connecting.get(peer.worker_id, ("", None))
        if task is None or boot_id != peer.boot_id:
            task = asyncio.create_task(self._measure(peer, after=task), name=f"handshake {peer.worker_id}")
            self._connecting[peer.worker_id] = (peer.boot_id, task)
            self._handshakes.add(task)
            task.add_done_callback(self._handshakes.discard)
            task.add_done_callback(_retrieve)
        # Not awaited directly: one impatient request must not end the handshake that others wait for.
        await asyncio.wait([task])
        if self._closed or task.cancelled():
            raise PeerLost("this worker is closing its transfers.")
        return task.result()

    async def _measure(self, peer: WorkerInfo, after: asyncio.Task[Link] | None) -> Link:
        """One handshake at a time per peer: a newer boot's waits for the older one's to end."""
        if after is not None:
            await asyncio.wait([after])
        try:
            figures = await self._handshake.choose(peer)
            link = Link(peer.worker_id, peer.boot_id, figures)
            self._links[peer.worker_id] = link
        finally:
            if self._connecting.get(peer.worker_id, ("", None))[1] is asyncio.current_task():
                del self._connecting[peer.worker_id]
        log.info("pulls from %s use %s (%s)", peer.worker_id, link.transport,
                 ", ".join(f"{f.transport} {f.error or f'{f.bytes_per_s / 1e6:.0f} MB/s'}" for f in figures))
        return link

    # ---- pulling -------------------------------------------------------------------------------------------------

    async def pull(
        self, peer: WorkerInfo, lease_id: str, blocks: Sequence[LentBlock], destination: Sequence[int],
        part: tuple[int, int] | None = None,
    ) -> None:
        """Bring blocks[i] into our block destination[i]; return when every digest is right.

        `part`: only the bytes [start, end) of each block, and the digests are of these bytes alone. Pulls of parts that
        do not overlap may share a destination block.

        Raises DeadlineExceeded after handoff.pull_timeout_s, PeerLost (PullRefused if the lender lives but declines),
        Incompatible, IntegrityError. However it ends, no destination block that the caller then lets go of can change
        under its next owner: it is either terminal or quarantined.
        """
        assert len(blocks) == len(destination), f"{len(blocks)} blocks to {len(destination)}"
        assert all(0 <= b < self._memory.num_blocks for b in destination), f"destination {destination} not in the pool"
        transfer: _Transfer | None = None
        name = "none"
        end = "cancelled"
        try:
            async with asyncio.timeout(self._config.pull_timeout_s):
                order = PullOrder(lease_id, tuple(b.block_id for b in blocks), tuple(destination), *(part or ()))
                link = await self._link(peer)
                name = link.transport
                transfer = self._start(peer.worker_id, name, order)
                if self._never_began(transfer.pull):
                    self._let_go(transfer, "failed")
                    self._fall_back(link, transfer.pull)
                    link = await self._link(peer)
                    name = link.transport
                    transfer = self._start(peer.worker_id, name, order)
                await transfer.pull.wait()
            end = self._outcome(transfer, blocks, link)
        except TimeoutError:
            end = "timeout"
            raise DeadlineExceeded(
                f"{len(blocks)} blocks from {peer.worker_id} did not arrive over {name} within "
                f"{self._config.pull_timeout_s:g} s; they stay in quarantine until no late byte can land."
            ) from None
        except (PeerLost, Incompatible) as e:
            end = "refused" if isinstance(e, PullRefused) else "failed"
            raise
        except IntegrityError:
            end = "integrity"
            raise
        finally:
            if transfer is not None:
                self._let_go(transfer, end)
            self._metrics.inc("baton_pulls_total", transport=name, end=end)

    def _start(self, peer_id: str, transport: str, order: PullOrder) -> _Transfer:
        for other in self._transfers.values():
            assert not order.overlaps(other.pull.order, self._memory.block_bytes), (
                f"{order} writes where {other.pull.order} may still write"
            )
        transfer = _Transfer(self._transports[transport].pull(peer_id, order), peer_id, transport)
        self._transfers[id(transfer)] = transfer
        return transfer

    @staticmethod
    def _never_began(pull: Pull) -> bool:
        """The connection was gone before we asked: nothing moved, so another way may be tried at once."""
        return pull.state is PullState.FAILED and not isinstance(pull.error, PullRefused)

    def _fall_back(self, link: Link, pull: Pull) -> None:
        """Forget the link, so that the next handshake finds what still works. Strict: raise instead."""
        if self._links.get(link.peer_id) is link:
            del self._links[link.peer_id]
        self._metrics.inc("baton_fallbacks_total", kind="transport")
        log.warning("transport %s to %s is gone (%s): measuring anew", link.transport, link.peer_id, pull.error)
        if self._config.strict:
            raise pull.error or PeerLost(f"transport {link.transport} to {link.peer_id} is gone")

    def _outcome(self, transfer: _Transfer, blocks: Sequence[LentBlock], link: Link) -> str:
        """Of a terminal pull: 'verified', or raises its error. No await between DONE and the comparison."""
        pull = transfer.pull
        transfer.hear()
        if pull.state is PullState.FAILED:
            error = pull.error or PeerLost(f"the pull from {transfer.peer_id} failed")
            if not isinstance(error, PullRefused) and self._links.get(link.peer_id) is link:
                del self._links[link.peer_id]  # the connection is gone: measure again before the next pull
            raise error
        start, end = pull.order.span(self._memory.block_bytes)
        num_bytes = len(blocks) * (end - start)
        self._metrics.inc("baton_pulled_bytes_total", num_bytes, transport=transfer.transport)
        wrong = [
            b.block_id for b, d in zip(blocks, pull.order.destination, strict=True)
            if digest(self._memory.block(d)[start:end]) != b.digest
        ]
        transfer.life.on("differ" if wrong else "equal")
        if wrong:
            self._metrics.inc("baton_integrity_failures_total", len(wrong), reason="digest")
            raise IntegrityError(
                f"{len(wrong)} of {len(blocks)} blocks pulled from {transfer.peer_id} over {transfer.transport} are "
                f"not what it published (its blocks {wrong[:8]}). They are thrown away and computed again."
            )
        self._metrics.inc("baton_verified_bytes_total", num_bytes)
        return "verified"

    def _let_go(self, transfer: _Transfer, end: str) -> None:
        """The waiter leaves. What is not terminal is quarantined here, before anybody else can run. Idempotent."""
        state, life = transfer.pull.state, transfer.life
        if life.at("quarantined"):
            return
        if life.at("moving"):
            if state is not PullState.FAILED:
                life.on("timeout" if end == "timeout" else "cancel")
            if not transfer.hear():
                self._quarantine(transfer, end)
                return
        self._transfers.pop(id(transfer), None)

    def _quarantine(self, transfer: _Transfer, end: str) -> None:
        transfer.quarantined_at = asyncio.get_running_loop().time()
        self._pin(transfer.pull.order.destination)
        level, why = logging.WARNING, "it did not end in time"
        if end == "cancelled":
            level, why = logging.INFO, "it was cancelled"
        log.log(level, "%d blocks of a pull from %s over %s are quarantined: %s",
                len(transfer.pull.order.destination), transfer.peer_id, transfer.transport, why)

    # ---- quarantine ----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """The quarantine timer, until cancelled or closed. Keeps working when no request ever comes again."""
        while not self._closed:
            await asyncio.sleep(self._config.quarantine_poll_s)
            self.poll()

    def poll(self) -> None:
        """Return what has become terminal; start fences for what is too old or too much."""
        now = asyncio.get_running_loop().time()
        self._return_ended()
        for transfer in self._quarantined():
            if now - transfer.quarantined_at >= self._config.quarantine_max_s:
                self._start_fence(transfer.transport, transfer.peer_id)
        self._fence_over_cap()

    def _fence_over_cap(self) -> None:
        """Above the cap, the peer of the oldest pulls goes first, until what is left is below it."""
        cap = self._config.quarantine_cap * self._memory.num_blocks
        while True:
            waiting = [t for t in self._quarantined() if not self._is_seen_to(t.transport, t.peer_id)]
            if len(_destinations(waiting)) <= cap:
                return
            self._start_fence(waiting[0].transport, waiting[0].peer_id)

    def _start_fence(self, transport: str, peer_id: str) -> None:
        if self._is_seen_to(transport, peer_id):
            return
        self._metrics.inc("baton_fences_total", transport=transport)
        for transfer in self._quarantined():
            if (transfer.transport, transfer.peer_id) == (transport, peer_id):
                transfer.life.on("fence")
        task = asyncio.create_task(self._fence(transport, peer_id), name=f"fence {peer_id} on {transport}")
        self._fencing[transport, peer_id] = task
        task.add_done_callback(_retrieve)

    def _is_seen_to(self, transport: str, peer_id: str) -> bool:
        """A fence is under way, or the last one failed and it is too early for the next."""
        not_before, _ = self._unfenced.get((transport, peer_id), (0.0, 0.0))
        is_early = not self._closed and asyncio.get_running_loop().time() < not_before
        return is_early or (transport, peer_id) in self._fencing

    async def _fence(self, transport: str, peer_id: str) -> None:
        """End every pull from the peer on this transport. A new handshake comes before the next one."""
        again = (transport, peer_id) in self._unfenced
        log.log(logging.DEBUG if again else logging.WARNING, "fencing %s on %s", peer_id, transport)
        self._links.pop(peer_id, None)
        try:
            await self._transports[transport].fence(peer_id)
        except Exception as e:  # whatever it is, bytes may still land: its blocks stay where they are
            self._postpone_fence(transport, peer_id, e)
        else:
            self._unfenced.pop((transport, peer_id), None)
        finally:
            del self._fencing[transport, peer_id]
        self._return_ended()

    def _postpone_fence(self, transport: str, peer_id: str, error: Exception) -> None:
        _, pause_s = self._unfenced.get((transport, peer_id), (0.0, 0.0))
        log.log(logging.DEBUG if pause_s else logging.ERROR,
                "fencing %s on %s failed, its blocks stay in quarantine: %s", peer_id, transport, error)
        pause_s = min(2 * pause_s, FENCE_PAUSE_MAX_S) or FENCE_PAUSE_FIRST_S
        self._unfenced[transport, peer_id] = (asyncio.get_running_loop().time() + pause_s, pause_s)

    def _return_ended(self) -> None:
        """Out of quarantine: whatever no byte can land for any more."""
        for transfer in self._quarantined():
            if transfer.hear():
                del self._transfers[id(transfer)]
                self._unpin(transfer.pull.order.destination)

    def _pin(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            if not self._pinned[block]:
                self._pins.quarantine(block)
                self._metrics.inc("baton_quarantined_blocks_total")
            self._pinned[block] += 1

    def _unpin(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._pinned[block] -= 1
            if not self._pinned[block]:
                del self._pinned[block]
                self._pins.unquarantine(block)

    def _quarantined(self) -> list[_Transfer]:
        """Oldest first."""
        return [t for t in self._transfers.values() if t.life.at("quarantined")]

    # ---- looking in ----------------------------------------------------------------------------------------------

    def links(self) -> tuple[Link, ...]:
        """Per connected peer: every transport as measured, the one in use first."""
        return tuple(self._links.values())

    def bandwidths(self) -> tuple[tuple[str, str, float], ...]:
        """(peer worker_id, transport in use, measured bytes/s), as in StepMessage.pair_bandwidth."""
        return tuple((k.peer_id, k.transport, k.bytes_per_s) for k in self._links.values())

    def in_flight_blocks(self) -> set[int]:
        """Destination blocks that a transport may still write to, quarantined ones included."""
        return _destinations(self._transfers.values())

    def quarantined_blocks(self) -> set[int]:
        """Destination blocks pinned by quarantine."""
        return set(self._pinned)

    def progress(self) -> Iterator[tuple[str, str, int, int]]:
        """(peer worker_id, transport, blocks landed, blocks ordered) of every pull under way."""
        for t in self._transfers.values():
            yield t.peer_id, t.transport, t.pull.moved_blocks, len(t.pull.order.source)

    # ---- closing -------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Fence everything. On return every pull is terminal, its waiter has been told or will be in the next loop
        turn, the quarantine is empty, and the transports serve nobody any more."""
        self._closed = True
        for task in self._handshakes:
            task.cancel()
        if self._handshakes:
            await asyncio.wait(self._handshakes)
        for transfer in list(self._transfers.values()):
            self._start_fence(transfer.transport, transfer.peer_id)
        if self._fencing:
            await asyncio.wait(list(self._fencing.values()))
        async with contextlib.AsyncExitStack() as stack:  # one that fails does not keep the others open
            stack.callback(self._return_ended)
            for transport in self._transports.values():
                stack.push_async_callback(transport.close)


def _destinations(transfers: Iterable[_Transfer]) -> set[int]:
    return {b for t in transfers for b in t.pull.order.destination}


def _retrieve(task: asyncio.Task[object]) -> None:
    """A task whose waiters may all have gone: its error is looked at here, at the latest."""
    if not task.cancelled() and (error := task.exception()) is not None:
        level = logging.DEBUG if isinstance(error, BatonError) else logging.ERROR
        log.log(level, "%s ended with %r", task.get_name(), error, exc_info=error)
