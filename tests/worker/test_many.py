"""One turn after another, and many requests at once, on workers seen from their streams (tests/worker/by_hand.py)."""

from __future__ import annotations

import asyncio

import pytest

from tests.worker.by_hand import BLOCK, Bench, play, request, terms
from tests.worker.test_by_hand import check

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.slow
def test_three_hundred_cancelled_at_once_twenty_times_leave_nothing_and_slow_nobody() -> None:
    """T22: a storm of cancels, each time somewhere else in the lives of the requests."""

    async def story(b: Bench) -> None:
        stream, quiet = b.stream(b.decode[0]), b.stream(b.decode[0])

        async def alone(name: str) -> float:
            started = b.loop.time()
            heard = quiet.submit(request(name, range(100, 120)), next(b.epochs), b.prefill[0])
            await heard.ended()
            assert not heard.failed, heard.last
            return b.loop.time() - started

        base_s = max([await alone(f"base {i}") for i in range(5)])
        for epoch in range(20):
            requests = [request(f"{epoch}.{i}", (i, epoch, *range(10)), max_tokens=40) for i in range(300)]
            epochs = [next(b.epochs) for _ in requests]
            asked = [
                stream.submit(r, e, b.prefill[0] if i % 3 else None)
                for i, (r, e) in enumerate(zip(requests, epochs, strict=True))
            ]
            await asyncio.sleep(0.02 * epoch)
            for r, e in zip(requests, epochs, strict=True):
                stream.cancel(r, e)
            for heard in asked:
                await heard.ended()
            after_s = await alone(f"after {epoch}")
            assert after_s <= 2 * base_s, f"round {epoch}: {after_s} s, undisturbed {base_s}"
        for machine in b.machines:
            assert machine.node is not None
            load = machine.node.load()
            assert (load.num_running, load.num_waiting, load.num_lent_out) == (0, 0, 0), load

    # A step that runs is not aborted: short ones, so that it is the storm that is measured.
    play(story, world_terms=terms(num_blocks=3000, max_step_tokens=32))


@pytest.mark.parametrize("num_tokens", range(1, 2 * BLOCK + 2))
def test_a_block_is_not_full_because_the_first_token_came_before_its_kv(num_tokens: int) -> None:
    """It entered the prefix map with an empty slot, and the next turn read it."""

    async def story(b: Bench) -> None:
        stream, r = b.stream(b.decode[0]), request("turn-1", range(1, num_tokens + 1), max_tokens=1)
        heard = stream.submit(r, 1, b.prefill[0])
        await heard.ended()
        again = request("turn-2", (*r.prompt, *heard.tokens[0], 70, 71))
        heard = stream.submit(again, 2)
        await heard.ended()
        check(again, heard)

    play(story)
