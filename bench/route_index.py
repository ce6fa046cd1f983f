"""The prefix index by itself: how long a lookup, an event and the loss of a worker take, and what an entry weighs.

    python -m baton.bench.route_index [--workers 8,64,512] [--chains 1600] [--json FILE]

A chain is the 64 blocks of a prompt of 1,024 tokens; every eighth is held by three workers, the others by one. `find`
asks for 64 blocks of which all, half or none are held, with hashes made anew for each question, as a router makes them.
`drop` is the loss of the worker that holds most, `wide` a chain that every worker holds. Times are CPU time: for single
calls what nine of ten exceed, as in bench/linear.py, for `store` the best of several rounds. Bars: find at most 10 us,
3 M blocks/s stored, drop under 1 ms.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from baton.core.block_hash import HASH_BYTES, BlockHash
from baton.core.messages import KVEvents, KVSnapshot
from baton.router.index import PrefixIndex

CHAIN = 64
COPIES, EVERY = 3, 8
QUESTIONS, ROUNDS = 2000, 5

Chain = tuple[BlockHash, ...]


@dataclass(frozen=True, slots=True)
class Row:
    workers: int
    entries: int
    find_full_us: float
    find_half_us: float
    find_miss_us: float
    find_wide_us: float
    store_blocks_per_s: float
    drop_ms: float
    dropped_entries: int
    bytes_per_entry: float
    """Hashes included, which the events bring."""


def chains(rng: Random, num: int) -> list[Chain]:
    return [tuple(BlockHash(rng.randbytes(HASH_BYTES)) for _ in range(CHAIN)) for _ in range(num)]


def filled(index: PrefixIndex, num_workers: int, held: Sequence[Chain]) -> None:
    """Chain i is stored by worker i, and some by the two next ones as well; one event each."""
    seqs = [0] * num_workers
    for i, chain in enumerate(held):
        for copy in range(COPIES if i % EVERY == 0 else 1):
            worker = (i + copy) % num_workers
            seqs[worker] += 1
            index.apply(f"w{worker}", "boot", KVEvents(seqs[worker], chain))


def empty(num_workers: int) -> PrefixIndex:
    index = PrefixIndex()
    for i in range(num_workers):
        index.apply_snapshot(f"w{i}", "boot", KVSnapshot(0, ()))
    return index


def anew(chain: Sequence[BlockHash]) -> list[BlockHash]:
    """Equal hashes in objects of their own, whose hash Python has not worked out."""
    return [BlockHash(bytes(bytearray(block_hash))) for block_hash in chain]


def call_us(call: Callable[[list[BlockHash]], object], questions: Sequence[Sequence[BlockHash]]) -> float:
    times = []
    for question in questions:
        hashes = anew(question)
        began = time.perf_counter_ns()
        call(hashes)
        times.append(time.perf_counter_ns() - began)
    return statistics.quantiles(times, n=10)[0] / 1e3


def measure(num_workers: int, num_chains: int) -> Row:
    rng = Random(0)
    held, others = chains(rng, num_chains), chains(rng, num_chains)
    stored_s = []
    for _ in range(ROUNDS):
        index = empty(num_workers)
        began = time.process_time()
        filled(index, num_workers, held)
        stored_s.append(time.process_time() - began)
    num_entries = index.num_entries
    picks = [rng.randrange(num_chains) for _ in range(QUESTIONS)]

    def ask(hashes: list[BlockHash]) -> object:
        return dict(index.match(hashes))

    full = call_us(ask, [held[i] for i in picks])
    half = call_us(ask, [held[i][: CHAIN // 2] + others[i][CHAIN // 2 :] for i in picks])
    miss = call_us(ask, [others[i] for i in picks])
    most = max((f"w{i}" for i in range(num_workers)), key=index.num_held)
    dropped = index.num_held(most)
    began = time.perf_counter_ns()
    index.drop(most)
    drop_ms = (time.perf_counter_ns() - began) / 1e6
    return Row(
        num_workers, num_entries, full, half, miss, wide_us(num_workers, held[0]), num_entries / min(stored_s), drop_ms,
        dropped, weight(num_workers, num_chains),
    )


def wide_us(num_workers: int, chain: Chain) -> float:
    """Everybody holds it: to know that, not to name them all."""
    index = PrefixIndex()
    for i in range(num_workers):
        index.apply_snapshot(f"w{i}", "boot", KVSnapshot(0, chain))
    return call_us(lambda hashes: index.match(hashes).get("w0"), [chain] * QUESTIONS)


def weight(num_workers: int, num_chains: int) -> float:
    index = empty(num_workers)
    tracemalloc.start()
    filled(index, num_workers, chains(Random(0), num_chains))
    num_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return num_bytes / index.num_entries


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="8,64,512")
    parser.add_argument("--chains", type=int, default=1600)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args(arguments)
    names = ' '.join(f'{name:>8}' for name in ('full us', 'half us', 'miss us', 'wide us'))
    print(f"{'workers':>7} {'entries':>9} {names} {'stored M/s':>10}"
          f" {'drop ms':>8} {'of':>8} {'bytes':>6}")
    rows = []
    for num_workers in map(int, asked.workers.split(",")):
        row = measure(num_workers, asked.chains)
        rows.append(asdict(row))
        finds = (row.find_full_us, row.find_half_us, row.find_miss_us, row.find_wide_us)
        print(f"{row.workers:7} {row.entries:9}", *(f"{us:8.1f}" for us in finds),
              f"{row.store_blocks_per_s / 1e6:10.2f} {row.drop_ms:8.3f} {row.dropped_entries:8}"
              f" {row.bytes_per_entry:6.0f}", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
