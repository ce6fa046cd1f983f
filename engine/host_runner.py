"""Executes steps with the host kernels: the same op list as torch's runner, one call of C per step.

Owns C's line and its team of threads, the packed weights and the buffers of logits. Does not know which model it runs
(the op list says), who owns a block, or why a chunk is in the step. Needs no torch.

Life of a step:
1. `execute` makes flat arrays (`_Work`) of its chunks, mostly while the step before computes, and puts them on C's
   line: its thread begins them the moment the step before is done, with the tokens which that has chosen. No Python
   runs between two steps.
2. Meanwhile, if somebody wants to hear of layers, the event loop looks at the word in which C counts them.
3. C chooses the tokens of *plain* rows (greedy, or with a temperature and filters), and wakes the event loop, which
   makes the result. Where it takes the logits for that (penalties, several choices, log-probs), a thread does.

A step that needs a token which C did not choose is put when the result before it is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from array import array
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from baton.core.errors import BatonError, InternalError
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

_KINDS: dict[type[Op], str] = {
    Embed: "embed", RMSNorm: "rms_norm", Linear: "linear", LinearResidual: "linear_residual",
    RopeAndWriteKV: "rope_write_kv", PagedAttention: "attention", KeepSampledRows: "keep_sampled_rows",
    SwiGLU: "swiglu", LMHead: "lm_head",
}

_CHOICE = np.dtype(library.Choice)


class _Work:
    """A step's chunks as what C reads and writes. It must live until the step is done."""

    def __init__(
        self, chunks: Sequence[ScheduledChunk], before: _Work | None = None,
        done: asyncio.Future[StepResult] | None = None, place: int = 0,
    ) -> None:
        """`before`: the work of the step before, while its result is not out. `done`: where the result is wanted.
        `place`: 0 or 1, in turn."""
        self.chunks, self.done, self.place = chunks, done, place
        self.is_put = self.is_read = False
        """The line has, or had, it; somebody makes, or made, the result."""
        self.sampling: dict[int, int] = {}
        """Index of each chunk that samples -> its place among the sampled rows; and below how."""
        self.rows: list[SampledRow] = []
        self.unknown: list[tuple[int, int]] = []
        """(row, index of its chunk) of each token that the step before brings and C does not fill in."""
        self.logits: Logits = np.empty((0, 0), np.float32)
        parts: list[list[int]] = [[], [], [], [], []]
        tokens, spans, blocks, sampled, sources = parts
        for index, chunk in enumerate(chunks):
            if chunk.token_from is not None:
                source = before.source(chunk.token_from) if before is not None else None
                if source is None:
                    self.unknown.append((len(tokens), index))
                else:
                    sources += (len(tokens), source)
            spans += (len(tokens), len(chunk.token_ids), chunk.start, len(blocks))
            tokens += chunk.token_ids
            blocks += chunk.block_table
            if chunk.choices:
                sampled.append(len(tokens) - 1)
                self.sampling[index] = len(self.rows)
                self.rows.append(SampledRow.of(chunk))
        self.is_plain = [row.is_plain for row in self.rows]
        """C chooses the row's token."""
        self.reads_logits = not all(self.is_plain) or any(row.sampling.logprobs is not None for row in self.rows)
        """Once C is done with them."""
        # One array, because asking for an address takes longer than filling a small one.
        parts += ([0] * len(sampled), [0] * len(sampled), [0])
        self._ints: array[int] = array("i", sum(parts, start=[]))
        self._begins = tuple(itertools.accumulate(map(len, parts), initial=0))
        self._peaks, self._choices = array("f", bytes(4 * len(sampled))), _choices(self.rows, self.is_plain)
        self.job = library.Job()

    @property
    def num_sampled(self) -> int:
        return len(self.rows)

    @property
    def num_layers_done(self) -> int:
        return self._ints[-1]

    def source(self, index: int) -> int | None:
        """Of chunk `index` among the sampled rows, if C chooses its token."""
        place = self.sampling.get(index)
        return place if place is not None and self.is_plain[place] else None

    def fill(self, before: StepResult | None) -> None:
        """The tokens that C does not fill in."""
        for row, index in self.unknown:
            chunk = self.chunks[index].filled(before)
            self._ints[row] = chunk.token_ids[0]
            if chunk.history:
                self.rows[self.sampling[index]] = SampledRow.of(chunk)

    def given(self, pool: int, logits: Logits) -> library.Job:
        """What C gets; `pool` is the address of the KV pool."""
        self.logits, job = logits[: self.num_sampled], self.job
        address, _ = self._ints.buffer_info()
        tokens, spans, blocks, sampled, sources, largest, chosen, layers, _ = (
            address + 4 * begin for begin in self._begins)
        job.batch = library.Batch(
            tokens, spans, blocks, sampled, pool, logits.ctypes.data, largest, layers,
            self._begins[1], len(self.chunks), self.num_sampled, 0)
        job.tokens, job.sources, job.num_sources = tokens, sources, (self._begins[5] - self._begins[4]) // 2
        job.choices, job.chosen, (job.greatest, _) = self._choices.ctypes.data, chosen, self._peaks.buffer_info()
        return job

    def result(self) -> StepResult:
        """Once C is done."""
        tokens: list[tuple[SampledToken, ...]] = [()] * len(self.chunks)
        failed: dict[int, BatonError] = {}
        chosen = self._ints[self._begins[6] : self._begins[7]]
        rows = zip(self.sampling, self.rows, self.is_plain, chosen, self._peaks, self.logits, strict=True)
        for index, row, is_plain, token, peak, logits in rows:
            came = outcome(row, token if is_plain else None, peak, logits)
            if isinstance(came, BatonError):
                failed[index] = came
            else:
                tokens[index] = came
        return StepResult(tuple(tokens), failed)


def _choices(rows: Sequence[SampledRow], is_plain: Sequence[bool]) -> NDArray[np.void]:
    """library.Choice of each. Rows that are not plain are greedy here: nobody looks at their token."""
    choices = np.zeros(len(rows), _CHOICE)
    for i, row in enumerate(rows):
        how = row.sampling
        if how.temperature and is_plain[i]:
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
        self._sampler = ThreadPoolExecutor(1, "baton-sampler")
        self._team = self._library.baton_team_new(threads, SPIN_US)
        self._line = self._library.baton_line_new(self._program, self._team)
        self._line_fd: int = self._library.baton_line_fd(self._line)
        self._before: StepResult | None = None
        """Of the last step whose result is out; none if it broke."""
        self._works: deque[_Work] = deque()
        """Whose results are not out yet, oldest first."""
        self._num_works = 0
        self._listening: asyncio.AbstractEventLoop | None = None
        """The loop that the line wakes; none while there is no work."""
        self._idle = asyncio.Event()
        """No work, which somebody wants to know who closes."""
        self._is_closed = False

    def execute(self, step: Step, on_layers: Callable[[int], None] | None = None) -> Awaitable[StepResult]:
        """Write the step's KV and sample. A cancelled caller does not stop the step: the next one waits for it."""
        assert not self._is_closed, "a step for a closed runner"
        loop = asyncio.get_running_loop()
        if self._listening is not loop:
            self._listening = loop
            loop.add_reader(self._line_fd, self._on_done)
        done = loop.create_future()
        work = _Work(step.chunks, self._works[-1] if self._works else None, done, self._num_works % 2)
        self._num_works += 1
        self._works.append(work)
        self._idle.clear()
        if len(self._works) == 1:
            self._complete(work)
        # The logits of two steps can be kept; and a step that waits for a result keeps those behind it waiting.
        elif not work.unknown and len(self._works) == 2 and self._works[0].is_put:
            self._put(work)
        return done if on_layers is None else self._watch(done, work, on_layers)

    async def _watch(
        self, running: asyncio.Future[StepResult], work: _Work, on_layers: Callable[[int], None]
    ) -> StepResult:
        told, timeout_s = 0, LAYERS_POLL_S
        while told < self._num_layers:
            await asyncio.wait({running}, timeout=timeout_s)
            while told < work.num_layers_done:
                told += 1
                on_layers(told)
            if running.done():
                break
        return await running

    async def close(self) -> None:
        """Wait for all steps that were given, also those that wait for another's token; then let go of memory and
        weights. No step comes after."""
        self._is_closed = True
        loop = asyncio.get_running_loop()
        if self._listening is loop:
            await self._idle.wait()
        await loop.run_in_executor(self._sampler, self._let_go)
        self._sampler.shutdown(wait=False)

    def _let_go(self) -> None:
        """Nobody puts anything any more: there is no work, or the loop of those who gave it is closed."""
        for work in self._works:
            if work.is_put:
                self._library.baton_line_wait(self._line, work.job)
        self._library.baton_line_free(self._line)
        self._library.baton_program_free(self._program)
        self._library.baton_team_free(self._team)
        self._packed.close()
        self._arrays = {}
        self._pool = np.empty(0, np.uint8)

    def _put(self, work: _Work) -> None:
        place = work.place if work.reads_logits else 2
        if len(self._logits[place]) < work.num_sampled:
            self._logits[place] = self.room_for_logits(work.num_sampled)
        work.is_put = True
        self._library.baton_line_put(self._line, work.given(self._pool.ctypes.data, self._logits[place]))

    def _on_done(self) -> None:
        """The line has done something."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._line_fd)
        self._look()

    def _look(self) -> None:
        """Results of the oldest works, as far as the line is done with them."""
        while self._works and self._works[0].job.done and not self._works[0].is_read:
            work = self._works[0]
            work.is_read = True
            if work.reads_logits:
                reading = asyncio.get_running_loop().run_in_executor(self._sampler, work.result)
                reading.add_done_callback(self._on_read)
            else:
                self._conclude(work.result)

    def _on_read(self, reading: asyncio.Future[StepResult]) -> None:
        self._conclude(reading.result)
        self._look()

    def _conclude(self, result: Callable[[], StepResult]) -> None:
        """The oldest work has a result, or broke. What waited for it goes on the line."""
        done, self._before = self._works.popleft().done, None
        assert done is not None, "whoever gave a step wants its result"
        try:
            self._before = result()
            if not done.done():  # its caller may have left
                done.set_result(self._before)
        except Exception as e:
            if not done.done():
                done.set_exception(e)
        if self._works:
            if not self._works[0].is_put:
                self._complete(self._works[0])
        else:
            assert self._listening is not None
            self._listening.remove_reader(self._line_fd)
            self._listening = None
            self._idle.set()

    def _complete(self, work: _Work) -> None:
        """Put what has no other before it. It breaks with the step whose token it needs."""
        if work.unknown and self._before is None:
            self._conclude(_raise_broken)
        else:
            work.fill(self._before)
            self._put(work)

    def room_for_logits(self, num_sampled: int) -> Logits:
        """Rows begin at a cache line, where the vocabulary allows it: then C writes them past the caches."""
        room = library.aligned(num_sampled * self._vocab_size * 4).view(np.float32)
        return room.reshape(num_sampled, self._vocab_size)

    def logits(self, chunks: Sequence[ScheduledChunk], room: Logits | None = None) -> Logits:
        """Run the op list: [number of chunks that sample, vocab_size], in their order; in `room`, if it is given. A
        test may call it while no step is in execution."""
        work = _Work(chunks)
        logits = self.room_for_logits(work.num_sampled) if room is None else room
        self._library.baton_step(self._program, self._team, work.given(self._pool.ctypes.data, logits).batch, 0)
        return logits

    def time_ops(self, seconds: NDArray[np.float64] | None) -> None:
        """Add the seconds of each op to its place in `seconds`, which must live on; None: no more of that. Not while a
        step is in execution."""
        self._library.baton_program_time(self._program, None if seconds is None else seconds.ctypes.data)


def _raise_broken() -> StepResult:
    raise InternalError("the step before broke, and with it the token that this one needs")


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
