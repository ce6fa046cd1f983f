"""The measured choice over real transports, and what they leave on the machine: nothing."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import json
import mmap
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from baton.core.config import HandoffConfig
from baton.core.errors import Incompatible
from baton.core.metrics import Metrics
from baton.core.worker import WorkerInfo
from baton.engine.block_pool import BlockPool
from baton.kv_transfer.digest import digest
from baton.kv_transfer.lease import LeaseTable
from baton.kv_transfer.memory import KVMemory, probe_pattern
from baton.kv_transfer.offer import open_transports
from baton.kv_transfer.puller import Puller
from baton.kv_transfer.transport import Pull, PullOrder, Transport
from tests.kv_transfer.pair import Lender, info_of, reader

SIZE = 64 << 10


class Throttled:
    """A transport behind a narrow link: what has come in is announced at `bytes_per_s` and no faster."""

    def __init__(self, inner: Transport, bytes_per_s: float, block_bytes: int) -> None:
        self.inner, self.bytes_per_s, self.block_bytes = inner, bytes_per_s, block_bytes
        self.name, self.advert = inner.name, inner.advert
        self.tasks: list[asyncio.Task[None]] = []

    async def connect(self, peer: WorkerInfo) -> None:
        await self.inner.connect(peer)

    def pull(self, peer_id: str, order: PullOrder) -> Pull:
        outer = Pull(order)
        self.tasks.append(asyncio.create_task(self._hand_on(self.inner.pull(peer_id, order), outer)))
        return outer

    async def _hand_on(self, inner: Pull, outer: Pull) -> None:
        await inner.wait()
        await asyncio.sleep(len(inner.order.source) * self.block_bytes / self.bytes_per_s)
        if inner.error is None:
            outer.set_done()
        else:
            outer.set_failed(inner.error)

    async def fence(self, peer_id: str) -> None:
        await self.inner.fence(peer_id)

    async def close(self) -> None:
        await self.inner.close()


def test_throttling_a_transport_changes_the_choice() -> None:
    there = Lender(("shm", "tcp"), block_bytes=SIZE)

    async def main() -> None:
        async with reader(("shm", "tcp"), block_bytes=SIZE) as r:
            config = HandoffConfig(probe_bytes=1 << 20)
            for slow, chosen in (("tcp", "shm"), ("shm", "tcp")):
                narrow = {**r.transports, slow: Throttled(r.transports[slow], 2e6, SIZE)}
                puller = Puller(r.memory, narrow, r.pool, config, Metrics())
                assert await puller.connect(there.info) == chosen
                (link,) = puller.links()
                assert [f.transport for f in link.figures] == [chosen, slow]
                assert link.figures[1].bytes_per_s <= 2e6 < link.bytes_per_s

    try:
        asyncio.run(main())
    finally:
        there.close()


def test_a_spoiled_probe_block_disqualifies_every_way_to_that_memory() -> None:
    there = Lender(("tcp", "shm"))

    async def main() -> None:
        there.ask("spoil_probe")
        async with reader(("tcp", "shm")) as r:
            with pytest.raises(Exception, match="with other bytes than it holds"):
                await r.puller.connect(there.info)
            assert r.metrics.value("baton_fallbacks_total", kind="transport") == 2

    try:
        asyncio.run(main())
    finally:
        there.close()


def test_the_pool_never_sees_the_probe_and_landing_blocks() -> None:
    memory = KVMemory(3, 100, shared=False)
    assert len(memory.buffer) == 300
    assert bytes(memory.block(memory.probe_block)) == probe_pattern(100)
    assert digest(memory.block(3)) == memory.probe_digest
    memory.block(1)[:] = b"x" * 100
    assert bytes(memory.buffer[100:200]) == b"x" * 100
    assert bytes(memory.buffer[200:]) == bytes(100)
    with pytest.raises(AssertionError):
        memory.block(memory.total_blocks)


def _punch_hole(fd: int) -> None:
    if _libc.fallocate(fd, _FALLOC_FL_PUNCH_HOLE_KEEP_SIZE, ctypes.c_long(0), ctypes.c_long(mmap.PAGESIZE)):
        raise OSError(ctypes.get_errno(), "fallocate")


def _make_writable_later(fd: int) -> None:
    """A shared mapping that is read-only at first."""
    _libc.mmap.restype = ctypes.c_void_p
    address = _libc.mmap(None, mmap.PAGESIZE, mmap.PROT_READ, mmap.MAP_SHARED, fd, ctypes.c_long(0))
    assert address not in (None, ctypes.c_void_p(-1).value)
    failed = _libc.mprotect(ctypes.c_void_p(address), mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE)
    error = ctypes.get_errno()
    _libc.munmap(ctypes.c_void_p(address), mmap.PAGESIZE)
    if failed:
        raise OSError(error, "mprotect")


_FALLOC_FL_PUNCH_HOLE_KEEP_SIZE = 3
_libc = ctypes.CDLL(None, use_errno=True)
ATTACKS: dict[str, Callable[[int], object]] = {
    "map it writable": lambda fd: mmap.mmap(fd, mmap.PAGESIZE),
    "map it read-only and change that": _make_writable_later,
    "write": lambda fd: os.write(fd, b"x"),
    "pwrite": lambda fd: os.pwrite(fd, b"x", 0),
    "shrink": lambda fd: os.ftruncate(fd, 0),
    "grow": lambda fd: os.ftruncate(fd, os.fstat(fd).st_size + 1),
    "punch a hole": _punch_hole,
    "take the seals off": lambda fd: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0),
}


@pytest.fixture(scope="module")
def attacked() -> Iterator[Lender]:
    """One for all attacks: none of them does anything to it."""
    there = Lender(("shm",), num_blocks=2 * len(ATTACKS))
    yield there
    there.close()


@pytest.mark.parametrize("reopened", [False, True], ids=["as received", "opened again through proc"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_reader_can_do_nothing_to_the_lenders_memory(attack: str, reopened: bool, attacked: Lender) -> None:
    """With the descriptor that the shm transport gives it, and with a fresh one for the same file."""

    async def main() -> None:
        async with reader(("shm",)) as r:
            lease, blocks = attacked.lend(1)
            await r.puller.pull(attacked.info, lease, blocks, r.take(1))
            assert r.memory.fd is not None
            fd = _memory_of_another(os.fstat(r.memory.fd).st_ino)
            if reopened:
                fd = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
            with pytest.raises(PermissionError):
                ATTACKS[attack](fd)
            if reopened:
                os.close(fd)
            r.puller.poll()
            await r.puller.pull(attacked.info, lease, blocks, r.take(1))  # the digest says: unchanged

    asyncio.run(main())


def _memory_of_another(our_inode: int) -> int:
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # the listing's own is gone again
            is_memory = os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:baton-kv")
            if is_memory and os.fstat(fd).st_ino != our_inode:
                return fd
    raise AssertionError("no memory came from the lender")


def _listens(shm_advert: bytes | None) -> bool:
    """Whether the socket of this shm transport is there."""
    return f"@{json.loads(shm_advert or b'')['socket']}" in Path("/proc/net/unix").read_text()


def test_closed_transports_leave_no_descriptor_socket_or_memory_behind() -> None:
    there = Lender(("shm", "tcp"))

    async def main() -> bytes:
        async with reader(("shm", "tcp")) as r:
            lease, blocks = there.lend(2)
            await r.puller.pull(there.info, lease, blocks, r.take(2))
            assert _listens(r.transports["shm"].advert)
            return r.transports["shm"].advert

    try:
        asyncio.run(main())  # whatever is imported or cached at first use
        before = len(os.listdir("/proc/self/fd"))
        advert = asyncio.run(main())
        assert len(os.listdir("/proc/self/fd")) == before
        assert not _listens(advert)
        assert _listens(there.info.capability.advert("shm"))
        there.kill()
        assert not _listens(there.info.capability.advert("shm")), "the kernel removes a killed worker's socket"
    finally:
        there.close()


def test_a_lender_that_dies_does_not_keep_its_memory_alive_through_its_readers() -> None:
    there = Lender(("shm",))

    async def main() -> None:
        async with reader(("shm",)) as r:
            before = len(os.listdir("/proc/self/fd"))
            await r.puller.connect(there.info)
            assert len(os.listdir("/proc/self/fd")) == before + 2  # the connection and the memory
            there.kill()
            async with asyncio.timeout(20):
                while len(os.listdir("/proc/self/fd")) > before:
                    await asyncio.sleep(0)

    try:
        asyncio.run(main())
    finally:
        there.close()


def test_shared_memory_does_not_reach_another_machine() -> None:
    async def main() -> None:
        async with reader(("shm",)) as r:
            advert = b'{"machine": "11111111-2222-3333-4444-555555555555", "socket": "x", "token": "00"}'
            with pytest.raises(Incompatible, match="another machine"):
                await r.transports["shm"].connect(info_of("far", "b1", 16, [("shm", advert)]))

    asyncio.run(main())


def test_a_stranger_on_this_machine_gets_no_memory() -> None:
    async def main() -> None:
        async with reader(("shm",)) as r:
            name = r.transports["shm"].advert.decode().partition('"socket":"')[2].partition('"')[0]
            loop, sock = asyncio.get_running_loop(), socket.socket(socket.AF_UNIX)
            sock.setblocking(False)
            await loop.sock_connect(sock, "\0" + name)
            await loop.sock_sendall(sock, b"BtKV" + (2).to_bytes(4, "little") + bytes(16))
            assert await loop.sock_recv(sock, 100) == b""
            sock.close()

    asyncio.run(main())


def test_transports_are_offered_in_the_order_of_the_configuration() -> None:
    async def main() -> None:
        memory, pool = KVMemory(2, SIZE, shared=True), BlockPool(2, 16)
        config = HandoffConfig(transports=("tcp", "shm"))
        opened = await open_transports("w", "b", memory, LeaseTable(pool, Metrics()), config)
        assert list(opened) == ["tcp", "shm"]
        for transport in opened.values():
            await transport.close()
        memory.close()

    asyncio.run(main())
