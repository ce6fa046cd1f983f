"""What one order of K costs: the exact product, whose every sum runs through k from its first element to its last,
beside the most that a product gains which may give halves of k to different threads.

The second is a product of twice the columns and half the k, by the same kernel on the same team: the same weights are
read and the same multiplications done, in tasks of another shape. The final addition of the halves, and the barrier
before it, are left out. Both are timed in turns, as in bench/linear.py. `layer` is the four products of a layer; its
cost is against a variant that splits only where that is faster, so it is more than such a variant could gain.

    python -m baton.bench.one_order --threads 2 --rows 1,8,512 --formats bf16,int8
"""

from __future__ import annotations

import argparse
import statistics

import torch

from baton.bench.linear import SMOLLM2_135M, pack_copies, product_us
from baton.kernels.host import library


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", default="1,8,512", help="numbers of activation rows")
    parser.add_argument("--formats", default="bf16,int8")
    parser.add_argument("--isa", default=library.isas()[0])
    parser.add_argument("--weights-mb", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9, help="turns of both")
    parser.add_argument("--seconds", type=float, default=0.05, help="per figure and turn")
    args = parser.parse_args()
    team = library.load().baton_team_new(args.threads, 20)
    print(f"{args.threads} threads, {args.isa}\n{'format':6} {'n':>6} {'k':>5} {'rows':>5} {'one order us':>12} "
          f"{'k split us':>10} {'cost':>6}")
    for format in args.formats.split(","):
        for m in map(int, args.rows.split(",")):
            exact_us = best_us = 0.0
            for n, k in SMOLLM2_135M[:-1]:
                exact, split = turns(args, team, format, n, k, m)
                exact_us, best_us = exact_us + exact, best_us + min(exact, split)
                print(line(format, str(n), str(k), m, exact, split))
            print(line(format, "layer", "", m, exact_us, best_us))
    library.load().baton_team_free(team)


def turns(args: argparse.Namespace, team: int, format: str, n: int, k: int, m: int) -> tuple[float, float]:
    """Microseconds of the exact product and of the split one: medians over turns."""
    pairs = [(torch.randn(m, size), pack_copies(format, columns, size, args.weights_mb << 19))
             for columns, size in ((n, k), (2 * n, k // 2))]
    found: tuple[list[float], list[float]] = [], []
    for _ in range(args.rounds):
        for times, (x, weights) in zip(found, pairs, strict=True):
            times.append(product_us(args.isa, team, x, weights, args.seconds))
    return statistics.median(found[0]), statistics.median(found[1])


def line(format: str, n: str, k: str, m: int, exact: float, split: float) -> str:
    return f"{format:6} {n:>6} {k:>5} {m:5} {exact:12.1f} {split:10.1f} {exact / split - 1:6.1%}"


if __name__ == "__main__":
    main()
