"""Executes steps of the hash model (models/hash_model.py): time by a cost model, KV really written to and read from the
worker's memory. No torch. The simulator runs it on virtual time, a worker on real.

Owns nothing but its costs. Each layer takes its time first and touches memory at the end of it: if a block was freed
or given away under a step in flight, this write lands in somebody else's block and the tokens show it.

A block is [2 layers, 1 head, K|V, token, head_dim] u64.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from baton.core.layout import KVLayout
from baton.core.request import SampledToken
from baton.core.step import ScheduledChunk, Step, StepResult
from baton.models.hash_model import (
    ELEMENT_BYTES,
    NUM_LAYERS,
    Draw,
    LayerAttention,
    key_of,
    layout,
    sample,
    upper_key,
)


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Seconds of a step: base + per computed token + per token of context that is read. The defaults are round figures
    of a small model on two CPU cores (docs/lab.md has measured ones)."""

    step_base_s: float = 0.004
    per_token_s: float = 0.0008
    per_context_token_s: float = 0.000002

    def of(self, step: Step) -> float:
        context = sum(c.end for c in step.chunks)
        return self.step_base_s + self.per_token_s * step.num_tokens + self.per_context_token_s * context


class HashRunner:
    """core.step.Runner on one worker's memory. `slowness` multiplies all times; a fault may change it."""

    def __init__(self, memory: memoryview, shape: KVLayout, costs: StepCosts) -> None:
        """`memory` is writable, holds whole blocks and outlives the runner."""
        assert shape == layout(shape.block_size, shape.head_dim), f"{shape} is no layout of the hash model"
        self.slowness = 1.0
        self.num_steps = 0
        self._memory = memory
        self._shape = shape
        self._costs = costs
        self._last: asyncio.Task[StepResult] | None = None
        """Of the step that was taken last."""

    def execute(self, step: Step, on_layers: Callable[[int], None] | None = None) -> asyncio.Task[StepResult]:
        self._last = asyncio.get_running_loop().create_task(self._in_turn(self._last, step, on_layers))
        return self._last

    async def _in_turn(
        self, last: asyncio.Task[StepResult] | None, step: Step, on_layers: Callable[[int], None] | None
    ) -> StepResult:
        if last is not None and not last.done():
            await asyncio.wait([last])  # whoever gives this step up does not give up that one
        return await self._compute(step.filled(last.result() if last is not None else None), on_layers)

    async def _compute(self, step: Step, on_layers: Callable[[int], None] | None) -> StepResult:
        """One step; all its tokens are known, and it is the only one that is computed now."""
        for layer in range(NUM_LAYERS):
            await asyncio.sleep(self._costs.of(step) * self.slowness / NUM_LAYERS)
            for chunk in step.chunks:
                self._write_layer(chunk, layer)
            if on_layers is not None:
                on_layers(layer + 1)
        self.num_steps += 1
        return StepResult(tuple(self._sample(chunk) for chunk in step.chunks))

    async def close(self) -> None:
        """Let go of the memory, so that it can be unmapped."""
        self._memory = memoryview(b"")

    def _write_layer(self, chunk: ScheduledChunk, layer: int) -> None:
        seen, dim = self._read(chunk.block_table, layer, chunk.start), self._shape.head_dim
        for position, token in enumerate(chunk.token_ids, chunk.start):
            if layer == 0:
                self._clear_if_fresh(chunk.block_table, position)
                key = key_of(token, position, dim)
            else:
                _, below = self._slots(chunk.block_table, layer - 1, position, position + 1)
                key = upper_key(bytes(below), dim)
            value = seen.value(key)
            keys, values = self._slots(chunk.block_table, layer, position, position + 1)
            keys[:], values[:] = key, value
            seen.read(key, value)

    def _sample(self, chunk: ScheduledChunk) -> tuple[SampledToken, ...]:
        if not chunk.choices:
            return ()
        state = b"".join(self._read(chunk.block_table, layer, chunk.end).state for layer in range(NUM_LAYERS))
        draws = (
            Draw(chunk.sampling, chunk.seed, choice, chunk.end, chunk.history, chunk.num_prompt_tokens)
            for choice in chunk.choices
        )
        return tuple(sample(state, draw) for draw in draws)

    def _read(self, table: Sequence[int], layer: int, end: int) -> LayerAttention:
        """Attention over slots [0, end), read from the blocks."""
        seen, size = LayerAttention(self._shape.head_dim), self._shape.block_size
        for start in range(0, end, size):
            seen.read(*self._slots(table, layer, start, min(start + size, end)))
        return seen

    def _clear_if_fresh(self, table: Sequence[int], position: int) -> None:
        """A fresh block's tail is zeroed, so that its digest is defined."""
        if position % self._shape.block_size == 0:
            size = self._shape.block_bytes
            at = table[position // self._shape.block_size] * size
            self._memory[at : at + size] = bytes(size)

    def _slots(self, table: Sequence[int], layer: int, start: int, end: int) -> tuple[memoryview, memoryview]:
        """Keys and values of slots [start, end), all of one block."""
        shape = self._shape
        slot_bytes = shape.head_dim * ELEMENT_BYTES
        block, first = divmod(start, shape.block_size)
        keys = table[block] * shape.block_bytes + (2 * layer * shape.block_size + first) * slot_bytes
        values, length = keys + shape.block_size * slot_bytes, (end - start) * slot_bytes
        return self._memory[keys : keys + length], self._memory[values : values + length]
