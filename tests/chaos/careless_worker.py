"""A decode worker that loses a bit of its KV now and then: what the chaos runner must not overlook."""

from __future__ import annotations

import asyncio

from baton.cluster.store import Registry
from baton.core.config import Config
from baton.decode_node import server
from baton.kv_transfer.memory import KVMemory
from baton.worker import assembly

EVERY_S = 0.3


class Careless(KVMemory):
    """One bit of every block flips, again and again."""

    def __init__(self, num_blocks: int, block_bytes: int, shared: bool) -> None:
        super().__init__(num_blocks, block_bytes, shared)
        self._flipping = asyncio.get_running_loop().create_task(self._flip())

    async def _flip(self) -> None:
        while True:
            await asyncio.sleep(EVERY_S)
            for block in range(self.num_blocks):
                self.block(block)[0] ^= 1

    def close(self) -> None:
        self._flipping.cancel()
        super().close()


async def serve(config: Config, worker_id: str, registry: Registry) -> None:
    setattr(assembly, "KVMemory", Careless)  # noqa: B010 (mypy: a class is not assigned)
    await server.serve(config, worker_id, registry)
