"""Transport "nccl": orders over our own TCP framing, block bytes by torch.distributed point to point, two-sided.

Owns one communicator (nccl_group.py) per connection, at either end, so one per pair of workers and boot. The backend
follows from where the blocks lie: gloo on the host, NCCL on a GPU (not run: written for GPU memory, of which Baton has
none yet). The lender takes part: it checks its lease table in the loop turn in which it copies a batch out of the pool,
so what it sends was lent at that moment.

What makes a pull terminal: all its bytes were copied out of the communicator's staging buffer, or the receive task of
the connection has ended. The fence ends the communicator; torch knows no pool block, so what still comes for an ended
one lands in memory that nobody reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import torch

from baton.core.config import HandoffConfig
from baton.core.errors import BatonError, Incompatible, PeerLost
from baton.core.metrics import Metrics
from baton.core.worker import WorkerInfo
from baton.kv_transfer.framing import (
    BATCH_BYTES,
    Answer,
    FrameError,
    Give,
    Hangup,
    OrderLink,
    OrderListener,
    ReadRequest,
    check_lent,
    finish,
    log_bug,
    send,
    unpack_advert,
)
from baton.kv_transfer.memory import KVMemory
from baton.kv_transfer.nccl_group import LENDER, READER, Communicator, check_backend
from baton.kv_transfer.order_transport import OrderTransport
from baton.kv_transfer.tcp import DataPort, call
from baton.kv_transfer.transport import PROBE_LEASE, MayRead, Pull, PullOrder, failed

log = logging.getLogger("baton.kv_transfer")

MESSAGE_TIMEOUTS = 2
"""A message may take so many handoff.pull_timeout_s: the puller's deadline comes first, so who ends a pull is decided
there; this one only lets the thread out of torch."""


IDLE_S = 5.0


async def open_nccl(
    memory: KVMemory, may_read: MayRead, config: HandoffConfig, metrics: Metrics, announce: str | None = None
) -> OrderTransport:
    """Take orders on a free port of handoff.data_bind. Raises OSError when torch cannot communicate on this machine,
    SetupError when the address cannot be bound."""
    ends = _Ends(memory, may_read, config, metrics, announce)
    port = DataPort(config, announce, backend=ends.backend)
    listener = OrderListener(port.sock, port.token, memory, ends.serve, config.peer_timeout_s)
    return OrderTransport("nccl", port.advert, ends.dial, listener, ends.close)


class _Ends:
    """How blocks travel."""

    def __init__(
        self, memory: KVMemory, may_read: MayRead, config: HandoffConfig, metrics: Metrics, announce: str | None
    ) -> None:
        self._memory = memory
        self._blocks = memory_tensor(memory)
        self._may_read = may_read
        self._config = config
        self._metrics = metrics
        wildcard = config.data_bind in ("", "0.0.0.0", "::")
        self._host = announce if wildcard and announce is not None else config.data_bind
        self.backend = check_backend(self._blocks.device, self._host)
        self._communicators: set[Communicator] = set()

    async def close(self) -> None:
        """No connection is left; give the communicators time to go. One whose peer died or froze in the middle of a
        message goes when torch gives that up, or with the process."""
        gone = [one.gone for one in self._communicators]
        if gone:
            await asyncio.wait(gone, timeout=self._config.peer_timeout_s)

    def _new_communicator(self, name: str, rank: int) -> Communicator:
        staging = torch.empty(
            max(self._memory.block_bytes, BATCH_BYTES), dtype=torch.uint8, device=self._blocks.device
        )
        one = Communicator(name, rank, staging, self._host, MESSAGE_TIMEOUTS * self._config.pull_timeout_s)
        self._communicators.add(one)
        one.gone.add_done_callback(lambda _: self._communicators.discard(one))
        return one

    async def dial(self, peer: WorkerInfo) -> NappingLink:
        return NappingLink(peer, await self._dial(peer), self._dial, self._config.peer_timeout_s)

    async def _dial(self, peer: WorkerInfo) -> OrderLink:
        theirs = unpack_advert(peer.worker_id, peer.capability.advert("nccl")).get("backend")
        if theirs != self.backend:
            raise Incompatible(f"{peer.worker_id} keeps its blocks where {theirs} moves them, ours {self.backend}")
        sock = await call("nccl", peer, self._memory)
        communicator = self._new_communicator(f"nccl from {peer.worker_id}", READER)
        try:
            await communicator.join(sock)
        except BaseException:
            communicator.end()
            sock.close()
            raise
        hangup = Hangup(sock, communicator.end)

        def release() -> None:
            hangup.close()
            communicator.end()

        take = functools.partial(self._take, communicator)
        return OrderLink(sock, peer.worker_id, peer.boot_id, self._memory.block_bytes, take, release)

    async def _take(self, communicator: Communicator, pull: Pull, answer: Answer) -> None:
        """The batch that an answer announces is one message. It is copied in the loop turn in which it is complete."""
        order, count = pull.order, answer.size
        blocks = order.destination[pull.moved_blocks : pull.moved_blocks + count]
        parts = [self._blocks[block, order.part] for block in blocks]
        num_bytes = sum(map(len, parts))
        if num_bytes > len(communicator.staging):
            raise FrameError(f"a batch of {count} blocks, {num_bytes} bytes: malformed")
        await communicator.receive(num_bytes)
        _copy(parts, communicator.staging[:num_bytes].view(count, -1))
        pull.moved_blocks += count

    @contextlib.asynccontextmanager
    async def serve(self, sock: socket.socket, welcome: bytes) -> AsyncIterator[Give]:
        await send(sock, welcome)
        communicator = self._new_communicator("nccl to a reader", LENDER)
        try:
            await communicator.join(sock)
            yield functools.partial(self._give, sock, communicator)
        finally:
            communicator.end()

    async def _give(self, sock: socket.socket, communicator: Communicator, request: ReadRequest) -> None:
        check_lent(self._may_read, request.lease_id, request.blocks)
        for blocks in request.batches():
            check_lent(self._may_read, request.lease_id, blocks)
            parts = [self._blocks[block, request.part] for block in blocks]
            num_bytes = sum(map(len, parts))
            _copy(communicator.staging[:num_bytes].view(len(parts), -1), parts)
            async with asyncio.timeout(self._config.pull_timeout_s):
                await send(sock, request.granted(len(blocks)))
                await communicator.send(num_bytes)
            if request.lease_id != PROBE_LEASE:
                self._metrics.inc("baton_served_bytes_total", num_bytes, transport="nccl")


def memory_tensor(memory: KVMemory) -> torch.Tensor:
    """[total_blocks, block_bytes] uint8: the blocks themselves, where they are."""
    return torch.frombuffer(memory.all_blocks, dtype=torch.uint8).view(memory.total_blocks, memory.block_bytes)


class NappingLink:
    """An OrderLink that is only there while there is something to pull: gloo wakes up 100 times a second for a
    communicator, used or not.

    1. awake: orders go to the link. After one to two times IDLE_S without an order it is closed.
    2. asleep: the next order dials again; orders wait for that.
    3. over: dialling failed, or it was closed. What waited has failed.
    """

    def __init__(
        self, peer: WorkerInfo, link: OrderLink, dial: Callable[[WorkerInfo], Awaitable[OrderLink]], timeout_s: float
    ) -> None:
        """`timeout_s` bounds dialling again."""
        self.boot_id = peer.boot_id
        self._peer = peer
        self._dial = dial
        self._timeout_s = timeout_s
        self._waiting: list[Pull] = []
        self._dialling: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._over: PeerLost | None = None
        self._wake_up(link)

    @property
    def alive(self) -> bool:
        return self._over is None and (self._link is None or self._link.alive)

    def submit(self, order: PullOrder) -> Pull:
        self._used = True
        if self._over is not None:
            return failed(order, self._over)
        if self._link is not None:
            return self._link.submit(order)
        pull = Pull(order)
        self._waiting.append(pull)
        if self._dialling is None:
            self._dialling = asyncio.create_task(self._dial_again(), name=f"nccl to {self._peer.worker_id} again")
            self._dialling.add_done_callback(log_bug)
        return pull

    async def close(self) -> None:
        """On return the connection is closed and every pull is terminal."""
        self._timer.cancel()
        ending = [task for task in (self._dialling, self._closing) if task is not None]
        if self._dialling is not None:
            self._dialling.cancel()
        if self._link is not None:
            ending.append(asyncio.create_task(self._link.close()))
        try:
            await finish(ending)
        finally:
            self._end(PeerLost(f"the nccl connection to {self._peer.worker_id} was fenced"))

    def _wake_up(self, link: OrderLink) -> None:
        self._link: OrderLink | None = link
        self._used = True
        self._timer = asyncio.get_running_loop().call_later(IDLE_S, self._look)

    def _look(self) -> None:
        assert self._link is not None, "the timer of a link that is asleep"
        if self._used or not self._link.idle:
            self._used = False
            self._timer = asyncio.get_running_loop().call_later(IDLE_S, self._look)
        elif self._link.alive:
            self._closing = asyncio.create_task(self._link.close())
            self._link = None

    async def _dial_again(self) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                link = await self._dial(self._peer)
        except (OSError, BatonError, TimeoutError) as e:
            self._end(PeerLost(f"{self._peer.worker_id} does not answer over nccl any more: {e}"))
            return
        self._dialling = None
        self._wake_up(link)
        while self._waiting:
            link.carry(self._waiting.pop(0))

    def _end(self, reason: PeerLost) -> None:
        self._over = reason
        while self._waiting:
            self._waiting.pop(0).set_failed(reason)


Rows = Sequence[torch.Tensor] | torch.Tensor


def _copy(targets: Rows, sources: Rows) -> None:
    """Row by row; on return the bytes are there."""
    for target, source in zip(targets, sources, strict=True):
        if target.is_cuda:
            target.copy_(source)
        else:
            target.numpy()[:] = source.numpy()  # torch's own copy would start a team of threads on the event loop
    if targets[0].is_cuda:
        torch.cuda.current_stream(targets[0].device).synchronize()
