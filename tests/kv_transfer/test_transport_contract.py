"""What every transport promises, with the lender in another process: exact bytes, certain ends, and no late byte in a
block that has changed hands."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from baton.bench.freeze import freeze_once
from baton.core.errors import Incompatible, IntegrityError, PeerLost
from baton.core.handoff import LentBlock
from baton.kv_transfer.transport import PullOrder, PullRefused, PullState
from tests.kv_transfer.pair import Lender, Reader, kill_a_reader, lender, reader, until

BIG = 1 << 20
"""Block size of the tests that must catch a pull on its way."""
MANY = 96


def test_pulled_blocks_are_byte_for_byte_what_was_lent(transport: str) -> None:
    async def main() -> None:
        async with reader((transport,)) as r:
            lease, blocks = there.lend(7)
            destination = r.take(7)
            order = [3, 0, 6, 5, 1, 2, 4]
            chosen = await r.puller.connect(there.info)
            await r.puller.pull(there.info, lease, [blocks[i] for i in order], destination)
            assert chosen == transport
            assert r.metrics.value("baton_verified_bytes_total") == 7 * 4096
            assert r.metrics.value("baton_pulled_bytes_total", transport=transport) == 7 * 4096
            assert r.metrics.value("baton_pulls_total", transport=transport, end="verified") == 1
            assert len({bytes(r.memory.block(b)) for b in destination}) == 7

    with lender((transport,), num_blocks=12) as there:  # pools of different sizes
        asyncio.run(main())


def test_a_part_of_each_block_comes_to_its_place_and_touches_no_other_byte(transport: str) -> None:
    async def main() -> None:
        async with reader((transport,)) as r:
            lease, blocks = there.lend(3, part=(100, 1000))
            destination = r.take(3)
            for d in destination:
                r.memory.block(d)[:] = b"\xa5" * 4096
            await r.puller.pull(there.info, lease, blocks, destination, part=(100, 1000))
            assert r.metrics.value("baton_verified_bytes_total") == 3 * 900
            around = [bytes(r.memory.block(d)[:100]) + bytes(r.memory.block(d)[1000:]) for d in destination]
            assert around == [b"\xa5" * (4096 - 900)] * 3
            rest = PullOrder(lease, tuple(b.block_id for b in blocks), tuple(destination), start=1000)
            assert await r.transports[transport].pull(there.info.worker_id, rest).wait() is PullState.DONE
            assert [bytes(r.memory.block(d)[:100]) for d in destination] == [b"\xa5" * 100] * 3
            assert all(bytes(r.memory.block(d)[960:1024]) == bytes(r.memory.block(d)[1024:1088]) for d in destination)

    with lender((transport,)) as there:
        asyncio.run(main())


def test_pulls_at_the_same_time_do_not_mix(transport: str) -> None:
    async def main() -> None:
        async with reader((transport,), num_blocks=64) as r:
            lease, blocks = there.lend(32)
            async with asyncio.TaskGroup() as tasks:
                for i in range(0, 32, 4):
                    tasks.create_task(r.puller.pull(there.info, lease, blocks[i : i + 4], r.take(4)))
            assert r.metrics.value("baton_verified_bytes_total") == 32 * 4096
            assert r.puller.in_flight_blocks() == set()

    with lender((transport,), num_blocks=32) as there:
        asyncio.run(main())


def test_a_pull_without_a_connection_has_failed_before_it_began(transport: str) -> None:
    async def main() -> None:
        async with reader((transport,)) as r:
            pull = r.transports[transport].pull("nobody", PullOrder("lease", (1,), (2,)))
            assert await pull.wait() is PullState.FAILED
            assert isinstance(pull.error, PeerLost)

    asyncio.run(main())


def test_blocks_outside_the_lenders_memory_are_refused_and_the_connection_lives_on(transport: str) -> None:
    async def main() -> None:
        async with reader((transport,)) as r:
            lease, blocks = there.lend(2)
            await r.puller.connect(there.info)
            order = PullOrder(lease, (blocks[0].block_id, 10_000), (1, 2))
            pull = r.transports[transport].pull(there.info.worker_id, order)
            assert await pull.wait() is PullState.FAILED
            assert isinstance(pull.error, PullRefused)
            await r.puller.pull(there.info, lease, blocks, r.take(2))

    with lender((transport,)) as there:
        asyncio.run(main())


def test_a_block_that_changed_after_it_was_published_is_never_accepted(transport: str) -> None:
    async def main() -> None:
        async with reader((transport,)) as r:
            lease, blocks = there.lend(3)
            there.ask("scribble", block=blocks[1].block_id)
            with pytest.raises(IntegrityError, match="1 of 3 blocks"):
                await r.puller.pull(there.info, lease, blocks, r.take(3))
            assert r.metrics.value("baton_integrity_failures_total", reason="digest") == 1
            assert r.metrics.value("baton_verified_bytes_total") == 0

    with lender((transport,)) as there:
        asyncio.run(main())


def test_blocks_of_another_size_are_incompatible(transport: str) -> None:
    async def main() -> None:
        async with reader((transport,), block_bytes=8192) as r:
            with pytest.raises(Incompatible):
                await r.transports[transport].connect(there.info)

    with lender((transport,)) as there:
        asyncio.run(main())


def test_a_cancelled_pull_keeps_its_blocks_until_no_byte_can_land(transport: str) -> None:
    async def main() -> None:
        async with reader((transport,), num_blocks=MANY, block_bytes=BIG, quarantine_poll_s=0.01) as r:
            lease, blocks = there.lend(MANY)
            destination = r.take(MANY)
            await r.puller.connect(there.info)
            pulling = asyncio.create_task(r.puller.pull(there.info, lease, blocks, destination))
            await until(r.puller.in_flight_blocks)
            pulling.cancel()
            await asyncio.wait([pulling])
            r.pool.release(destination)
            pending = r.puller.in_flight_blocks()
            assert pending == r.puller.quarantined_blocks()
            assert r.pool.ledger().quarantined == len(pending), "a block that may still be written to was given back"
            await until(lambda: not r.puller.quarantined_blocks())
            assert r.pool.ledger().free == MANY

    with lender((transport,), num_blocks=MANY, block_bytes=BIG) as there:
        asyncio.run(main())


def test_closing_ends_every_pull_that_is_under_way(transport: str) -> None:
    async def main() -> None:
        async with reader((transport,), num_blocks=MANY, block_bytes=BIG) as r:
            lease, blocks = there.lend(MANY)
            await r.puller.connect(there.info)
            pulls = [
                asyncio.create_task(r.puller.pull(there.info, lease, blocks[i : i + 8], r.take(8)))
                for i in range(0, MANY, 8)
            ]
            await until(r.puller.in_flight_blocks)
            await r.puller.close()
            outcomes = await asyncio.gather(*pulls, return_exceptions=True)
            assert all(o is None or isinstance(o, PeerLost) for o in outcomes), outcomes
            assert r.puller.in_flight_blocks() == set()
            with pytest.raises(PeerLost, match="closing"):
                await r.puller.connect(there.info)

    with lender((transport,), num_blocks=MANY, block_bytes=BIG) as there:
        asyncio.run(main())


async def _catch_on_its_way(
    r: Reader, there: Lender, strike: Callable[[], None]
) -> tuple[asyncio.Task[None], list[int], str, list[LentBlock]]:
    """Start a pull of everything the lender has, and strike when its first bytes are in."""
    lease, blocks = there.lend(MANY)
    await r.puller.connect(there.info)
    destination = r.take(len(blocks))
    pulling = asyncio.create_task(r.puller.pull(there.info, lease, blocks, destination))
    await until(lambda: r.arrived(destination) > 0 or pulling.done())
    strike()
    return pulling, destination, lease, blocks


@pytest.mark.slow
def test_a_lender_killed_with_bytes_on_their_way_fails_the_pull_and_its_next_boot_is_reached(transport: str) -> None:
    async def main(there: Lender) -> None:
        async with reader((transport,), num_blocks=MANY, block_bytes=BIG) as r:
            pulling, destination, _, _ = await _catch_on_its_way(r, there, there.kill)
            outcome = (await asyncio.gather(pulling, return_exceptions=True))[0]
            if transport == "tcp":  # the others may have all bytes before the kill lands: one copy, by the reader
                assert isinstance(outcome, PeerLost), outcome
            else:
                assert outcome is None or isinstance(outcome, PeerLost), outcome
            if outcome is not None:
                assert 0 < r.arrived(destination) < MANY, "the kill missed the transfer"
            assert r.puller.in_flight_blocks() == set(), "a failed pull is terminal"
            r.pool.release(destination)
            with lender((transport,), boot_id="boot2", block_bytes=BIG) as again:
                lease, blocks = again.lend(4)
                await r.puller.pull(again.info, lease, blocks, r.take(4))
            assert [k.boot_id for k in r.puller.links()] == ["boot2"]

    with lender((transport,), num_blocks=MANY, block_bytes=BIG) as first:
        asyncio.run(main(first))


@pytest.mark.slow
def test_readers_that_are_killed_in_the_middle_of_a_pull_do_the_lender_no_harm(
    transport: str, request: pytest.FixtureRequest
) -> None:
    if "nixl/tcp" in request.node.callspec.id:
        pytest.skip("UCX's emulated READ can abort its lender: why no worker offers it (docs/notes/0003)")
    with lender((transport,), num_blocks=MANY, block_bytes=BIG) as there:
        for _ in range(3):
            lease_id = kill_a_reader(there, transport, MANY, BIG)
            assert there.ask("release", lease_id=lease_id)["good"]
        asyncio.run(_one_pull(transport, there))


async def _one_pull(transport: str, there: Lender) -> None:
    async with reader((transport,), num_blocks=4, block_bytes=BIG) as r:
        lease, blocks = there.lend(4)
        await r.puller.pull(there.info, lease, blocks, r.take(4))


def test_an_ended_lease_is_declined_by_name() -> None:
    async def main(transport: str) -> None:
        async with reader((transport,)) as r:
            lease, blocks = there.lend(2)
            assert there.ask("release", lease_id=lease)["good"]
            with pytest.raises(PullRefused, match="declined to lend: lease prefill-0:boot1:"):
                await r.puller.pull(there.info, lease, blocks, r.take(2))
            assert r.metrics.value("baton_pulls_total", transport=transport, end="refused") == 1

    with lender(("shm", "tcp")) as there:
        for transport in ("shm", "tcp"):
            asyncio.run(main(transport))


def test_a_frozen_lender_writes_no_byte_into_a_block_that_has_a_new_owner(
    transport: str, request: pytest.FixtureRequest
) -> None:
    """Frozen half-way, timed out, quarantined, fenced, thawed: the blocks are somebody else's by then."""
    seen = freeze_once(transport)
    assert not seen.missed, f"nothing was on its way when the lender was stopped: {seen}"
    if request.node.callspec.params["transport"] != "nixl":  # process_vm_readv reads a frozen process, too
        assert seen.timed_out > 0, "the second pull needs a lender that is awake"
    assert seen.fences == (seen.timed_out > 0), f"{seen}"
    assert seen.late_bytes == 0, f"{seen}"
    # UCX's emulated READ aborts a process that finds its reader fenced when it wakes up (docs/notes/0003).
    assert seen.lender_lived or request.node.callspec.params["transport"] == "nixl/tcp"


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_a_lender_that_does_not_answer_is_lost_in_bounded_time(
    transport: str, how: str, request: pytest.FixtureRequest
) -> None:
    if how == "frozen" and request.node.callspec.params["transport"] == "nixl":
        pytest.skip("process_vm_readv reads a frozen process as well as any other")

    async def main() -> None:
        async with reader((transport,), peer_timeout_s=0.3) as r:
            with pytest.raises(PeerLost):
                await r.puller.connect(there.info)
            assert r.metrics.value("baton_fallbacks_total", kind="transport") == 1

    with lender((transport,)) as there:
        there.kill() if how == "killed" else there.freeze()
        asyncio.run(main())
