"""Executes steps with the host kernels: the same op list as torch's runner, one call of C per step.

Owns the compute thread, the team of threads that helps it, the packed weights and the buffer of logits. Does not know
which model it runs (the op list says), who owns a block, or why a chunk is in the step. Needs no torch.

Life of a step:
1. `execute` makes flat arrays (`_Batch`) of its chunks, mostly while the step before computes, and queues it for the
   one compute thread.
2. There, tokens that the step before sampled are filled in, and C runs the whole op list, without the interpreter's
   lock.
3. Meanwhile, if somebody wants to hear of layers, the event loop looks at the word in which C counts them.
4. Last rows of chunks that sample have logits and their greatest; the sampler makes a token of each choice.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from baton.core.errors import BatonError
from baton.core.layout import KVLayout
from baton.core.request import SampledToken
from baton.core.step import ScheduledChunk, Step, StepResult
from baton.engine.backend import Backend
from baton.engine.sampler import Ids, Logits, SampledRow, sample
from baton.kernels.host import library
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
from baton.models.convert import ModelFiles
from baton.models.packed import PackedWeights, open_packed
from baton.models.spec import ModelSpec
from baton.models.weights import Array, map_arrays

SPIN_US = 20
"""A thread without work spins for so long, then sleeps: phases are microseconds apart, steps are not."""
LAYERS_POLL_S = 0.001
"""How often the loop looks how many layers are done: a few times per published part of a prompt."""

Ints = NDArray[np.int32]
_KINDS: dict[type[Op], str] = {
    Embed: "embed", RMSNorm: "rms_norm", Linear: "linear", LinearResidual: "linear_residual",
    RopeAndWriteKV: "rope_write_kv", PagedAttention: "attention", KeepSampledRows: "keep_sampled_rows",
    SwiGLU: "swiglu", LMHead: "lm_head",
}


@dataclass(frozen=True, slots=True)
class _Batch:
    """A step's chunks as the arrays that C reads."""

    tokens: Ints
    spans: Ints
    """[num_chunks, 4]: library.Span."""
    blocks: Ints
    sampled: Ints
    sampling: list[int]
    """Indices of the chunks that sample, and below how."""
    rows: list[SampledRow]
    unknown: list[tuple[int, int]]
    """(row, index of its chunk) of each token that the step before samples."""

    @classmethod
    def of(cls, chunks: Sequence[ScheduledChunk]) -> _Batch:
        spans, sampled, sampling, rows, unknown, row, first_block = [], [], [], [], [], 0, 0
        for index, chunk in enumerate(chunks):
            if chunk.token_from is not None:
                unknown.append((row, index))
            num_rows = len(chunk.token_ids)
            spans.append((row, num_rows, chunk.start, first_block))
            row += num_rows
            first_block += len(chunk.block_table)
            if chunk.choices:
                sampled.append(row - 1)
                sampling.append(index)
                rows.append(SampledRow.of(chunk))
        tokens = np.fromiter(itertools.chain.from_iterable(c.token_ids for c in chunks), np.int32, row)
        blocks = np.fromiter(itertools.chain.from_iterable(c.block_table for c in chunks), np.int32, first_block)
        return cls(
            tokens, np.array(spans, np.int32), blocks, np.array(sampled, np.int32), sampling, rows, unknown)

    def fill(self, chunks: Sequence[ScheduledChunk], before: StepResult | None) -> None:
        """The tokens that the step before sampled."""
        for row, index in self.unknown:
            chunk = chunks[index].filled(before)
            self.tokens[row] = chunk.token_ids[0]
            if chunk.history:
                self.rows[self.sampling.index(index)] = SampledRow.of(chunk)


class HostRunner:
    """A core.step.Runner on the CPU. Give it to one scheduler; steps run strictly one after the other."""

    def __init__(
        self, files: ModelFiles, memory: memoryview, layout: KVLayout, threads: int, backend: Backend
    ) -> None:
        """`memory` is writable, starts at a cache line, holds blocks of `layout` and outlives the runner. Raises
        SetupError if the weights cannot be packed."""
        spec = files.spec
        assert layout == spec.layout(layout.block_size, backend.kv_dtype), (layout, spec, backend)
        self._library = library.load()
        self._arrays = map_arrays(files.directory / "weights.safetensors")
        self._packed = open_packed(files, backend.quantization)
        self._program = _program(spec, layout, backend.isa, self._packed, self._arrays)
        self._num_layers, self._vocab_size = layout.num_layers, spec.vocab_size
        self._pool = np.frombuffer(memory, np.uint8)
        self._logits: Logits = np.empty((0, spec.vocab_size), np.float32)
        self._thread = ThreadPoolExecutor(1, "baton-compute")
        self._team = self._library.baton_team_new(threads, SPIN_US)
        self._before: StepResult | None = None
        """The compute thread's: result of the last step, none if it broke."""

    def execute(self, step: Step, on_layers: Callable[[int], None] | None = None) -> Awaitable[StepResult]:
        """Write the step's KV and sample. A cancelled caller does not stop the step: the next one waits for it."""
        layers = np.zeros(1, np.int32)
        batch = _Batch.of(step.chunks)
        running = asyncio.get_running_loop().run_in_executor(self._thread, self._run, step, batch, layers)
        return running if on_layers is None else self._watch(running, layers, on_layers)

    async def _watch(
        self, running: asyncio.Future[StepResult], layers: Ints, on_layers: Callable[[int], None]
    ) -> StepResult:
        told, timeout_s = 0, LAYERS_POLL_S
        while told < self._num_layers:
            await asyncio.wait({running}, timeout=timeout_s)
            while told < int(layers[0]):
                told += 1
                on_layers(told)
            if running.done():
                break
        return await running

    async def close(self) -> None:
        """Wait for the step in execution, then let go of memory and weights."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._let_go)
        self._thread.shutdown(wait=False)

    def _let_go(self) -> None:
        self._library.baton_program_free(self._program)
        self._library.baton_team_free(self._team)
        self._packed.close()
        self._arrays = {}
        self._pool = np.empty(0, np.uint8)

    def _run(self, step: Step, batch: _Batch, layers: Ints) -> StepResult:
        before, self._before = self._before, None
        batch.fill(step.chunks, before)
        tokens: list[tuple[SampledToken, ...]] = [()] * len(step.chunks)
        failed: dict[int, BatonError] = {}
        logits, largest = self._compute(batch, layers)
        for i, outcome in zip(batch.sampling, sample(logits, batch.rows, largest), strict=True):
            if isinstance(outcome, BatonError):
                failed[i] = outcome
            else:
                tokens[i] = outcome
        self._before = StepResult(tuple(tokens), failed)
        return self._before

    def logits(self, chunks: Sequence[ScheduledChunk]) -> Logits:
        """Run the op list: [number of chunks that sample, vocab_size], in their order. A test may call it while no
        step is in execution."""
        return self._compute(_Batch.of(chunks), np.zeros(1, np.int32))[0].copy()

    def time_ops(self, seconds: NDArray[np.float64] | None) -> None:
        """Add the seconds of each op to its place in `seconds`, which must live on; None: no more of that. Not while a
        step is in execution."""
        self._library.baton_program_time(self._program, None if seconds is None else seconds.ctypes.data)

    def _compute(self, batch: _Batch, layers: Ints) -> tuple[Logits, Ids]:
        """Logits, good until the next step, and where each row's greatest is."""
        num_sampled = len(batch.sampled)
        if num_sampled > len(self._logits):
            self._logits = np.empty((num_sampled, self._vocab_size), np.float32)
        largest = np.empty(num_sampled, np.int32)
        given = library.Batch(
            batch.tokens.ctypes.data, batch.spans.ctypes.data, batch.blocks.ctypes.data, batch.sampled.ctypes.data,
            self._pool.ctypes.data, self._logits.ctypes.data, largest.ctypes.data, layers.ctypes.data,
            len(batch.tokens), len(batch.spans), num_sampled, 0)
        self._library.baton_step(self._program, self._team, given, 0)
        return self._logits[:num_sampled], largest.astype(np.int64)


def _program(
    spec: ModelSpec, layout: KVLayout, isa: str, packed: PackedWeights, arrays: dict[str, Array]
) -> int:
    """The C program of a model. Its memory is that of `packed` and `arrays`."""
    names = list(packed.matrices)
    matrices = [
        library.Matrix(packed.address + m.offset, m.n, m.k, library.FORMATS[m.format], 0)
        for m in packed.matrices.values()
    ]
    compiled = compile_spec(spec)
    ops = [_op(op, names, arrays) for op in compiled]
    theta = next(op.theta for op in compiled if isinstance(op, RopeAndWriteKV))
    frequencies = rope_frequencies(spec.head_dim, theta)
    shape = library.Shape(
        spec.hidden_size, spec.intermediate_size, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.vocab_size,
        spec.num_layers, layout.block_size, library.FORMATS[layout.dtype], 0, frequencies.ctypes.data)
    return library.new_program(isa, shape, ops, matrices)


def _op(op: Op, names: list[str], arrays: dict[str, Array]) -> library.Op:
    kind, layer = library.OPS.index(_KINDS[type(op)]), getattr(op, "layer", -1)
    match op:
        case Embed():
            return library.Op(kind, layer, -1, 0.0, arrays[op.weight].ctypes.data)
        case RMSNorm():
            return library.Op(kind, layer, -1, op.eps, arrays[op.weight].ctypes.data)
        case Linear() | LinearResidual() | LMHead():
            return library.Op(kind, layer, names.index(op.weight), 0.0, None)
    return library.Op(kind, layer, -1, 0.0, None)


def rope_frequencies(head_dim: int, theta: float) -> Array:
    """[head_dim / 2] fp32: theta^(-2i / head_dim) (Su et al. 2021), rounded where kernels/reference.py rounds. The
    power is taken in float64 and rounded once, because numpy's own of fp32 is off by a unit in the last place here and
    there, and at position 8,000 that is an angle of 0.0005."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.float32(1) / (theta ** exponents.astype(np.float64)).astype(np.float32)
