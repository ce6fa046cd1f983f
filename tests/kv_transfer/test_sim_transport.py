"""The simulator's transport keeps the promises that the real ones keep, on virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from baton.core.errors import Incompatible, PeerLost
from baton.kv_transfer.memory import KVMemory
from baton.kv_transfer.transport import Pull, PullOrder, PullRefused, PullState
from baton.sim.loop import SimLoop, SimProcess, run
from baton.sim.trace import Trace
from baton.sim.transport import Fabric, Lender, PullFault, SimTransport
from tests.kv_transfer.pair import info_of

SIZE = 64


class World:
    def __init__(self, loop: SimLoop) -> None:
        self.loop = loop
        self.fabric = Fabric(loop, Trace(loop.time))
        self.memory = KVMemory(8, SIZE, shared=False)
        self.reader = SimTransport(self.fabric, "d0", self.memory)
        self.boot("b1")

    def boot(self, boot_id: str) -> None:
        """A (new) boot of p0, whose block i is full of i + 1."""
        self.lender = KVMemory(4, SIZE, shared=False)
        for b in range(4):
            self.lender.block(b)[:] = bytes([b + 1]) * SIZE
        self.info = info_of("p0", boot_id, 4, [("sim", b"p0")])
        self.process = SimProcess(self.loop, "p0")
        self.fabric.attach(Lender(self.info, self.lender, lambda lease, _: lease == "good", self.process))

    def pull(self, *source: int, lease: str = "good") -> Pull:
        return self.reader.pull("p0", PullOrder(lease, source, tuple(range(len(source)))))


def simulate(scenario: Callable[[World], Awaitable[None]]) -> None:
    async def main(loop: SimLoop) -> None:
        world = World(loop)
        await scenario(world)
        await world.reader.close()

    for seed in range(5):
        run(seed, main)


def test_bytes_come_in_exactly() -> None:
    async def scenario(w: World) -> None:
        await w.reader.connect(w.info)
        assert await w.pull(3, 0).wait() is PullState.DONE
        assert bytes(w.memory.block(0)) + bytes(w.memory.block(1)) == b"\4" * SIZE + b"\1" * SIZE

    simulate(scenario)


def test_a_part_of_a_block_touches_no_other_byte() -> None:
    async def scenario(w: World) -> None:
        await w.reader.connect(w.info)
        assert await w.reader.pull("p0", PullOrder("good", (2,), (5,), 16, 24)).wait() is PullState.DONE
        assert bytes(w.memory.block(5)) == bytes(16) + b"\3" * 8 + bytes(SIZE - 24)

    simulate(scenario)


def test_without_connection_or_lease_a_pull_fails() -> None:
    async def scenario(w: World) -> None:
        assert isinstance(w.pull(0).error, PeerLost)
        await w.reader.connect(w.info)
        refused = w.pull(0, lease="ended")
        assert await refused.wait() is PullState.FAILED
        assert isinstance(refused.error, PullRefused)
        with pytest.raises(Incompatible):
            await w.reader.connect(info_of("p1", "b1", 4, [("pigeon", b"")]))

    simulate(scenario)


def test_after_a_fence_every_pull_is_terminal_and_no_byte_lands() -> None:
    async def scenario(w: World) -> None:
        w.fabric.rules["test"] = lambda *_: PullFault.LATE
        await w.reader.connect(w.info)
        pull = w.pull(0, 1, 2, 3)
        await asyncio.sleep(1)
        assert pull.state is PullState.MOVING
        await w.reader.fence("p0")
        assert pull.state is PullState.FAILED
        for b in range(4):
            w.memory.block(b)[:] = b"\xa5" * SIZE
        await asyncio.sleep(100)
        assert all(bytes(w.memory.block(b)) == b"\xa5" * SIZE for b in range(4))

    simulate(scenario)


def test_a_new_boot_ends_the_old_ones_pulls_and_is_reached_by_connecting_again() -> None:
    async def scenario(w: World) -> None:
        await w.reader.connect(w.info)
        w.process.freeze()
        pull = w.pull(0, 1)
        await asyncio.sleep(1)
        assert pull.state is PullState.MOVING, "a frozen lender moves nothing"
        w.boot("b2")
        assert await pull.wait() is PullState.FAILED
        await w.reader.connect(w.info)
        assert await w.pull(0, 1).wait() is PullState.DONE

    simulate(scenario)
