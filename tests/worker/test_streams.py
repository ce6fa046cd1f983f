"""A router's stream ends as a whole: when the worker has let go of it, nobody reads what the router says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from baton.core.messages import Hello, UpMessage
from tests.worker.by_hand import HAND, Bench, play


def test_a_stream_that_breaks_while_nothing_is_said_can_be_closed_at_once() -> None:
    """As the gRPC server does it: it closes what it gave the worker as soon as the worker's side has ended."""

    async def story(bench: Bench) -> None:
        async def messages() -> AsyncGenerator[UpMessage, None]:
            yield Hello(HAND)
            await asyncio.Event().wait()

        async def serve() -> None:
            (machine,) = bench.decode
            assert machine.node is not None
            async with aclosing(messages()) as up:  # RuntimeError if somebody is still inside
                async for _ in machine.node.stream(up):
                    pass

        serving = bench.hand.spawn(serve(), "serve")
        await asyncio.sleep(1.0)
        serving.cancel()
        await asyncio.wait([serving])
        assert serving.cancelled(), serving

    play(story)
