"""Workers that cost nothing, for Baton's own router: they speak its protocol, with made-up tokens.

`python -m baton.bench.router_cost.workers REDIS_URL CONFIG_JSON --gap-s S`: one process with two prefill and two decode
workers. A decode worker gives each of its requests one token in every step, S seconds apart or a millisecond,
says its load and tells of the blocks that come and go, as a real one does; nothing is computed or handed off.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import uvloop

from baton.cluster.store import RedisRegistry
from baton.core.block_hash import HASH_BYTES, BlockHash
from baton.core.layout import Capability, KVLayout
from baton.core.messages import Cancel, KVEvents, KVSnapshot, StepMessage, Submit, TokenChunk, UpMessage
from baton.core.request import FinishReason
from baton.core.services import WorkerService
from baton.core.step_model import StepModel
from baton.core.worker import Role, WorkerInfo, WorkerLoad
from baton.wire.server import start_worker_server

NUM_OF_EACH_ROLE = 2
NUM_BLOCKS, MAX_KEPT = 65_536, 4_096
TOKEN_ID = 42
REGISTER_S = 1.0
FASTEST_S = 0.001
"""No engine does a step in less, and a message for each request alone is not what routers get."""
MODEL = StepModel(1e-4, 1e-7, 1e-12, 1e-7, 1e-12, num_prefill_steps=99, num_decode_steps=99)


@dataclass(slots=True)
class _Running:
    epoch: int
    left: int
    first_index: int = 0


@dataclass(slots=True)
class Worker:
    """One router's stream at a time."""

    info: WorkerInfo
    gap_s: float
    _running: dict[str, _Running] = field(default_factory=dict)
    _taken: list[int] = field(default_factory=list)
    _kept: deque[BlockHash] = field(default_factory=deque)
    _stored: list[BlockHash] = field(default_factory=list)
    _steps: int = 0
    _seq: int = 0
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    async def stream(self, up: AsyncIterator[UpMessage]) -> AsyncGenerator[StepMessage, None]:
        reader = asyncio.create_task(self._read(up))
        try:
            yield replace(self._step(), snapshot=KVSnapshot(self._seq, tuple(self._kept)))
            while True:
                try:
                    await asyncio.wait_for(self._news.wait(), REGISTER_S)
                except TimeoutError:
                    yield self._step()
                    continue
                await asyncio.sleep(max(self.gap_s, FASTEST_S))
                yield self._step()
        finally:
            reader.cancel()

    async def _read(self, up: AsyncIterator[UpMessage]) -> None:
        async for message in up:
            if isinstance(message, Submit):
                request = message.request
                self._running[request.request_id] = _Running(message.epoch, request.sampling.max_tokens)
                self._taken.append(message.epoch)
                num_blocks = len(request.prompt) // self.info.capability.layout.block_size
                self._stored += [BlockHash(os.urandom(HASH_BYTES)) for _ in range(num_blocks)]
                self._news.set()
            elif isinstance(message, Cancel):
                self._running.pop(message.request_id, None)

    def _step(self) -> StepMessage:
        """One token for everybody."""
        chunks = []
        for request_id, one in list(self._running.items()):
            one.left -= 1
            finish = None if one.left else FinishReason.LENGTH
            chunks.append(TokenChunk(request_id, one.epoch, one.first_index, (TOKEN_ID,), finish))
            one.first_index += 1
            if finish is not None:
                del self._running[request_id]
        self._steps += bool(chunks)
        if not self._running:
            self._news.clear()
        taken, self._taken = tuple(self._taken), []
        return StepMessage(self.info.boot_id, self._load(), tuple(chunks), self._blocks(), taken=taken)

    def _blocks(self) -> tuple[KVEvents, ...]:
        """What was computed since the last step, and what had to go for it."""
        stored, self._stored = tuple(self._stored), []
        if not stored:
            return ()
        self._kept += stored
        gone = tuple(self._kept.popleft() for _ in range(max(0, len(self._kept) - MAX_KEPT)))
        self._seq += 1
        return (KVEvents(self._seq, stored, gone),)

    def _load(self) -> WorkerLoad:
        return WorkerLoad(
            num_running=len(self._running), context_tokens=100 * len(self._running), available_blocks=NUM_BLOCKS,
            total_blocks=NUM_BLOCKS, steps=self._steps, model=MODEL,
        )  # fmt: skip


async def serve(redis_url: str, about: dict[str, Any], gap_s: float) -> None:
    """`about`: what config.json says of the model."""
    capability = Capability(
        about["name"], about["fingerprint"], KVLayout(1, 1, 4, 16, "bf16"), about["max_model_len"], NUM_BLOCKS,
        tuple(about["eos_token_ids"]), transports=(("tcp", b""),),
    )  # fmt: skip
    registry, workers, servers = RedisRegistry(redis_url), [], []
    for role in Role:
        for number in range(NUM_OF_EACH_ROLE):
            worker = Worker(WorkerInfo(f"{role.value}-{number}", "boot", role, "", capability), gap_s)
            server = await start_worker_server(cast(WorkerService, worker), "127.0.0.1", 0)
            worker.info = replace(worker.info, address=f"127.0.0.1:{server.port}")
            workers.append(worker)
            servers.append(server)
    while True:
        for worker in workers:
            await registry.register(worker.info)
        await asyncio.sleep(REGISTER_S)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Workers that cost nothing.")
    parser.add_argument("redis_url", metavar="REDIS_URL")
    parser.add_argument("card", type=Path, metavar="CONFIG_JSON", help="of the converted model")
    parser.add_argument("--gap-s", type=float, default=0.0)
    arguments = parser.parse_args()
    uvloop.run(serve(arguments.redis_url, json.loads(arguments.card.read_text()), arguments.gap_s))
