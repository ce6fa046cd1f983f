"""A reader in a process of its own that pulls the same blocks over and over, until it is killed.

Started as `python reader_main.py '{"transport": ..., "adverts": ..., ...}'`; says PULLED after each round.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from baton.core.handoff import LentBlock
from tests.kv_transfer.pair import info_of, reader


async def main(options: dict[str, Any]) -> None:
    adverts = [(name, advert.encode()) for name, advert in options["adverts"]]
    peer = info_of("prefill-0", "boot1", options["num_blocks"], adverts)
    blocks = [LentBlock(**{**b, "digest": bytes.fromhex(b["digest"])}) for b in options["blocks"]]
    async with reader((options["transport"],), len(blocks), options["block_bytes"]) as r:
        destination = r.take(len(blocks))
        while True:
            await r.puller.pull(peer, options["lease_id"], blocks, destination)
            sys.stdout.write("PULLED\n")
            sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
