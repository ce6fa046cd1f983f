"""Where a step's time goes: each kind of operation, its share, and how near it is to what this machine can do.

Steps run on the host engine that the configuration gives, without the serving around it. An operation is bound by the
bytes that it must read (weights; K and V) or by its multiplications, whichever takes longer at the rates measured in
the same run on as many threads: of reading memory, and of the best of torch's and our own large bf16 products (which
with AMX is not half of what tiles in registers reach). `limit` is that bound as a share of the time taken. Each time is
what nine of ten exceed, as in bench/linear.py, of an operation
and of whole steps apart: where others use the machine too, a step takes longer than its operations.

    baton bench ops --steps prefill:512,decode:1,decode:8 --set engine.quantization=bf16 --set engine.threads=2

prefill:N is a prompt of N tokens in chunks of 512, the last of which samples; decode:N is one token of each of N
sequences, `--context` tokens into them.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from baton.bench.linear import pack_copies, product_us, quick_s, read_bandwidth
from baton.core.config import Config, load
from baton.core.errors import SetupError
from baton.core.layout import KVLayout
from baton.core.request import SamplingParams
from baton.core.step import ScheduledChunk
from baton.engine.backend import Backend, choose_backend
from baton.engine.host_runner import SPIN_US, HostRunner
from baton.kernels.host import library
from baton.models.catalog import open_model
from baton.models.compile import (
    Embed,
    KeepSampledRows,
    Linear,
    LinearResidual,
    LMHead,
    Op,
    PagedAttention,
    RopeAndWriteKV,
    compile_spec,
)
from baton.models.convert import ModelFiles
from baton.models.packed import PackedMatrix, plan
from baton.models.spec import ModelSpec

CHUNK_TOKENS = 512
PEAK_SIZE = 1024
READ_MB, LIMIT_SECONDS = 256, 0.5
MIN_ROUNDS = 3
GREEDY = SamplingParams(temperature=0.0)
_KINDS: dict[type[Op], str] = {Embed: "embed", PagedAttention: "attention", RopeAndWriteKV: "rope, write KV"}

Chunks = tuple[ScheduledChunk, ...]


@dataclass(frozen=True)
class Limits:
    """What this machine does at its best."""

    read_bytes_per_s: float
    flop_per_s: float

    @classmethod
    def measured(cls, threads: int, isa: str) -> Limits:
        torch.set_num_threads(threads)
        x, flop = torch.randn(PEAK_SIZE, PEAK_SIZE), 2 * PEAK_SIZE**3
        torch_s = quick_s(lambda w: torch.nn.functional.linear(w, w), [x.to(torch.bfloat16)], LIMIT_SECONDS)
        team = library.load().baton_team_new(threads, SPIN_US)
        own_s = product_us(isa, team, x, pack_copies("bf16", PEAK_SIZE, PEAK_SIZE, 1), LIMIT_SECONDS) * 1e-6
        library.load().baton_team_free(team)
        return cls(read_bandwidth(READ_MB << 20, LIMIT_SECONDS, threads) * 1e9, flop / min(torch_s, own_s))

    def least_s(self, num_bytes: float, flop: float) -> float:
        return max(num_bytes / self.read_bytes_per_s, flop / self.flop_per_s)


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Raises SetupError if the engine is not the host kernels."""
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default="prefill:512,prefill:2048,decode:1,decode:8,decode:32")
    parser.add_argument("--context", type=int, default=256, help="tokens before those of a decode step")
    parser.add_argument("--seconds", type=float, default=3.0, help="per step")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.NAME=VALUE", dest="overrides")
    asked = parser.parse_args(arguments)
    config = load({}, asked.overrides)
    files = open_model(config.model)
    if not isinstance(files, ModelFiles):
        raise SetupError("the hash model has no operations to time. Set model.name to a real one.")
    backend = choose_backend(config.engine, files.spec.head_dim)
    if backend.name != "host":
        raise SetupError("only the host kernels have operations to time. Set engine.backend=host.")
    limits = Limits.measured(config.engine.threads or 1, backend.isa)
    print(f"{config.engine.threads or 1} threads; memory is read at {limits.read_bytes_per_s * 1e-9:.1f} GB/s, "
          f"bf16 multiplied at {limits.flop_per_s * 1e-9:.0f} GFLOP/s")
    for what in asked.steps.split(","):
        kind, _, count = what.partition(":")
        longest, num_sequences = (int(count), 1) if kind == "prefill" else (asked.context + 1, int(count))
        bench = Bench(config, files, backend, longest, num_sequences)
        steps = bench.prefill() if kind == "prefill" else bench.decode()
        bench.time(what, steps, limits, asked.seconds)
        bench.close()


@dataclass
class Cost:
    """Of all operations of a kind."""

    seconds: float = 0.0
    num_bytes: float = 0.0
    flop: float = 0.0
    least_s: float = 0.0

    def add(self, num_bytes: float, flop: float, limits: Limits) -> None:
        self.num_bytes += num_bytes
        self.flop += flop
        self.least_s += limits.least_s(num_bytes, flop)

    def row(self, total_s: float) -> str:
        return (f"{self.seconds * 1e3:8.3f} {self.seconds / total_s:6.1%} {self.num_bytes / self.seconds * 1e-9:6.1f} "
                f"{self.flop / self.seconds * 1e-9:8.0f} {self.least_s / self.seconds:6.0%}")


class Bench:
    """A runner, and sequences in its pool, whose blocks lie all over it."""

    def __init__(
        self, config: Config, files: ModelFiles, backend: Backend, longest: int, num_sequences: int
    ) -> None:
        block_size = config.engine.block_size
        self._spec: ModelSpec = files.spec
        self._layout = self._spec.layout(block_size, backend.kv_dtype)
        each = -(-longest // block_size)
        rng = np.random.default_rng(0)
        self._tables = rng.permutation(each * num_sequences).reshape(num_sequences, each).tolist()
        self._tokens = rng.integers(0, self._spec.vocab_size, (num_sequences, longest)).tolist()
        self._memory = library.aligned(each * num_sequences * self._layout.block_bytes)
        self._runner = HostRunner(files, self._memory.data, self._layout, config.engine.threads or 1, backend)
        self._ops = compile_spec(self._spec)
        self._matrices = plan(self._spec, backend.quantization)

    def close(self) -> None:
        asyncio.run(self._runner.close())

    def prefill(self) -> list[Chunks]:
        longest = len(self._tokens[0])
        starts = range(0, longest, CHUNK_TOKENS)
        return [(self._chunk(0, start, min(start + CHUNK_TOKENS, longest)),) for start in starts]

    def decode(self) -> list[Chunks]:
        """The last token of each; those before it are computed here."""
        last = len(self._tokens[0]) - 1
        for i in range(len(self._tokens)):
            for start in range(0, last, CHUNK_TOKENS):
                self._runner.logits([self._chunk(i, start, min(start + CHUNK_TOKENS, last))])
        return [tuple(self._chunk(i, last, last + 1) for i in range(len(self._tokens)))]

    def _chunk(self, i: int, start: int, end: int) -> ScheduledChunk:
        tokens, choices = self._tokens[i], (0,) if end == len(self._tokens[i]) else ()
        return ScheduledChunk(f"r{i}", tuple(tokens[start:end]), start, tuple(self._tables[i]), choices, GREEDY, 0)

    def time(self, what: str, steps: Sequence[Chunks], limits: Limits, seconds: float) -> None:
        """Print a line for each kind of operation that takes a thousandth of all or more."""
        total_s, op_s = self._measured(steps, seconds)
        num_rows = sum(len(c.token_ids) for chunks in steps for c in chunks)
        print(f"\n{what}: {total_s * 1e3:.2f} ms, {num_rows / total_s:.0f} tok/s; operations {sum(op_s) * 1e3:.2f} ms")
        print(f"  {'operation':16} {'ms':>8} {'share':>6} {'GB/s':>6} {'GFLOP/s':>8} {'limit':>6}")
        costs: dict[str, Cost] = {}
        works = [works_of(self._spec, self._layout, self._matrices, chunks) for chunks in steps]
        for i, op in enumerate(self._ops):
            cost = costs.setdefault(_kind(op), Cost())
            cost.seconds += op_s[i]
            for work in works:
                cost.add(*work[i], limits)
        for kind, cost in costs.items():
            if cost.seconds > 0.001 * sum(op_s):
                print(f"  {kind:16} {cost.row(sum(op_s))}")

    def _measured(self, steps: Sequence[Chunks], seconds: float) -> tuple[float, list[float]]:
        """All steps, and each op in all of them."""
        for chunks in steps:
            self._runner.logits(chunks)  # warms up
        room = self._runner.room_for_logits(max(len(chunks) for chunks in steps))
        totals: list[float] = []
        ops: list[NDArray[np.float64]] = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(totals) < MIN_ROUNDS:
            ops.append(np.zeros(len(self._ops)))
            self._runner.time_ops(ops[-1])
            before = time.perf_counter()
            for chunks in steps:
                self._runner.logits(chunks, room)
            totals.append(time.perf_counter() - before)
        self._runner.time_ops(None)
        return float(np.quantile(totals, 0.1)), np.quantile(ops, 0.1, axis=0).tolist()


def works_of(
    spec: ModelSpec, layout: KVLayout, matrices: Mapping[str, PackedMatrix], chunks: Chunks
) -> list[tuple[float, float]]:
    """Of each operation of a step: bytes that it must read, and multiplications and additions."""
    works = []
    num_rows = sum(len(c.token_ids) for c in chunks)
    ends = [(c.start + len(c.token_ids), len(c.token_ids)) for c in chunks]
    for op in compile_spec(spec):
        num_bytes = flop = 0.0
        if isinstance(op, KeepSampledRows):
            num_rows = sum(1 for c in chunks if c.choices)
        elif isinstance(op, PagedAttention):
            num_bytes = layout.block_bytes / layout.block_size / spec.num_layers * sum(end for end, _ in ends)
            seen = sum(rows * (end - (rows - 1) / 2) for end, rows in ends)
            flop = 4 * seen * spec.num_heads * spec.head_dim
        elif isinstance(op, Linear | LinearResidual | LMHead) and num_rows:
            matrix = matrices[op.weight]
            num_bytes, flop = matrix.num_bytes, 2.0 * matrix.n * matrix.k * num_rows
        works.append((num_bytes, flop))
    return works


def _kind(op: Op) -> str:
    if isinstance(op, LMHead):
        return "lm_head"
    if isinstance(op, Linear | LinearResidual):
        return op.weight.rpartition(".")[2]
    return _KINDS.get(type(op), type(op).__name__)


if __name__ == "__main__":
    main()
