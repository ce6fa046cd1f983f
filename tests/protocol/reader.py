"""One boot of the reader: the real Puller, stepped on a manual loop, over a wire that moves bytes when it is told to.

Around it as little as there is in worker/intake.py and worker/handoff.py: credit at the call, blocks at the first
publish, a pull, a release when everything is here, and the blocks enter the prefix map only after its answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from baton.core.errors import BatonError, PeerLost
from baton.core.handoff import LentBlock
from baton.core.layout import Capability, KVLayout
from baton.core.machines import DECODE_REQUEST, Life
from baton.core.metrics import Metrics
from baton.core.worker import Role, WorkerInfo
from baton.engine.block_pool import Credit
from baton.kv_transfer.memory import KVMemory
from baton.kv_transfer.transport import PROBE_LEASE, Pull, PullOrder, PullState, failed
from baton.worker.ledger import check_ledger
from tests.protocol.bounds import BLOCK_BYTES, CONFIG, LENDER, Bounds, Parts, content, hash_of
from tests.protocol.lender import LenderSide, Message, check_cache
from tests.protocol.manual_loop import ManualLoop

_LAYOUT = KVLayout(1, 1, 1, 1, "fp32")


def lender_info(boot: int, num_blocks: int) -> WorkerInfo:
    capability = Capability("m", "f", _LAYOUT, 64, num_blocks, transports=(("wire", b""),))
    return WorkerInfo(LENDER, f"boot{boot}", Role.PREFILL, "", capability)


@dataclass(slots=True, eq=False)
class Moving:
    """One transfer under way."""

    pull: Pull
    boot: str
    """Of the lender it reads from."""
    in_flight: list[bytes]
    """The lender's bytes as they were at the start: what may be in buffers on the way."""
    landed: int = 0


class Wire:
    """A Transport whose bytes land, late or never, as the exploration says. It reads one-sidedly: the lender takes no
    part, so nothing but digests and the release tells that a lease ended under the transfer."""

    name = "wire"
    advert = b""

    def __init__(self, memory: KVMemory, lender: Callable[[], LenderSide], fences: bool) -> None:
        self.moving: list[Moving] = []
        self.fence_asked: asyncio.Future[None] | None = None
        self._memory = memory
        self._lender = lender
        self._fences = fences
        self._peer = ""
        """Boot of the lender we are connected to."""

    async def connect(self, peer: WorkerInfo) -> None:
        if self._peer != peer.boot_id:
            self._end_all("another boot")
        if f"boot{self._lender().boot}" != peer.boot_id:
            raise PeerLost(f"{peer.boot_id} does not answer")
        self._peer = peer.boot_id

    def pull(self, peer_id: str, order: PullOrder) -> Pull:
        lender = self._lender()
        if self._peer != f"boot{lender.boot}":
            return failed(order, PeerLost("no connection"))
        data = [bytes(lender.memory.block(b)) for b in order.source]
        pull = Pull(order)
        if order.lease_id == PROBE_LEASE:
            self._memory.block(order.destination[0])[:] = data[0]
            pull.set_done()
        else:
            self.moving.append(Moving(pull, self._peer, data))
        return pull

    async def fence(self, peer_id: str) -> None:
        self._peer = ""
        self.fence_asked = asyncio.get_running_loop().create_future()
        try:
            await self.fence_asked
        finally:
            self.fence_asked = None

    async def close(self) -> None:
        """Never called: a world ends by being dropped."""

    # ---- what the exploration does ---------------------------------------------------------------------------------

    def land(self, number: int, source: str) -> int:
        """The next block's bytes arrive: those read at the start, or those read now. Returns the block."""
        one = self.moving[number]
        order = one.pull.order
        data = one.in_flight[one.landed] if source == "old bytes" else self._now(one)
        destination = order.destination[one.landed]
        self._memory.block(destination)[:] = data
        one.landed += 1
        if one.landed == len(order.source):
            self.moving.remove(one)
            if one.pull.state is PullState.MOVING:
                one.pull.set_done()
        return destination

    def sources(self, number: int) -> list[str]:
        """Which bytes may arrive next."""
        one = self.moving[number]
        differs = one.boot == f"boot{self._lender().boot}" and self._now(one) != one.in_flight[one.landed]
        return ["old bytes", "new bytes"] if differs else ["old bytes"]

    def _now(self, one: Moving) -> bytes:
        return bytes(self._lender().memory.block(one.pull.order.source[one.landed]))

    def break_down(self, number: int) -> None:
        self.moving.pop(number).pull.set_failed(PeerLost("the connection broke"))

    def end_fence(self, well: bool) -> None:
        assert self.fence_asked is not None
        if well:
            self._end_all("fenced")
            self.fence_asked.set_result(None)
        else:
            self.fence_asked.set_exception(PeerLost("the agent does not go away"))

    def _end_all(self, why: str) -> None:
        for one in self.moving:
            if one.pull.state is PullState.MOVING:
                one.pull.set_failed(PeerLost(why))
        if self._fences:
            self.moving.clear()


@dataclass(slots=True, eq=False)
class Intake:
    name: str
    life: Life
    credit: Credit | None
    lease_id: str = ""
    blocks: list[int] = field(default_factory=list)
    task: asyncio.Task[None] | None = None
    verified: bool = False
    has_state: bool = False


class ReaderSide:
    """Every method runs inside `loop.run`."""

    def __init__(
        self, bounds: Bounds, parts: Parts, send: Callable[[Message], None], lender: Callable[[], LenderSide]
    ) -> None:
        self.loop = ManualLoop()
        self.pool = parts.pool(bounds.reader_blocks, 1)
        self.memory = KVMemory(bounds.reader_blocks, BLOCK_BYTES, shared=False)
        self.wire = Wire(self.memory, lender, parts.fences)
        self.intakes: dict[str, Intake] = {}
        self._bounds = bounds
        self._send = send
        self.loop.run(lambda: self._start(parts))

    def _start(self, parts: Parts) -> None:
        self.puller = parts.puller(self.memory, {"wire": self.wire}, self.pool, CONFIG, Metrics())
        self.timer = self.loop.create_task(self.puller.run(), name="quarantine timer")

    # ---- life of a request -----------------------------------------------------------------------------------------

    def start(self, name: str) -> None:
        credit = self.pool.reserve(self._bounds.blocks_each)
        if credit is None:
            return
        intake = self.intakes[name] = Intake(name, Life(DECODE_REQUEST), credit)
        intake.life.on("call")
        self._send(("call", name))

    def published(self, name: str, lease_id: str, lent: tuple[tuple[int, int, bytes], ...], boot: int) -> None:
        intake = self.intakes.get(name)
        if intake is None or not intake.life.at("called"):
            return  # the call is closed: nobody reads its stream
        assert intake.credit is not None
        intake.blocks = self.pool.bind(intake.credit)
        intake.credit, intake.lease_id = None, lease_id
        intake.life.on("publish")
        blocks = [LentBlock(i, b, generation, named, 1) for i, (b, generation, named) in enumerate(lent)]
        work = self._pull(intake, lender_info(boot, self._bounds.lender_blocks), blocks)
        intake.task = self.loop.create_task(work, name=f"pull {name}")

    async def _pull(self, intake: Intake, lender: WorkerInfo, blocks: list[LentBlock]) -> None:
        try:
            await self.puller.pull(lender, intake.lease_id, blocks, intake.blocks)
        except BatonError:
            if not intake.life.ended:
                intake.life.on("fail")
                intake.life.on("retry")
                self._leave(intake)
        else:
            intake.verified = True
            self._advance(intake)
        finally:
            if intake.life.ended:
                self._give_back(intake)

    def state(self, name: str) -> None:
        intake = self.intakes.get(name)
        if intake is not None and intake.life.at("bound"):
            intake.has_state = True
            self._advance(intake)

    def refused(self, name: str) -> None:
        if name in self.intakes and self.intakes[name].life.at("called"):
            self.cancel(name)

    def _advance(self, intake: Intake) -> None:
        if intake.life.at("bound") and intake.verified and intake.has_state:
            intake.life.on("hand")
            self._send(("release", intake.lease_id, intake.name))

    def answer(self, lease_id: str, good: bool) -> None:
        for intake in list(self.intakes.values()):
            if intake.lease_id == lease_id and intake.life.at("handed"):
                self._decide(intake, "good" if good else "bad")

    def no_answer(self, name: str) -> None:
        self._decide(self.intakes[name], "good")

    def _decide(self, intake: Intake, event: str) -> None:
        if intake.life.on(event) == "running":
            for i, block in enumerate(intake.blocks):
                self.pool.publish(block, hash_of(intake.name, i))
        else:
            intake.life.on("retry")
            self._give_back(intake)

    def finish(self, name: str) -> None:
        self.intakes[name].life.on("end")
        self._give_back(self.intakes[name])

    def cancel(self, name: str) -> None:
        """Client, deadline, or a lender that said nothing for peer_timeout_s."""
        intake = self.intakes[name]
        intake.life.on("end")
        self._leave(intake)
        if intake.task is not None and not intake.task.done():
            intake.task.cancel()
        else:
            self._give_back(intake)

    def _leave(self, intake: Intake) -> None:
        """The lender should not wait for the lease to expire."""
        if not intake.has_state:
            self._send(("close", intake.name))
        if intake.lease_id:
            self._send(("release", intake.lease_id, intake.name))

    def _give_back(self, intake: Intake) -> None:
        """Quarantined destinations stay pinned: giving our reference back does not free them."""
        if self.intakes.get(intake.name) is not intake:
            return
        del self.intakes[intake.name]
        self.pool.release(intake.blocks)
        if intake.credit is not None:
            self.pool.drop(intake.credit)

    # ---- what else happens on it -----------------------------------------------------------------------------------

    def reuse(self, name: str) -> None:
        blocks = self.pool.allocate(1)
        if blocks is None:
            return
        self.memory.block(blocks[0])[:] = content(name, 0)
        self.pool.publish(blocks[0], hash_of(name, 0))
        self.pool.release(blocks)

    def land(self, number: int, source: str) -> None:
        """Bytes may land only where the pull that brings them still owns the block."""
        order = self.wire.moving[number].pull.order
        block = self.wire.land(number, source)
        refs, _, quarantined = self.pool.pins(block)
        owner = next((i for i in self.intakes.values() if block in i.blocks), None)
        is_ours = owner is not None and owner.lease_id == order.lease_id and owner.life.at("bound", "ended")
        assert quarantined or (is_ours and not owner.verified), (
            f"bytes of the pull under {order.lease_id} landed in block {block}, which belongs to "
            f"{owner.name if owner else 'somebody else' if refs else 'nobody'}"
        )

    # ---- what must hold --------------------------------------------------------------------------------------------

    def check(self) -> None:
        assert not self.loop.problems, self.loop.problems
        assert not self.timer.done(), "the quarantine timer has ended"
        check_ledger(self.pool, [i.blocks for i in self.intakes.values()], (), self.puller.quarantined_blocks())
        check_cache(self.pool, self.memory, "the reader")
        for intake in self.intakes.values():
            if intake.life.at("running"):
                found = [bytes(self.memory.block(b)) for b in intake.blocks]
                right = [content(intake.name, i) for i in range(len(found))]
                assert found == right, f"request {intake.name} runs on {found}"

    def check_at_rest(self) -> None:
        ledger = self.pool.ledger()
        assert not self.intakes, f"{list(self.intakes)} never ended"
        assert ledger.free + ledger.cached == ledger.total, f"the reader's blocks never came back: {ledger}"
        assert self.pool.num_available == ledger.total, "a credit was never given back"
        assert not self.puller.in_flight_blocks(), f"pulls to {self.puller.in_flight_blocks()} never ended"
