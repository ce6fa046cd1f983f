"""What a router spends on a request, against the number of workers and the length of the prompt: CPU and memory.

    python -m baton.bench.route_scale [--workers 10,100,1000,10000] [--tokens 1024,8192,32768,131072] [--json FILE]
        [--plot FILE]

The production dispatcher, fleet, index and policy in one process; only the workers are not: they say a random load and
prefix map, and answer each request at once with one token. Half of them are of each role. All hold one system prompt,
each three hold the first half of one of the prompts asked, and every worker holds blocks that nobody asks for. Between
two requests some workers report a new load, and the order of the workers is put right within the next request.

CPU time of a whole request in the router, text and transport left out: admission, hashing, lookup, shortlist, price,
dispatch, delivery. `hash` is the part that hashing the prompt alone takes, `report` what one load report costs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
import tracemalloc
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import cast

from baton.bench.load.plots import figure
from baton.bench.route_index import anew
from baton.core.block_hash import HASH_BYTES, BlockHash, HashScope, block_hashes
from baton.core.config import Config, RouterConfig
from baton.core.layout import Capability, KVLayout
from baton.core.messages import KVSnapshot, StepMessage, Submit, TokenChunk, UpMessage
from baton.core.metrics import Metrics
from baton.core.request import FinishReason, Request, SamplingParams
from baton.core.services import WorkerService
from baton.core.step_model import StepModel
from baton.core.worker import Role, WorkerInfo, WorkerLoad
from baton.router.cost import CostPolicy
from baton.router.dispatch import Dispatcher
from baton.router.fleet import Fleet
from baton.router.index import PrefixIndex
from baton.router.room import FEW

BLOCK, SHARED_BLOCKS, OWN_BLOCKS = 16, 64, 128
PROMPTS, COPIES = 8, 3
REPORTS = 8
"""Between two requests."""
CAPABILITY = Capability(
    "sim", "f00d", KVLayout(32, 8, 128, BLOCK, "bf16"), max_model_len=200_000, num_blocks=65_536,
    transports=(("tcp", b""),),
)
MODEL = StepModel(0.005, 5e-5, 5e-10, 1e-4, 1e-9, num_prefill_steps=9, num_decode_steps=9)


@dataclass(frozen=True, slots=True)
class Row:
    workers: int
    tokens: int
    request_us: float
    hash_us: float
    report_us: float
    index_entries: int
    index_mb: float


class Worker:
    """Says what it is told to say, and one token to each request."""

    def __init__(self, name: str, role: Role, held: Sequence[BlockHash], load: WorkerLoad) -> None:
        self.info = WorkerInfo(name, f"{name}-boot", role, f"{name}:1", CAPABILITY)
        self.held = held
        self.load = load
        self._down: asyncio.Queue[StepMessage] = asyncio.Queue()

    def say(self, *chunks: TokenChunk) -> None:
        self._down.put_nowait(StepMessage(self.info.boot_id, self.load, chunks))

    async def stream(self, up: AsyncIterator[UpMessage]) -> AsyncGenerator[StepMessage, None]:
        reader = asyncio.create_task(self._answer(up))
        try:
            yield StepMessage(self.info.boot_id, self.load, snapshot=KVSnapshot(0, tuple(self.held)))
            while True:
                yield await self._down.get()
        finally:
            reader.cancel()

    async def _answer(self, up: AsyncIterator[UpMessage]) -> None:
        async for message in up:
            if isinstance(message, Submit):
                self.say(TokenChunk(message.request.request_id, message.epoch, 0, (1,), FinishReason.LENGTH, 0))


def random_load(rng: Random, role: Role) -> WorkerLoad:
    if role is Role.PREFILL:
        return WorkerLoad(rng.randrange(8000), num_running=1, model=MODEL)
    rows = rng.randrange(FEW)
    return WorkerLoad(
        num_running=rows, context_tokens=2000 * rows, available_blocks=60_000, total_blocks=65_536, model=MODEL
    )


def hashes_of(prompt: Sequence[int]) -> list[BlockHash]:
    return block_hashes(HashScope.of(CAPABILITY), prompt, BLOCK)


class World:
    """Workers, a router over them, and prompts of one length to ask."""

    def __init__(self, num_workers: int, num_tokens: int) -> None:
        self.rng = rng = Random(num_workers)
        system = rng.choices(range(1000), k=min(SHARED_BLOCKS * BLOCK, num_tokens // 2))
        self.prompts = [tuple(system + rng.choices(range(1000), k=num_tokens - len(system))) for _ in range(PROMPTS)]
        shared = hashes_of(system)
        held = [
            [*shared, *(BlockHash(rng.randbytes(HASH_BYTES)) for _ in range(OWN_BLOCKS))] for _ in range(num_workers)
        ]
        for prompt in self.prompts:
            for i in rng.sample(range(num_workers), COPIES):
                held[i] += hashes_of(prompt)[len(shared) : num_tokens // BLOCK // 2]
        roles = [Role.PREFILL, Role.DECODE]
        self.workers = {
            f"w{i}": Worker(f"w{i}", roles[i % 2], held[i], random_load(rng, roles[i % 2])) for i in range(num_workers)
        }
        router = RouterConfig(suspect_s=3600.0, dead_s=7200.0)
        config, metrics = Config(router=router), Metrics()
        self.fleet = Fleet(self._discover, self._dial, config, metrics, "router-0")
        self.dispatcher = Dispatcher(self.fleet, CostPolicy(router, Random(0)), config, metrics)

    async def _discover(self) -> Sequence[WorkerInfo]:
        return [worker.info for worker in self.workers.values()]

    def _dial(self, info: WorkerInfo) -> WorkerService:
        return cast(WorkerService, self.workers[info.worker_id])

    async def until_ready(self) -> None:
        while sum(len(self.fleet.candidates(role, {})) for role in Role) < len(self.workers):
            await self.fleet.changed(1.0)

    async def report(self) -> None:
        for worker in self.rng.choices(list(self.workers.values()), k=REPORTS):
            worker.load = random_load(self.rng, worker.info.role)
            worker.say()
        for _ in range(3):
            await asyncio.sleep(0)

    async def ask(self, name: str) -> None:
        request = Request(name, self.rng.choice(self.prompts), SamplingParams(max_tokens=1))
        async for _ in self.dispatcher.generate(request):
            pass


async def measure(num_workers: int, num_tokens: int, num_requests: int) -> Row:
    world = World(num_workers, num_tokens)
    following = asyncio.create_task(world.fleet.run())
    try:
        await world.until_ready()
        await world.ask("warm")
        asked_s, reported_s = [], []
        for i in range(num_requests):
            began = time.process_time()
            await world.report()
            between = time.process_time()
            await world.ask(f"r{i}")
            reported_s.append(between - began)
            asked_s.append(time.process_time() - between)
    finally:
        following.cancel()
        await asyncio.wait([following])
    index_bytes, entries = weight(world)
    return Row(
        num_workers, num_tokens, 1e6 * typical(asked_s), hash_us(world.prompts), 1e6 * typical(reported_s) / REPORTS,
        entries, index_bytes / 1e6,
    )


def hash_us(prompts: Sequence[Sequence[int]]) -> float:
    took = []
    for prompt in prompts:
        began = time.process_time()
        hashes_of(prompt)
        took.append(time.process_time() - began)
    return 1e6 * typical(took)


def typical(seconds: Sequence[float]) -> float:
    """The median: the poll of the registry falls into a few."""
    return sorted(seconds)[len(seconds) // 2]


def weight(world: World) -> tuple[int, int]:
    """(bytes of the index, hashes included, entries)."""
    index = PrefixIndex()
    tracemalloc.start()
    for name, worker in world.workers.items():
        index.apply_snapshot(name, "boot", KVSnapshot(0, tuple(anew(worker.held))))
    num_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return num_bytes, index.num_entries


def draw(rows: Sequence[Row], path: Path) -> None:
    drawn, (by_workers, by_tokens, memory) = figure(3)
    for tokens in sorted({row.tokens for row in rows}):
        some = [row for row in rows if row.tokens == tokens]
        by_workers.plot([r.workers for r in some], [r.request_us for r in some], "o-", label=f"{tokens:,} tokens")
    for workers in sorted({row.workers for row in rows}):
        some = [row for row in rows if row.workers == workers]
        by_tokens.plot([r.tokens for r in some], [r.request_us for r in some], "o-", label=f"{workers:,} workers")
    longest = [row for row in rows if row.workers == max(r.workers for r in rows)]
    by_tokens.plot([r.tokens for r in longest], [r.hash_us for r in longest], ":", color="grey", label="hashing alone")
    shortest = [row for row in rows if row.tokens == min(r.tokens for r in rows)]
    memory.plot([r.workers for r in shortest], [r.index_mb for r in shortest], "o-", label="index")
    for ax, name in ((by_workers, "workers"), (by_tokens, "prompt tokens")):
        ax.set(xlabel=name, ylabel="CPU us a request", xscale="log", yscale="log")
    memory.set(xlabel=f"workers, {OWN_BLOCKS + SHARED_BLOCKS} blocks each", ylabel="MB", xscale="log", yscale="log")
    for ax in (by_workers, by_tokens, memory):
        ax.legend(fontsize=8)
    drawn.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="10,100,1000,10000")
    parser.add_argument("--tokens", default="1024,8192,32768,131072")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    asked = parser.parse_args(arguments)
    rows = []
    print(f"{'workers':>7} {'tokens':>7} {'request us':>10} {'hash us':>8} {'report us':>9} {'entries':>9} {'MB':>7}")
    for num_workers in map(int, asked.workers.split(",")):
        for num_tokens in map(int, asked.tokens.split(",")):
            row = asyncio.run(measure(num_workers, num_tokens, asked.requests))
            rows.append(row)
            print(f"{row.workers:7} {row.tokens:7} {row.request_us:10.0f} {row.hash_us:8.0f} {row.report_us:9.1f}"
                  f" {row.index_entries:9} {row.index_mb:7.1f}", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    if asked.plot:
        draw(rows, asked.plot)


if __name__ == "__main__":
    main()
