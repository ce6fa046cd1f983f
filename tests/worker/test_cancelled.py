"""Work that is given up in the very turn in which it fails ends: nothing goes on behind its owner's back.

A TaskGroup before Python 3.13 forgets that its task was cancelled when it fails in the same turn (gh-116720).
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from typing import Any

import pytest

from baton.core.errors import PeerLost
from baton.core.handoff import PrefillCall
from baton.worker.handoff import Silent
from tests.worker.by_hand import BLOCK, Bench, play, request

PROMPT = range(1, 4 * BLOCK + 2)
SEEDS = range(8)
"""The order of two things in one turn is the seed's."""


def leaves_as_it_fails(monkeypatch: pytest.MonkeyPatch, leave: list[asyncio.Task[Any]]) -> None:
    """The pull of a fetched prefix ends in an error, and at that moment whoever wanted it goes away."""

    def span(self: Silent, name: str, start_s: float, detail: str = "") -> None:
        for task in leave:
            task.cancel()
        raise PeerLost("the holder is gone")

    monkeypatch.setattr(Silent, "span", span)


async def warmed(b: Bench) -> None:
    """The first decode worker holds the prompt's blocks."""
    await b.stream(b.decode[0]).submit(request("warm", PROMPT), 1).ended()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_prefill_that_is_cancelled_while_its_fetch_fails_computes_nothing(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(b: Bench) -> None:
        await warmed(b)
        lender, holder = b.prefill[0].node, b.decode[0].node
        assert lender is not None
        assert holder is not None
        call = PrefillCall(request("cold", PROMPT), 1, "reader", 0, 3.0, holder=holder.info)

        async def read() -> None:
            async with aclosing(lender.prefill(call)) as events:
                async for _ in events:
                    pass

        reading = b.hand.spawn(read(), "read")
        leaves_as_it_fails(monkeypatch, [reading])
        await asyncio.wait([reading])
        await b.quiet()
        assert b.computed(b.prefill[0]) == 0

    play(story, seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_request_that_ends_while_its_fetch_fails_computes_nothing(
    seed: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(b: Bench) -> None:
        await warmed(b)
        node, holder, r = b.decode[1].node, b.decode[0].node, request("cold", PROMPT)
        assert node is not None
        assert holder is not None
        stream = b.stream(b.decode[1])
        stream.submit(r, 1, holder=b.decode[0])
        leave: list[asyncio.Task[Any]] = []
        leaves_as_it_fails(monkeypatch, leave)
        while not node._intakes:
            await asyncio.sleep(0.001)
        (intake,) = node._intakes.values()
        assert intake._task is not None

        async def go() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                intake.end(PeerLost("the router's stream ended"))

        leave.append(b.hand.spawn(go(), "go"))
        await asyncio.wait([intake._task])
        await b.quiet()
        assert b.computed(b.decode[1]) == 0

    play(story, num_decode=2, seed=seed)
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]
