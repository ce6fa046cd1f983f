"""Executes steps with plain torch: an op list over mapped weights and the worker's KV memory.

Owns the compute thread and the registers of the step in it. Does not know which model it runs (the op list says), who
owns a block, or why a chunk is in the step.

Life of a step:
1. `execute` queues it for the one compute thread, in which every torch call of the worker happens. Tokens that the
   step before sampled are filled in there.
2. The chunks become spans (kernels/reference.py); blocks that the step begins but does not fill are zeroed.
3. The op list runs. After each layer's K and V are written, the event loop hears of it, if it asked to.
4. Last rows of chunks that sample get logits, and a token for each choice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from baton.core.errors import BatonError
from baton.core.layout import KVLayout
from baton.core.request import SampledToken
from baton.core.step import ScheduledChunk, Step, StepResult
from baton.engine.sampler import SampledRow, sample
from baton.kernels import reference
from baton.models.compile import (
    Embed,
    KeepSampledRows,
    Linear,
    LinearResidual,
    LMHead,
    Op,
    PagedAttention,
    RMSNorm,
    RopeAndWriteKV,
    SwiGLU,
    compile_spec,
)
from baton.models.convert import open_converted
from baton.models.weights import load_weights


@dataclass(slots=True)
class _Registers:
    """What the ops of one step work on."""

    tokens: Tensor
    plan: reference.BatchPlan
    sampled: Tensor
    """Rows that a token is sampled from, int64."""
    rope: tuple[Tensor, Tensor]
    hidden: Tensor
    x: Tensor
    on_layers: Callable[[int], None] | None


class TorchRunner:
    """A core.step.Runner on the CPU. Give it to one scheduler; steps run strictly one after the other."""

    def __init__(self, model_dir: Path, memory: memoryview, num_blocks: int, layout: KVLayout, threads: int) -> None:
        """`memory` is writable, at least num_blocks * layout.block_bytes long and outlives the runner; it is viewed
        as [num_blocks, *layout.block_shape] fp32 until `close`. Raises SetupError if model_dir is no converted model.
        """
        spec = open_converted(model_dir).spec
        assert layout == spec.layout(layout.block_size), (layout, spec)
        assert memory.nbytes >= num_blocks * layout.block_bytes, (memory.nbytes, num_blocks, layout.block_bytes)
        self._layout = layout
        self._ops = compile_spec(spec)
        self._theta = next(op.theta for op in self._ops if isinstance(op, RopeAndWriteKV))
        self._weights = load_weights(model_dir / "weights.safetensors")
        count = num_blocks * layout.block_bytes // 4
        self._pool = torch.frombuffer(memory, dtype=torch.float32, count=count).view(num_blocks, *layout.block_shape)
        # torch keeps the team's size per thread: it must be set in the thread that computes.
        self._thread = ThreadPoolExecutor(1, "baton-compute", torch.set_num_threads, (threads,))
        self._before: StepResult | None = None
        """The compute thread's: result of the last step, none if it broke."""

    def execute(self, step: Step, on_layers: Callable[[int], None] | None = None) -> asyncio.Future[StepResult]:
        """Write the step's KV and sample. A cancelled caller does not stop the step: the next one waits for it."""
        loop = asyncio.get_running_loop()

        def tell(num_layers: int) -> None:
            assert on_layers is not None, "told only if somebody listens"
            loop.call_soon_threadsafe(on_layers, num_layers)

        return loop.run_in_executor(self._thread, self._run, step, tell if on_layers else None)

    async def close(self) -> None:
        """Wait for the step in execution, then let go of memory and weights."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._let_go)
        self._thread.shutdown(wait=False)

    def _let_go(self) -> None:
        self._pool = torch.empty(0)
        self._weights = {}

    def _run(self, step: Step, on_layers: Callable[[int], None] | None) -> StepResult:
        before, self._before = self._before, None
        step = step.filled(before)
        tokens: list[tuple[SampledToken, ...]] = [()] * len(step.chunks)
        failed: dict[int, BatonError] = {}
        sampling = [i for i, c in enumerate(step.chunks) if c.choices]
        with torch.inference_mode():
            logits = self.logits(step.chunks, on_layers)
            rows = [SampledRow.of(step.chunks[i]) for i in sampling]
            for i, outcome in zip(sampling, [] if logits is None else sample(logits.numpy(), rows), strict=True):
                if isinstance(outcome, BatonError):
                    failed[i] = outcome
                else:
                    tokens[i] = outcome
        self._before = StepResult(tuple(tokens), failed)
        return self._before

    def logits(
        self, chunks: tuple[ScheduledChunk, ...], on_layers: Callable[[int], None] | None = None
    ) -> Tensor | None:
        """Run the op list: [number of chunks that sample, vocab_size] in their order, or None if there is none.

        `execute` calls it in the compute thread; a test may call it while no step is in execution."""
        layout = self._layout
        spans = [reference.Span(c.start, len(c.token_ids), c.block_table) for c in chunks]
        plan = reference.plan_batch(spans, layout.num_layers, layout.num_kv_heads, layout.block_size)
        reference.clear_fresh_blocks(self._pool, plan)
        ends, row = [], 0
        for chunk in chunks:
            row += len(chunk.token_ids)
            if chunk.choices:
                ends.append(row - 1)
        rope = reference.rope_tables(plan.positions, layout.head_dim, self._theta)
        tokens = torch.tensor([t for c in chunks for t in c.token_ids])
        nothing = torch.empty(0)
        registers = _Registers(tokens, plan, torch.tensor(ends, dtype=torch.int64), rope, nothing, nothing, on_layers)
        for op in self._ops:
            self._apply(op, registers)
            if isinstance(op, KeepSampledRows) and not ends:
                return None
        return registers.x

    def _apply(self, op: Op, r: _Registers) -> None:
        match op:
            case Embed():
                r.hidden = functional.embedding(r.tokens, self._weights[op.weight])
            case RMSNorm():
                r.x = reference.rms_norm(r.hidden, self._weights[op.weight], op.eps)
            case Linear() | LMHead():
                r.x = functional.linear(r.x, self._weights[op.weight])
            case RopeAndWriteKV():
                r.x = self._rope_and_write(op, r)
            case PagedAttention():
                r.x = reference.paged_attention(self._pool, op.layer, r.x, r.plan)
            case KeepSampledRows():
                r.x, r.hidden = r.x.index_select(0, r.sampled), r.hidden.index_select(0, r.sampled)
            case LinearResidual():
                r.hidden = torch.addmm(r.hidden, r.x, self._weights[op.weight].t())
            case SwiGLU():
                r.x = reference.swiglu(r.x)

    def _rope_and_write(self, op: RopeAndWriteKV, r: _Registers) -> Tensor:
        """x [num_tokens, q | k | v] -> q [num_tokens, num_heads, head_dim]."""
        num_kv_heads = self._layout.num_kv_heads
        heads = r.x.view(len(r.tokens), -1, self._layout.head_dim)
        num_heads = heads.shape[1] - 2 * num_kv_heads
        reference.rope_(heads[:, : num_heads + num_kv_heads], *r.rope)
        kv = heads[:, num_heads:].view(len(r.tokens), 2, num_kv_heads, -1)
        reference.write_kv(self._pool, op.layer, kv, r.plan)
        if r.on_layers is not None:
            r.on_layers(op.layer + 1)
        return heads[:, :num_heads]
