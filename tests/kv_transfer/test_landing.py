"""KV of another element type, over every transport: verified as the lender had it, converted behind the transport, and
no byte in a block of the pool that was not verified."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
from collections.abc import AsyncIterator, Iterator, Sequence

import pytest

from baton.core.config import HandoffConfig
from baton.core.errors import DeadlineExceeded, IntegrityError
from baton.core.handoff import Layers, LentBlock, Published
from baton.core.layout import KVLayout
from baton.core.metrics import Metrics
from baton.core.worker import Span
from baton.engine.block_pool import BlockPool
from baton.kv_transfer.landing import LANDING_BLOCKS, Landings
from baton.kv_transfer.lease import LeaseTable
from baton.kv_transfer.memory import KVMemory
from baton.kv_transfer.offer import open_transports
from baton.kv_transfer.transport import Transport
from tests.kv_transfer.pair import Lender, lender

THEIRS = KVLayout(num_layers=4, num_kv_heads=1, head_dim=16, block_size=16, dtype="fp32")
OURS = dataclasses.replace(THEIRS, dtype="bf16")
RUBBISH = b"\xa5"


def narrowed(theirs: KVLayout, ours: KVLayout, source: memoryview, destination: memoryview) -> None:
    """A conversion that anybody can check: every other byte."""
    assert (theirs, ours) == (THEIRS, OURS)
    destination[:] = source[::2]


@dataclasses.dataclass
class Reading:
    landings: Landings
    memory: KVMemory
    metrics: Metrics

    def block(self, index: int) -> bytes:
        return bytes(self.memory.block(index))


@contextlib.asynccontextmanager
async def reading(transport: str, num_blocks: int = 16, **settings: float) -> AsyncIterator[Reading]:
    """Landings over a pool of rubbish, with their timer."""
    config, metrics = HandoffConfig(transports=(transport,), **settings), Metrics()  # type: ignore[arg-type]
    memory = KVMemory(num_blocks, OURS.block_bytes, shared=False)
    memory.buffer[:] = RUBBISH * len(memory.buffer)

    async def open_for(landing: KVMemory, name: str) -> dict[str, Transport]:
        lends_nothing = LeaseTable(BlockPool(landing.num_blocks, 16), metrics)
        return await open_transports("decode-0", f"r1/{name}", landing, lends_nothing, config)

    landings = Landings(OURS, memory, open_for, narrowed, config, metrics)
    timer = asyncio.create_task(landings.run())
    try:
        yield Reading(landings, memory, metrics)
    finally:
        timer.cancel()
        await asyncio.wait([timer])
        await landings.close()
        memory.close()


@contextlib.contextmanager
def lending(transport: str, num_blocks: int = 16) -> Iterator[Lender]:
    with lender((transport,), num_blocks=num_blocks, block_bytes=THEIRS.block_bytes) as there:
        capability = dataclasses.replace(there.info.capability, layout=THEIRS)
        there.info = dataclasses.replace(there.info, capability=capability)
        yield there


def published(lease: str, blocks: Sequence[LentBlock], layers: Layers | None = None) -> Published:
    return Published(lease, 0, tuple(blocks), Span("chunk", 0.0, 0.0), last=False, layers=layers)


def lent_bytes(block: LentBlock) -> bytes:
    """What bench/kv_lender.py writes into a block."""
    name = f"boot1/{block.block_id}/{block.generation}".encode()
    return hashlib.shake_128(name).digest(64) * (THEIRS.block_bytes // 64)


def untouched(r: Reading, blocks: Sequence[int]) -> bool:
    return all(r.block(b) == RUBBISH * OURS.block_bytes for b in blocks)


def test_blocks_come_converted_and_what_was_verified_is_what_the_lender_had(transport: str) -> None:
    async def main() -> None:
        async with reading(transport) as r:
            lease, blocks = there.lend(5)
            destination = [9, 2, 11, 0, 4]
            assert await r.landings.connect(there.info) == transport
            await r.landings.pull(there.info, published(lease, blocks), destination)
            assert [r.block(d) for d in destination] == [lent_bytes(b)[::2] for b in blocks]
            assert untouched(r, [i for i in range(16) if i not in destination])
            assert r.metrics.value("baton_verified_bytes_total") == 5 * THEIRS.block_bytes
            came = r.metrics.value("baton_converted_bytes_total", lender="fp32", reader="bf16")
            assert came == 5 * THEIRS.block_bytes
            assert [peer for peer, _, _ in r.landings.bandwidths()] == [there.info.worker_id]

    with lending(transport) as there:
        asyncio.run(main())


def test_some_layers_come_to_their_place_and_touch_no_other(transport: str) -> None:
    async def main() -> None:
        async with reading(transport) as r:
            start, end = OURS.part_of(1, 3)
            lease, blocks = there.lend(2, part=THEIRS.part_of(1, 3))
            await r.landings.pull(there.info, published(lease, blocks, Layers(1, 3)), [3, 8])
            for d, b in zip((3, 8), blocks, strict=True):
                assert r.block(d)[start:end] == lent_bytes(b)[::2][start:end]
                assert r.block(d)[:start] + r.block(d)[end:] == RUBBISH * (OURS.block_bytes // 2)

    with lending(transport) as there:
        asyncio.run(main())


def test_a_block_that_changed_after_it_was_published_is_not_converted(transport: str) -> None:
    async def main() -> None:
        async with reading(transport) as r:
            lease, blocks = there.lend(3)
            there.ask("scribble", block=blocks[1].block_id)
            with pytest.raises(IntegrityError, match="1 of 3 blocks"):
                await r.landings.pull(there.info, published(lease, blocks), [5, 6, 7])
            assert untouched(r, range(16))
            assert r.metrics.value("baton_converted_bytes_total") == 0

    with lending(transport) as there:
        asyncio.run(main())


def test_more_blocks_than_have_room_at_once_come_in_turns_and_several_pulls_take_turns() -> None:
    count = LANDING_BLOCKS + 9

    async def main() -> None:
        async with reading("tcp", num_blocks=2 * count) as r:
            lease, blocks = there.lend(count)
            event = published(lease, blocks)
            halves = list(range(count)), list(range(count, 2 * count))
            await asyncio.gather(*(r.landings.pull(there.info, event, half) for half in halves))
            for half in halves:
                assert [r.block(d) for d in half] == [lent_bytes(b)[::2] for b in blocks]

    with lending("tcp", num_blocks=count) as there:
        asyncio.run(main())


def test_a_frozen_lenders_late_bytes_never_reach_the_pool_and_their_room_stays_quarantined() -> None:
    async def main() -> None:
        async with reading("tcp", pull_timeout_s=0.3, quarantine_max_s=60.0, quarantine_cap=1.0) as r:
            lease, blocks = there.lend(16)
            await r.landings.connect(there.info)
            there.freeze()
            for _ in range(LANDING_BLOCKS // 16):
                with pytest.raises(DeadlineExceeded, match="did not arrive"):
                    await r.landings.pull(there.info, published(lease, blocks), range(16))
            with pytest.raises(DeadlineExceeded, match="no room for 16 blocks of fp32 KV"):
                await r.landings.pull(there.info, published(lease, blocks), range(16))
            there.thaw()
            async with asyncio.timeout(30):
                while True:  # late bytes land, the room is free again
                    with contextlib.suppress(DeadlineExceeded):
                        await r.landings.pull(there.info, published(lease, blocks[:1]), [15])
                        break
            assert untouched(r, range(15))
            assert r.block(15) == lent_bytes(blocks[0])[::2]

    with lending("tcp") as there:
        asyncio.run(main())
