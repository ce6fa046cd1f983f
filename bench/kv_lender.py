"""A lender in a process of its own: a real pool, lease table and transports, told what to do on stdin.

Started as `python -m baton.bench.kv_lender '{"worker_id": ..., ...}'`; answers each JSON line with one JSON line.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import sys
from typing import Any

from baton.core.config import HandoffConfig
from baton.core.handoff import LentBlock, PrefillCall
from baton.core.metrics import Metrics
from baton.core.request import Request
from baton.engine.block_pool import BlockPool
from baton.kv_transfer.digest import digest
from baton.kv_transfer.lease import LeaseTable
from baton.kv_transfer.memory import KVMemory
from baton.kv_transfer.offer import open_transports


class LenderProcess:
    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.memory = KVMemory(options["num_blocks"], options["block_bytes"], shared=True)
        self.pool = BlockPool(options["num_blocks"], 16)
        self.leases = LeaseTable(self.pool, Metrics())
        self.leased: dict[str, list[int]] = {}

    async def run(self) -> None:
        config = HandoffConfig(transports=tuple(self.options["transports"]))
        transports = await open_transports(
            self.options["worker_id"], self.options["boot_id"], self.memory, self.leases, config
        )
        self.say({"adverts": [[name, t.advert.decode()] for name, t in transports.items()]})
        loop = asyncio.get_running_loop()
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            call = json.loads(line)
            self.say(getattr(self, call.pop("op"))(**call))
        for transport in transports.values():
            await transport.close()

    def say(self, answer: dict[str, Any]) -> None:
        sys.stdout.write("LENDER " + json.dumps(answer) + "\n")
        sys.stdout.flush()

    def lend(self, count: int, part: tuple[int, int] | None = None) -> dict[str, Any]:
        """Fill `count` fresh blocks with bytes that name block and generation, and lend them. The digests are of all
        bytes, or of `part`."""
        now = asyncio.get_running_loop().time()
        call = PrefillCall(Request("r", (1, 2, 3)), 0, "reader", 0, lease_ttl_s=600.0)
        lease = self.leases.grant(call, self.options["worker_id"], self.options["boot_id"], now)
        blocks = self.pool.allocate(count)
        assert blocks is not None, f"no {count} blocks left"
        lent = []
        for index, block in enumerate(blocks):
            name = f"{self.options['boot_id']}/{block}/{self.pool.generation(block)}".encode()
            self.memory.block(block)[:] = hashlib.shake_128(name).digest(64) * (self.memory.block_bytes // 64)
            data = self.memory.block(block)[slice(*part or (None,))]
            one = LentBlock(index, block, self.pool.generation(block), digest(data), 16)
            self.leases.add(lease.lease_id, one)
            lent.append(one)
        self.pool.release(blocks)
        plain = [dataclasses.asdict(b) | {"digest": b.digest.hex()} for b in lent]
        return {"lease_id": lease.lease_id, "blocks": plain}

    def release(self, lease_id: str) -> dict[str, Any]:
        answer = self.leases.release(lease_id, asyncio.get_running_loop().time())
        return dataclasses.asdict(answer)

    def scribble(self, block: int) -> dict[str, Any]:
        """One byte changes after the block was published."""
        self.memory.block(block)[-1] ^= 1
        return {}

    def spoil_probe(self) -> dict[str, Any]:
        self.memory.block(self.memory.probe_block)[0] ^= 1
        return {}

    def served(self) -> dict[str, Any]:
        return {"bytes": self.leases.metrics.value("baton_served_bytes_total")}


if __name__ == "__main__":
    asyncio.run(LenderProcess(json.loads(sys.argv[1])).run())
