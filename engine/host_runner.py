"""Executes steps with the host kernels: the same op list as torch's runner, one call of C per step.

Owns the compute thread, the team of threads that helps it, the packed weights and the buffer of logits. Does not know
which model it runs (the op list says), who owns a block, or why a chunk is in the step. Needs no torch.

Life of a step:
1. `execute` makes flat arrays (`_Work`) of its chunks, mostly while the step before computes, and puts them on C's
   line: its thread begins them the moment the step before is done, with the tokens which that has chosen. No Python
   runs between two steps.
2. Meanwhile, if somebody wants to hear of layers, the event loop looks at the word in which C counts them.
3. C chooses the tokens of *plain* rows (greedy or with a temperature and filters). Our thread, which waits for the
   step, makes the result: tokens of the other rows, with penalties or several choices, and log-probs.

A step that needs a token which C did not choose is put later, by our thread, when it has made it.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from baton.core.errors import BatonError
from baton.core.layout import KVLayout
from baton.core.request import SampledToken
from baton.core.step import ScheduledChunk, Step, StepResult
from baton.engine.backend import Backend
from baton.engine.sampler import Logits, SampledRow, outcome
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
Bytes = NDArray[np.uint8]
_KINDS: dict[type[Op], str] = {
    Embed: "embed", RMSNorm: "rms_norm", Linear: "linear", LinearResidual: "linear_residual",
    RopeAndWriteKV: "rope_write_kv", PagedAttention: "attention", KeepSampledRows: "keep_sampled_rows",
    SwiGLU: "swiglu", LMHead: "lm_head",
}

_CHOICE = np.dtype(library.Choice)


class _Work:
    """A step's chunks as what C reads and writes. It must live until the step is done."""

    def __init__(self, chunks: Sequence[ScheduledChunk], before: _Work | None) -> None:
        """`before`: the work of the step before, if a token comes from it."""
        self.chunks = chunks
        self.sampling: list[int] = []
        """Indices of the chunks that sample, and below how."""
        self.rows: list[SampledRow] = []
        self.unknown: list[tuple[int, int]] = []
        """(row, index of its chunk) of each token that the step before brings and C does not fill in."""
        self.layers = np.zeros(1, np.int32)
        self.logits: Logits = np.empty((0, 0), np.float32)
        spans, sampled, sources, row, first_block = [], [], [], 0, 0
        for index, chunk in enumerate(chunks):
            if chunk.token_from is not None:
                source = before.place(chunk.token_from) if before is not None else None
                if source is None:
                    self.unknown.append((row, index))
                else:
                    sources.append((row, source))
            num_rows = len(chunk.token_ids)
            spans.append((row, num_rows, chunk.start, first_block))
            row += num_rows
            first_block += len(chunk.block_table)
            if chunk.choices:
                sampled.append(row - 1)
                self.sampling.append(index)
                self.rows.append(SampledRow.of(chunk))
        self.tokens = np.fromiter(itertools.chain.from_iterable(c.token_ids for c in chunks), np.int32, row)
        self.blocks = np.fromiter(itertools.chain.from_iterable(c.block_table for c in chunks), np.int32, first_block)
        self.spans, self.sampled = np.array(spans, np.int32), np.array(sampled, np.int32)
        self.sources, self.choices = np.array(sources, np.int32), _choices(self.rows)
        self.largest, self.chosen = np.empty(len(sampled), np.int32), np.empty(len(sampled), np.int32)
        self.peaks = np.empty(len(sampled), np.float32)
        self.job = library.Job()

    @property
    def reads_logits(self) -> bool:
        """Once C is done with them."""
        return any(not row.is_plain or row.sampling.logprobs is not None for row in self.rows)

    def place(self, index: int) -> int | None:
        """Of chunk `index` among the sampled rows, if C chooses its token."""
        if index not in self.sampling:
            return None
        place = self.sampling.index(index)
        return place if self.rows[place].is_plain else None

    def fill(self, before: StepResult | None) -> None:
        """The tokens that C does not fill in."""
        for row, index in self.unknown:
            chunk = self.chunks[index].filled(before)
            self.tokens[row] = chunk.token_ids[0]
            if chunk.history:
                self.rows[self.sampling.index(index)] = SampledRow.of(chunk)

    def given(self, pool: Bytes, logits: Logits) -> library.Job:
        """What C gets."""
        self.logits, job = logits[: len(self.sampled)], self.job
        job.batch = library.Batch(
            self.tokens.ctypes.data, self.spans.ctypes.data, self.blocks.ctypes.data, self.sampled.ctypes.data,
            pool.ctypes.data, logits.ctypes.data, self.largest.ctypes.data, self.layers.ctypes.data,
            len(self.tokens), len(self.spans), len(self.sampled), 0)
        job.tokens, job.sources, job.choices = job.batch.tokens, self.sources.ctypes.data, self.choices.ctypes.data
        job.chosen, job.greatest, job.num_sources = self.chosen.ctypes.data, self.peaks.ctypes.data, len(self.sources)
        return job

    def result(self) -> StepResult:
        """Once C is done."""
        tokens: list[tuple[SampledToken, ...]] = [()] * len(self.chunks)
        failed: dict[int, BatonError] = {}
        rows = zip(self.sampling, self.rows, self.chosen.tolist(), self.peaks.tolist(), self.logits, strict=True)
        for index, row, token, peak, logits in rows:
            came = outcome(row, token if row.is_plain else None, peak, logits)
            if isinstance(came, BatonError):
                failed[index] = came
            else:
                tokens[index] = came
        return StepResult(tuple(tokens), failed)


def _choices(rows: Sequence[SampledRow]) -> NDArray[np.void]:
    """library.Choice of each. Rows that are not plain are greedy here: nobody looks at their token."""
    choices = np.zeros(len(rows), _CHOICE)
    for i, row in enumerate(rows):
        how = row.sampling
        if row.is_plain and how.temperature:
            choices[i] = (row.seed, row.position, how.temperature, how.top_p, how.min_p, how.top_k, row.choices[0])
    return choices


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
        self._logits = [np.empty((0, spec.vocab_size), np.float32)] * 3
        """Of steps whose logits we read, in turn: one is read while the next is written; and of all others."""
        self._thread = ThreadPoolExecutor(1, "baton-steps")
        self._team = self._library.baton_team_new(threads, SPIN_US)
        self._line = self._library.baton_line_new(self._program, self._team)
        self._works: deque[tuple[_Work, bool]] = deque()
        """Not done, and whether the line has them. The event loop's."""
        self._num_works = 0
        self._before: StepResult | None = None
        """Our thread's: result of the last step, none if it broke."""

    def execute(self, step: Step, on_layers: Callable[[int], None] | None = None) -> Awaitable[StepResult]:
        """Write the step's KV and sample. A cancelled caller does not stop the step: the next one waits for it."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[StepResult] = loop.create_future()
        work = _Work(step.chunks, self._works[-1][0] if self._works else None)
        self._num_works += 1
        # The logits of two steps can be kept; and a step that waits for our thread keeps those behind it waiting.
        is_put = not work.unknown and len(self._works) < 2 and all(put for _, put in self._works)
        self._works.append((work, is_put))
        place = self._num_works % 2
        if is_put:
            self._put(work, place)
        self._thread.submit(self._finish, work, None if is_put else place, loop, done)
        return done if on_layers is None else self._watch(done, work.layers, on_layers)

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
        self._library.baton_line_free(self._line)
        self._library.baton_program_free(self._program)
        self._library.baton_team_free(self._team)
        self._packed.close()
        self._arrays = {}
        self._pool = np.empty(0, np.uint8)

    def _put(self, work: _Work, place: int) -> None:
        self._library.baton_line_put(self._line, work.given(self._pool, self._room(work, place)))

    def _room(self, work: _Work, place: int) -> Logits:
        """For the logits of a step."""
        place = place if work.reads_logits else 2
        if len(self._logits[place]) < len(work.sampled):
            self._logits[place] = np.empty((len(work.sampled), self._vocab_size), np.float32)
        return self._logits[place]

    def _finish(
        self, work: _Work, place: int | None, loop: asyncio.AbstractEventLoop, done: asyncio.Future[StepResult]
    ) -> None:
        """In our thread: see the step to its end, and tell the event loop. `place`: it is not put yet."""
        before, self._before = self._before, None
        try:
            if place is not None:
                work.fill(before)
                self._put(work, place)
            self._library.baton_line_wait(self._line, work.job)
            self._before = work.result()
            loop.call_soon_threadsafe(self._done, done, self._before, None)
        except BaseException as e:
            loop.call_soon_threadsafe(self._done, done, None, e)

    def _done(self, done: asyncio.Future[StepResult], result: StepResult | None, error: BaseException | None) -> None:
        self._works.popleft()
        if done.cancelled():
            return
        if result is not None:
            done.set_result(result)
        elif error is not None:
            done.set_exception(error)

    def logits(self, chunks: Sequence[ScheduledChunk]) -> Logits:
        """Run the op list: [number of chunks that sample, vocab_size], in their order. A test may call it while no
        step is in execution."""
        work = _Work(chunks, None)
        logits = np.empty((len(work.sampled), self._vocab_size), np.float32)
        self._library.baton_step(self._program, self._team, work.given(self._pool, logits).batch, 0)
        return logits

    def time_ops(self, seconds: NDArray[np.float64] | None) -> None:
        """Add the seconds of each op to its place in `seconds`, which must live on; None: no more of that. Not while a
        step is in execution."""
        self._library.baton_program_time(self._program, None if seconds is None else seconds.ctypes.data)


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
