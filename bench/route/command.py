"""`baton bench route`: one trace, one fleet, every policy. docs/routing.md describes the figures."""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from baton.bench.load.plots import figure
from baton.bench.load.traces import Traced, read_trace, spread
from baton.bench.route.cell import Cell
from baton.bench.route.plots import draw
from baton.bench.route.processes import replay_for_real, twin
from baton.bench.route.setup import MODES, Setup
from baton.bench.route.world import replay
from baton.core.config import PolicyName
from baton.core.errors import SetupError

POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)
SPREAD_SEED = 7
HEAD = ("policy", "world", "workers", "load", "routers", "hit", "mean_ttft_s", "p50_ttft_s", "p99_ttft_s", "imbalance",
        "util", "local", "regret_s")

Row = dict[str, object]


@dataclass(frozen=True, slots=True)
class Job:
    """One cell to replay, in whichever process."""

    trace: Path
    num_requests: int | None
    setup: Setup
    load: float
    real: bool = False

    def run(self) -> Row:
        began = time.process_time()
        play = replay_for_real if self.real else replay
        cell = play(requests_of(self.trace, self.num_requests), self.setup, self.load)
        return self.row(cell, time.process_time() - began)

    def row(self, cell: Cell, cpu_s: float) -> Row:
        setup = self.setup
        own = {
            "trace": self.trace.name, "world": "real" if self.real else "simulated", "mode": setup.mode,
            "policy": setup.policy, "workers": setup.num_prefill, "decode_workers": setup.num_decode,
            "routers": setup.num_routers, "load": self.load, "blocks": setup.num_blocks, "grain": setup.grain,
            "pace": setup.pace, "seed": setup.seed, "settings": list(setup.settings),
        }
        return own | dataclasses.asdict(cell) | {"cpu_s": round(cpu_s, 1)}


def requests_of(path: Path, num_requests: int | None) -> list[Traced]:
    """The first so many of a trace; those of one instant are spread over the time until the next."""
    return spread(read_trace(path)[:num_requests], random.Random(SPREAD_SEED))


def main(arguments: Sequence[str] | None = None, prog: str = "baton bench route") -> None:
    """Raises SetupError for a trace or rows that cannot be read, and before anything is replayed also for a plot that
    cannot be drawn."""
    asked = options(prog).parse_args(arguments)
    if asked.plot:
        figure(1)
    rows = list[Row]()
    print("  ".join(f"{name:>{width(name)}}" for name in HEAD))
    for row in kept(asked.rows) if asked.rows else replayed(jobs_of(asked), asked.jobs):
        rows.append(row)
        print("  ".join(f"{shown(row[name]):>{width(name)}}" for name in HEAD), flush=True)
        if row["num_failed"]:
            print(f"  {row['num_failed']} of {row['num_requests']} requests failed: {row['failure']}")
        if asked.json:
            asked.json.write_text(json.dumps(rows, indent=1) + "\n")
    if asked.plot:
        draw(rows, asked.plot)


def kept(paths: Sequence[Path]) -> list[Row]:
    """What `--json` has written."""
    try:
        rows = [row for path in paths for row in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError) as e:
        raise SetupError(f"cannot read the rows: {e}.") from e
    if not all(isinstance(row, dict) and set(HEAD) <= row.keys() for row in rows):
        raise SetupError("these are no rows that `bench route --json` has kept.")
    return rows


def jobs_of(asked: argparse.Namespace) -> list[Job]:
    if not asked.trace.is_file():
        raise SetupError(f"there is no trace {asked.trace}.")
    policies = POLICIES if "all" in asked.policy else asked.policy
    jobs = list[Job]()
    for workers, load, routers, policy in itertools.product(asked.workers, asked.load, asked.routers, policies):
        setup = Setup(
            asked.mode, policy, workers, asked.decode_workers or max(1, workers // 2), routers, asked.blocks,
            asked.grain, asked.seed, tuple(asked.set), asked.pace,
        )
        jobs.append(Job(asked.trace, asked.requests, twin(setup) if asked.real else setup, load))
        if asked.real:
            jobs.append(Job(asked.trace, asked.requests, setup, load, real=True))
    return jobs


def replayed(jobs: Sequence[Job], num_processes: int) -> Iterator[Row]:
    """Rows in order of the jobs, each as soon as it is there."""
    if num_processes == 1:
        yield from map(Job.run, jobs)
        return
    with concurrent.futures.ProcessPoolExecutor(num_processes, max_tasks_per_child=1) as pool:
        yield from pool.map(Job.run, jobs)


def shown(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "-" if value is None else str(value)


def width(name: str) -> int:
    return max(len(name), {"policy": 15, "world": 9}.get(name, 8))


def options(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="Replay a recorded trace through the production router, "
                                     "scheduler and hand-off on virtual time, with Baton's policy and others'.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--trace", type=Path, help="Mooncake JSON lines or Azure CSV, plain or gzipped.")
    source.add_argument("--rows", type=Path, nargs="+", help="Replay nothing; take these rows, which --json has kept.")
    parser.add_argument("--policy", nargs="+", default=["all"], choices=("all", *POLICIES), metavar="NAME",
                        help=f"all, or some of {', '.join(POLICIES)}.")
    parser.add_argument("--workers", type=positive, nargs="+", default=[4], help="Prefill workers.")
    parser.add_argument("--decode-workers", type=positive, help="Default: half as many.")
    parser.add_argument("--load", type=above_zero, nargs="+", default=[0.85],
                        help="Offered prompt tokens over what the prefill workers compute without a cache.")
    parser.add_argument("--mode", choices=MODES, default="production",
                        help="fcfs: one prompt after the other, all else free. production: chunks, hand-off, decode.")
    parser.add_argument("--routers", type=positive, nargs="+", default=[1])
    parser.add_argument("--requests", type=positive, help="Only the first so many.")
    parser.add_argument("--blocks", type=positive, default=2000, help="KV blocks of a worker, of 512 tokens each.")
    parser.add_argument("--grain", type=int, choices=(1, 2, 4, 8, 16, 32), default=16,
                        help="Tokens of the trace that one simulated token stands for.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="A setting; tokens in grains.")
    parser.add_argument("--real", action="store_true", help="Beside each row, one of real processes on real time: give "
                        "--requests. Workers of the hash model, and a wire that costs nothing in both.")
    parser.add_argument("--pace", type=above_zero, default=1.0, metavar="X", help="Everything X times as fast as on "
                        "the trace's clock; figures are told in the trace's time.")
    parser.add_argument("--jobs", type=positive, default=1, help="Processes.")
    parser.add_argument("--json", type=Path, help="Keep the rows there.")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="Draw the rows.")
    return parser


def above_zero(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


if __name__ == "__main__":
    main()
