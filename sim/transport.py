"""The simulator's transport: bytes of blocks move between the memories of two workers, in virtual time.

Owns the pulls under way (`Fabric` knows all of them, for faults to hit and to verify). Does not know digests,
quarantine or deadlines: what happens to a pull that is late is the puller's affair, and this is where it is tested.

Life of a pull: each block takes its time on the wire; its bytes are read from the lender at the start of that time
and land at its end. It fails when the lender refuses the lease, resets, or is fenced. A frozen or vanished lender
moves nothing: the pull stays MOVING, and when the lender comes back the late bytes do land.
"""

from __future__ import annotations

import asyncio
import contextvars
import enum
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from baton.core.errors import BatonError, Incompatible, PeerLost
from baton.core.worker import WorkerInfo
from baton.kv_transfer.memory import KVMemory
from baton.kv_transfer.transport import PROBE_LEASE, MayRead, Pull, PullOrder, PullRefused, failed
from baton.sim.loop import SimLoop, SimProcess
from baton.sim.provenance import Mark, Provenance
from baton.sim.trace import Trace


class PullFault(enum.StrEnum):
    SLOW = "slow"
    """Takes twenty times as long."""
    LATE = "late"
    """Stops half way and goes on long after the reader's time-out."""
    NEVER = "never"
    """Stops half way for ever: terminal only by a fence."""
    FAIL = "fail"
    """The transport reports an error half way."""
    CORRUPT = "corrupt"
    """One bit of one block is flipped on the wire."""
    MISPLACED = "misplaced"
    """Every block lands one place further on, the last one at the first place."""
    SHORT = "short"
    """The transport says done, and one block never came."""


@dataclass(frozen=True, slots=True)
class WireSpeed:
    bytes_per_s: float = 2e5
    latency_s: float = 0.001
    poll_s: float = 0.05
    """How often a pull that cannot move looks again."""
    late_s: float = 9.0
    slow_factor: float = 20.0


@dataclass(slots=True)
class Lender:
    """One boot of a worker, as the fabric reaches it."""

    info: WorkerInfo
    memory: KVMemory
    may_read: MayRead
    process: SimProcess
    provenance: Provenance | None = None


@dataclass(eq=False, slots=True)
class Moving:
    """A pull on the wire, for faults and their verification."""

    reader: str
    lender: str
    pull: Pull
    fault: PullFault | None
    generations: tuple[int, ...] = ()
    """Of the destination blocks when they were given to this pull."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    late_landings: int = 0
    """Blocks that landed after a stall: what quarantine is for."""


FaultRule = Callable[[str, str, PullOrder], PullFault | None]
"""(reader, lender, order) -> what goes wrong with this pull."""


class Fabric:
    """The wires between all workers' memories."""

    def __init__(self, loop: SimLoop, trace: Trace, speed: WireSpeed | None = None) -> None:
        self.loop = loop
        self.trace = trace
        self.speed = speed or WireSpeed()
        self.rng: random.Random = loop.fork("fabric")
        self.context = contextvars.Context()
        self.rules: dict[object, FaultRule] = {}
        """By who set them; the first that answers counts."""
        self.reaches: Callable[[str, str], bool] = lambda a, b: True
        """Whether two workers' hosts reach each other (the network's cuts hold for data, too)."""
        self.moving: dict[Moving, None] = {}
        self.hit: list[Moving] = []
        """Pulls that a rule did something to."""
        self._boots: dict[str, Lender] = {}

    def attach(self, lender: Lender) -> None:
        """This boot of a worker serves its memory from now on; an older boot's memory is gone."""
        worker_id = lender.info.worker_id
        self._boots[worker_id] = lender
        for one in [m for m in self.moving if m.lender == worker_id]:
            self.end(one, PeerLost(f"{worker_id} was restarted"))

    def reset(self, a: str, b: str) -> int:
        """Break the data connections between two workers; returns how many pulls that ended."""
        hit = [m for m in self.moving if {m.reader, m.lender} == {a, b}]
        for one in hit:
            self.end(one, PeerLost(f"{one.lender} reset the data connection"))
        return len(hit)

    def boot(self, worker_id: str) -> Lender | None:
        return self._boots.get(worker_id)

    def crash(self, worker_id: str, silent: bool) -> None:
        """The worker was killed: its own pulls stop with it; those from it fail, or (`silent`) hang."""
        gone = self._boots.pop(worker_id, None)
        for one in list(self.moving):
            if one.reader == worker_id:
                del self.moving[one]
                one.ended.set()
            elif one.lender == worker_id and not silent and gone is not None:
                error = PeerLost(f"{worker_id} reset the data connection")
                self.loop.call_later(self.speed.latency_s, self.end, one, error, context=self.context)

    def fault_of(self, reader: str, lender: str, order: PullOrder) -> PullFault | None:
        faults = (rule(reader, lender, order) for rule in self.rules.values())
        return next((f for f in faults if f is not None), None)

    def end(self, one: Moving, error: BatonError | None = None) -> None:
        """Terminal, exactly once."""
        if one not in self.moving:
            return
        del self.moving[one]
        one.ended.set()
        if error is None:
            one.pull.set_done()
        else:
            one.pull.set_failed(error)


class SimTransport:
    """kv_transfer.transport.Transport for one boot of a worker."""

    def __init__(
        self, fabric: Fabric, worker_id: str, memory: KVMemory, provenance: Provenance | None = None
    ) -> None:
        self._fabric = fabric
        self._worker_id = worker_id
        self._memory = memory
        self._provenance = provenance
        self._peers: dict[str, Lender] = {}

    @property
    def name(self) -> str:
        return "sim"

    @property
    def advert(self) -> bytes:
        return self._worker_id.encode()

    async def connect(self, peer: WorkerInfo) -> None:
        known = self._peers.get(peer.worker_id)
        if known is not None and known.info.boot_id == peer.boot_id and not known.process.dead:
            return
        if known is not None:
            await self.fence(peer.worker_id)
        if peer.capability.advert(self.name) is None:
            raise Incompatible(f"{peer.worker_id} does not offer the sim transport")
        await asyncio.sleep(2 * self._fabric.speed.latency_s)
        lender = self._reachable(peer)
        while lender is None:
            await asyncio.sleep(self._fabric.speed.poll_s)
            lender = self._reachable(peer)
        self._peers[peer.worker_id] = lender

    def _reachable(self, peer: WorkerInfo) -> Lender | None:
        """None: it does not answer now. Raises PeerLost when this boot never will."""
        lender = self._fabric.boot(peer.worker_id)
        if lender is None or lender.info.boot_id != peer.boot_id:
            raise PeerLost(f"{peer.worker_id} (boot {peer.boot_id}) does not answer")
        answers = lender.process.running and self._fabric.reaches(self._worker_id, peer.worker_id)
        return lender if answers else None

    def pull(self, peer_id: str, order: PullOrder) -> Pull:
        lender = self._peers.get(peer_id)
        if lender is None or lender.process.dead:
            return failed(order, PeerLost(f"no connection to {peer_id}"))
        one = Moving(self._worker_id, peer_id, Pull(order), self._fabric.fault_of(self._worker_id, peer_id, order))
        if self._provenance is not None and order.lease_id != PROBE_LEASE:
            one.generations = self._provenance.generations(order.destination)
        self._fabric.moving[one] = None
        if one.fault is not None:
            self._fabric.hit.append(one)
            self._fabric.trace.note(self._worker_id, "pull-fault", peer_id, one.fault)
        wire = _Wire(self._fabric, one, lender, self._memory, self._provenance)
        self._fabric.loop.create_task(wire.move(), context=self._fabric.context.copy())
        return one.pull

    async def fence(self, peer_id: str) -> None:
        self._peers.pop(peer_id, None)
        for one in [m for m in self._fabric.moving if m.reader == self._worker_id and m.lender == peer_id]:
            self._fabric.end(one, PeerLost(f"the connection to {peer_id} was fenced"))
        await asyncio.sleep(self._fabric.speed.latency_s)

    async def close(self) -> None:
        for peer_id in list(self._peers):
            await self.fence(peer_id)


class _Wire:
    """Carries one pull. Runs as the world: neither reader nor lender needs to run for bytes to land, except that a
    stopped lender sends nothing."""

    def __init__(
        self, fabric: Fabric, moving: Moving, lender: Lender, destination: KVMemory, reader: Provenance | None
    ) -> None:
        self._fabric = fabric
        self._moving = moving
        self._lender = lender
        self._destination = destination
        self._reader = reader
        self._stalled = False

    async def move(self) -> None:
        fabric, one, order = self._fabric, self._moving, self._moving.pull.order
        half = len(order.source) // 2
        broken = fabric.rng.randrange(len(order.source)) if one.fault in (PullFault.CORRUPT, PullFault.SHORT) else -1
        await self._wait(fabric.speed.latency_s)
        if not self._lender.may_read(order.lease_id, order.source):
            fabric.end(one, PullRefused(f"{one.lender} does not lend {order.source} under {order.lease_id}"))
            return
        for i, source in enumerate(order.source):
            if i == half:
                await self._stall_or_fail()
            if one not in fabric.moving:
                return
            data = bytearray(self._lender.memory.block(source)[order.part])
            mark = self._lender.provenance.mark(source) if self._lender.provenance is not None else None
            await self._wait(len(data) / fabric.speed.bytes_per_s)
            if one not in fabric.moving:
                return
            if i == broken and one.fault is PullFault.CORRUPT:
                data[fabric.rng.randrange(len(data))] ^= 1 << fabric.rng.randrange(8)
            is_short = i == broken and one.fault is PullFault.SHORT
            self._land((i + 1) % len(order.source) if one.fault is PullFault.MISPLACED else i, data, mark, is_short)
        fabric.end(one)

    def _land(self, i: int, data: bytearray, mark: Mark | None, is_short: bool) -> None:
        """What a short pull leaves in a block is not new, and may yet be right: its digest says."""
        one = self._moving
        destination = one.pull.order.destination[i]
        if self._reader is not None and one.generations:
            self._reader.lands(destination, one.generations[i], mark)
        if not is_short:
            self._destination.block(destination)[one.pull.order.part] = data
        one.late_landings += self._stalled

    async def _stall_or_fail(self) -> None:
        fabric, one = self._fabric, self._moving
        if one.fault is PullFault.FAIL:
            fabric.end(one, PeerLost(f"the transport to {one.lender} reported an error"))
        elif one.fault is PullFault.LATE:
            await asyncio.sleep(fabric.speed.late_s)
            self._stalled = True
        elif one.fault is PullFault.NEVER:
            await one.ended.wait()

    async def _wait(self, duration_s: float) -> None:
        """Time on the wire; stands still while the lender is stopped or unreachable."""
        fabric, one = self._fabric, self._moving
        slow = fabric.speed.slow_factor if one.fault is PullFault.SLOW else 1.0
        await asyncio.sleep(duration_s * slow * (0.5 + fabric.rng.random()))
        while one in fabric.moving and not (self._lender.process.running and fabric.reaches(one.reader, one.lender)):
            self._stalled = True
            await asyncio.sleep(fabric.speed.poll_s)
