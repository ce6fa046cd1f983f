"""Transport "tcp": blocks over our own framing, received straight into the destination block.

Owns the listening port and both data paths. What makes a pull terminal: all its bytes are in, or the connection's
receive task has ended. The lender checks its lease table before every batch it sends, so a lease that ends half-way
ends the pull there.

The bytes of blocks are moved by blocking calls in a thread per connection and direction: the kernel's copy of a block
takes longer than anything else a loop does in one turn, and a loop costs as much again in wake-ups per GB. A frozen
peer holds up its own thread and no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor

from baton.core.config import HandoffConfig
from baton.core.errors import Incompatible, SetupError
from baton.core.metrics import Metrics
from baton.core.worker import WorkerInfo
from baton.kv_transfer.framing import (
    ANSWER_BYTES,
    TOKEN_BYTES,
    WELCOME_BYTES,
    Answer,
    Give,
    OrderLink,
    OrderListener,
    ReadRequest,
    check_lent,
    check_welcome,
    declined,
    finish,
    pack_advert,
    read_answer,
    receive,
    say_hello,
    send,
    unpack_advert,
)
from baton.kv_transfer.memory import KVMemory
from baton.kv_transfer.order_transport import OrderTransport
from baton.kv_transfer.transport import PROBE_LEASE, MayRead, Pull

KEEPALIVE_S = 10
"""Idle connections of a vanished machine end after this, twice."""


async def open_tcp(
    memory: KVMemory, may_read: MayRead, config: HandoffConfig, metrics: Metrics, announce: str | None = None
) -> OrderTransport:
    """Listen on a free port of handoff.data_bind; peers are told `announce`, by default the same address.

    Raises SetupError when the address cannot be bound.
    """
    port = DataPort(config, announce)
    ends = _Ends(memory, may_read, config, metrics)
    listener = OrderListener(port.sock, port.token, memory, ends.serve, config.peer_timeout_s)
    return OrderTransport("tcp", port.advert, ends.dial, listener)


class _Ends:
    """How blocks travel."""

    def __init__(self, memory: KVMemory, may_read: MayRead, config: HandoffConfig, metrics: Metrics) -> None:
        self._memory = memory
        self._may_read = may_read
        self._send_timeout_s = config.pull_timeout_s
        self._metrics = metrics

    async def dial(self, peer: WorkerInfo) -> OrderLink:
        sock = await call("tcp", peer, self._memory)
        bulk = _Bulk(sock, f"kv from {peer.worker_id}")
        take = functools.partial(self._take, bulk, peer.worker_id)
        return OrderLink(sock, peer.worker_id, peer.boot_id, self._memory.block_bytes, take, bulk.close)

    async def _take(self, bulk: _Bulk, peer_id: str, pull: Pull, answer: Answer) -> None:
        await bulk.run(self._receive, peer_id, pull, answer)

    def _receive(self, sock: socket.socket, peer_id: str, pull: Pull, answer: Answer) -> None:
        """In the thread: the whole pull, so that its answers cost no way to the loop and back."""
        order = pull.order
        while True:
            for _ in range(answer.size):
                _fill(sock, self._memory.block(order.destination[pull.moved_blocks])[order.part])
                pull.moved_blocks += 1
            if pull.moved_blocks == len(order.source):
                return
            frame = _fill(sock, memoryview(bytearray(ANSWER_BYTES)))
            answer = read_answer(bytes(frame), answer.number, pull)
            if answer.refused:
                raise declined(peer_id, bytes(_fill(sock, memoryview(bytearray(answer.size)))))

    @contextlib.asynccontextmanager
    async def serve(self, sock: socket.socket, welcome: bytes) -> AsyncIterator[Give]:
        await send(sock, welcome)
        bulk = _Bulk(sock, "kv to a reader")
        try:
            yield functools.partial(self._give, bulk)
        finally:
            bulk.close()

    async def _give(self, bulk: _Bulk, request: ReadRequest) -> None:
        check_lent(self._may_read, request.lease_id, request.blocks)
        sent: list[int] = []
        try:
            async with asyncio.timeout(self._send_timeout_s):
                await bulk.run(self._send, request, sent)
        finally:
            if request.lease_id != PROBE_LEASE:
                self._metrics.inc("baton_served_bytes_total", sum(sent), transport="tcp")

    def _send(self, sock: socket.socket, request: ReadRequest, sent: list[int]) -> None:
        """In the thread. The lease table is only read, a word at a time, so it may be asked from here."""
        for blocks in request.batches():
            check_lent(self._may_read, request.lease_id, blocks)
            sock.sendall(request.granted(len(blocks)), socket.MSG_MORE)
            for block in blocks:
                part = self._memory.block(block)[request.part]
                sock.sendall(part)
                sent.append(len(part))


class _Bulk:
    """Blocking calls on one connection, in a thread of its own, which lives from the first call to close()."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        sock.setblocking(True)
        self._sock = sock
        self._thread = ThreadPoolExecutor(1, name)

    async def run(self, work: Callable[..., None], *args: object) -> None:
        """work(sock, *args). When cancelled, the connection is shut down, which ends any call on it, and the thread has
        let go of it before this returns."""
        call = asyncio.get_running_loop().run_in_executor(self._thread, work, self._sock, *args)
        try:
            await asyncio.wait([call])
        except asyncio.CancelledError:
            with contextlib.suppress(OSError):  # the other side may have closed it
                self._sock.shutdown(socket.SHUT_RDWR)
            await finish([call])
            if not call.cancelled():
                call.exception()  # looked at: nobody else will
            raise
        call.result()

    def close(self) -> None:
        self._thread.shutdown(wait=False)  # idle: every call was waited for


def _fill(sock: socket.socket, view: memoryview) -> memoryview:
    """Blocks until it is full. Raises ConnectionError at the end of the stream."""
    left = view
    while left:
        count = sock.recv_into(left, len(left), socket.MSG_WAITALL)
        if count == 0:
            raise ConnectionResetError("the other side closed the connection")
        left = left[count:]
    return view


# ---- the port, shared with other transports that take orders over TCP --------------------------------------------


class DataPort:
    """A listening socket on handoff.data_bind, and what peers must know to reach it."""

    def __init__(self, config: HandoffConfig, announce: str | None, **more: str) -> None:
        """Tells peers `more`, too. Raises SetupError when the address cannot be bound, or told to peers."""
        if announce is None and config.data_bind in ("", "0.0.0.0", "::"):
            raise SetupError(f"handoff.data_bind = {config.data_bind!r} is no address that peers can reach. "
                             "Set it to an address of this machine.", "handoff.data_bind")
        self.sock = socket.socket(_family(config.data_bind), socket.SOCK_STREAM)
        try:
            self.sock.setblocking(False)
            tune(self.sock)  # accepted connections inherit it
            self.sock.bind((config.data_bind, 0))
            self.sock.listen(64)
        except OSError as e:
            self.sock.close()
            raise SetupError(f"handoff.data_bind = {config.data_bind!r} cannot be bound: {e.strerror or e}. "
                             "Set it to an address of this machine.", "handoff.data_bind") from None
        self.token = secrets.token_bytes(TOKEN_BYTES)
        host, port = announce or config.data_bind, self.sock.getsockname()[1]
        self.advert = pack_advert(host=host, port=port, token=self.token.hex(), **more)


async def call(transport: str, peer: WorkerInfo, memory: KVMemory) -> socket.socket:
    """A connection to the peer's DataPort that has been welcomed. Raises OSError, or Incompatible."""
    host, port, token = _address(transport, peer)
    sock = socket.socket(_family(host), socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        tune(sock)
        await asyncio.get_running_loop().sock_connect(sock, (host, port))
        await say_hello(sock, token)
        check_welcome(await receive(sock, WELCOME_BYTES), peer.worker_id, memory)
    except BaseException:
        sock.close()
        raise
    return sock


def _address(transport: str, peer: WorkerInfo) -> tuple[str, int, bytes]:
    fields = unpack_advert(peer.worker_id, peer.capability.advert(transport))
    try:
        host, port, token = str(fields["host"]), int(fields["port"]), bytes.fromhex(str(fields["token"]))
    except (KeyError, ValueError):
        host, port, token = "", 0, b""
    if len(token) != TOKEN_BYTES or not 0 < port < 65536:
        raise Incompatible(f"the {transport} advert of {peer.worker_id} cannot be read; it runs another version.")
    return host, port, token


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def tune(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL"):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), KEEPALIVE_S)
