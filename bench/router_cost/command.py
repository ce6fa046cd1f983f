"""`baton bench router`: what a request and a token cost in the router's own process, beside other routers, in one run.

Systems take turns, round by round; a figure is the median over rounds. CPU time, not latency: it is what a busy router
has too little of, and what others on the machine disturb least.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from baton.bench.load.command import keep, say
from baton.bench.load.host import family
from baton.bench.peers.command import model_of
from baton.bench.router_cost import systems
from baton.bench.router_cost.drive import ROWS, Cost, Row, measure
from baton.bench.router_cost.systems import System
from baton.core import config
from baton.core.errors import SetupError

NAMES = ("baton", "floor", "sglang-router", "vllm-router", "dynamo")
WARM_UP = Row("warm-up", 4, 40, 4)


def main(arguments: Sequence[str], prog: str) -> None:
    """Raises SetupError if a system cannot be had or does not answer."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", type=lambda text: tuple(text.split(",")), default=NAMES, metavar="NAME,NAME",
                        help=f"of {', '.join(NAMES)}")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE")
    asked = parser.parse_args(arguments)
    if unknown := set(asked.only) - set(NAMES):
        raise SetupError(f"{sorted(unknown)} are no routers known here. There are {', '.join(NAMES)}.")
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SetupError("this needs two cores: one is the router's alone.")
    with tempfile.TemporaryDirectory() as scratch:
        chosen = _systems(asked.only, Path(scratch))
        os.sched_setaffinity(0, {cores[1]})  # children inherit it; a router is moved away from them
        found = asyncio.run(_rounds(chosen, asked.rounds, cores[0]))
    print(_table(found))
    rows = {name: {row: [asdict(c) for c in costs] for row, costs in by.items()} for name, by in found.items()}
    keep(rows, asked.json)


def _systems(names: Sequence[str], scratch: Path) -> list[System]:
    _, files = model_of(config.load({}))
    own = {"baton": systems.baton, "floor": systems.floor}
    chosen = [of(files.directory) for name, of in own.items() if name in names]
    if set(names) - set(own):
        python = systems.installed(config.cache_dir(), say)
        proxies = {"sglang-router": (str(python), "-m", "sglang_router.launch_router"),
                   "vllm-router": (str(python), "-m", "vllm_router.launch_router")}
        chosen += [systems.proxy(name, command) for name, command in proxies.items() if name in names]
        if "dynamo" in names:
            directory = systems.text_files(scratch / "model", files.directory, files.spec)
            chosen.append(systems.dynamo(python, directory, scratch))
    return chosen


Found = dict[str, dict[str, list[Cost]]]


async def _rounds(chosen: Sequence[System], num_rounds: int, core: int) -> Found:
    found: Found = {system.name: {row.name: [] for row in ROWS} for system in chosen}
    for number in range(num_rounds):
        for system in chosen:
            for paced in (False, True):
                async with system.start(paced) as up:
                    _alone(up.pid, core)
                    await measure(up.port, up.pid, up.model, WARM_UP)
                    for row in (r for r in ROWS if r.paced == paced):
                        cost = await measure(up.port, up.pid, up.model, row)
                        found[system.name][row.name].append(cost)
                        rate = cost.num_requests / cost.wall_s
                        say(f"round {number + 1}, {system.name}, {row.name}: {cost.per_request_s * 1e6:.0f} us a "
                            f"request, {rate:.0f} requests/s")
    return found


def _alone(pid: int, core: int) -> None:
    for member in family(frozenset({pid})):
        for thread in (Path("/proc") / str(member) / "task").iterdir():
            os.sched_setaffinity(int(thread.name), {core})


def _table(found: Found) -> str:
    names = list(found)
    lines = ["| row | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in ROWS:
        unit = "us a token" if row.stream else "us a request"
        cells = []
        for name in names:
            costs = found[name][row.name]
            used = [c.per_token_s if row.stream else c.per_request_s for c in costs]
            p50 = statistics.median(c.latencies_s[len(c.latencies_s) // 2] for c in costs)
            cells.append(f"{statistics.median(used) * 1e6:.1f} (p50 {p50 * 1e3:.2f} ms)")
        lines.append(f"| {row.name}, CPU {unit} | " + " | ".join(cells) + " |")
    sizes = (max(c.rss_bytes for costs in by.values() for c in costs) for by in found.values())
    lines.append("| memory, MB | " + " | ".join(f"{size / 1e6:.0f}" for size in sizes) + " |")
    return "\n".join(lines)
