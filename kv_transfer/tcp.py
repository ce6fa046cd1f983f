"""Transport "tcp": blocks over our own framing, received straight into the destination block.

Owns the listening port, one connection per peer, and both data paths. What makes a pull terminal: all its bytes are
in, or the connection's receive task has ended. The lender checks its lease table before every block it sends, so a
lease that ends half-way ends the pull there.
"""

from __future__ import annotations

import asyncio
import secrets
import socket

from baton.core.config import HandoffConfig
from baton.core.errors import Incompatible, PeerLost, SetupError
from baton.core.metrics import Metrics
from baton.core.worker import WorkerInfo
from baton.kv_transfer.framing import (
    TOKEN_BYTES,
    WELCOME_BYTES,
    OrderLink,
    OrderListener,
    ReadRequest,
    check_lent,
    check_welcome,
    pack_advert,
    receive,
    receive_into,
    say_hello,
    send,
    unpack_advert,
)
from baton.kv_transfer.memory import KVMemory
from baton.kv_transfer.transport import PROBE_LEASE, MayRead, Pull, PullOrder, failed

KEEPALIVE_S = 10
"""Idle connections of a vanished machine end after this, twice."""


class TcpTransport:
    """Built by `open`; closed by whoever opened it."""

    name = "tcp"

    def __init__(self, memory: KVMemory, may_read: MayRead, config: HandoffConfig, metrics: Metrics) -> None:
        self._memory = memory
        self._may_read = may_read
        self._send_timeout_s = config.pull_timeout_s
        self._metrics = metrics
        self._links: dict[str, OrderLink] = {}
        self.advert = b""
        self._listener: OrderListener | None = None

    @classmethod
    async def open(
        cls, memory: KVMemory, may_read: MayRead, config: HandoffConfig, metrics: Metrics, announce: str | None = None
    ) -> TcpTransport:
        """Listen on a free port of handoff.data_bind; peers are told `announce`, by default the same address.

        Raises SetupError when the address cannot be bound.
        """
        self = cls(memory, may_read, config, metrics)
        if announce is None and config.data_bind in ("", "0.0.0.0", "::"):
            raise SetupError(f"handoff.data_bind = {config.data_bind!r} is no address that peers can reach. "
                             "Set it to an address of this machine.", "handoff.data_bind")
        family = socket.AF_INET6 if ":" in config.data_bind else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            _tune(sock)  # accepted connections inherit it
            sock.bind((config.data_bind, 0))
            sock.listen(64)
        except OSError as e:
            sock.close()
            raise SetupError(f"handoff.data_bind = {config.data_bind!r} cannot be bound: {e.strerror or e}. "
                             "Set it to an address of this machine.", "handoff.data_bind") from None
        token = secrets.token_bytes(TOKEN_BYTES)
        self._listener = OrderListener(sock, token, memory, self._give, config.peer_timeout_s)
        self.advert = pack_advert(host=announce or config.data_bind, port=sock.getsockname()[1], token=token.hex())
        return self

    async def connect(self, peer: WorkerInfo) -> None:
        link = self._links.get(peer.worker_id)
        if link is not None and link.alive and link.boot_id == peer.boot_id:
            return
        await self.fence(peer.worker_id)
        host, port, token = _address(peer)
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            _tune(sock)
            await asyncio.get_running_loop().sock_connect(sock, (host, port))
            await say_hello(sock, token)
            check_welcome(await receive(sock, WELCOME_BYTES), peer.worker_id, self._memory)
        except OSError as e:
            sock.close()
            raise PeerLost(f"{peer.worker_id} does not answer at {host}:{port}: {e}") from None
        except BaseException:
            sock.close()
            raise
        if peer.worker_id in self._links:  # another caller was quicker
            sock.close()
            return
        self._links[peer.worker_id] = OrderLink(
            sock, peer.worker_id, peer.boot_id, self._memory.block_bytes, self._take
        )

    def pull(self, peer_id: str, order: PullOrder) -> Pull:
        link = self._links.get(peer_id)
        if link is None:
            return failed(order, PeerLost(f"there is no tcp connection to {peer_id}"))
        return link.submit(order)

    async def fence(self, peer_id: str) -> None:
        link = self._links.pop(peer_id, None)
        if link is not None:
            await link.close()

    async def close(self) -> None:
        if self._listener is not None:
            await self._listener.close()
        for peer_id in list(self._links):
            await self.fence(peer_id)

    async def _take(self, sock: socket.socket, pull: Pull) -> None:
        """One OK answer announces one block."""
        order = pull.order
        await receive_into(sock, self._memory.block(order.destination[pull.moved_blocks])[order.part])
        pull.moved_blocks += 1
        await asyncio.sleep(0)  # a socket that is always readable must not keep the loop from everybody else

    async def _give(self, sock: socket.socket, request: ReadRequest) -> None:
        check_lent(self._may_read, request.lease_id, request.blocks)
        for block in request.blocks:
            check_lent(self._may_read, request.lease_id, (block,))
            data = self._memory.block(block)[request.part]
            async with asyncio.timeout(self._send_timeout_s):
                await send(sock, request.granted())
                await send(sock, data)
            if request.lease_id != PROBE_LEASE:
                self._metrics.inc("baton_served_bytes_total", len(data), transport=self.name)
            await asyncio.sleep(0)


def _address(peer: WorkerInfo) -> tuple[str, int, bytes]:
    fields = unpack_advert(peer.worker_id, peer.capability.advert("tcp"))
    try:
        host, port, token = str(fields["host"]), int(fields["port"]), bytes.fromhex(str(fields["token"]))
    except (KeyError, ValueError):
        raise Incompatible(f"the tcp advert of {peer.worker_id} cannot be read; it runs another version.") from None
    if len(token) != TOKEN_BYTES or not 0 < port < 65536:
        raise Incompatible(f"the tcp advert of {peer.worker_id} cannot be read; it runs another version.")
    return host, port, token


def _tune(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL"):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), KEEPALIVE_S)
