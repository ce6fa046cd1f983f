"""A Transport (transport.py) out of an OrderLink per peer and an OrderListener (framing.py): tcp, shm, ucx and nccl.

Owns which link serves which peer. Does not know how a link is made: it is given a `dial`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

from baton.core.errors import PeerLost
from baton.core.worker import WorkerInfo
from baton.kv_transfer.framing import OrderListener
from baton.kv_transfer.transport import Pull, PullOrder, failed


class Link(Protocol):
    """What an OrderTransport needs of a connection. OrderLink is one."""

    @property
    def alive(self) -> bool: ...

    @property
    def boot_id(self) -> str: ...

    def submit(self, order: PullOrder) -> Pull: ...

    async def close(self) -> None: ...


Dial = Callable[[WorkerInfo], Awaitable[Link]]
"""Connect to this boot of a peer. Raises OSError when it does not answer, Incompatible when it never will."""


class OrderTransport:
    """A Transport (transport.py) out of its two ends. Closed by whoever opened it."""

    def __init__(
        self, name: str, advert: bytes, dial: Dial, listener: OrderListener,
        closed: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`closed` is called when no connection is left, to give back what both ends shared."""
        self.name = name
        self.advert = advert
        self._dial = dial
        self._listener = listener
        self._closed = closed
        self._links: dict[str, Link] = {}
        self._fencing: dict[str, asyncio.Task[None]] = {}
        """By peer, its link that is being closed."""

    async def connect(self, peer: WorkerInfo) -> None:
        link = self._links.get(peer.worker_id)
        if link is not None and link.alive and link.boot_id == peer.boot_id:
            return
        await self.fence(peer.worker_id)
        try:
            link = await self._dial(peer)
        except OSError as e:
            raise PeerLost(f"{peer.worker_id} does not answer over {self.name}: {e}") from None
        if peer.worker_id in self._links:  # another caller was quicker
            await link.close()
        else:
            self._links[peer.worker_id] = link

    def pull(self, peer_id: str, order: PullOrder) -> Pull:
        link = self._links.get(peer_id)
        if link is None:
            return failed(order, PeerLost(f"there is no {self.name} connection to {peer_id}"))
        return link.submit(order)

    async def fence(self, peer_id: str) -> None:
        link = self._links.pop(peer_id, None)
        if link is not None:
            self._fencing[peer_id] = asyncio.create_task(link.close(), name=f"fence {peer_id}")
        ending = self._fencing.get(peer_id)
        if ending is not None:  # whoever fences at the same time relies on it too
            try:
                await asyncio.shield(ending)
            finally:
                if ending.done() and self._fencing.get(peer_id) is ending:
                    del self._fencing[peer_id]

    async def close(self) -> None:
        await self._listener.close()
        for peer_id in {**self._links, **self._fencing}:
            await self.fence(peer_id)
        if self._closed is not None:
            await self._closed()
