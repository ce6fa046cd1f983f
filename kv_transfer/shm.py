"""Transport "shm": two workers on one machine, one copy, by the reader.

Owns the abstract Unix socket over which the lender passes its sealed memfd (no name in any file system: nothing to
leave behind), and the thread that copies. Each pull asks the lender first, with one small order; the copy then runs
without it. A lease that ends during the copy is caught by the digests.

What makes a pull terminal: the copy has returned. A copy takes its time and cannot be cancelled, but it cannot stall
either: it needs nothing of the lender, frozen or dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import secrets
import socket
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from baton.core.config import HandoffConfig
from baton.core.errors import Incompatible
from baton.core.worker import WorkerInfo
from baton.kv_transfer.framing import (
    TOKEN_BYTES,
    WELCOME_BYTES,
    FrameError,
    Give,
    OrderLink,
    OrderListener,
    OrderTransport,
    ReadRequest,
    check_lent,
    check_welcome,
    finish,
    pack_advert,
    say_hello,
    send,
    unpack_advert,
)
from baton.kv_transfer.memory import KVMemory
from baton.kv_transfer.transport import MayRead, Pull, PullOrder

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


async def open_shm(memory: KVMemory, may_read: MayRead, config: HandoffConfig) -> OrderTransport:
    """Listen on an abstract socket with a random name. Raises OSError where there is no such thing."""
    assert memory.fd is not None, "the shm transport needs shared memory"
    name = f"baton-kv-{secrets.token_hex(16)}"
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    sock.bind("\0" + name)
    sock.listen(64)
    token = secrets.token_bytes(TOKEN_BYTES)
    ends = _Ends(memory, may_read)
    listener = OrderListener(sock, token, memory, ends.serve, config.peer_timeout_s)
    advert = pack_advert(machine=_machine(), socket=name, token=token.hex())
    return OrderTransport("shm", advert, ends.dial, listener, ends.close)


class _Ends:
    """How the memory changes hands, and who copies out of it."""

    def __init__(self, memory: KVMemory, may_read: MayRead) -> None:
        self._memory = memory
        self._may_read = may_read
        self._copier = ThreadPoolExecutor(1, "kv-copy")

    async def close(self) -> None:
        self._copier.shutdown(wait=True)  # idle by now: every copy was joined

    async def dial(self, peer: WorkerInfo) -> OrderLink:
        name, token = _address(peer)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, "\0" + name)
            await say_hello(sock, token)
            fd = await self._receive_memory(sock, peer.worker_id)
        except BaseException:
            sock.close()
            raise
        # The descriptor keeps the peer's whole memory alive, so it goes when the link does, not when somebody asks.
        return OrderLink(
            sock, peer.worker_id, peer.boot_id, self._memory.block_bytes, functools.partial(self._take, fd),
            functools.partial(os.close, fd),
        )

    async def _receive_memory(self, sock: socket.socket, peer_id: str) -> int:
        """The WELCOME frame and the descriptor that comes with it. The caller owns the descriptor."""
        await _readable(sock)
        frame, fds, _, _ = socket.recv_fds(sock, WELCOME_BYTES, 1)
        try:
            if not frame:
                raise ConnectionResetError("the other side closed the connection")
            if len(frame) != WELCOME_BYTES or len(fds) != 1:
                raise FrameError(f"{peer_id} sent no memory with its welcome")
            check_welcome(frame, peer_id, self._memory)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return fds[0]

    async def _take(self, fd: int, pull: Pull, count: int) -> None:
        """Returns, or is cancelled, only after the copy has ended."""
        if count != len(pull.order.source):
            raise FrameError(f"{count} of {len(pull.order.source)} blocks were granted: shm knows all or nothing")
        copying = asyncio.get_running_loop().run_in_executor(self._copier, self._copy, fd, pull.order)
        await finish([copying])
        copying.result()
        pull.moved_blocks = count

    def _copy(self, fd: int, order: PullOrder) -> None:
        """In the thread. preadv releases the interpreter and reads the lender's pages straight into the block."""
        size = self._memory.block_bytes
        for source, destination in zip(order.source, order.destination, strict=True):
            data = self._memory.block(destination)[order.part]
            count = os.preadv(fd, [data], source * size + order.start)
            if count != len(data):
                raise ConnectionResetError(f"block {source} lies outside the lender's memory ({count} bytes read)")

    @contextlib.asynccontextmanager
    async def serve(self, sock: socket.socket, welcome: bytes) -> AsyncIterator[Give]:
        """A fresh connection's buffer takes these few bytes at once."""
        assert self._memory.fd is not None, "serving memory that was closed"
        socket.send_fds(sock, [welcome], [self._memory.fd])
        yield functools.partial(self._give, sock)

    async def _give(self, sock: socket.socket, request: ReadRequest) -> None:
        check_lent(self._may_read, request.lease_id, request.blocks)
        await send(sock, request.granted(len(request.blocks)))


def _address(peer: WorkerInfo) -> tuple[str, bytes]:
    fields = unpack_advert(peer.worker_id, peer.capability.advert("shm"))
    if fields.get("machine") != _machine():
        raise Incompatible(f"{peer.worker_id} runs on another machine: no shared memory")
    try:
        name, token = str(fields["socket"]), bytes.fromhex(str(fields["token"]))
    except (KeyError, ValueError):
        token, name = b"", ""
    if len(token) != TOKEN_BYTES or not 0 < len(name) < 100:
        raise Incompatible(f"the shm advert of {peer.worker_id} cannot be read; it runs another version.")
    return name, token


def _machine() -> str:
    return _BOOT_ID.read_text().strip()


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(sock, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(sock)
