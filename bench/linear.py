"""Matrix products of the host kernels: speed per shape, format, instruction set and number of rows, beside
torch.nn.functional.linear and beside what this machine reads from memory in the same run.

Each shape has as many copies of its weights as fill `--weights-mb`, multiplied one after the other, so that weights
come from where a model's come from and not from a cache that one matrix fits in. A figure is what nine of ten single
calls exceed: on a machine that does other things too, that is the least wrong. Memory is read in pieces, of which the
fastest counts.

    python -m baton.bench.linear --threads 1 --rows 1,8,512 --formats bf16,int8
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import mmap
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from baton.kernels.host import library

SMOLLM2_135M = ((960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576))
"""(n, k) of qkv, o, gate_up, down and the LM head."""
T = TypeVar("T")

MIN_CALLS, MAX_CALLS = 10, 20_000
READ_BYTES = 4 << 20
"""Of memory, per thread and timed piece."""


@dataclass(frozen=True)
class Weights:
    """Copies of one packed matrix."""

    matrices: list[library.Matrix]
    num_bytes: int
    """Of one copy."""
    memory: mmap.mmap


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", default="1,4,16,256,512", help="numbers of activation rows")
    parser.add_argument("--formats", default=",".join(library.FORMATS))
    parser.add_argument("--isas", default=library.isas()[0])
    parser.add_argument("--shapes", default=",".join(f"{n}x{k}" for n, k in SMOLLM2_135M), help="n x k")
    parser.add_argument("--weights-mb", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=0.2, help="per figure")
    parser.add_argument("--no-torch", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shapes = [(int(n), int(k)) for n, k in (shape.split("x") for shape in args.shapes.split(","))]
    rows = [int(m) for m in args.rows.split(",")]
    read = read_bandwidth(args.weights_mb << 20, args.seconds, args.threads)
    print(f"{args.threads} threads; memory is read at {read:.1f} GB/s")
    print(f"{'format':6} {'isa':6} {'n':>6} {'k':>5} {'rows':>5} {'us':>9} {'GFLOP/s':>8} {'GB/s':>6} {'of read':>7} "
          f"{'torch us':>9} {'ratio':>6}")
    team = library.load().baton_team_new(args.threads, 20)
    for format in args.formats.split(","):
        for n, k in shapes:
            weights = pack_copies(format, n, k, args.weights_mb << 20)
            for m in rows:
                x = torch.randn(m, k)
                peer = None if args.no_torch else torch_us(format, x, n, args.weights_mb << 20, args.seconds)
                for isa in args.isas.split(","):
                    print(line(format, isa, weights, m, product_us(isa, team, x, weights, args.seconds), peer, read))
    library.load().baton_team_free(team)


def line(format: str, isa: str, weights: Weights, m: int, us: float, peer: float | None, read: float) -> str:
    n, k = weights.matrices[0].n, weights.matrices[0].k
    rate = weights.num_bytes / us * 1e-3
    beside = "" if peer is None else f"{peer:9.1f} {peer / us:6.2f}"
    return (f"{format:6} {isa:6} {n:6} {k:5} {m:5} {us:9.1f} {2 * n * k * m / us * 1e-3:8.0f} {rate:6.1f} "
            f"{rate / read:7.0%} {beside}")


def pack_copies(format: str, n: int, k: int, total_bytes: int) -> Weights:
    host, number = library.load(), library.FORMATS[format]
    num_bytes = int(host.baton_packed_bytes(number, n, k))
    count = max(1, total_bytes // num_bytes)
    memory = huge_memory(count * num_bytes)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if format == "int4":
        q = torch.randint(0, 16, (n, k), dtype=torch.uint8)
        scale, minimum = torch.rand(n, k // 32), torch.rand(n, k // 32)
        host.baton_pack_int4(q.data_ptr(), scale.data_ptr(), minimum.data_ptr(), n, k, start)
    else:
        w = torch.randn(n, k)
        getattr(host, f"baton_pack_{format}")(w.data_ptr(), n, k, start)
    for i in range(1, count):
        ctypes.memmove(start + i * num_bytes, start, num_bytes)
    return Weights([library.Matrix(start + i * num_bytes, n, k, number, 0) for i in range(count)], num_bytes, memory)


def huge_memory(num_bytes: int) -> mmap.mmap:
    """In huge pages, as a model's packed weights are (models/packed.py)."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def product_us(isa: str, team: int, x: torch.Tensor, weights: Weights, seconds: float) -> float:
    y = torch.empty(len(x), weights.matrices[0].n)
    name, host = isa.encode(), library.load()

    def multiply(matrix: library.Matrix) -> None:
        host.baton_linear(name, team, x.data_ptr(), len(x), ctypes.byref(matrix), y.data_ptr(), 0)

    return quick_s(multiply, weights.matrices, seconds) * 1e6


def torch_us(format: str, x: torch.Tensor, n: int, total_bytes: int, seconds: float) -> float | None:
    """The product in torch, where torch has the format."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(format)
    if dtype is None:
        return None
    x = x.to(dtype)
    one = torch.randn(n, x.shape[1]).to(dtype)
    copies = [one.clone() for _ in range(max(1, total_bytes // one.nbytes))]
    with torch.inference_mode():
        return quick_s(lambda w: torch.nn.functional.linear(x, w), copies, seconds) * 1e6


def read_bandwidth(num_bytes: int, seconds: float, threads: int) -> float:
    """GB/s, of all threads together: a few long streams for each, fetched ahead, out of huge pages. Others' use of the
    machine only makes it slower, so the best piece counts: what is read faster is an error."""
    host, memory = library.load(), huge_memory(num_bytes)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    ctypes.memset(start, 1, num_bytes)
    team, piece = host.baton_team_new(threads, 20), threads * READ_BYTES
    pieces = range(start, start + num_bytes - piece + 1, piece)
    try:
        return piece / min(times_s(lambda at: host.baton_read(team, at, piece), pieces, seconds)) * 1e-9
    finally:
        host.baton_team_free(team)


def quick_s(work: Callable[[T], object], copies: Sequence[T], seconds: float) -> float:
    """The time that nine of ten calls exceed, of as many as fit into `seconds`, on one copy after the other."""
    return statistics.quantiles(times_s(work, copies, seconds), n=10)[0]


def times_s(work: Callable[[T], object], copies: Sequence[T], seconds: float) -> list[float]:
    for _ in range(2):
        work(copies[0])
    spent: list[float] = []
    begin = time.perf_counter()
    for copy in itertools.islice(itertools.cycle(copies), MAX_CALLS):
        before = time.perf_counter()
        if len(spent) >= MIN_CALLS and before - begin > seconds:
            break
        work(copy)
        spent.append(time.perf_counter() - before)
    return spent


if __name__ == "__main__":
    main()
