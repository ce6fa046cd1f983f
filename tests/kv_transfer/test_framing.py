"""The data port against strangers and broken peers: nothing is read without the token, and no frame hurts anybody."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import json
import os
import random
import socket
import struct
import warnings
from collections.abc import AsyncIterator

import pytest

from baton.core.config import HandoffConfig
from baton.core.errors import Incompatible, PeerLost, SetupError
from baton.core.metrics import Metrics
from baton.kv_transfer.framing import BATCH_BYTES, MAX_ORDER_BLOCKS
from baton.kv_transfer.memory import KVMemory
from baton.kv_transfer.tcp import open_tcp
from baton.kv_transfer.transport import PROBE_LEASE, PullOrder, PullRefused, PullState, Transport
from tests.kv_transfer.pair import info_of

SIZE = 4096
HELLO = struct.Struct("<4sI16s")
ORDER = struct.Struct("<IHxxIQQ")
ANSWER = struct.Struct("<IHxxI")


def order(lease: bytes, count: int, start: int = 0, end: int = SIZE, lease_bytes: int | None = None) -> bytes:
    """The frame up to the block ids."""
    return ORDER.pack(0, len(lease) if lease_bytes is None else lease_bytes, count, start, end) + lease


@contextlib.asynccontextmanager
async def transport(**settings: object) -> AsyncIterator[Transport]:
    """A lender of everything under lease "good", which serves its own process."""
    config = HandoffConfig(**settings)  # type: ignore[arg-type]
    memory = KVMemory(4, SIZE, shared=False)
    one = await open_tcp(memory, lambda lease, blocks: lease in ("good", PROBE_LEASE), config, Metrics())
    try:
        yield one
    finally:
        await one.close()


async def dial(one: Transport, token: bytes | None = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    fields = json.loads(one.advert)
    reader, writer = await asyncio.open_connection(fields["host"], fields["port"])
    writer.write(HELLO.pack(b"BtKV", 2, token if token is not None else bytes.fromhex(fields["token"])))
    return reader, writer


async def hang_up(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def read_all(reader: asyncio.StreamReader) -> bytes:
    """Until the lender closes."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while more := await reader.read(1 << 16):
            data += more
    return data


async def still_serves(one: Transport) -> None:
    peer = info_of("self", "b1", 4, [("tcp", one.advert)])
    await one.connect(peer)
    pull = one.pull("self", PullOrder("good", (0, 1), (2, 3)))
    assert await pull.wait() is PullState.DONE


def test_a_connection_without_the_token_gets_not_a_single_byte() -> None:
    async def main() -> None:
        async with transport() as one:
            for token in (bytes(16), os.urandom(16)):
                reader, writer = await dial(one, token)
                writer.write(order(b"good", 1) + struct.pack("<I", 0))
                assert await read_all(reader) == b""
                await hang_up(writer)
            await still_serves(one)

    asyncio.run(main())


def test_somebody_who_says_nothing_is_hung_up_on() -> None:
    async def main() -> None:
        async with transport(peer_timeout_s=0.05) as one:
            fields = json.loads(one.advert)
            reader, writer = await asyncio.open_connection(fields["host"], fields["port"])
            assert await read_all(reader) == b""
            await hang_up(writer)

    asyncio.run(main())


@pytest.mark.parametrize("frame", [
    order(b"good", 0),
    order(b"good", MAX_ORDER_BLOCKS + 1),
    order(b"", 1, lease_bytes=0xFFFF),
    order(b"\xff\xfe\xfd\xfc", 1) + struct.pack("<I", 0),
    order(b"good", 1, 8, 8) + struct.pack("<I", 0),
    order(b"good", 1, 8, SIZE + 1) + struct.pack("<I", 0),
    order(b"good", 1, 1 << 63, 1) + struct.pack("<I", 0),
], ids=["no blocks", "too many blocks", "too long a lease", "a lease that is not text", "no bytes",
        "bytes behind the block", "bytes backwards"])
def test_a_malformed_order_closes_its_connection_and_no_other(frame: bytes) -> None:
    async def main() -> None:
        async with transport() as one:
            reader, writer = await dial(one)
            writer.write(frame)
            assert len(await read_all(reader)) == 16, "the welcome, then the end"
            await hang_up(writer)
            await still_serves(one)

    asyncio.run(main())


def test_random_bytes_after_a_good_hello_hurt_nobody() -> None:
    async def main() -> None:
        rng = random.Random(7)
        async with transport(peer_timeout_s=0.2) as one:
            for _ in range(40):
                reader, writer = await dial(one)
                writer.write(rng.randbytes(rng.randrange(1, 200)))
                writer.write_eof()
                await read_all(reader)
                await hang_up(writer)
            await still_serves(one)

    asyncio.run(main())


async def _false_lender(answer: bytes) -> tuple[asyncio.Server, bytes]:
    """Welcomes everybody, and answers any order with these bytes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(HELLO.size)
        writer.write(struct.pack("<4sIQ", b"BtKV", 2, SIZE))
        with contextlib.suppress(asyncio.IncompleteReadError):
            await reader.readexactly(ORDER.size)
            writer.write(answer)
            await writer.drain()
        await hang_up(writer)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    return server, json.dumps({"host": "127.0.0.1", "port": port, "token": "00" * 16}).encode()


@pytest.mark.parametrize("answer", [
    ANSWER.pack(99, 0, 1) + bytes(SIZE), ANSWER.pack(0, 7, 1), ANSWER.pack(0, 1, 60_000),
    ANSWER.pack(0, 0, 1) + b"short", ANSWER.pack(0, 0, 0), ANSWER.pack(0, 0, 2) + bytes(2 * SIZE), b"",
], ids=["wrong number", "unknown status", "endless text", "cut short", "no block", "too many blocks", "nothing"])
def test_a_lender_that_breaks_the_protocol_fails_the_pulls_and_leaves_the_reader_well(answer: bytes) -> None:
    async def main() -> None:
        server, advert = await _false_lender(answer)
        async with transport() as one:
            await one.connect(info_of("p", "b1", 4, [("tcp", advert)]))
            pulls = [one.pull("p", PullOrder("good", (0,), (b,))) for b in (0, 1)]
            assert [await p.wait() for p in pulls] == [PullState.FAILED] * 2
            assert all(isinstance(p.error, PeerLost) for p in pulls)
            await still_serves(one)
        server.close()
        await server.wait_closed()

    asyncio.run(main())


def test_a_lease_that_ends_half_way_ends_the_pull_there() -> None:
    async def main() -> None:
        memory, asked = KVMemory(4, BATCH_BYTES, shared=False), []

        def may_read(lease: str, blocks: object) -> bool:
            asked.append(blocks)
            return len(asked) <= 2  # the order, and its first batch

        one = await open_tcp(memory, may_read, HandoffConfig(), Metrics())
        await one.connect(info_of("self", "b1", 4, [("tcp", one.advert)]))
        pull = one.pull("self", PullOrder("good", (0, 1), (2, 3)))
        assert await pull.wait() is PullState.FAILED
        assert isinstance(pull.error, PullRefused)
        assert pull.moved_blocks == 1
        await one.close()

    asyncio.run(main())


@pytest.mark.parametrize("advert", [b"", b"\xff", b"[]", b'{"host": "h"}', b'{"host":"h","port":70000,"token":""}'])
def test_an_advert_that_cannot_be_read_is_incompatible(advert: bytes) -> None:
    async def main() -> None:
        async with transport() as one:
            with pytest.raises(Incompatible):
                await one.connect(info_of("p", "b1", 4, [("tcp", advert)]))

    asyncio.run(main())


@pytest.mark.parametrize("address", ["192.0.2.1", "0.0.0.0"])
def test_an_address_that_cannot_be_bound_or_announced_is_one_clear_sentence(address: str) -> None:
    async def main() -> None:
        with pytest.raises(SetupError, match=r"handoff\.data_bind"):
            async with transport(data_bind=address):
                pass

    asyncio.run(main())


@pytest.mark.parametrize("turns", range(6))
def test_a_reader_that_arrives_while_the_lender_closes_leaves_no_socket_behind(turns: int) -> None:
    async def main() -> None:
        async with transport() as one:
            await asyncio.sleep(0.01)  # it listens
            fields = json.loads(one.advert)
            arriving = socket.create_connection((fields["host"], fields["port"]))
            for _ in range(turns):
                await asyncio.sleep(0)
        arriving.close()

    with warnings.catch_warnings(record=True) as complaints:
        warnings.simplefilter("always")
        asyncio.run(main())
        gc.collect()
    assert not [str(c.message) for c in complaints]


def test_a_lender_that_is_out_of_descriptors_accepts_again_when_there_are_some(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It pauses in between: the listening socket stays readable, and would keep the loop busy for nothing."""
    accept = socket.socket.accept
    failures = [OSError(errno.EMFILE, "Too many open files"), BlockingIOError()]

    def scarce(self: socket.socket) -> object:
        if failures:
            raise failures.pop(0)
        return accept(self)

    async def main() -> None:
        async with transport() as one:
            monkeypatch.setattr(socket.socket, "accept", scarce)
            await still_serves(one)
            assert not failures
        await one.close()  # once more does no harm

    asyncio.run(main())
    assert caplog.text.count("could not be accepted") == 1
