"""How fast blocks move, each transport beside what it is made of, in one run.

    python -m baton.bench.kv_bandwidth [--transport shm ...] [--repeats 9] [--blocks 128] [--json FILE]

    1. every way to move blocks gets a reader process with a lender of its own, and moves all blocks once to warm up:
       `copy` is a loop of memcpy inside one process, `raw` two processes with blocking sockets and tcp's buffer sizes
    2. each repeat asks them one after the other to move all blocks again, so that a busy machine hits all alike
    3. `digest` is xxh3_128 over the same blocks: what integrity costs on top of a pull

Blocks are SmolLM2-135M's (720 KiB, 16 tokens); the default of 128 is a prompt of 2,048 tokens. Bars: shm at least 0.7
of copy, tcp at least 0.9 of raw. Ratios are the median over repeats of the ratio within a repeat.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from baton.bench.kv_pair import lender, reader
from baton.core.config import child_env
from baton.kv_transfer.digest import digest
from baton.kv_transfer.memory import KVMemory
from baton.kv_transfer.tcp import tune
from baton.kv_transfer.transport import PullOrder, PullState

BLOCK_BYTES = 30 * 3 * 2 * 16 * 64 * 4  # layers, KV heads, K and V, tokens, dim, fp32
TRANSPORTS = ("shm", "tcp", "nixl", "ucx", "nccl")
BASELINE = {"shm": "copy", "tcp": "raw"}
BARS = {"shm": 0.7, "tcp": 0.9}
START_TIMEOUT_S = 60.0


# ---- in the reader's process: moves all blocks once per line on stdin, and answers with the seconds it took ----------


def _serve(move: Callable[[], float]) -> None:
    move()
    print("READY", flush=True)
    for _ in sys.stdin:
        print(f"MOVED {move()}", flush=True)


def _copy(num_blocks: int) -> None:
    ours, theirs = (KVMemory(num_blocks, BLOCK_BYTES, shared=True) for _ in range(2))
    for b in range(num_blocks):
        theirs.block(b)[:] = os.urandom(64) * (BLOCK_BYTES // 64)

    def move() -> float:
        started = time.perf_counter()
        for b in range(num_blocks):
            ours.block(b)[:] = theirs.block(b)
        return time.perf_counter() - started

    _serve(move)


def _digest(num_blocks: int) -> None:
    memory = KVMemory(num_blocks, BLOCK_BYTES, shared=True)
    for b in range(num_blocks):
        memory.block(b)[:] = os.urandom(64) * (BLOCK_BYTES // 64)

    def move() -> float:
        started = time.perf_counter()
        for b in range(num_blocks):
            digest(memory.block(b))
        return time.perf_counter() - started

    _serve(move)


def _raw(num_blocks: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        tune(server)
        port = server.getsockname()[1]
        module = "baton.bench.kv_bandwidth"
        command = [sys.executable, "-m", module, "--blocks", str(num_blocks), "--raw-lender", str(port)]
        with subprocess.Popen(command) as peer:
            sock, _ = server.accept()
            memory = KVMemory(num_blocks, BLOCK_BYTES, shared=True)

            def move() -> float:
                started = time.perf_counter()
                sock.sendall(b"!")
                for b in range(num_blocks):
                    view = memory.block(b)
                    while view:
                        view = view[sock.recv_into(view) :]
                return time.perf_counter() - started

            _serve(move)
            sock.close()
            peer.wait(START_TIMEOUT_S)


def _raw_lender(port: int, num_blocks: int) -> None:
    memory = KVMemory(num_blocks, BLOCK_BYTES, shared=True)
    for b in range(num_blocks):
        memory.block(b)[:] = os.urandom(64) * (BLOCK_BYTES // 64)
    with socket.socket() as sock:
        tune(sock)
        sock.connect(("127.0.0.1", port))
        while sock.recv(1):
            for b in range(num_blocks):
                sock.sendall(memory.block(b))


def _pull(transport: str, num_blocks: int) -> None:
    with lender((transport,), num_blocks=num_blocks, block_bytes=BLOCK_BYTES) as there, asyncio.Runner() as runner:
        context = reader((transport,), num_blocks=num_blocks, block_bytes=BLOCK_BYTES, pull_timeout_s=30)
        r = runner.run(context.__aenter__())
        lease, blocks = there.lend(num_blocks)
        mine = r.take(num_blocks)
        runner.run(r.puller.pull(there.info, lease, blocks, mine))
        order = PullOrder(lease, tuple(b.block_id for b in blocks), tuple(mine))

        async def pull() -> float:
            started = time.perf_counter()
            state = await r.transports[transport].pull(there.info.worker_id, order).wait()
            assert state is PullState.DONE, f"a pull over {transport} ended {state}"
            return time.perf_counter() - started

        _serve(lambda: runner.run(pull()))
        runner.run(context.__aexit__(None, None, None))


def _move(name: str, num_blocks: int) -> None:
    if name in TRANSPORTS:
        _pull(name, num_blocks)
    else:
        {"copy": _copy, "digest": _digest, "raw": _raw}[name](num_blocks)


# ---- the process that asks -------------------------------------------------------------------------------------------


class Mover:
    """One of these processes. Raises SystemExit when it cannot do its work, with what it said last."""

    def __init__(self, name: str, num_blocks: int) -> None:
        self.name = name
        command = [sys.executable, "-m", "baton.bench.kv_bandwidth", "--move", name, "--blocks", str(num_blocks)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=child_env(1)
        )
        self._answer("READY")

    def move(self) -> float:
        """Seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._answer("MOVED"))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(START_TIMEOUT_S)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _answer(self, word: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(word):
                return line.removeprefix(word)
        raise SystemExit(f"{self.name} ended with {self._process.wait()} instead of moving blocks")


def measure(names: list[str], num_blocks: int, repeats: int) -> dict[str, list[float]]:
    """Seconds for all blocks: name -> one value per repeat."""
    movers = [Mover(name, num_blocks) for name in names]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats):
        for mover in movers:
            seconds[mover.name].append(mover.move())
    for mover in movers:
        mover.close()
    return seconds


def report(seconds: dict[str, list[float]], num_blocks: int) -> dict[str, Any]:
    """Prints the table; returns it for --json."""
    num_bytes = num_blocks * BLOCK_BYTES
    rows: dict[str, Any] = {}
    print(f"{num_blocks} blocks of {BLOCK_BYTES} bytes ({num_bytes / 1e6:.0f} MB), {len(seconds['copy'])} repeats, "
          f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for name, values in seconds.items():
        speeds = sorted(num_bytes / s / 1e9 for s in values)
        row: dict[str, Any] = {"GB/s": statistics.median(speeds), "spread": (speeds[0], speeds[-1])}
        line = f"{name:7} {row['GB/s']:6.2f} GB/s  ({speeds[0]:.2f} to {speeds[-1]:.2f})"
        if (base := BASELINE.get(name)) is not None:
            row["ratio"] = statistics.median(b / s for b, s in zip(seconds[base], values, strict=True))
            line += f"  {row['ratio']:.2f} of {base} (bar: {BARS[name]})"
        if name in TRANSPORTS:
            row["digest_share"] = statistics.median(d / s for d, s in zip(seconds["digest"], values, strict=True))
            line += f"  digests cost {100 * row['digest_share']:.1f} % of a pull"
        print(line)
        rows[name] = row
    per_mib = statistics.median(seconds["digest"]) / num_bytes * (1 << 20)
    print(f"a digest costs {1e6 * per_mib:.0f} us per MiB, {1e3 * statistics.median(seconds['digest']):.1f} ms for all")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transport", action="append", choices=TRANSPORTS, help="default: those installed here")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--blocks", type=int, default=128)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--move", help=argparse.SUPPRESS)
    parser.add_argument("--raw-lender", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.raw_lender:
        _raw_lender(options.raw_lender, options.blocks)
    elif options.move:
        _move(options.move, options.blocks)
    else:
        chosen = options.transport or [name for name in TRANSPORTS if _is_installed(name)]
        seconds = measure(["copy", "digest", "raw", *chosen], options.blocks, options.repeats)
        rows = report(seconds, options.blocks)
        if options.json:
            machine = {"cpus": os.cpu_count(), "platform": platform.platform()}
            options.json.write_text(json.dumps({"machine": machine, "rows": rows, "seconds": seconds}, indent=1))
    return 0


def _is_installed(transport: str) -> bool:
    package = {"nixl": "nixl_cu13", "ucx": "ucxx", "nccl": "torch"}.get(transport)
    return package is None or importlib.util.find_spec(package) is not None


if __name__ == "__main__":
    sys.exit(main())
