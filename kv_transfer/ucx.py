"""Transport "ucx": orders over our own TCP framing, block bytes over UCX (InfiniBand, RoCE, or its own use of TCP).

Owns one lane (ucx_lane.py) per connection, at either end. The lender takes part: it checks its lease table before
every batch it sends. What makes a pull terminal: all its bytes were copied out of the inlet's slots, or the receive
task of the connection has ended. UCX itself never knows a pool block of the reader's: that copy is the price of a fence
that does not depend on what UCX does with a frozen peer.

Orders, tokens and the news of a peer's death travel over the TCP connection: UCX's own listener knows no passwords and
binds every interface. Not in a process with NIXL, which brings a UCX of its own (offer.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import socket
import struct
from collections.abc import AsyncIterator

from baton.core.config import HandoffConfig
from baton.core.metrics import Metrics
from baton.core.worker import WorkerInfo
from baton.kv_transfer.framing import (
    Answer,
    FrameError,
    Give,
    Hangup,
    OrderLink,
    OrderListener,
    ReadRequest,
    check_lent,
    receive,
    send,
)
from baton.kv_transfer.memory import KVMemory
from baton.kv_transfer.order_transport import OrderTransport
from baton.kv_transfer.tcp import DataPort, call
from baton.kv_transfer.transport import PROBE_LEASE, MayRead, Pull
from baton.kv_transfer.ucx_lane import Inlet, Lane, Outlet

log = logging.getLogger("baton.kv_transfer")

MAX_ADDRESS_BYTES = 1 << 14
_ADDRESS = struct.Struct("<I")


async def open_ucx(
    memory: KVMemory, may_read: MayRead, config: HandoffConfig, metrics: Metrics, announce: str | None = None
) -> OrderTransport:
    """Take orders on a free port of handoff.data_bind. Raises OSError when UCX cannot start on this machine, SetupError
    when the address cannot be bound."""
    ends = _Ends(memory, may_read, config, metrics)
    await ends.try_out()
    port = DataPort(config, announce)
    listener = OrderListener(port.sock, port.token, memory, ends.serve, config.peer_timeout_s)
    return OrderTransport("ucx", port.advert, ends.dial, listener, ends.close)


class _Ends:
    """How blocks travel."""

    def __init__(self, memory: KVMemory, may_read: MayRead, config: HandoffConfig, metrics: Metrics) -> None:
        self._memory = memory
        self._may_read = may_read
        self._config = config
        self._metrics = metrics
        self._lanes: set[Lane] = set()

    async def try_out(self) -> None:
        lane = Lane("ucx trial", always=False)
        self._keep(lane)
        try:
            await lane.ready()
        finally:
            lane.stop()

    async def close(self) -> None:
        """No connection is left; give the workers time to end."""
        gone = [lane.gone for lane in self._lanes]
        if gone:
            _, stuck = await asyncio.wait(gone, timeout=self._config.peer_timeout_s)
            if stuck:
                log.error("%d UCX workers cannot be destroyed: they go with the process", len(stuck))

    def _keep(self, lane: Lane) -> None:
        """Until it is gone."""
        self._lanes.add(lane)
        lane.gone.add_done_callback(lambda _: self._lanes.discard(lane))

    async def dial(self, peer: WorkerInfo) -> OrderLink:
        sock = await call("ucx", peer, self._memory)
        inlet = Inlet(f"ucx from {peer.worker_id}")
        self._keep(inlet.lane)
        try:
            await _join(sock, inlet.lane)
        except BaseException:
            inlet.lane.stop()
            sock.close()
            raise
        watch = Hangup(sock, inlet.lane.stop)

        def release() -> None:
            watch.close()
            inlet.lane.stop()

        take = functools.partial(self._take, inlet)
        return OrderLink(sock, peer.worker_id, peer.boot_id, self._memory.block_bytes, take, release)

    async def _take(self, inlet: Inlet, pull: Pull, answer: Answer) -> None:
        order, done = pull.order, pull.moved_blocks
        blocks = order.destination[done : done + answer.size]
        await inlet.receive_into([self._memory.block(b)[order.part] for b in blocks])
        pull.moved_blocks += answer.size

    @contextlib.asynccontextmanager
    async def serve(self, sock: socket.socket, welcome: bytes) -> AsyncIterator[Give]:
        await send(sock, welcome)
        outlet = Outlet("ucx to a reader")
        self._keep(outlet.lane)
        try:
            await _join(sock, outlet.lane)
            yield functools.partial(self._give, sock, outlet)
        finally:
            outlet.lane.stop()

    async def _give(self, sock: socket.socket, outlet: Outlet, request: ReadRequest) -> None:
        check_lent(self._may_read, request.lease_id, request.blocks)
        for blocks in request.batches():
            check_lent(self._may_read, request.lease_id, blocks)
            parts = [self._memory.block(b)[request.part] for b in blocks]
            async with asyncio.timeout(self._config.pull_timeout_s):
                await send(sock, request.granted(len(blocks)))
                await outlet.send(parts)
            if request.lease_id != PROBE_LEASE:
                self._metrics.inc("baton_served_bytes_total", sum(map(len, parts)), transport="ucx")


async def _join(sock: socket.socket, lane: Lane) -> None:
    """Tell the other side our worker's address, and connect to theirs."""
    address = await lane.ready()
    await send(sock, _ADDRESS.pack(len(address)) + address)
    (size,) = _ADDRESS.unpack(await receive(sock, _ADDRESS.size))
    if not 0 < size <= MAX_ADDRESS_BYTES:
        raise FrameError(f"a UCX address of {size} bytes: malformed")
    await lane.connect(await receive(sock, size))
