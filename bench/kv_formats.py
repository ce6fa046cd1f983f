"""KV in bf16 and int8: attention over a long context in both, in turns, and the conversion of a hand-off.

    python -m baton.bench.kv_formats --threads 1 --contexts 512,2048,8192

Attention is one layer of SmolLM2-135M for `--sequences` sequences of one row each (decode), over blocks from all over
a pool; int8 reads half the bytes and widens them. A figure is what nine of ten calls exceed, the median of turns.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
from collections.abc import Callable

import numpy as np

from baton.bench.linear import quick_s
from baton.core.layout import KVLayout
from baton.kernels.host import library
from baton.kernels.host.convert import convert_kv

KV_HEADS, GROUP, HEAD_DIM, BLOCK_SIZE, LAYERS = 3, 3, 64, 16, 30
DTYPES = ("bf16", "int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--contexts", default="512,2048,8192")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--isas", default=",".join(library.isas()))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.05, help="per figure and turn")
    args = parser.parse_args()
    team = library.load().baton_team_new(args.threads, 20)
    print(f"{args.threads} threads, {args.sequences} sequences\n{'isa':6} {'context':>7} {'bf16 us':>9} {'int8 us':>9} "
          f"{'int8 / bf16':>11}")
    for isa in args.isas.split(","):
        for context in map(int, args.contexts.split(",")):
            calls = [attention(isa, team, dtype, context, args.sequences) for dtype in DTYPES]
            bf16, int8 = in_turns(calls, args.rounds, args.seconds)
            print(f"{isa:6} {context:7} {bf16:9.1f} {int8:9.1f} {int8 / bf16:11.2f}")
    library.load().baton_team_free(team)
    for lender, reader in (DTYPES, DTYPES[::-1]):
        (us,) = in_turns([conversion(lender, reader)], args.rounds, args.seconds)
        print(f"{lender} to {reader}: {us:.0f} us per block of {BLOCK_SIZE} tokens, "
              f"{layout(lender).block_bytes / us * 1e-3:.1f} GB/s of {lender}, on one thread")


def in_turns(calls: list[Callable[[None], object]], rounds: int, seconds: float) -> list[float]:
    """Microseconds of each, medians over turns."""
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for times, call in zip(found, calls, strict=True):
            times.append(quick_s(call, [None], seconds) * 1e6)
    return [statistics.median(times) for times in found]


def layout(dtype: str, num_layers: int = LAYERS) -> KVLayout:
    return KVLayout(num_layers, KV_HEADS, HEAD_DIM, BLOCK_SIZE, dtype)


def filled(dtype: str, num_blocks: int, num_layers: int) -> np.ndarray:
    """Blocks of random values of that type: [block bytes] each."""
    plain, form = layout("fp32", num_layers), layout(dtype, num_layers)
    values = np.random.default_rng(1).standard_normal(plain.block_bytes // 4, np.float32)
    memory = library.aligned(num_blocks * form.block_bytes)
    one = memory[: form.block_bytes]
    convert_kv(plain, form, values.data.cast("B"), one.data.cast("B"))
    memory.reshape(num_blocks, -1)[1:] = one
    return memory


def attention(isa: str, team: int, dtype: str, context: int, num_sequences: int) -> Callable[[None], object]:
    each = -(-context // BLOCK_SIZE)
    pool = filled(dtype, num_sequences * each, 1)
    blocks = np.random.default_rng(2).permutation(num_sequences * each).astype(np.int32)
    spans = np.array([(i, 1, context - 1, i * each) for i in range(num_sequences)], np.int32)
    q = np.random.default_rng(3).standard_normal((num_sequences, KV_HEADS * GROUP, HEAD_DIM), np.float32)
    out = np.empty_like(q)
    shape = library.Shape(
        num_heads=KV_HEADS * GROUP, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, num_layers=1, block_size=BLOCK_SIZE,
        kv_format=library.FORMATS[dtype])
    batch = library.Batch(
        spans=spans.ctypes.data, blocks=blocks.ctypes.data, pool=pool.ctypes.data, num_rows=num_sequences,
        num_spans=num_sequences)
    kept, host = (pool, blocks, spans), library.load()

    def call(_: None) -> object:
        host.baton_attention(
            isa.encode(), team, ctypes.byref(shape), ctypes.byref(batch), 0, q.ctypes.data, out.ctypes.data)
        return kept

    return call


def conversion(lender: str, reader: str) -> Callable[[None], object]:
    source = filled(lender, 1, LAYERS)
    target = library.aligned(layout(reader).block_bytes)
    return lambda _: convert_kv(layout(lender), layout(reader), source.data.cast("B"), target.data.cast("B"))


if __name__ == "__main__":
    main()
