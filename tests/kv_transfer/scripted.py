"""A second implementation of Transport, for tests on virtual time: it moves bytes between memories of one process,
when and as far as the test says."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from baton.core.errors import BatonError, PeerLost
from baton.core.worker import WorkerInfo
from baton.kv_transfer.memory import KVMemory
from baton.kv_transfer.transport import PROBE_LEASE, Pull, PullOrder, PullState, failed


@dataclass(eq=False)
class ScriptedTransport:
    """Probes move at `bytes_per_s`; every other pull stays MOVING until the test calls `land` or `fail`."""

    name: str
    memory: KVMemory
    lenders: dict[str, KVMemory]
    bytes_per_s: float = 1e6
    connect_error: BatonError | None = None
    connect_s: float = 0.01
    fence_s: float = 0.1
    fence_error: BatonError | None = None
    close_error: BatonError | None = None
    advert: bytes = b"scripted"
    connects: list[tuple[str, str]] = field(default_factory=list)
    fences: list[str] = field(default_factory=list)
    moving: list[tuple[str, Pull]] = field(default_factory=list)
    destinations: set[int] = field(default_factory=set)
    """Every block a pull was ever told to fill."""
    closed: bool = False
    _connected: set[str] = field(default_factory=set)

    async def connect(self, peer: WorkerInfo) -> None:
        self.connects.append((peer.worker_id, peer.boot_id))
        await asyncio.sleep(self.connect_s)
        if self.connect_error is not None:
            raise self.connect_error
        self._connected.add(peer.worker_id)

    def pull(self, peer_id: str, order: PullOrder) -> Pull:
        if peer_id not in self._connected:
            return failed(order, PeerLost(f"no connection to {peer_id}"))
        pull = Pull(order)
        self.moving.append((peer_id, pull))
        self.destinations.update(order.destination)
        if order.lease_id == PROBE_LEASE:
            delay = len(order.source) * self.memory.block_bytes / self.bytes_per_s
            asyncio.get_running_loop().call_later(delay, self._land_if_moving, pull)
        return pull

    async def fence(self, peer_id: str) -> None:
        self.fences.append(peer_id)
        self._connected.discard(peer_id)
        await asyncio.sleep(self.fence_s)
        if self.fence_error is not None:
            raise self.fence_error
        for owner, pull in list(self.moving):
            if owner == peer_id:
                self.fail(pull, PeerLost("fenced"))

    async def close(self) -> None:
        for peer_id in sorted({p for p, _ in self.moving}):
            await self.fence(peer_id)
        if self.close_error is not None:
            raise self.close_error
        self.closed = True

    def _land_if_moving(self, pull: Pull) -> None:
        if pull.state is PullState.MOVING:
            self.land(pull)

    def land(self, pull: Pull) -> None:
        peer_id = self._end(pull)
        for source, destination in zip(pull.order.source, pull.order.destination, strict=True):
            self.memory.block(destination)[pull.order.part] = self.lenders[peer_id].block(source)[pull.order.part]
        pull.set_done()

    def fail(self, pull: Pull, error: BatonError) -> None:
        self._end(pull)
        pull.set_failed(error)

    def _end(self, pull: Pull) -> str:
        entry = next(e for e in self.moving if e[1] is pull)
        self.moving.remove(entry)
        return entry[0]
