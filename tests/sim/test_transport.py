"""What can go wrong on the simulated wire, one fault at a time. The promises it keeps beside are in
tests/kv_transfer/test_sim_transport.py."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from baton.core.layout import Capability
from baton.core.worker import Role, WorkerInfo
from baton.kv_transfer.memory import KVMemory
from baton.kv_transfer.transport import Pull, PullOrder, PullState
from baton.models.hash_model import layout
from baton.sim.loop import SimLoop, SimProcess, run
from baton.sim.trace import Trace
from baton.sim.transport import Fabric, Lender, PullFault, SimTransport, WireSpeed

NUM_BLOCKS = 8
SHAPE = layout(4)


class Scene:
    """One lender whose block i is full of the byte i + 1, one reader whose memory is zero."""

    def __init__(self, loop: SimLoop) -> None:
        self.fabric = Fabric(loop, Trace(loop.time), WireSpeed(bytes_per_s=6400.0, late_s=5.0))
        self.process = SimProcess(loop, "p")
        self.lent = KVMemory(NUM_BLOCKS, SHAPE.block_bytes, shared=False)
        for i in range(NUM_BLOCKS):
            self.lent.block(i)[:] = bytes([i + 1]) * SHAPE.block_bytes
        capability = Capability("m", "f", SHAPE, 8, NUM_BLOCKS, transports=(("sim", b"p"),))
        self.info = WorkerInfo("p", "p.1", Role.PREFILL, "p", capability)
        self.fabric.attach(Lender(self.info, self.lent, lambda lease, blocks: True, self.process))
        self.mine = KVMemory(NUM_BLOCKS, SHAPE.block_bytes, shared=False)
        self.transport = SimTransport(self.fabric, "d", self.mine)

    def pull(self, fault: PullFault | None = None) -> Pull:
        """Block i of the lender into our block 7 - i, for four blocks; 10 ms each."""
        self.fabric.rules["test"] = lambda reader, lender, order: fault
        return self.transport.pull("p", PullOrder("lease", (0, 1, 2, 3), (7, 6, 5, 4)))

    def landed(self) -> list[int]:
        return [self.mine.block(7 - i)[0] for i in range(4)]


def play(act: Callable[[Scene], Coroutine[Any, Any, None]]) -> None:
    async def main(loop: SimLoop) -> None:
        scene = Scene(loop)
        await scene.transport.connect(scene.info)
        await act(scene)

    run(1, main)


def test_a_late_pull_goes_on_after_everybody_gave_up_and_then_is_done() -> None:
    async def act(scene: Scene) -> None:
        pull = scene.pull(PullFault.LATE)
        await asyncio.sleep(4.0)
        assert (pull.state, scene.landed()) == (PullState.MOVING, [1, 2, 0, 0])
        assert await pull.wait() is PullState.DONE
        assert scene.landed() == [1, 2, 3, 4]

    play(act)


def test_a_pull_that_never_completes_ends_by_a_fence_and_nothing_lands_after_it() -> None:
    async def act(scene: Scene) -> None:
        pull = scene.pull(PullFault.NEVER)
        await asyncio.sleep(3600.0)
        assert pull.state is PullState.MOVING
        await scene.transport.fence("p")
        assert pull.state is PullState.FAILED
        await asyncio.sleep(3600.0)
        assert scene.landed() == [1, 2, 0, 0]

    play(act)


def test_a_corrupted_pull_is_done_with_one_bit_wrong() -> None:
    async def act(scene: Scene) -> None:
        assert await scene.pull(PullFault.CORRUPT).wait() is PullState.DONE
        wrong = [scene.mine.block(7 - i)[at] ^ (i + 1) for i in range(4) for at in range(SHAPE.block_bytes)]
        assert sum(byte.bit_count() for byte in wrong) == 1

    play(act)


def test_a_failed_pull_has_landed_half_and_no_more_lands() -> None:
    async def act(scene: Scene) -> None:
        pull = scene.pull(PullFault.FAIL)
        assert await pull.wait() is PullState.FAILED
        assert pull.error is not None
        await asyncio.sleep(60.0)
        assert scene.landed() == [1, 2, 0, 0]

    play(act)


def test_a_frozen_lender_sends_nothing_until_it_thaws() -> None:
    async def act(scene: Scene) -> None:
        pull = scene.pull()
        await asyncio.sleep(0.02)
        scene.process.freeze()
        before = scene.landed()
        await asyncio.sleep(100.0)
        assert pull.state is PullState.MOVING
        assert sum(b > 0 for b in scene.landed()) <= sum(b > 0 for b in before) + 1
        scene.process.thaw()
        assert await pull.wait() is PullState.DONE

    play(act)


def test_a_lender_killed_under_a_pull_fails_it_and_one_that_vanished_leaves_it_moving() -> None:
    async def act(scene: Scene) -> None:
        pull = scene.pull()
        await asyncio.sleep(0.02)
        scene.process.kill()
        scene.fabric.crash("p", silent=True)
        await asyncio.sleep(100.0)
        assert pull.state is PullState.MOVING
        await scene.transport.fence("p")
        assert pull.state is PullState.FAILED

    play(act)

    async def killed(scene: Scene) -> None:
        pull = scene.pull()
        await asyncio.sleep(0.02)
        scene.process.kill()
        scene.fabric.crash("p", silent=False)
        assert await pull.wait() is PullState.FAILED

    play(killed)


def test_bytes_of_a_dead_reader_land_nowhere() -> None:
    async def act(scene: Scene) -> None:
        scene.pull()
        await asyncio.sleep(0.02)
        scene.fabric.crash("d", silent=False)
        before = scene.landed()
        await asyncio.sleep(10.0)
        assert scene.landed() == before
        assert not scene.fabric.moving

    play(act)
