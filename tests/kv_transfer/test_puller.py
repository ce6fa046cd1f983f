"""Who owns a destination block, when: every row of docs/protocol.md, table Pull, on virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from baton.core.config import HandoffConfig
from baton.core.errors import (
    BatonError,
    DeadlineExceeded,
    Incompatible,
    IntegrityError,
    InternalError,
    PeerLost,
)
from baton.core.handoff import LentBlock
from baton.core.metrics import Metrics
from baton.core.worker import WorkerInfo
from baton.engine.block_pool import BlockPool
from baton.kv_transfer.digest import digest
from baton.kv_transfer.memory import KVMemory
from baton.kv_transfer.puller import Puller
from baton.kv_transfer.transport import PullRefused
from baton.sim.loop import SimLoop, run
from tests.kv_transfer.pair import info_of
from tests.kv_transfer.scripted import ScriptedTransport

SIZE = 64


class World:
    """One reader, two lenders p0 and p1, two transports: slow (preferred by the lenders) and fast."""

    def __init__(self, **settings: Any) -> None:
        self.config = HandoffConfig(probe_bytes=SIZE * 8, **settings)
        self.memory, self.pool, self.metrics = KVMemory(10, SIZE, shared=False), BlockPool(10, 16), Metrics()
        self.lenders = {name: KVMemory(8, SIZE, shared=False) for name in ("p0", "p1")}
        for name, memory in self.lenders.items():
            for b in range(8):
                memory.block(b)[:] = f"{name}/{b}".encode().ljust(SIZE, b".")
        self.slow = ScriptedTransport("slow", self.memory, self.lenders, bytes_per_s=1e3)
        self.fast = ScriptedTransport("fast", self.memory, self.lenders, bytes_per_s=1e6)
        transports = {"slow": self.slow, "fast": self.fast}
        self.puller = Puller(self.memory, transports, self.pool, self.config, self.metrics)

    def peer(self, name: str = "p0", boot: str = "b1", transports: tuple[str, ...] = ("slow", "fast")) -> WorkerInfo:
        return info_of(name, boot, 8, [(t, b"x") for t in transports])

    def lent(self, name: str, *blocks: int) -> list[LentBlock]:
        return [LentBlock(i, b, 1, digest(self.lenders[name].block(b)), 16) for i, b in enumerate(blocks)]

    def start(self, name: str, *blocks: int) -> tuple[asyncio.Task[None], list[int]]:
        """A request that pulls these blocks of a lender and holds their destination."""
        destination = self.pool.allocate(len(blocks))
        assert destination is not None
        pull = self.puller.pull(self.peer(name), "lease", self.lent(name, *blocks), destination)
        return asyncio.create_task(pull), destination


def simulate(scenario: Callable[[World], Awaitable[None]], **settings: Any) -> None:
    async def main(loop: SimLoop) -> None:
        world = World(**settings)
        timer = asyncio.create_task(world.puller.run())
        await scenario(world)
        timer.cancel()
        await asyncio.wait([timer])
        await world.puller.close()
        assert world.pool.ledger().quarantined == 0
        assert not world.puller.in_flight_blocks()
        assert world.slow.closed
        assert world.fast.closed
        world.pool.check()

    for seed in range(5):
        run(seed, main)


async def end_of(task: asyncio.Task[None]) -> BaseException | None:
    await asyncio.wait([task])
    return asyncio.CancelledError() if task.cancelled() else task.exception()


def test_the_fastest_transport_is_chosen_not_the_preferred_one() -> None:
    async def scenario(w: World) -> None:
        assert await w.puller.connect(w.peer()) == "fast"
        (link,) = w.puller.links()
        assert [(f.transport, round(f.bytes_per_s)) for f in link.figures] == [("fast", 1_000_000), ("slow", 1_000)]
        assert w.puller.bandwidths() == (("p0", "fast", link.bytes_per_s),)
        w.fast.bytes_per_s = 10.0  # throttled: the next boot's handshake sees it
        assert await w.puller.connect(w.peer(boot="b2")) == "slow"

    simulate(scenario, peer_timeout_s=600)


def test_about_equal_transports_follow_the_lenders_preference() -> None:
    async def scenario(w: World) -> None:
        w.slow.bytes_per_s = 0.95 * w.fast.bytes_per_s
        assert await w.puller.connect(w.peer(transports=("fast", "slow"))) == "fast"
        assert await w.puller.connect(w.peer("p1", transports=("slow", "fast"))) == "slow"

    simulate(scenario)


def test_a_transport_that_fails_is_left_out_counted_and_shown() -> None:
    async def scenario(w: World) -> None:
        w.fast.connect_error = PeerLost("port closed")
        assert await w.puller.connect(w.peer()) == "slow"
        assert w.metrics.value("baton_fallbacks_total", kind="transport") == 1
        assert [f.error for f in w.puller.links()[0].figures] == ["", "port closed"]

    simulate(scenario)


def test_strict_makes_the_same_failure_an_error() -> None:
    async def scenario(w: World) -> None:
        w.fast.connect_error = PeerLost("port closed")
        with pytest.raises(PeerLost, match="strict"):
            await w.puller.connect(w.peer())

    simulate(scenario, strict=True)


def test_a_transport_that_cannot_join_the_two_is_no_failure() -> None:
    async def scenario(w: World) -> None:
        w.fast.connect_error = Incompatible("another machine")
        assert await w.puller.connect(w.peer()) == "slow"
        assert w.metrics.value("baton_fallbacks_total") == 0
        with pytest.raises(Incompatible, match="no transport joins"):
            await w.puller.connect(w.peer("p1", transports=("fast", "pigeon")))

    simulate(scenario, strict=True)


def test_a_probe_with_wrong_bytes_disqualifies_the_transport() -> None:
    async def scenario(w: World) -> None:
        w.fast.lenders = {"p0": KVMemory(9, SIZE, shared=False)}  # block 8 is not its probe block
        assert await w.puller.connect(w.peer()) == "slow"

    simulate(scenario)


def test_a_probe_that_does_not_end_is_fenced_before_its_landing_block_is_used_again() -> None:
    async def scenario(w: World) -> None:
        w.slow.bytes_per_s = 1e-3
        assert await w.puller.connect(w.peer()) == "fast"
        assert w.slow.fences == ["p0"]
        assert w.slow.moving == []

    simulate(scenario)


def test_a_probe_that_cannot_be_ended_keeps_its_landing_block_from_everybody_else() -> None:
    async def scenario(w: World) -> None:
        w.slow.bytes_per_s, w.slow.fence_error = 1e-3, InternalError("its agent cannot be destroyed")
        for boot in range(3):  # each leaves one block behind
            assert await w.puller.connect(w.peer(boot=f"b{boot}")) == "fast"
        late = [block for _, pull in w.slow.moving for block in set(pull.order.destination)]
        assert len(set(late)) == len(late) == 3
        w.fast.destinations.clear()
        assert await w.puller.connect(w.peer(boot="b3", transports=("fast",))) == "fast"
        assert not set(late) & w.fast.destinations, "another probe landed where late bytes may land"
        with pytest.raises(PeerLost):  # it takes the last one
            await w.puller.connect(w.peer(boot="b4"))
        with pytest.raises(PeerLost, match="landing blocks"):
            await w.puller.connect(w.peer("p1", transports=("fast",)))
        w.slow.fence_error = None
        await w.slow.fence("p0")  # now it could be
        assert await w.puller.connect(w.peer("p1", transports=("fast",))) == "fast"

    simulate(scenario)


def test_requests_share_one_handshake_and_an_impatient_one_does_not_end_it() -> None:
    async def scenario(w: World) -> None:
        first, second = (asyncio.create_task(w.puller.connect(w.peer())) for _ in range(2))
        await asyncio.sleep(0.005)
        first.cancel()
        assert await second == "fast"
        assert await w.puller.connect(w.peer()) == "fast"
        assert w.fast.connects == [("p0", "b1")]

    simulate(scenario)


def test_one_silent_peer_does_not_delay_the_handshake_with_another() -> None:
    async def scenario(w: World) -> None:
        w.slow.bytes_per_s = w.fast.bytes_per_s = 1e-3
        silent = asyncio.create_task(w.puller.connect(w.peer("p0")))
        await asyncio.sleep(0.5)
        w.slow.bytes_per_s = w.fast.bytes_per_s = 1e6
        async with asyncio.timeout(0.5):
            await w.puller.connect(w.peer("p1"))
        assert not silent.done()

    simulate(scenario)


def test_a_pull_is_verified_before_it_returns() -> None:
    async def scenario(w: World) -> None:
        task, destination = w.start("p0", 3, 1)
        await asyncio.sleep(1)
        assert w.puller.in_flight_blocks() == set(destination)
        w.fast.land(w.fast.moving[0][1])
        assert await end_of(task) is None
        assert [bytes(w.memory.block(b))[:4] for b in destination] == [b"p0/3", b"p0/1"]
        assert not w.puller.in_flight_blocks()

    simulate(scenario)


def test_wrong_bytes_are_an_integrity_error_however_few() -> None:
    async def scenario(w: World) -> None:
        task, _ = w.start("p0", 0, 1, 2)
        await asyncio.sleep(1)
        w.lenders["p0"].block(2)[SIZE - 1] ^= 1
        w.fast.land(w.fast.moving[0][1])
        assert isinstance(await end_of(task), IntegrityError)
        assert w.metrics.value("baton_verified_bytes_total") == 0
        assert w.metrics.value("baton_integrity_failures_total") == 1

    simulate(scenario)


def part_of(w: World, destination: list[int], start: int, end: int) -> asyncio.Task[None]:
    """A pull of these bytes of p0's block 0."""
    blocks = [LentBlock(0, 0, 1, digest(w.lenders["p0"].block(0)[start:end]), 16)]
    return asyncio.create_task(w.puller.pull(w.peer("p0"), "lease", blocks, destination, (start, end)))


def test_parts_of_one_block_arrive_side_by_side_each_with_its_own_digest() -> None:
    async def scenario(w: World) -> None:
        destination = w.pool.allocate(1)
        assert destination is not None
        await w.puller.connect(w.peer())
        head, tail = part_of(w, destination, 0, 40), part_of(w, destination, 40, SIZE)
        await asyncio.sleep(0.1)
        w.lenders["p0"].block(0)[63] ^= 1
        for _, pull in list(w.fast.moving):
            w.fast.land(pull)
        assert await end_of(head) is None
        assert isinstance(await end_of(tail), IntegrityError)
        assert w.metrics.value("baton_verified_bytes_total") == 40
        assert bytes(w.memory.block(destination[0])) == bytes(w.lenders["p0"].block(0))

    simulate(scenario)


def test_two_pulls_of_the_same_byte_are_a_bug() -> None:
    async def scenario(w: World) -> None:
        destination = w.pool.allocate(1)
        assert destination is not None
        await w.puller.connect(w.peer())
        both = {part_of(w, destination, 0, 41), part_of(w, destination, 40, SIZE)}
        refused, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        assert [type(task.exception()) for task in refused] == [AssertionError]
        w.fast.land(w.fast.moving[0][1])
        assert await end_of((both - refused).pop()) is None

    simulate(scenario)


def test_a_block_with_two_late_parts_returns_when_both_have_ended() -> None:
    async def scenario(w: World) -> None:
        destination = w.pool.allocate(1)
        assert destination is not None
        parts = [part_of(w, destination, 0, 40), part_of(w, destination, 40, SIZE)]
        await asyncio.wait(parts)
        w.pool.release(destination)
        assert w.pool.ledger().quarantined == 1
        assert w.metrics.value("baton_quarantined_blocks_total") == 1
        w.fast.land(w.fast.moving[0][1])
        await asyncio.sleep(2 * w.config.quarantine_poll_s)
        assert w.puller.quarantined_blocks() == set(destination)
        assert w.pool.ledger().quarantined == 1, "bytes of the other part may still land"
        w.fast.land(w.fast.moving[0][1])
        await asyncio.sleep(2 * w.config.quarantine_poll_s)
        assert w.pool.ledger().free == 10
        assert w.fast.fences == []

    simulate(scenario, quarantine_cap=1.0)


def test_above_the_cap_only_as_many_peers_are_fenced_as_it_takes() -> None:
    async def scenario(w: World) -> None:
        await w.puller.connect(w.peer("p0"))
        await w.puller.connect(w.peer("p1"))
        pulls = []
        for lender, *blocks in (("p0", 0, 1), ("p1", 2), ("p0", 3, 4)):
            pulls.append(w.start(str(lender), *map(int, blocks)))
            await asyncio.sleep(0.001)
        await asyncio.wait([task for task, _ in pulls])
        for _, destination in pulls:
            w.pool.release(destination)
        await asyncio.sleep(w.config.quarantine_poll_s + w.fast.fence_s + 0.01)
        assert w.fast.fences == ["p0"], "without its four blocks the quarantine is below the cap"
        assert w.pool.ledger().quarantined == 1

    simulate(scenario, quarantine_cap=0.1, quarantine_max_s=1000)


def test_a_late_pull_is_quarantined_before_its_request_hears_of_it_and_returns_when_it_ends() -> None:
    async def scenario(w: World) -> None:
        task, destination = w.start("p0", 0, 1)
        assert isinstance(await end_of(task), DeadlineExceeded)
        assert w.pool.ledger().quarantined == 2
        w.pool.release(destination)
        assert w.pool.ledger().quarantined == 2, "the request let go, the pull did not"
        w.fast.land(w.fast.moving[0][1])  # the late bytes
        await asyncio.sleep(2 * w.config.quarantine_poll_s)
        assert w.pool.ledger().free == 10
        assert w.fast.fences == []

    simulate(scenario, quarantine_cap=1.0)


def test_a_pull_that_never_ends_gets_its_peer_fenced_by_the_timer_alone() -> None:
    async def scenario(w: World) -> None:
        await w.puller.connect(w.peer("p1"))
        task, destination = w.start("p0", 0, 1)
        assert isinstance(await end_of(task), DeadlineExceeded)
        w.pool.release(destination)
        await asyncio.sleep(w.config.quarantine_max_s + 1)  # no request comes again
        assert w.fast.fences == ["p0"]
        assert w.pool.ledger().free == 10
        assert [k.peer_id for k in w.puller.links()] == ["p1"], "the next pull must measure p0 again"

    simulate(scenario, quarantine_cap=1.0)


def test_above_the_cap_the_peer_is_fenced_by_the_next_poll() -> None:
    async def scenario(w: World) -> None:
        task, destination = w.start("p0", 0, 1)
        assert isinstance(await end_of(task), DeadlineExceeded)
        w.pool.release(destination)
        await asyncio.sleep(w.config.quarantine_poll_s + w.fast.fence_s + 0.01)
        assert w.fast.fences == ["p0"]
        assert w.pool.ledger().free == 10

    simulate(scenario, quarantine_cap=0.1, quarantine_max_s=1000)


def test_below_the_cap_nobody_is_fenced_early() -> None:
    async def scenario(w: World) -> None:
        task, destination = w.start("p0", 0, 1)
        assert isinstance(await end_of(task), DeadlineExceeded)
        w.pool.release(destination)
        await asyncio.sleep(5)
        assert w.fast.fences == []

    simulate(scenario, quarantine_cap=0.2)


def test_a_fence_that_fails_leaves_the_blocks_in_quarantine_and_is_tried_again_more_and_more_rarely(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario(w: World) -> None:
        caplog.clear()
        w.fast.fence_error = InternalError("its agent cannot be destroyed")
        task, destination = w.start("p0", 0, 1)
        assert isinstance(await end_of(task), DeadlineExceeded)
        w.pool.release(destination)
        await asyncio.sleep(100)
        assert w.pool.ledger().quarantined == 2
        assert 4 <= len(w.fast.fences) <= 8
        assert caplog.text.count("cannot be destroyed") == 1
        w.fast.fence_error = None
        await asyncio.sleep(70)
        assert w.pool.ledger().free == 10
        young, destination = w.start("p0", 0, 1)
        assert isinstance(await end_of(young), DeadlineExceeded)
        w.pool.release(destination)
        await asyncio.sleep(1)
        assert w.pool.ledger().free == 10, "the next fence is not held up by failures that are over"

    simulate(scenario, quarantine_cap=0.1)


def test_a_fence_ends_the_other_pulls_of_that_peer_and_leaves_other_peers_alone() -> None:
    async def scenario(w: World) -> None:
        await w.puller.connect(w.peer("p1"))
        late, late_blocks = w.start("p0", 0, 1)
        await asyncio.sleep(w.config.pull_timeout_s - 0.05)
        young, _ = w.start("p0", 2)
        other, _ = w.start("p1", 2)
        await asyncio.wait([late])
        w.pool.release(late_blocks)
        assert isinstance(await end_of(young), PeerLost)
        assert not other.done()
        w.fast.land(next(p for owner, p in w.fast.moving if owner == "p1"))
        assert await end_of(other) is None

    simulate(scenario, quarantine_cap=0.1)


def test_a_cancelled_pull_is_quarantined_too() -> None:
    async def scenario(w: World) -> None:
        task, destination = w.start("p0", 5)
        await asyncio.sleep(1)
        task.cancel()
        await asyncio.wait([task])
        w.pool.release(destination)
        assert w.puller.quarantined_blocks() == set(destination)
        assert w.metrics.value("baton_pulls_total", transport="fast", end="cancelled") == 1

    simulate(scenario)


@pytest.mark.parametrize(("error", "end", "measured"), [
    (PeerLost("connection reset"), "failed", 2), (PullRefused("lease ended"), "refused", 1),
])
def test_a_failed_pull_frees_its_blocks_at_once_and_a_lost_connection_is_measured_again(
    error: BatonError, end: str, measured: int
) -> None:
    async def scenario(w: World) -> None:
        task, destination = w.start("p0", 5)
        await asyncio.sleep(1)
        w.fast.fail(w.fast.moving[0][1], error)
        assert await end_of(task) is error
        w.pool.release(destination)
        assert w.pool.ledger().free == 10
        assert w.metrics.value("baton_pulls_total", transport="fast", end=end) == 1
        await w.puller.connect(w.peer())
        assert len(w.fast.connects) == measured

    simulate(scenario)


@pytest.mark.parametrize("strict", [False, True])
def test_a_connection_that_was_gone_before_the_pull_began_is_replaced_by_what_still_works(strict: bool) -> None:
    async def scenario(w: World) -> None:
        await w.puller.connect(w.peer())
        await w.fast.fence("p0")  # the idle connection broke
        w.fast.connect_error = Incompatible("no way any more")
        task, _ = w.start("p0", 5)
        await asyncio.sleep(2)
        assert w.metrics.value("baton_fallbacks_total", kind="transport") == 1
        if strict:
            assert isinstance(await end_of(task), PeerLost)
            return
        w.slow.land(w.slow.moving[0][1])
        assert await end_of(task) is None
        assert w.metrics.value("baton_pulls_total", transport="slow", end="verified") == 1

    simulate(scenario, strict=strict)


def test_closing_in_the_middle_of_a_handshake_and_of_pulls_leaves_nothing() -> None:
    async def scenario(w: World) -> None:
        task, _ = w.start("p0", 0, 1)
        await asyncio.sleep(1)
        greeting = asyncio.create_task(w.puller.connect(w.peer("p1")))
        await asyncio.sleep(0.005)
        await w.puller.close()
        assert isinstance(await end_of(task), PeerLost)
        assert isinstance(await end_of(greeting), PeerLost)  # type: ignore[arg-type]

    simulate(scenario)


def test_closing_ends_the_handshakes_with_every_boot_of_a_peer() -> None:
    async def scenario(w: World) -> None:
        w.slow.connect_s = w.fast.connect_s = 1.0
        boots = [asyncio.create_task(w.puller.connect(w.peer(boot=boot))) for boot in ("b1", "b2")]
        await asyncio.sleep(0.5)
        await w.puller.close()
        connects = len(w.slow.connects) + len(w.fast.connects)
        assert [type(await end_of(task)) for task in boots] == [PeerLost, PeerLost]  # type: ignore[arg-type]
        await asyncio.sleep(10)
        assert len(w.slow.connects) + len(w.fast.connects) == connects, "a closed transport was asked to connect"

    simulate(scenario)


def test_a_transport_that_cannot_be_closed_does_not_keep_the_others_open() -> None:
    async def scenario(w: World) -> None:
        task, _ = w.start("p0", 0, 1)
        await asyncio.sleep(1)
        w.slow.close_error = InternalError("its agent cannot be destroyed")
        with pytest.raises(InternalError, match="cannot be destroyed"):
            await w.puller.close()
        assert w.fast.closed
        assert isinstance(await end_of(task), PeerLost)
        w.slow.close_error = None

    simulate(scenario)
