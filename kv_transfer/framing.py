"""What two workers say to each other on a data connection, over TCP or a Unix socket, and who waits for what.

Owns the frames, the reader's end of a connection (OrderLink) and the lender's listener (OrderListener);
order_transport.py makes a transport of the two. Does not know how bytes of blocks travel: both ends are given
coroutines for that.

    reader                              lender
    HELLO version, token          ->    (a wrong token: closed without a word)
                                  <-    WELCOME version, bytes per block
    ORDER id, lease, byte range, block ids  ->    any number, without waiting for answers
                                  <-    ANSWER id, OK, n: the next n blocks of the order, in the transport's own way;
                                        as many answers as it takes; or ANSWER id, REFUSED, text

Orders are answered in the order they came. A frame that is out of bounds, or that nobody asked for, closes the
connection. The token is 16 random bytes per boot out of the lender's advert: so a connection is always to the boot
it was meant for, and somebody who found the port gets nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import itertools
import json
import logging
import select
import socket
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass

from baton.core.errors import Incompatible, PeerLost
from baton.kv_transfer.memory import KVMemory
from baton.kv_transfer.transport import MayRead, Pull, PullOrder, PullRefused, PullState

log = logging.getLogger("baton.kv_transfer")

VERSION = 2
TOKEN_BYTES = 16
MAX_LEASE_BYTES = 512
MAX_ORDER_BLOCKS = 1 << 16
MAX_TEXT_BYTES = 1024
BATCH_BYTES = 1 << 20
"""The lease is checked before each batch of blocks; small blocks share an answer."""
MAX_CONNECTIONS = 256
ACCEPT_PAUSE_S = 0.1

_HELLO = struct.Struct(f"<4sI{TOKEN_BYTES}s")
_WELCOME = struct.Struct("<4sIQ")
_ORDER = struct.Struct("<IHxxIQQ")
_ANSWER = struct.Struct("<IHxxI")
_MAGIC = b"BtKV"
OK, REFUSED = 0, 1


class FrameError(ConnectionError):
    """The other side does not speak our protocol: close."""


async def receive(sock: socket.socket, num_bytes: int) -> bytes:
    """Raises ConnectionError at the end of the stream. For frames; like `send`, it never blocks, even if the socket is
    one whose bulk bytes are moved by blocking calls in a thread."""
    data = b""
    while missing := num_bytes - len(data):
        try:
            more = sock.recv(missing, socket.MSG_DONTWAIT)
        except BlockingIOError:
            await readable(sock)
            continue
        if not more:
            raise ConnectionResetError("the other side closed the connection")
        data += more
    return data


async def send(sock: socket.socket, data: bytes) -> None:
    while data:
        try:
            data = data[sock.send(data, socket.MSG_DONTWAIT) :]
        except BlockingIOError:
            loop = asyncio.get_running_loop()
            await _ready(sock, loop.add_writer, loop.remove_writer)


async def readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    await _ready(sock, loop.add_reader, loop.remove_reader)


async def _ready(
    sock: socket.socket, add: Callable[..., object], remove: Callable[[socket.socket], object]
) -> None:
    ready = asyncio.Event()
    add(sock, ready.set)
    try:
        await ready.wait()
    finally:
        remove(sock)


def pack_advert(**fields: str | int) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode()


def unpack_advert(peer_id: str, advert: bytes | None) -> dict[str, str | int]:
    """Raises Incompatible for an advert this build cannot read: it came from another worker."""
    try:
        fields = json.loads(advert or b"")
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise Incompatible(f"a transport advert of {peer_id} cannot be read; it runs another Baton version.")
    return fields


# ---- the reader's end ------------------------------------------------------------------------------------------------


async def say_hello(sock: socket.socket, token: bytes) -> None:
    await send(sock, _HELLO.pack(_MAGIC, VERSION, token))


def check_welcome(frame: bytes, peer_id: str, memory: KVMemory) -> None:
    """Raises FrameError, or Incompatible if the lender's blocks have another size."""
    magic, version, block_bytes = _WELCOME.unpack(frame)
    if magic != _MAGIC or version != VERSION:
        raise FrameError(f"{peer_id} does not speak version {VERSION} of the data protocol")
    if block_bytes != memory.block_bytes:
        raise Incompatible(f"blocks of {peer_id} have {block_bytes} bytes, ours {memory.block_bytes}")


WELCOME_BYTES = _WELCOME.size
ANSWER_BYTES = _ANSWER.size


@dataclass(frozen=True, slots=True)
class Answer:
    """What an ANSWER frame says about the order it is for."""

    number: int
    refused: bool
    size: int
    """Blocks that follow; if refused, bytes of text."""


def read_answer(frame: bytes, number: int, pull: Pull) -> Answer:
    """Raises FrameError if it does not answer this order, or does not fit what is missing of the pull."""
    answered, status, size = _ANSWER.unpack(frame)
    missing = len(pull.order.source) - pull.moved_blocks
    if answered != number or status not in (OK, REFUSED):
        raise FrameError(f"an answer nobody asked for: {answered}, status {status}")
    if size > (MAX_TEXT_BYTES if status == REFUSED else missing) or (status == OK and size == 0):
        raise FrameError(f"an answer of {size}, status {status}, with {missing} blocks missing")
    return Answer(number, status == REFUSED, size)


def declined(peer_id: str, text: bytes) -> PullRefused:
    """The error that a refusal's text stands for."""
    return PullRefused(f"{peer_id} declined to lend: {text.decode(errors='replace')}")


Take = Callable[[Pull, Answer], Awaitable[None]]
"""Called with an OK answer to a pull: bring in the blocks it announces and advance pull.moved_blocks. It may go on and
read further answers to the same order. Raises ConnectionError or PullRefused. When cancelled it must not return before
the last byte that can land has landed."""


class OrderLink:
    """The reader's end of one welcomed connection, which it owns.

    1. submit() queues an order; a sending task writes it.
    2. A receiving task reads answers for as long as the connection lives, in the order of the orders.
    3. It ends by an error, by the peer, or by close(). Only when it has ended - so that nothing can land any more - do
       the pulls still queued become FAILED.
    """

    def __init__(
        self, sock: socket.socket, peer_id: str, boot_id: str, block_bytes: int, take: Take,
        release: Callable[[], None] | None = None,
    ) -> None:
        """`block_bytes` are ours. `release` is called once nothing is received any more: what `take` used can be given
        back."""
        self.peer_id = peer_id
        self.boot_id = boot_id
        self._sock = sock
        self._block_bytes = block_bytes
        self._take = take
        self._release = release
        self._numbers = itertools.count()
        self._pending: deque[tuple[int, Pull]] = deque()
        self._outbox: asyncio.Queue[bytes] = asyncio.Queue()
        self._reason = "the connection was fenced"
        self._receiving = asyncio.create_task(self._receive_all(), name=f"pulls from {peer_id}")
        self._sending = asyncio.create_task(self._send_all(), name=f"orders to {peer_id}")
        self._receiving.add_done_callback(self._fail_pending)
        for task in (self._receiving, self._sending):
            task.add_done_callback(self._close_socket)
            task.add_done_callback(log_bug)

    @property
    def alive(self) -> bool:
        return not self._receiving.done()

    @property
    def idle(self) -> bool:
        """No pull is under way."""
        return not self._pending

    def submit(self, order: PullOrder) -> Pull:
        pull = Pull(order)
        self.carry(pull)
        return pull

    def carry(self, pull: Pull) -> None:
        """Take over a pull that has not begun."""
        order = pull.order
        assert len(order.source) <= MAX_ORDER_BLOCKS, f"an order of {len(order.source)} blocks"
        if not self.alive:
            pull.set_failed(PeerLost(f"no connection to {self.peer_id}: {self._reason}"))
            return
        number = next(self._numbers) & 0xFFFFFFFF
        lease = order.lease_id.encode()
        assert len(lease) <= MAX_LEASE_BYTES, f"lease id of {len(lease)} bytes"
        self._pending.append((number, pull))
        count = len(order.source)
        head = _ORDER.pack(number, len(lease), count, *order.span(self._block_bytes))
        self._outbox.put_nowait(head + lease + struct.pack(f"<{count}I", *order.source))

    async def close(self) -> None:
        """On return the connection is closed, both tasks have ended and every pull is terminal."""
        self._sending.cancel()
        self._receiving.cancel()
        await finish([self._sending, self._receiving])

    async def _send_all(self) -> None:
        try:
            while True:
                await send(self._sock, await self._outbox.get())
        except OSError as e:
            self._reason = str(e)
            self._receiving.cancel()  # half a connection is none

    async def _receive_all(self) -> None:
        try:
            while True:
                await self._receive_answer()
        except (OSError, FrameError) as e:
            self._reason = str(e)

    async def _receive_answer(self) -> None:
        frame = await receive(self._sock, ANSWER_BYTES)
        if not self._pending:
            raise FrameError(f"{self.peer_id} sent an answer nobody asked for")
        number, pull = self._pending[0]
        answer = read_answer(frame, number, pull)
        try:
            if answer.refused:
                raise declined(self.peer_id, await receive(self._sock, answer.size))
            await self._take(pull, answer)
        except PullRefused as e:
            self._pending.popleft()
            pull.set_failed(e)
            return
        if pull.moved_blocks == len(pull.order.source):
            self._pending.popleft()
            pull.set_done()

    def _fail_pending(self, _: asyncio.Task[None]) -> None:
        self._sending.cancel()
        while self._pending:
            pull = self._pending.popleft()[1]
            assert pull.state is PullState.MOVING, f"a {pull.state} pull is still queued"
            pull.set_failed(PeerLost(f"the connection to {self.peer_id} ended: {self._reason}"))

    def _close_socket(self, _: asyncio.Task[None]) -> None:
        """By the later of the two tasks: until then the event loop may still watch the descriptor."""
        if self._receiving.done() and self._sending.done():
            self._sock.close()
            release, self._release = self._release, None
            if release is not None:
                release()


# ---- the lender's end ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """An order as the lender sees it."""

    number: int
    lease_id: str
    blocks: tuple[int, ...]
    part: slice
    """Of each block's bytes; inside the block."""

    def granted(self, num_blocks: int) -> bytes:
        """The ANSWER frame OK: the next `num_blocks` follow."""
        return _ANSWER.pack(self.number, OK, num_blocks)

    def batches(self) -> Iterator[tuple[int, ...]]:
        """The blocks, so many at a time that their parts have up to BATCH_BYTES, but at least one."""
        count = max(1, BATCH_BYTES // (self.part.stop - self.part.start))
        for i in range(0, len(self.blocks), count):
            yield self.blocks[i : i + count]


Give = Callable[[ReadRequest], Awaitable[None]]
"""Answer one order: raise PullRefused to decline (also half-way), OSError when the connection is broken."""

Serve = Callable[[socket.socket, bytes], contextlib.AbstractAsyncContextManager[Give]]
"""(connection, WELCOME frame) -> what answers its orders while the context is open. Entering it sends the frame, and
whatever else the transport sends with it."""


class OrderListener:
    """The lender's listener and the connections of its readers, one task each."""

    def __init__(
        self, sock: socket.socket, token: bytes, memory: KVMemory, serve: Serve, timeout_s: float
    ) -> None:
        """Takes the bound, listening, non-blocking socket. `timeout_s` bounds a reader's HELLO and each answer."""
        self._sock = sock
        self._token = token
        self._serve = serve
        self._timeout_s = timeout_s
        self._block_bytes = memory.block_bytes
        self._welcome = _WELCOME.pack(_MAGIC, VERSION, memory.block_bytes)
        self._connections: dict[int, asyncio.Task[None]] = {}
        self._numbers = itertools.count()
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        self._listen()

    async def close(self) -> None:
        """On return no connection is open and nothing listens. May be repeated."""
        if self._pause is not None:
            self._pause.cancel()
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock)
            self._sock.close()
        tasks = list(self._connections.values())
        for task in tasks:
            task.cancel()
        await finish(tasks)

    def _listen(self) -> None:
        # Not loop.sock_accept: cancelled at the wrong moment, it loses the connection it has just accepted.
        self._loop.add_reader(self._sock, self._accept)

    def _accept(self) -> None:
        try:
            sock, _ = self._sock.accept()
        except BlockingIOError:
            return
        except OSError as e:
            # Out of descriptors, or the reader went away in between: neither may end the lender.
            log.warning("a reader could not be accepted: %s", e)
            self._loop.remove_reader(self._sock)
            self._pause = self._loop.call_later(ACCEPT_PAUSE_S, self._listen)
            return
        if len(self._connections) >= MAX_CONNECTIONS:
            log.warning("a reader was turned away: %d connections are open", len(self._connections))
            sock.close()
            return
        sock.setblocking(False)
        number = next(self._numbers)
        task = asyncio.create_task(self._attend(sock), name=f"reader {number}")
        self._connections[number] = task
        task.add_done_callback(functools.partial(self._forget, number, sock))
        task.add_done_callback(log_bug)

    def _forget(self, number: int, sock: socket.socket, _: asyncio.Task[None]) -> None:
        """Here, not in the task: one that is cancelled before its first step closes nothing."""
        sock.close()
        del self._connections[number]

    async def _attend(self, sock: socket.socket) -> None:
        try:
            async with contextlib.AsyncExitStack() as stack:
                async with asyncio.timeout(self._timeout_s):
                    magic, version, token = _HELLO.unpack(await receive(sock, _HELLO.size))
                    if magic != _MAGIC or version != VERSION or not hmac.compare_digest(token, self._token):
                        raise FrameError("a reader without this boot's token was turned away")
                    give = await stack.enter_async_context(self._serve(sock, self._welcome))
                while True:
                    await self._answer(sock, give, await self._read_order(sock))
        except FrameError as e:
            log.warning("%s", e)
        except (OSError, TimeoutError) as e:
            log.debug("a reader's connection ended: %r", e)

    async def _read_order(self, sock: socket.socket) -> ReadRequest:
        """Waits for the next order as long as the reader likes; the rest of it is bounded by `timeout_s`."""
        head = await receive(sock, _ORDER.size)
        number, lease_bytes, count, start, end = _ORDER.unpack(head)
        if lease_bytes > MAX_LEASE_BYTES or not 0 < count <= MAX_ORDER_BLOCKS:
            raise FrameError(f"an order of {count} blocks with a lease id of {lease_bytes} bytes: malformed")
        if not start < end <= self._block_bytes:
            raise FrameError(f"an order of bytes [{start}, {end}) of blocks of {self._block_bytes}: malformed")
        async with asyncio.timeout(self._timeout_s):
            body = await receive(sock, lease_bytes + 4 * count)
        try:
            lease_id = body[:lease_bytes].decode()
        except UnicodeDecodeError:
            raise FrameError("a lease id that is not text: malformed") from None
        return ReadRequest(number, lease_id, struct.unpack(f"<{count}I", body[lease_bytes:]), slice(start, end))

    async def _answer(self, sock: socket.socket, give: Give, request: ReadRequest) -> None:
        try:
            await give(request)
        except PullRefused as e:
            text = e.message.encode()[:MAX_TEXT_BYTES]
            async with asyncio.timeout(self._timeout_s):
                await send(sock, _ANSWER.pack(request.number, REFUSED, len(text)) + text)


# ---- both ------------------------------------------------------------------------------------------------------------


class Hangup:
    """Hears that the other side closed the connection even while nobody reads from it."""

    def __init__(self, sock: socket.socket, heard: Callable[[], None]) -> None:
        self._epoll = select.epoll()
        self._epoll.register(sock, select.EPOLLRDHUP | select.EPOLLONESHOT)
        self._heard = heard
        asyncio.get_running_loop().add_reader(self._epoll, self._on_event)

    def _on_event(self) -> None:
        self._epoll.poll(0)  # once is enough
        self._heard()

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._epoll)
        self._epoll.close()


def check_lent(may_read: MayRead, lease_id: str, blocks: tuple[int, ...]) -> None:
    """Raises PullRefused unless the lender lends all of them now."""
    if not may_read(lease_id, blocks):
        raise PullRefused(f"lease {lease_id} does not (or no longer) cover blocks {list(blocks[:8])}")


async def finish(tasks: Sequence[asyncio.Future[None]]) -> None:
    """Wait until cancelled tasks of ours have really ended, even while we are being cancelled ourselves: what must
    not happen before they have ended comes after this."""
    cancelled = False
    while waiting := [t for t in tasks if not t.done()]:
        try:
            await asyncio.wait(waiting)
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError


def log_bug(task: asyncio.Task[None]) -> None:
    """Done-callback: what a task of ours did not expect is logged when it happens, not when it is collected."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("%s ended with %r", task.get_name(), error, exc_info=error)
