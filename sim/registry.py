"""The registry of the simulated world: reached over the network, and as unreliable as a Redis can be.

Entries expire as Redis' do. A fault may take it away (`outage`), let it answer from a replica that is behind (`lag`),
or empty it. Production code must not need more of it than it promises: a hint where to connect.
"""

from __future__ import annotations

import asyncio
import builtins
from dataclasses import dataclass

from baton.core.errors import PeerLost
from baton.core.worker import WorkerInfo
from baton.sim.network import SimNetwork

HOST = "registry"
CALL_TIMEOUT_S = 2.5
"""As cluster/store.py's: then a call is given up."""
EXPIRE_S = 30.0


@dataclass(frozen=True, slots=True)
class _Entry:
    info: WorkerInfo
    until_s: float


class SimRegistry:
    def __init__(self, network: SimNetwork) -> None:
        self.outage = False
        self.num_refused = 0
        """Calls that found it away, or beyond a cut link."""
        self.num_stale = 0
        """Lists that named a boot which has a successor."""
        self._network = network
        self._entries: dict[str, _Entry] = {}
        self._replica: dict[str, _Entry] | None = None

    def at(self, host: str) -> RegistryClient:
        """The registry as `host` reaches it."""
        return RegistryClient(self, self._network, host)

    def fall_behind(self) -> None:
        """From now on lists are answered as of now."""
        self._replica = dict(self._entries)

    def catch_up(self) -> None:
        self._replica = None

    def forget(self) -> int:
        """It restarts empty; returns how many entries that cost."""
        lost = len(self._entries)
        self._entries.clear()
        return lost

    def put(self, info: WorkerInfo) -> None:
        self._entries[info.worker_id] = _Entry(info, self._network.loop.now + EXPIRE_S)

    def remove(self, worker_id: str, boot_id: str) -> None:
        if worker_id in self._entries and self._entries[worker_id].info.boot_id == boot_id:
            del self._entries[worker_id]

    def entries(self) -> tuple[WorkerInfo, ...]:
        now, shown = self._network.loop.now, self._entries if self._replica is None else self._replica
        found = [shown[name] for name in sorted(shown)]
        if any(e.info.worker_id in self._entries and self._entries[e.info.worker_id].info.boot_id != e.info.boot_id
               for e in found):
            self.num_stale += 1
        return tuple(e.info for e in found if e.until_s > now or self._replica is not None)


class RegistryClient:
    """cluster.store.Registry on one host."""

    def __init__(self, registry: SimRegistry, network: SimNetwork, host: str) -> None:
        self._registry = registry
        self._network = network
        self._host = host

    async def register(self, info: WorkerInfo) -> None:
        await self._reach()
        self._registry.put(info)

    async def deregister(self, worker_id: str, boot_id: str) -> None:
        await self._reach()
        self._registry.remove(worker_id, boot_id)

    async def list(self) -> builtins.tuple[WorkerInfo, ...]:
        await self._reach()
        return self._registry.entries()

    async def close(self) -> None:
        """Nothing to close."""

    async def _reach(self) -> None:
        """One call's way there and back. Raises PeerLost when it does not answer."""
        network, late = self._network, 2 * self._network.conditions.delay_s
        if not (network.reaches(self._host, HOST) and network.reaches(HOST, self._host)):
            late = CALL_TIMEOUT_S
        await asyncio.sleep(late)
        if self._registry.outage or late == CALL_TIMEOUT_S:
            self._registry.num_refused += 1
            raise PeerLost("the registry does not answer")
