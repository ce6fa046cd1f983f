"""Baton's engine alone, from nothing to a first token: one worker in this process, no router and no registry.

    python -m baton.bench.peers.first_token --set engine.quantization=bf16

Says so in one line and ends; whoever started it looks at the clock.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import AsyncIterator

from baton.core.config import Config, load
from baton.core.messages import Hello, Submit, UpMessage
from baton.core.request import Request, SamplingParams
from baton.core.worker import Route
from baton.decode_node.policy import decode_policy
from baton.models.catalog import open_model
from baton.wire.client import GrpcDial
from baton.worker.assembly import open_node

PROMPT = (5, 6, 7, 8)
WORKER = "first-token"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.NAME=VALUE", dest="overrides")
    token = asyncio.run(first_token(load({}, parser.parse_args().overrides)))
    print(f"first token: {token}", flush=True)


async def first_token(config: Config) -> int:
    files = open_model(config.model)
    async with contextlib.AsyncExitStack() as stack:
        dial = GrpcDial()
        stack.push_async_callback(dial.close)
        policy = decode_policy(config, files.spec.eos_token_ids)
        node = await open_node(files, config, WORKER, policy, dial, stack)
        turning = asyncio.create_task(node.run())
        try:
            async for message in node.stream(_asked()):
                if tokens := [token for chunk in message.chunks for token in chunk.token_ids]:
                    return tokens[0]
        finally:
            turning.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await turning
    raise AssertionError("the stream ended without a token")


async def _asked() -> AsyncIterator[UpMessage]:
    yield Hello(WORKER)
    yield Submit(Request("first", PROMPT, SamplingParams(max_tokens=1, ignore_eos=True)), Route(WORKER, None), 0)
    await asyncio.Event().wait()  # the stream stays open


if __name__ == "__main__":
    main()
