"""One communicator: two ranks of torch.distributed, a lender and a reader, and the one thread of ours that talks to it.

Owns the process group, the thread, the rendezvous and the staging buffer. Does not know orders, leases or blocks. gloo
for memory of the host, NCCL for memory of a GPU; what is said about NCCL here was written from its documentation and
not run, for want of two GPUs. There is no default group: a group belongs to one pair of workers and to nobody else.

Life:
1. join(): the ranks exchange what torch's rendezvous wants to know over the order connection, which has checked the
   peer's token, and then a word each over the group itself: gloo's port asks nobody for a password, so that is how a
   rank knows that it is the peer who connected to it. Torch's own TCPStore would be one more open port.
2. messages: the sender fills its staging buffer, the receiver's is filled, one message at a time.
3. end(): no receive() returns any more. The thread drops the group as soon as it is out of torch; `gone` tells.

A receive that gloo has begun cannot be called back. Measured with torch 2.13, the sender stopped in the middle of
512 MiB and woken up later: 0.53 GB of late bytes landed after abort(), after shutdown(), and after the group had been
dropped; and nothing but its own time-out wakes wait(), not even the death of the sender. So gloo is only ever given the
staging buffer, which is no pool block, is not used for anything after end(), and goes when the group goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import queue
import secrets
import socket
import struct
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import ProcessGroupGloo, Store  # type: ignore[attr-defined]

from baton.kv_transfer.framing import FrameError, finish, receive, send

LENDER, READER = 0, 1
"""Ranks."""

WORD_BYTES = 16
MAX_KEY_BYTES = 256
MAX_VALUE_BYTES = 1 << 16
MAX_ENTRIES = 64
"""gloo tells an address of 170 bytes, NCCL an id of 128."""
_ENTRY = struct.Struct("<HI")
_END = _ENTRY.pack(0, 0)


class Communicator:
    """Methods are called on the loop, unless they say otherwise."""

    def __init__(self, name: str, rank: int, staging: torch.Tensor, host: str, timeout_s: float) -> None:
        """`staging` is a buffer [num_bytes] uint8 of its own, on the device of the blocks. `host` is the address on
        which gloo may listen. `timeout_s` is the longest that one message may take, and that end() may take."""
        self.staging = staging
        self._rank = rank
        self._host = host
        self._timeout = timedelta(seconds=timeout_s)
        self._loop = asyncio.get_running_loop()
        self._relay = _Relay(self._loop, timeout_s)
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._group: Any = None
        """Only the thread's."""
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self.gone: asyncio.Future[None] = self._loop.create_future()
        """Done when the group and all it had are given back."""
        # A daemon: a message that torch does not let go of must not keep the process from ending.
        threading.Thread(target=self._main, name=name, daemon=True).start()

    async def join(self, sock: socket.socket) -> None:
        """Meet the other rank, who does the same at the other end of the order connection. Raises ConnectionError; the
        caller brings the deadline, and ends the communicator if this fails."""
        tasks = [asyncio.create_task(job) for job in (self._make(), self._relay.tell(sock), self._relay.hear(sock))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await finish(tasks)

    async def send(self, num_bytes: int) -> None:
        """Send the first bytes of the staging buffer. Raises ConnectionError. Torch may read it until this returns."""
        await self._in_thread(lambda: self._move(num_bytes, sending=True))

    async def receive(self, num_bytes: int) -> None:
        """Fill the first bytes of the staging buffer. Raises ConnectionError, and never returns after end()."""
        await self._in_thread(lambda: self._move(num_bytes, sending=False))

    def end(self) -> None:
        """Whoever waits for a message hears of it at once; the thread, when torch lets go of it. Idempotent."""
        if self._ended.done():
            return
        self._ended.set_result(None)
        self._relay.fail()
        if self.staging.is_cuda:
            threading.Thread(target=self._abort, daemon=True).start()  # wakes NCCL's wait; gloo's, nothing does
        self._jobs.put(None)

    async def _make(self) -> None:
        await self._in_thread(self._make_group)
        self._relay.outbox.put_nowait(_END)

    async def _in_thread(self, job: Callable[[], str]) -> None:
        """The job answers why it failed, or nothing: an exception would keep what its frames know alive."""
        done: asyncio.Future[str] = self._loop.create_future()
        self._jobs.put(lambda: self._tell(done, job()))
        either: list[asyncio.Future[Any]] = [done, self._ended]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if self._ended.done():
            raise ConnectionResetError("the communicator was ended")
        if error := done.result():
            raise ConnectionError(error)

    # ---- in the thread ---------------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            while (job := self._jobs.get()) is not None:
                job()
        finally:
            self._group = None
            self._tell(self.gone, None)

    def _tell(self, future: asyncio.Future[Any], value: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody is left to hear
            self._loop.call_soon_threadsafe(future.set_result, value)

    def _make_group(self) -> str:
        words = [secrets.token_bytes(WORD_BYTES), b""]
        try:
            self._relay.set(f"word/{self._rank}", words[0])
            self._group = _new_group(self.staging.device, self._relay, self._rank, self._host, self._timeout)
            words[1] = self._relay.get(f"word/{1 - self._rank}")
        except Exception as e:  # torch has no common root
            return f"the ranks did not meet: {e}"
        # The lender speaks first, and gives nothing away before it has heard the reader's word.
        for speaker in (LENDER, READER):
            speaking = speaker == self._rank
            if speaking:
                self.staging[:WORD_BYTES].copy_(torch.frombuffer(bytearray(words[0]), dtype=torch.uint8))
            if error := self._move(WORD_BYTES, sending=speaking):
                return f"the ranks do not hear each other: {error}"
            if not speaking and not hmac.compare_digest(bytes(self.staging[:WORD_BYTES].tolist()), words[1]):
                return "somebody else connected to the communicator"
        return ""

    def _move(self, num_bytes: int, sending: bool) -> str:
        """One message, to or from the other rank."""
        assert self._group is not None, "a communicator that nobody joined"
        if self._ended.done():
            return "the communicator was ended"
        part = self.staging[:num_bytes]
        try:
            move = self._group.send if sending else self._group.recv
            work = move([part], 1 - self._rank, 0)
            work.wait(self._timeout)
            if part.is_cuda:  # NCCL's wait holds up the stream, not us
                torch.cuda.current_stream(part.device).synchronize()
        except Exception as e:  # torch has no common root
            return str(e)
        return ""

    def _abort(self) -> None:
        """In a thread of its own."""
        group = self._group
        if group is not None:
            group.abort()


class _Relay(Store):
    """A torch Store of two: what one rank sets, the other hears over their order connection."""

    def __init__(self, loop: asyncio.AbstractEventLoop, timeout_s: float) -> None:
        super().__init__()
        self._loop = loop
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._values: dict[str, bytes] = {}
        self._failed = False
        self.outbox: asyncio.Queue[bytes] = asyncio.Queue()

    # ---- called by torch, in the communicator's thread -------------------------------------------------------------

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]
        self._put(key, value)
        entry = _ENTRY.pack(len(key), len(value)) + key.encode() + value
        self._loop.call_soon_threadsafe(self.outbox.put_nowait, entry)

    def get(self, key: str) -> bytes:
        with self._changed:
            known = self._changed.wait_for(lambda: key in self._values or self._failed, self._timeout_s)
            if not known or self._failed:
                raise ConnectionError("the other rank told no address")
            return self._values[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self.get(key)

    # ---- called on the loop ----------------------------------------------------------------------------------------

    async def tell(self, sock: socket.socket) -> None:
        """Send what is set, up to _END."""
        entry = b""
        while entry != _END:
            entry = await self.outbox.get()
            await send(sock, entry)

    async def hear(self, sock: socket.socket) -> None:
        """Take what the other rank sets, up to its _END."""
        for _ in range(MAX_ENTRIES):
            key_bytes, value_bytes = _ENTRY.unpack(await receive(sock, _ENTRY.size))
            if key_bytes == 0:
                return
            if key_bytes > MAX_KEY_BYTES or value_bytes > MAX_VALUE_BYTES:
                raise FrameError(f"a rendezvous entry of {key_bytes} + {value_bytes} bytes: malformed")
            key = (await receive(sock, key_bytes)).decode(errors="replace")
            self._put(key, await receive(sock, value_bytes))
        raise FrameError(f"a rendezvous of more than {MAX_ENTRIES} entries")

    def fail(self) -> None:
        """Whoever waits for the other rank need not wait any longer."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()

    def _put(self, key: str, value: bytes) -> None:
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()


def check_backend(device: torch.device, host: str) -> str:
    """Which backend moves bytes of this device's memory. Raises OSError when it is not there."""
    if device.type == "cuda":
        if not torch.distributed.is_nccl_available():
            raise OSError("this torch has no NCCL")
        return "nccl"
    if not torch.distributed.is_gloo_available():
        raise OSError("this torch has no gloo")
    try:
        ProcessGroupGloo.create_device(hostname=host)
    except RuntimeError as e:
        raise OSError(f"gloo cannot listen on {host}: {e}") from None
    return "gloo"


def _new_group(device: torch.device, store: Store, rank: int, host: str, timeout: timedelta) -> Any:
    if device.type == "cuda":
        from torch.distributed import ProcessGroupNCCL

        nccl = ProcessGroupNCCL.Options()
        nccl._timeout = timeout
        return ProcessGroupNCCL(store, rank, 2, nccl)
    gloo = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    gloo._devices = [ProcessGroupGloo.create_device(hostname=host)]  # its own: thread, port and sockets go with it
    gloo._threads = 1
    gloo._timeout = timeout
    return ProcessGroupGloo(store, rank, 2, gloo)
