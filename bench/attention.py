"""Paged attention of the host kernels: speed per chunk, KV format and instruction set, beside torch's attention over
as many keys laid side by side, and beside what this machine reads from memory in the same run.

Chunks are N@S: N rows of a sequence that has S tokens before them, so 1@2048 is a decode and 512@0 a prompt. There are
as many sequences as fill `--pool-mb`, whose blocks lie all over the pool, and each call takes the next sequence or
layer: K and V come from memory, as a step's do. Times are what nine of ten calls exceed, as in bench/linear.py.

    baton bench attention --chunks 1@256,1@2048,512@0,512@1536 --kv bf16,int8 --threads 1
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from baton.bench.linear import huge_memory, quick_s, read_bandwidth
from baton.core.layout import KVLayout
from baton.kernels.host import library

HEADS, KV_HEADS, HEAD_DIM, LAYERS, BLOCK_TOKENS = 9, 3, 64, 30, 16
"""Of SmolLM2-135M."""
SPIN_US = 20
READ_MB = 128


@dataclass(frozen=True)
class Chunk:
    num_rows: int
    start: int

    @classmethod
    def of(cls, text: str) -> Chunk:
        num_rows, _, start = text.partition("@")
        return cls(int(num_rows), int(start or 0))

    @property
    def num_tokens(self) -> int:
        return self.start + self.num_rows

    @property
    def flop(self) -> float:
        """Of what the rows see; half of a prompt's square is masked."""
        return 4 * HEADS * HEAD_DIM * self.num_rows * (self.start + (self.num_rows + 1) / 2)


class Pool:
    """Random K and V of many sequences of `num_tokens`, and a call for each sequence and layer."""

    def __init__(self, kv: str, num_tokens: int, num_bytes: int) -> None:
        layout = KVLayout(LAYERS, KV_HEADS, HEAD_DIM, BLOCK_TOKENS, kv)
        each = -(-num_tokens // BLOCK_TOKENS)
        self.num_sequences = max(1, num_bytes // (each * layout.block_bytes))
        self._memory = huge_memory(self.num_sequences * each * layout.block_bytes)
        rng = np.random.default_rng(0)
        self._fill(rng, kv)
        self.num_bytes = each * KV_HEADS * 2 * layout.run_bytes
        """That one call reads."""
        tables = rng.permutation(self.num_sequences * each).astype(np.int32).reshape(self.num_sequences, each)
        self.tables = tables
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

    def _fill(self, rng: np.random.Generator, kv: str) -> None:
        """Any bytes that are numbers of moderate size in the format: what they are does not change the time."""
        some = rng.normal(0, 1, 1 << 16).astype(np.float32)
        if kv == "bf16":
            pattern = (some.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        elif kv == "int8":  # runs end in scales: bytes 0x3c, repeated, are 0.0115 as fp32
            pattern = b"\x3c" * (1 << 16)
        else:
            pattern = some.tobytes()
        for at in range(0, len(self._memory), len(pattern)):
            end = min(at + len(pattern), len(self._memory))
            self._memory[at:end] = pattern[: end - at]


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", default="1@256,1@2048,8@512,512@0,512@1536", help="rows@tokens before them")
    parser.add_argument("--kv", default="bf16,int8", help="of fp32, bf16, int8")
    parser.add_argument("--isas", default=library.isas()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pool-mb", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=0.5, help="per figure")
    parser.add_argument("--no-torch", action="store_true")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    read = read_bandwidth(READ_MB << 20, asked.seconds, asked.threads)
    print(f"{asked.threads} threads; memory is read at {read:.1f} GB/s")
    print(f"{'chunk':10} {'kv':5} {'isa':6} {'us':>9} {'GFLOP/s':>8} {'GB/s':>6} {'of read':>7} {'torch us':>9} "
          f"{'ratio':>6}")
    for chunk in map(Chunk.of, asked.chunks.split(",")):
        peer = None if asked.no_torch else torch_us(chunk, asked.seconds)
        for kv in asked.kv.split(","):
            pool = Pool(kv, chunk.num_tokens, asked.pool_mb << 20)
            for isa in asked.isas.split(","):
                us = attention_us(isa, kv, pool, chunk, asked.threads, asked.seconds)
                rate = pool.num_bytes / us * 1e-3
                beside = "" if peer is None else f"{peer:9.1f} {peer / us:6.2f}"
                print(f"{chunk.num_rows:>5}@{chunk.start:<4} {kv:5} {isa:6} {us:9.1f} {chunk.flop / us * 1e-3:8.0f} "
                      f"{rate:6.1f} {rate / read:7.0%} {beside}")


def attention_us(isa: str, kv: str, pool: Pool, chunk: Chunk, threads: int, seconds: float) -> float:
    """Of one layer of one sequence, all heads."""
    host, name = library.load(), isa.encode()
    shape = library.Shape(
        HEADS * HEAD_DIM, 1, HEADS, KV_HEADS, HEAD_DIM, 1, LAYERS, BLOCK_TOKENS, library.FORMATS[kv], 0, None)
    q = np.random.default_rng(1).normal(0, 1, (chunk.num_rows, HEADS * HEAD_DIM)).astype(np.float32)
    out = np.empty_like(q)
    span = np.array([0, chunk.num_rows, chunk.start, 0], np.int32)
    batches = [
        library.Batch(None, span.ctypes.data, table.ctypes.data, None, pool.start, None, None, None,
                      chunk.num_rows, 1, 0, 0)
        for table in pool.tables]
    calls = [(batch, layer) for layer in range(LAYERS) for batch in batches]
    team = host.baton_team_new(threads, SPIN_US)

    def attend(call: tuple[library.Batch, int]) -> None:
        batch, layer = (ctypes.byref(call[0]), call[1])
        host.baton_attention(name, team, ctypes.byref(shape), batch, layer, q.ctypes.data, out.ctypes.data)

    try:
        return quick_s(attend, calls, seconds) * 1e6
    finally:
        host.baton_team_free(team)


def torch_us(chunk: Chunk, seconds: float) -> float:
    """The same rows in bf16, keys and values of a head side by side; the rows of a group's heads are its queries."""
    group = HEADS // KV_HEADS
    q = torch.randn(1, KV_HEADS, group * chunk.num_rows, HEAD_DIM, dtype=torch.bfloat16)
    seen = torch.arange(chunk.num_tokens) <= chunk.start + torch.arange(chunk.num_rows)[:, None]
    mask = None if chunk.num_rows == 1 else seen.repeat(group, 1)
    keys = [torch.randn(2, 1, KV_HEADS, chunk.num_tokens, HEAD_DIM, dtype=torch.bfloat16) for _ in range(LAYERS)]
    with torch.inference_mode():
        return 1e6 * quick_s(
            lambda kv: torch.nn.functional.scaled_dot_product_attention(q, kv[0], kv[1], mask), keys, seconds)


if __name__ == "__main__":
    main()
