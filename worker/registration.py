"""A worker's life in the registry: known as long as it runs, and acquainted with its peers before a request is.

Does not know what the registry is, and never waits for it with work: its loss hurts nobody who knows this worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from baton.core.config import Config
from baton.core.errors import BatonError
from baton.core.layout import difference
from baton.core.worker import Role, WorkerInfo
from baton.worker.node import WorkerNode

if TYPE_CHECKING:  # the simulator brings its own, and needs no Redis client to be loaded
    from baton.cluster.store import Registry

log = logging.getLogger(__name__)

DRAIN_POLL_S = 0.05
REGISTER_POLLS = 4
"""A worker registers again every so many registry polls; an entry outlives several of them."""


async def serve_registered(node: WorkerNode, registry: Registry, config: Config) -> None:
    """Run a node, registered, until cancelled; then drain it for at most cluster.drain_timeout_s. Cancelled again, it
    ends at once."""
    life = asyncio.get_running_loop().create_task(_live(node, registry, config))
    try:
        await asyncio.wait([life])
    except asyncio.CancelledError:
        await _drain(node, life, config.cluster.drain_timeout_s)
        raise
    finally:
        life.cancel()
        await asyncio.wait([life])
        with contextlib.suppress(BatonError):
            await registry.deregister(node.info.worker_id, node.info.boot_id)
    life.result()


async def _live(node: WorkerNode, registry: Registry, config: Config) -> None:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(node.run())
        tasks.create_task(_stay_registered(node.info, registry, config))
        if node.info.role is Role.DECODE:
            tasks.create_task(_meet_peers(node, registry, config))


async def _drain(node: WorkerNode, life: asyncio.Task[None], timeout_s: float) -> None:
    """Nothing new comes; the routers move away what runs here, and readers take what is lent."""
    await node.drain(True, timeout_s)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            while not node.is_drained and not life.done():
                await asyncio.wait([life], timeout=DRAIN_POLL_S)
    if not node.is_drained:
        log.warning("%s leaves with work aboard that did not move away within %g s", node.info.worker_id, timeout_s)


async def _stay_registered(info: WorkerInfo, registry: Registry, config: Config) -> None:
    """Again and again: the registry may have been restarted empty."""
    told_lost = False
    while True:
        try:
            await registry.register(info)
            told_lost = False
        except BatonError as e:
            if not told_lost:
                log.warning("the registry does not answer (%s); serving on, and trying again", e.message)
            told_lost = True
        await asyncio.sleep(REGISTER_POLLS * config.cluster.registry_poll_s)


async def _meet_peers(node: WorkerNode, registry: Registry, config: Config) -> None:
    """Handshake with each fitting prefill worker, once per incarnation. One that fails is tried again by the first
    pull that needs it."""
    met: dict[str, str] = {}
    while True:
        with contextlib.suppress(BatonError):
            for peer in await registry.list():
                fits = peer.role is Role.PREFILL and difference(node.info.capability, peer.capability) is None
                if fits and met.get(peer.worker_id) != peer.boot_id:
                    met[peer.worker_id] = peer.boot_id
                    await _meet(node, peer)
        await asyncio.sleep(config.cluster.registry_poll_s)


async def _meet(node: WorkerNode, peer: WorkerInfo) -> None:
    try:
        await node.meet(peer)
    except BatonError as e:
        log.warning("no way to pull from %s yet: %s", peer.worker_id, e.message)
