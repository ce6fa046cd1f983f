"""The simulator's runner: time by a cost model, KV really written to and read from the worker's memory.

Owns nothing but its costs. A step takes its time first and touches memory at its very end: if a block was freed or
given away under a step in flight, this write lands in somebody else's block and the tokens show it.

A block is [1 layer, 1 head, K|V, token, 1] u64: first the keys of its slots, then their values (sim/hash_model.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from baton.core.layout import KVLayout
from baton.core.step import ScheduledChunk, Step, StepResult
from baton.kv_transfer.memory import KVMemory
from baton.sim.hash_model import KEY_BYTES, Attention, key_of


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of a step: base + prefill per computed token + context per token read. Round figures of a small model
    on two CPU cores (docs/lab.md has measured ones)."""

    step_base_s: float = 0.004
    per_token_s: float = 0.0008
    per_context_token_s: float = 0.000002

    def of(self, step: Step) -> float:
        context = sum(c.end for c in step.chunks)
        return self.step_base_s + self.per_token_s * step.num_tokens + self.per_context_token_s * context


def layout(block_size: int) -> KVLayout:
    return KVLayout(num_layers=1, num_kv_heads=1, head_dim=1, block_size=block_size, dtype="u64")


class SimRunner:
    """core.step.Runner on one worker's memory. `slowness` multiplies all times; a fault may change it."""

    def __init__(self, memory: KVMemory, block_size: int, costs: Costs) -> None:
        expected = layout(block_size).block_bytes
        assert memory.block_bytes == expected, f"blocks of {memory.block_bytes} bytes, not {expected}"
        self.slowness = 1.0
        self.num_steps = 0
        self._memory = memory
        self._block_size = block_size
        self._costs = costs
        self._running = False

    async def execute(self, step: Step) -> StepResult:
        assert not self._running, "two steps at once on one runner"
        self._running = True
        try:
            await asyncio.sleep(self._costs.of(step) * self.slowness)
            self.num_steps += 1
            return StepResult(tuple(self._attend(chunk) for chunk in step.chunks))
        finally:
            self._running = False

    async def close(self) -> None:
        """Nothing is held."""

    def _attend(self, chunk: ScheduledChunk) -> int | None:
        seen = Attention()
        for position in range(chunk.start):
            seen.read(*self._slot(chunk.block_table, position))
        for position, token in enumerate(chunk.token_ids, chunk.start):
            key = key_of(token, position)
            value = seen.value(key)
            self._write(chunk.block_table, position, key, value)
            seen.read(key, value)
        return seen.next_token(chunk.seed, chunk.end) if chunk.samples else None

    def _slot(self, table: Sequence[int], position: int) -> tuple[bytes, bytes]:
        block, at, values = self._place(table, position)
        return bytes(block[at : at + KEY_BYTES]), bytes(block[values + at : values + at + KEY_BYTES])

    def _write(self, table: Sequence[int], position: int, key: bytes, value: bytes) -> None:
        block, at, values = self._place(table, position)
        if at == 0:
            block[:] = bytes(len(block))  # a fresh block's tail is zeroed, so that its digest is defined
        block[at : at + KEY_BYTES] = key
        block[values + at : values + at + KEY_BYTES] = value

    def _place(self, table: Sequence[int], position: int) -> tuple[memoryview, int, int]:
        """The block of a position, where in it the key is, and how far behind it the value."""
        block = self._memory.block(table[position // self._block_size])
        return block, (position % self._block_size) * KEY_BYTES, self._block_size * KEY_BYTES
