"""One UCX worker of ours that talks to one worker of one peer, and the one thread that ever touches it.

Owns context, worker, endpoint and requests. Does not know orders or blocks: a stream of bytes goes out of an Outlet and
comes in through the Inlet at the other end. A worker per connection costs 0.5 to 4 ms (measured, UCX 1.21 over tcp) and
shares its fate with nobody.

Life:
1. the thread makes context and worker; `ready` gives the address that the other side needs; connect() takes theirs.
2. jobs come in through a queue; an eventfd wakes the thread. Between jobs it drives progress, and sleeps on UCX's own
   descriptor when there is none to make: nothing spins.
3. stop(): all requests fail at once, then endpoint and worker are destroyed, without a word to the peer.

UCX only ever writes into an inlet's slots, which live as long as its worker. So there is nothing to fence: bytes that
come late find no pool block, whatever UCX, the peer or a destroyed endpoint do.

Streams, because a stream ends with its endpoint. A tag message whose sender died half-way is never complete, and ucxx
waits for it, spinning, when the worker is destroyed (ucxx 0.52: 3 of 20 killed senders).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import os
import queue
import select
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ucxx._lib import libucxx as ucx  # the core of ucxx: its asyncio layer has one context for the whole process
from ucxx._lib.arr import Array

log = logging.getLogger("baton.kv_transfer")

PIECE_BYTES = 1 << 20
NUM_SLOTS = 4
BURST = 32
WATCH_MS = 1000
"""Not every event wakes UCX's descriptor, so ucxx' own blocking mode looks again every second, too."""
_OPTIONS = {
    # Other ways to a neighbour's memory are the shm transport's; a killed process would leave segments behind.
    "TLS": "^sm",
}
_FEATURES = (ucx.Feature.STREAM, ucx.Feature.WAKEUP)


class _Stopped(Exception):
    pass


class Lane:
    """The thread and its worker. Methods are called on the loop, unless they say otherwise."""

    def __init__(self, name: str, always: bool) -> None:
        """`always`: drive progress without a request, too: what a sent piece left in UCX's buffers must go out. An
        inlet does not: without a request it leaves the bytes on the wire, where they hold the sender up."""
        self._loop = asyncio.get_running_loop()
        self._always = always
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._error: ConnectionResetError | None = None
        """Why nothing can be asked of it any more."""
        self._waiting: set[asyncio.Future[None]] = set()
        """For whatever was asked of it. On the loop only."""
        self._ready: asyncio.Future[bytes] = self._loop.create_future()
        self.gone: asyncio.Future[None] = self._loop.create_future()
        """Done when the worker is destroyed."""
        self._worker: Any = None
        self._endpoint: Any = None
        self._requests: dict[Any, tuple[asyncio.Future[None], memoryview]] = {}
        """Under way in UCX: what hears of the end, and the bytes, which UCX does not keep alive. In the thread only."""
        # A daemon: a library call that never returns must not keep the process from ending.
        threading.Thread(target=self._main, name=name, daemon=True).start()

    async def ready(self) -> bytes:
        """Our worker's address. Raises OSError when UCX cannot start."""
        return await asyncio.shield(self._ready)

    async def connect(self, address: bytes) -> None:
        """To the peer's worker; both sides must do so. Raises OSError for an address that UCX cannot use."""
        def job(ended: asyncio.Future[None]) -> None:
            remote = ucx.UCXAddress.create_from_buffer(bytearray(address))
            self._endpoint = ucx.UCXEndpoint.create_from_worker_address(
                self._worker, remote, endpoint_error_handling=True
            )
            self._tell(ended, None)

        await self.ready()
        await self._ask(job)

    def send(self, piece: memoryview) -> asyncio.Future[None]:
        """Done when UCX has taken the bytes over. ConnectionError when they cannot go."""
        return self._ask(lambda ended: self._begin(self._endpoint.stream_send(Array(piece)), ended, piece))

    def receive(self, slot: memoryview) -> asyncio.Future[None]:
        """Done when the slot is full. If it does not come to that, UCX may write to it as long as the worker lives."""
        return self._ask(lambda ended: self._begin(self._endpoint.stream_recv(Array(slot)), ended, slot))

    def stop(self) -> None:
        """Begin to destroy the worker; `gone` tells when it is done. What is under way fails."""
        self._ask(_stop)

    def _ask(self, job: Callable[[asyncio.Future[None]], None]) -> asyncio.Future[None]:
        """Run a job in the thread; it sees to its future. What it raises ends the lane."""
        ended: asyncio.Future[None] = self._loop.create_future()
        if self._error is not None:
            _settle(ended, None, self._error)
            return ended
        self._waiting.add(ended)
        ended.add_done_callback(self._waiting.discard)
        self._jobs.put(functools.partial(job, ended))
        os.eventfd_write(self._wake, 1)
        return ended

    # ---- in the thread -----------------------------------------------------------------------------------------------

    def _main(self) -> None:
        error = ConnectionResetError("this UCX connection was closed")
        try:
            self._worker = _make_worker()
            self._tell(self._ready, bytes(self._worker.address.tobytes()))
            self._work()
        except _Stopped:
            pass
        except Exception as e:  # ucxx has no common root
            error = ConnectionResetError(f"UCX: {type(e).__name__}: {e}")
            log.debug("a UCX lane ended: %s", error)
        self._on_loop(self._fail, error)
        kept = list(self._requests.values())  # the bytes: they outlive the worker, the requests must not
        self._requests.clear()
        self._endpoint = None
        self._worker = None
        kept.clear()
        self._on_loop(self._end)

    def _work(self) -> None:
        for_jobs, for_all = select.poll(), select.poll()
        for poll in (for_jobs, for_all):
            poll.register(self._wake, select.POLLIN)
        for_all.register(self._worker.epoll_file_descriptor, select.POLLIN)
        while True:
            self._run_jobs()
            ran_dry = not (self._always or self._requests) or not self._progress()
            self._settle_completed()
            if not (self._always or self._requests):
                for_jobs.poll()
            elif ran_dry and self._worker.arm():
                for_all.poll(WATCH_MS)

    def _progress(self) -> bool:
        """Whether there may be more to do. In bursts, so that an inlet without a request stops taking bytes in."""
        return all(self._worker.progress_once() for _ in range(BURST))

    def _run_jobs(self) -> None:
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            return
        while not self._jobs.empty():
            self._jobs.get()()

    def _begin(self, request: Any, ended: asyncio.Future[None], data: memoryview) -> None:
        self._requests[request] = ended, data

    def _settle_completed(self) -> None:
        for request in [r for r in self._requests if r.completed]:
            ended, _ = self._requests.pop(request)
            try:
                request.check_error()
            except Exception as e:
                self._tell(ended, None, ConnectionResetError(f"UCX: {type(e).__name__}: {e}"))
            else:
                self._tell(ended, None)

    def _tell(self, future: asyncio.Future[Any], value: Any, error: Exception | None = None) -> None:
        self._on_loop(_settle, future, value, error)

    def _on_loop(self, call: Callable[..., None], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: there is nobody left to tell
            self._loop.call_soon_threadsafe(call, *args)

    # ---- on the loop again -------------------------------------------------------------------------------------------

    def _fail(self, error: ConnectionResetError) -> None:
        self._error = error
        os.close(self._wake)
        _settle(self._ready, None, error)
        for ended in list(self._waiting):
            _settle(ended, None, error)

    def _end(self) -> None:
        _settle(self.gone, None, None)


class Outlet:
    """The sending end of one connection."""

    def __init__(self, name: str) -> None:
        self.lane = Lane(name, always=True)

    async def send(self, data: Iterable[memoryview]) -> None:
        """Returns when UCX has taken all bytes over. Raises ConnectionError; cancelling leaves the rest on its way, so
        the lane must be stopped then."""
        await asyncio.gather(*(self.lane.send(piece) for piece in _pieces(data)))


class Inlet:
    """The receiving end of one connection: a ring of slots, and a copy out of them."""

    def __init__(self, name: str) -> None:
        self.lane = Lane(name, always=False)
        self._slots = itertools.cycle([memoryview(bytearray(PIECE_BYTES)) for _ in range(NUM_SLOTS)])

    async def receive_into(self, data: Iterable[memoryview]) -> None:
        """Fill these views with the bytes that come next. Raises ConnectionError. Nothing is written to them after it
        has returned, raised, or been cancelled; after the last two the lane must be stopped."""
        under_way: deque[tuple[memoryview, memoryview, asyncio.Future[None]]] = deque()
        for piece in _pieces(data):
            if len(under_way) == NUM_SLOTS:
                await _land(*under_way.popleft())
            slot = next(self._slots)[: len(piece)]
            under_way.append((piece, slot, self.lane.receive(slot)))
        while under_way:
            await _land(*under_way.popleft())


async def _land(piece: memoryview, slot: memoryview, received: asyncio.Future[None]) -> None:
    await received
    piece[:] = slot


def _pieces(data: Iterable[memoryview]) -> Iterator[memoryview]:
    """The same on both sides: where these bytes are cut."""
    for view in data:
        for start in range(0, len(view), PIECE_BYTES):
            yield view[start : start + PIECE_BYTES]


def _make_worker() -> Any:
    context = ucx.UCXContext(_OPTIONS, feature_flags=_FEATURES)
    worker = ucx.UCXWorker(context, enable_delayed_submission=False, enable_python_future=False)
    worker.init_blocking_progress_mode()
    return worker


def _stop(_: object) -> None:
    raise _Stopped


def _settle(future: asyncio.Future[Any], value: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)
        future.exception()  # looked at: nobody may be waiting any more
