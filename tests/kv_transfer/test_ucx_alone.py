"""What is ucx's own. Run by test_ucx.py, in a process that has not loaded NIXL."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import pytest

from baton.core.errors import PeerLost
from tests.kv_transfer.pair import kill_a_reader, lender, reader, until

if os.environ.get("BATON_TEST_TRANSPORT") != "ucx":
    pytest.skip("run by test_ucx.py", allow_module_level=True)

from baton.kv_transfer.ucx_lane import NUM_SLOTS, PIECE_BYTES, Inlet, Outlet

BIG = 1 << 20
MANY = 32
DEATHS = 20


def test_a_lender_killed_at_any_moment_of_a_pull_ends_it_and_never_its_reader() -> None:
    rng = random.Random(3)

    async def main() -> None:
        ends = []
        async with reader(("ucx",), num_blocks=MANY, block_bytes=BIG, pull_timeout_s=60) as r:
            for death in range(DEATHS):
                with lender(("ucx",), num_blocks=MANY, block_bytes=BIG, boot_id=f"boot{death}") as there:
                    lease, blocks = there.lend(MANY)
                    await r.puller.connect(there.info)
                    destination = r.take(MANY)
                    for block in destination:
                        r.memory.block(block)[:64] = bytes(64)
                    pulling = asyncio.create_task(r.puller.pull(there.info, lease, blocks, destination))
                    enough = rng.randrange(MANY)
                    await until(lambda d=destination, e=enough, p=pulling: r.arrived(d) >= e or p.done())
                    there.kill()
                    ends.append((await asyncio.gather(pulling, return_exceptions=True))[0])
                    r.pool.release(destination)
        assert all(end is None or isinstance(end, PeerLost) for end in ends), ends
        assert sum(end is not None for end in ends) > DEATHS // 2, f"the kills missed: {ends}"

    asyncio.run(main())


def test_readers_killed_one_after_the_other_leave_their_lender_well() -> None:
    with lender(("ucx",), num_blocks=MANY, block_bytes=BIG) as there:
        for _ in range(DEATHS):
            assert there.ask("release", lease_id=kill_a_reader(there, "ucx", MANY, BIG))["good"]
        asyncio.run(_one_pull(there.lend(4), there.info))


async def _one_pull(lent: tuple, info: object) -> None:  # type: ignore[type-arg]
    async with reader(("ucx",), num_blocks=4, block_bytes=BIG) as r:
        await r.puller.pull(info, *lent, r.take(4))  # type: ignore[arg-type]


async def _join(outlet: Outlet, inlet: Inlet) -> None:
    await outlet.lane.connect(await inlet.lane.ready())
    await inlet.lane.connect(await outlet.lane.ready())


def test_bytes_come_in_order_and_an_inlet_nobody_reads_from_holds_the_sender_up() -> None:
    async def main() -> None:
        count = 64
        outlet, inlet = Outlet("out"), Inlet("in")
        await _join(outlet, inlet)
        data = [memoryview(bytes([i]) * PIECE_BYTES) for i in range(count)]
        sent = [asyncio.create_task(outlet.send([d])) for d in data]
        got = memoryview(bytearray(PIECE_BYTES))
        await inlet.receive_into([got])
        for _ in range(20_000):
            await asyncio.sleep(0)
        assert sum(s.done() for s in sent) < count - NUM_SLOTS, "what nobody reads is piling up in our memory"
        for i in range(1, count):
            await inlet.receive_into([got[:1000], got[1000:]])
            assert got == data[i]
        await asyncio.gather(*sent)
        for end in (outlet, inlet):
            end.lane.stop()
            await end.lane.gone

    asyncio.run(main())


def test_an_idle_connection_costs_no_processor_time() -> None:
    def used(pid: int) -> int:
        """Clock ticks of both ends, user and system."""
        fields = [Path(f"/proc/{p}/stat").read_text().rpartition(")")[2].split() for p in (pid, os.getpid())]
        return sum(int(f[11]) + int(f[12]) for f in fields)

    async def main() -> None:
        async with reader(("ucx",), num_blocks=4, block_bytes=BIG) as r:
            lease, blocks = there.lend(4)
            await r.puller.pull(there.info, lease, blocks, r.take(4))
            before = used(there.process.pid)
            await asyncio.sleep(1.0)
            assert used(there.process.pid) - before <= 5, "more than 50 ms in an idle second: something spins"

    with lender(("ucx",), num_blocks=4, block_bytes=BIG) as there:
        asyncio.run(main())


def test_bytes_that_come_after_the_reader_left_find_no_block() -> None:
    """The inlet goes while messages are on their way; the outlet hears of it, or is stopped without harm."""
    async def main() -> None:
        outlet, inlet = Outlet("out"), Inlet("in")
        await _join(outlet, inlet)
        block = memoryview(bytearray(8 * PIECE_BYTES))
        receiving = asyncio.create_task(inlet.receive_into([block]))
        sending = asyncio.create_task(outlet.send([memoryview(b"x" * (64 * PIECE_BYTES))]))
        await until(lambda: block[0] == ord("x"))
        receiving.cancel()
        await asyncio.wait([receiving])
        block[:] = bytes(len(block))
        inlet.lane.stop()
        await inlet.lane.gone
        await asyncio.wait([sending], timeout=1.0)
        outlet.lane.stop()
        await outlet.lane.gone
        assert (await asyncio.gather(sending, return_exceptions=True))[0] is not None
        assert not any(block), "late bytes landed"

    asyncio.run(main())
