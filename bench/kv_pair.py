"""Two ends of a transfer, both made of real parts: a lender in another process and a reader in this one.

For what must be seen happening between two processes: measurements, and tests of what a peer's death or sleep does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

from baton.core.config import HandoffConfig, child_env
from baton.core.handoff import LentBlock
from baton.core.layout import Capability, KVLayout
from baton.core.metrics import Metrics
from baton.core.worker import Role, WorkerInfo
from baton.engine.block_pool import BlockPool
from baton.kv_transfer.lease import LeaseTable
from baton.kv_transfer.memory import KVMemory
from baton.kv_transfer.offer import open_transports
from baton.kv_transfer.puller import Puller
from baton.kv_transfer.transport import Transport

LAYOUT = KVLayout(1, 1, 64, 16, "fp32")


def info_of(worker_id: str, boot_id: str, num_blocks: int, adverts: list[tuple[str, bytes]]) -> WorkerInfo:
    capability = Capability("m", "f", LAYOUT, 4096, num_blocks, transports=tuple(adverts))
    return WorkerInfo(worker_id, boot_id, Role.PREFILL, "bench", capability)


class Lender:
    """bench/kv_lender.py, running."""

    def __init__(
        self, transports: tuple[str, ...], num_blocks: int = 16, block_bytes: int = 4096, boot_id: str = "boot1",
        worker_id: str = "prefill-0",
    ) -> None:
        options = {"worker_id": worker_id, "boot_id": boot_id, "num_blocks": num_blocks, "block_bytes": block_bytes,
                   "transports": transports}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "baton.bench.kv_lender", json.dumps(options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=child_env(1),
        )
        adverts = [(name, advert.encode()) for name, advert in self._answer()["adverts"]]
        self.info = info_of(worker_id, boot_id, num_blocks, adverts)

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def answers(self) -> bool:
        """It has had its turn on the processor; False: and died of it."""
        try:
            self.ask("served")
        except (AssertionError, BrokenPipeError):
            return False
        return True

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("LENDER "):
                answer: dict[str, Any] = json.loads(line.removeprefix("LENDER "))
                return answer
        raise AssertionError(f"the lender ended with {self.process.wait()}")

    def lend(self, count: int, part: tuple[int, int] | None = None) -> tuple[str, list[LentBlock]]:
        answer = self.ask("lend", count=count, part=part)
        blocks = [LentBlock(**{**b, "digest": bytes.fromhex(b["digest"])}) for b in answer["blocks"]]
        return answer["lease_id"], blocks

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        """Returns only when the kernel says that it is stopped."""
        self.process.send_signal(signal.SIGSTOP)
        while self.state() != "T":
            pass

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def state(self) -> str:
        return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def close(self) -> None:
        if self.process.poll() is None:
            self.thaw()
            assert self.process.stdin is not None
            self.process.stdin.close()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()
        if self.process.stdin is not None and not self.process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        self.process.wait()


class Reader:
    """A reader's real parts; `take` plays the request that owns destination blocks."""

    def __init__(
        self, memory: KVMemory, pool: BlockPool, transports: dict[str, Transport], config: HandoffConfig
    ) -> None:
        self.memory = memory
        self.pool = pool
        self.transports = transports
        self.metrics = Metrics()
        self.puller = Puller(memory, transports, pool, config, self.metrics)

    def take(self, count: int) -> list[int]:
        blocks = self.pool.allocate(count)
        assert blocks is not None, f"no {count} blocks left"
        return blocks

    def arrived(self, blocks: list[int]) -> int:
        """How many of these blocks have begun to fill (fresh memory is zero, lent bytes hardly ever start so)."""
        return sum(any(self.memory.block(b)[:64]) for b in blocks)


@contextlib.asynccontextmanager
async def reader(
    transports: tuple[str, ...], num_blocks: int = 16, block_bytes: int = 4096, **settings: Any
) -> AsyncIterator[Reader]:
    """With the quarantine timer running; closed, and its ledger checked, on leaving."""
    config = HandoffConfig(transports=transports, **settings)
    memory = KVMemory(num_blocks, block_bytes, shared=True)
    pool = BlockPool(num_blocks, 16)
    opened = await open_transports("decode-0", "r1", memory, LeaseTable(pool, Metrics()), config)
    one = Reader(memory, pool, opened, config)
    timer = asyncio.create_task(one.puller.run())
    try:
        yield one
    finally:
        timer.cancel()
        await asyncio.wait([timer])
        await one.puller.close()
        memory.close()
        pool.check()
        assert pool.ledger().quarantined == 0, f"{pool.ledger()}"


@contextlib.contextmanager
def lender(*args: Any, **kwargs: Any) -> Iterator[Lender]:
    one = Lender(*args, **kwargs)
    try:
        yield one
    finally:
        one.close()


async def until(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    """Look again, as fast as the loop turns, until it holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - it is about bytes and processes, which set no event
            await asyncio.sleep(0)
