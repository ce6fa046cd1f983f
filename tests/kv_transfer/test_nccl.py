"""What is the nccl transport's own: the rendezvous, the words, naps, and a fence that holds although gloo cannot take a
receive back."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch.distributed")

from baton.core.config import HandoffConfig
from baton.core.errors import DeadlineExceeded, Incompatible, PeerLost
from baton.core.metrics import Metrics
from baton.core.worker import WorkerInfo
from baton.kv_transfer import nccl, nccl_group
from baton.kv_transfer.framing import ReadRequest, send
from baton.kv_transfer.memory import KVMemory
from baton.kv_transfer.nccl_group import Communicator
from baton.kv_transfer.order_transport import OrderTransport
from baton.kv_transfer.transport import MayRead, PullOrder, PullRefused, PullState
from tests.kv_transfer.pair import Lender, Reader, info_of, lender, reader, until

SIZE = 4096
BIG = 32 << 20
"""A block that takes long enough to be caught half-way."""
ENTRY = struct.Struct("<HI")


@dataclass(frozen=True, slots=True)
class End:
    """One worker of this process."""

    transport: OrderTransport
    memory: KVMemory
    info: WorkerInfo

    @property
    def communicators(self) -> set[Communicator]:
        found: set[Communicator] = ends_of(self.transport)._communicators
        return found

    async def pull(self, peer: End, *blocks: int, lease: str = "good") -> PullState:
        return await self.transport.pull(peer.info.worker_id, PullOrder(lease, blocks, blocks)).wait()


def ends_of(transport: Any) -> Any:
    return transport._dial.__self__


@contextlib.asynccontextmanager
async def end(
    name: str, boot: str = "b1", may_read: MayRead = lambda lease, blocks: True, block_bytes: int = SIZE,
    announce: str | None = None, num_blocks: int = 8, **settings: Any,
) -> AsyncIterator[End]:
    """Each block holds its name over and over."""
    memory = KVMemory(num_blocks, block_bytes, shared=False)
    for b in range(num_blocks):
        memory.block(b)[:] = f"{name}/{boot}/{b}".encode().ljust(64, b".") * (block_bytes // 64)
    config = HandoffConfig(transports=("nccl",), **settings)
    transport = await nccl.open_nccl(memory, may_read, config, Metrics(), announce)
    try:
        yield End(transport, memory, info_of(name, boot, num_blocks, [("nccl", transport.advert)]))
    finally:
        await transport.close()
        memory.close()


def threads() -> list[str]:
    """Of this process, torch's own included, by name."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            names.append((task / "comm").read_text().strip())
    return sorted(names)


@contextlib.asynccontextmanager
async def hello(one: End) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection of somebody who knows the token, welcomed."""
    fields = json.loads(one.transport.advert)
    reader, writer = await asyncio.open_connection(fields["host"], fields["port"])
    writer.write(struct.pack("<4sI16s", b"BtKV", 2, bytes.fromhex(fields["token"])))
    assert (await reader.readexactly(16))[:4] == b"BtKV"
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def test_a_lease_that_ends_half_way_is_declined_and_the_communicator_lives_on() -> None:
    asked: list[tuple[int, ...]] = []

    def may_read(lease: str, blocks: Any) -> bool:
        asked.append(tuple(blocks))
        return lease == "good" or len(asked) <= 3  # the whole order, then the first two batches

    async def main() -> None:
        async with end("p", may_read=may_read, block_bytes=1 << 20) as p, end("d", block_bytes=1 << 20) as d:
            await d.transport.connect(p.info)
            pull = d.transport.pull("p", PullOrder("ends soon", (0, 1, 2, 3), (4, 5, 6, 7)))
            assert await pull.wait() is PullState.FAILED
            assert isinstance(pull.error, PullRefused)
            assert asked == [(0, 1, 2, 3), (0,), (1,), (2,)]
            assert [bytes(d.memory.block(b)[:1]) for b in (4, 5, 6, 7)] == [b"p", b"p", b"d", b"d"]
            assert await d.pull(p, 3) is PullState.DONE
            assert bytes(d.memory.block(3)) == bytes(p.memory.block(3))

    asyncio.run(main())


def test_a_lender_that_announces_more_than_a_message_holds_is_hung_up_on() -> None:
    async def announce_all(sock: socket.socket, communicator: Communicator, request: ReadRequest) -> None:
        await send(sock, request.granted(len(request.blocks)))

    async def main() -> None:
        async with end("p") as p, end("d") as d:
            ends_of(p.transport)._give = announce_all
            await d.transport.connect(p.info)
            pull = d.transport.pull("p", PullOrder("good", (0,) * 1000, (1,) * 1000))
            assert await pull.wait() is PullState.FAILED
            assert "malformed" in str(pull.error)

    asyncio.run(main())


def test_somebody_without_the_token_makes_no_communicator() -> None:
    async def main() -> None:
        async with end("p") as p:
            before = threads()
            fields = json.loads(p.transport.advert)
            reader, writer = await asyncio.open_connection(fields["host"], fields["port"])
            writer.write(struct.pack("<4sI16s", b"BtKV", 2, os.urandom(16)))
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
            writer.close()
            assert not p.communicators
            assert threads() == before
            forged = info_of("p", "b1", 8, [("nccl", json.dumps(fields | {"token": "00" * 16}).encode())])
            async with end("d") as d:
                with pytest.raises(PeerLost):
                    await d.transport.connect(forged)

    asyncio.run(main())


ADDRESS_THAT_IS_NONE = (
    ENTRY.pack(3, 4) + b"0/1" + b"junk" + ENTRY.pack(6, 16) + b"word/1" + bytes(16) + ENTRY.pack(0, 0)
)


@pytest.mark.parametrize(("said", "timeout_s"), [
    (b"", 0.3), (ADDRESS_THAT_IS_NONE, 60), (ENTRY.pack(257, 0), 60), (ENTRY.pack(1, (1 << 16) + 1), 60),
    ((ENTRY.pack(1, 1) + b"kv") * 65, 60),
], ids=["nothing", "an address that is none", "a long key", "a long value", "no end"])
def test_a_rendezvous_that_makes_no_sense_is_hung_up_on_and_leaves_nothing(said: bytes, timeout_s: float) -> None:
    async def main() -> None:
        async with end("p", peer_timeout_s=timeout_s, pull_timeout_s=timeout_s) as p, end("d") as d:
            before = threads()
            async with hello(p) as (stream, writer), asyncio.timeout(30):
                writer.write(said)
                with contextlib.suppress(ConnectionError):
                    await stream.read()  # up to its end
            await until(lambda: threads() == before and not p.communicators)
            await d.transport.connect(p.info)
            assert await d.pull(p, 1) is PullState.DONE

    asyncio.run(main())


@pytest.mark.parametrize("word", ["word/0", "word/1"])
def test_a_rank_whose_word_is_wrong_is_not_the_peer(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo's port takes whoever comes first: who that is shows in the word that was told over the order connection."""
    get = nccl_group._Relay.get

    def expects_another(self: Any, key: str) -> bytes:
        return bytes(16) if key == word else get(self, key)

    async def main() -> None:
        async with end("p") as p, end("d") as d:
            before = threads()
            monkeypatch.setattr(nccl_group._Relay, "get", expects_another)
            with pytest.raises(PeerLost):
                await d.transport.connect(p.info)
            assert await d.pull(p, 1) is PullState.FAILED
            await until(lambda: threads() == before and not p.communicators and not d.communicators)

    asyncio.run(main())


def test_blocks_that_another_backend_moves_are_incompatible() -> None:
    async def main() -> None:
        async with end("p") as p, end("d") as d:
            fields = json.loads(p.transport.advert)
            assert fields["backend"] == "gloo"
            on_gpu = info_of("p", "b1", 8, [("nccl", json.dumps(fields | {"backend": "nccl"}).encode())])
            with pytest.raises(Incompatible, match="nccl moves them, ours gloo"):
                await d.transport.connect(on_gpu)

    asyncio.run(main())


def test_behind_a_wildcard_address_gloo_listens_where_peers_are_told_to_go() -> None:
    async def main() -> None:
        async with end("p", data_bind="0.0.0.0", announce="127.0.0.1") as p, end("d") as d:
            await d.transport.connect(p.info)
            assert await d.pull(p, 1) is PullState.DONE

    asyncio.run(main())


def test_a_peer_that_started_again_gets_a_communicator_of_its_own() -> None:
    async def main() -> None:
        async with end("p", "b1") as first, end("d") as d:
            await d.transport.connect(first.info)
            assert await d.pull(first, 1) is PullState.DONE
            (old,) = d.communicators
            async with end("p", "b2") as second:
                await d.transport.connect(second.info)
                assert old not in d.communicators or old._ended.done()
                assert await d.pull(second, 1) is PullState.DONE
                assert bytes(d.memory.block(1)).startswith(b"p/b2/1")
                await until(lambda: not first.communicators and len(d.communicators) == 1)

    asyncio.run(main())


@pytest.mark.slow
def test_fifty_connections_that_were_fenced_leave_no_descriptor_no_thread_and_no_memory() -> None:
    def held() -> tuple[int, int, int]:
        gc.collect()
        resident = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
        return len(os.listdir("/proc/self/fd")), len(threads()), int(resident.split()[1]) >> 10

    async def rounds(p: End, d: End, count: int) -> None:
        for _ in range(count):
            await d.transport.connect(p.info)
            assert await d.pull(p, *range(8)) is PullState.DONE
            await d.transport.fence("p")
        await until(lambda: not p.communicators and not d.communicators)

    async def main() -> None:
        async with end("p", block_bytes=1 << 20) as p, end("d", block_bytes=1 << 20) as d:
            await rounds(p, d, 5)
            *before, resident = held()
            await rounds(p, d, 50)
            # gloo's threads close their sockets in their own time.
            await until(lambda: all(now <= then for now, then in zip(held()[:2], before, strict=True)))
            assert held()[2] - resident < 25, "a staging buffer at each end is 2 MiB per round"

    asyncio.run(main())


# ---- naps ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def short_naps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "IDLE_S", 0.02)


@pytest.mark.usefixtures("short_naps")
def test_a_connection_without_orders_costs_nothing_and_is_there_for_the_next() -> None:
    async def main() -> None:
        async with end("p") as p, end("d") as d:
            before = threads()
            await d.transport.connect(p.info)
            assert "gloo_tcp_loop" in threads()
            await until(lambda: threads() == before and not p.communicators and not d.communicators)
            await d.transport.connect(p.info)
            assert not d.communicators, "it is connected; a nap is no reason to measure again"
            pulls = [asyncio.create_task(d.pull(p, b)) for b in range(4)]
            assert await asyncio.gather(*pulls) == [PullState.DONE] * 4
            assert bytes(d.memory.block(3)).startswith(b"p/b1/3")
            await until(lambda: threads() == before)

    asyncio.run(main())


@pytest.mark.usefixtures("short_naps")
def test_a_lender_that_went_away_during_the_nap_fails_the_pulls_that_wake_up() -> None:
    async def main() -> None:
        async with end("d") as d:
            async with end("p") as p:
                await d.transport.connect(p.info)
                await until(lambda: not d.communicators)
            pulls = [d.transport.pull("p", PullOrder("good", (b,), (b,))) for b in (1, 2)]
            assert [await pull.wait() for pull in pulls] == [PullState.FAILED] * 2
            assert all(isinstance(pull.error, PeerLost) for pull in pulls)
            assert await d.pull(p, 1) is PullState.FAILED
            async with end("p") as again:
                await d.transport.connect(again.info)
                assert await d.pull(again, 1) is PullState.DONE

    asyncio.run(main())


@pytest.mark.usefixtures("short_naps")
@pytest.mark.parametrize("how", ["fence", "deadline"])
def test_a_pull_that_wakes_a_silent_lender_ends_with_the_fence_or_in_bounded_time(how: str) -> None:
    async def main() -> None:
        settings = {"peer_timeout_s": 60.0 if how == "fence" else 0.3}
        async with end("p") as p, end("d", **settings) as d:
            await d.transport.connect(p.info)
            await until(lambda: not d.communicators)
            # the kernel still takes connections; nobody answers
            asyncio.get_running_loop().remove_reader(p.transport._listener._sock)
            pull = d.transport.pull("p", PullOrder("good", (1,), (1,)))
            if how == "fence":
                await asyncio.sleep(0)
                assert pull.state is PullState.MOVING
                await d.transport.fence("p")
            assert await pull.wait() is PullState.FAILED
            assert isinstance(pull.error, PeerLost)
            await until(lambda: not d.communicators)

    asyncio.run(main())


# ---- a lender that stops in the middle of a message ------------------------------------------------------------------


@contextlib.contextmanager
def big_lender() -> Iterator[Lender]:
    with lender(("nccl",), num_blocks=1, block_bytes=BIG) as there:
        yield there


async def caught_half_way(
    r: Reader, there: Lender, strike: Callable[[], None]
) -> tuple[asyncio.Task[None], list[int], Communicator]:
    """Strike when a part of a block is in the staging buffer; tells the pull, its block and the communicator."""
    lease, blocks = there.lend(1)
    await r.puller.connect(there.info)
    destination = r.take(1)
    (communicator,) = ends_of(r.transports["nccl"])._communicators
    communicator.staging.zero_()
    pulling = asyncio.create_task(r.puller.pull(there.info, lease, blocks, destination))
    await until(lambda: int(communicator.staging[:64].sum()) or pulling.done())
    strike()
    landed = int(communicator.staging.count_nonzero())
    assert 0 < landed < 0.9 * BIG, f"the strike missed the message: {landed} bytes are in"
    return pulling, destination, communicator


@pytest.mark.slow
def test_a_lender_killed_in_the_middle_of_a_message_fails_the_pull_although_gloo_does_not_notice() -> None:
    async def main() -> None:
        settings = {"pull_timeout_s": 40.0, "peer_timeout_s": 20.0}
        async with reader(("nccl",), num_blocks=1, block_bytes=BIG, **settings) as r:
            pulling, destination, communicator = await caught_half_way(r, there, there.kill)
            with pytest.raises(PeerLost):
                await pulling
            assert not any(r.memory.block(destination[0])[:64]), "half a block was copied"
            assert not r.puller.in_flight_blocks()
            r.pool.release(destination)
            assert not communicator.gone.done(), "torch lets go of a message only after its time-out"
            nccl_of_r = ends_of(r.transports["nccl"])
            nccl_of_r._config = nccl_of_r._config.model_copy(update={"peer_timeout_s": 0.1})  # close() need not wait

    with big_lender() as there:
        asyncio.run(main())


@pytest.mark.slow
def test_late_bytes_of_a_frozen_lender_find_the_staging_buffer_and_no_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "MESSAGE_TIMEOUTS", 60)

    async def main() -> None:
        settings = {"pull_timeout_s": 1.0, "quarantine_poll_s": 0.02, "quarantine_max_s": 0.2, "quarantine_cap": 1.0}
        async with reader(("nccl",), num_blocks=1, block_bytes=BIG, **settings) as r:
            pulling, destination, communicator = await caught_half_way(r, there, there.freeze)
            landed = int(communicator.staging.count_nonzero())
            with pytest.raises(DeadlineExceeded):
                await pulling
            r.pool.release(destination)
            assert r.pool.allocate(1) is None, "a quarantined block was given to somebody else"
            await until(lambda: not r.puller.quarantined_blocks())
            assert r.metrics.value("baton_fences_total", transport="nccl") == 1
            (reused,) = r.take(1)
            r.memory.block(reused)[:] = b"\xa5" * BIG
            assert there.state() == "T"
            there.thaw()
            await until(communicator.gone.done)
            assert int(communicator.staging.count_nonzero()) > landed, "late bytes did land, where they do no harm"
            assert bytes(r.memory.block(reused)) == b"\xa5" * BIG

    with big_lender() as there:
        asyncio.run(main())


def test_a_reader_that_takes_no_message_is_given_up_by_the_lender_and_hears_of_it() -> None:
    async def main() -> None:
        size = {"block_bytes": BIG, "num_blocks": 2}
        async with end("p", pull_timeout_s=0.3, **size) as p, end("d", **size) as d:
            await d.transport.connect(p.info)
            (communicator,) = d.communicators

            async def takes_nothing(num_bytes: int) -> None:
                await asyncio.shield(communicator._ended)
                raise ConnectionResetError("ended")

            communicator.receive = takes_nothing  # type: ignore[method-assign]
            pull = d.transport.pull("p", PullOrder("good", (1,), (1,)))
            assert await pull.wait() is PullState.FAILED
            await until(lambda: not p.communicators and not d.communicators)

    asyncio.run(main())


def test_a_port_of_a_stopped_transport_is_closed() -> None:
    async def main() -> None:
        async with end("p") as p:
            fields = json.loads(p.transport.advert)
        with socket.socket() as sock, pytest.raises(ConnectionRefusedError):
            sock.connect((fields["host"], fields["port"]))

    asyncio.run(main())
