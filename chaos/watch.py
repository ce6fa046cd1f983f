"""What a run must not leave behind, and what must not grow: memory, descriptors, threads, ports, shared memory, blocks.

Owns the samples. Reads /proc; of a worker's blocks it asks the worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from baton.chaos.kept import Kept
from baton.chaos.stack import Stack
from baton.core.errors import BatonError

SAMPLE_S = 1.0
WARM_S = 20.0
"""A process grows for so long after its start: caches fill, lazy imports happen."""
MIN_SLOPE_S = 120.0
"""Over less, one cache that fills looks like a leak."""
QUIET_TIMEOUT_S = 60.0
"""Far above lease and quarantine times."""
EXTRA_FDS, EXTRA_THREADS = 8, 6
"""What may come and go: connections that are being made or closed, gRPC's pollers."""
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Footprint:
    """Of one process."""

    rss_bytes: int
    num_fds: int
    num_threads: int


def footprint(pid: int) -> Footprint | None:
    with contextlib.suppress(OSError, IndexError):
        process = Path(f"/proc/{pid}")
        rss = int((process / "statm").read_text().split()[1]) * _PAGE
        return Footprint(rss, len(os.listdir(process / "fd")), len(os.listdir(process / "task")))
    return None


def ports_of(pid: int) -> set[int]:
    """TCP ports that this process listens on, on addresses of its namespace."""
    inodes = set()
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/{pid}/fd/{fd}")
                if target.startswith("socket:["):
                    inodes.add(target[8:-1])
        lines = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
        fields = [line.split() for line in lines]
        return {int(f[1].rpartition(":")[2], 16) for f in fields if f[3] == "0A" and f[9] in inodes}
    return set()


def shared_memory() -> set[str]:
    """Names in /dev/shm: what a killed process can leave there."""
    with contextlib.suppress(OSError):
        return set(os.listdir("/dev/shm"))
    return set()


def _shared_memory_in_use() -> set[str]:
    """By any process of this machine."""
    used = set()
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{entry}/maps").read_text().splitlines() if entry.isdigit() else ():
                if "/dev/shm/" in line:
                    used.add(line.partition("/dev/shm/")[2].split()[0])
    return used


@dataclass(slots=True)
class Watch:
    stack: Stack
    before_shm: set[str] = field(default_factory=shared_memory)
    baseline: dict[str, Footprint] = field(default_factory=dict)
    """By kind of process, the largest after the warm-up, at rest."""
    baseline_ports: dict[str, int] = field(default_factory=dict)
    _samples: dict[tuple[str, int], list[tuple[float, int]]] = field(default_factory=lambda: defaultdict(list))
    """(name, pid) -> (loop time, RSS)."""

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            for name, kept in self.stack.kept.items():
                seen = footprint(kept.pid) if kept.pid is not None else None
                if seen is not None and kept.pid is not None and loop.time() - kept.started_s > WARM_S:
                    self._samples[name, kept.pid].append((loop.time(), seen.rss_bytes))
            await asyncio.sleep(SAMPLE_S)

    def take_baseline(self) -> None:
        for kept in self.stack.kept.values():
            seen = footprint(kept.pid) if kept.pid is not None else None
            if seen is not None and kept.pid is not None:
                kind, old = _kind(kept), self.baseline.get(_kind(kept), Footprint(0, 0, 0))
                self.baseline[kind] = Footprint(
                    max(old.rss_bytes, seen.rss_bytes), max(old.num_fds, seen.num_fds),
                    max(old.num_threads, seen.num_threads))
                self.baseline_ports[kind] = max(self.baseline_ports.get(kind, 0), len(ports_of(kept.pid)))

    def slopes(self) -> dict[str, float]:
        """MB per minute of the longest-lived incarnation of each process, over the second half of its life, where it
        lived long enough."""
        longest: dict[str, list[tuple[float, int]]] = {}
        for (name, _), samples in self._samples.items():
            if samples[-1][0] - samples[0][0] >= MIN_SLOPE_S and len(samples) > len(longest.get(name, ())):
                longest[name] = samples
        return {name: _slope(samples[len(samples) // 2 :]) * 60 / 1e6 for name, samples in longest.items()}

    async def until_quiet(self, timeout_s: float) -> None:
        """Until no worker holds anything, or too long."""
        for _ in range(int(timeout_s / SAMPLE_S)):
            if not [held async for held in self._of_workers()]:
                return
            await asyncio.sleep(SAMPLE_S)

    async def leaks(self) -> list[str]:
        """Everything that is still held when nothing is asked any more. Waits until it is nothing, or too long."""
        found: list[str] = []
        for _ in range(int(QUIET_TIMEOUT_S / SAMPLE_S)):
            found = [leak async for leak in self._of_workers()] + list(self._of_processes())
            if not found:
                break
            await asyncio.sleep(SAMPLE_S)
        return found

    async def _of_workers(self) -> AsyncIterator[str]:
        for name in (*self.stack.plan.prefills, *self.stack.plan.decodes):
            try:
                status = await self.stack.worker(name)
            except BatonError as e:
                yield f"{name} does not answer: {e.message}"
                continue
            ledger, load = status.ledger, status.load
            for what, number in (
                ("quarantined blocks", ledger.quarantined), ("lent blocks", ledger.lent),
                ("active blocks", ledger.active), ("running requests", load.num_running),
                ("waiting requests", load.num_waiting),
                ("blocks of credit", load.total_blocks - load.available_blocks),
                ("blocks unaccounted for", load.total_blocks - ledger.total),
            ):
                if number:
                    yield f"{name} holds {number} {what}"

    def _of_processes(self) -> Iterator[str]:
        for name, kept in self.stack.kept.items():
            seen, limit = (footprint(kept.pid) if kept.pid is not None else None), self.baseline.get(_kind(kept))
            if seen is None or kept.pid is None:
                yield f"{name} is not running"
                continue
            if limit is None:
                continue
            if seen.num_fds > limit.num_fds + EXTRA_FDS:
                yield f"{name} has {seen.num_fds} descriptors, {limit.num_fds} at rest before the faults"
            if seen.num_threads > limit.num_threads + EXTRA_THREADS:
                yield f"{name} has {seen.num_threads} threads, {limit.num_threads} at rest before the faults"
            ports, usual = ports_of(kept.pid), self.baseline_ports[_kind(kept)]
            if len(ports) > usual:
                yield f"{name} listens on ports {sorted(ports)}, {usual} of them before the faults"
        left = shared_memory() - self.before_shm
        if left and (left := left - _shared_memory_in_use()):
            yield f"/dev/shm has {sorted(left)}, and nobody uses it"


def _kind(kept: Kept) -> str:
    return kept.name.rpartition("-")[0]


def _slope(samples: list[tuple[float, int]]) -> float:
    """Bytes per second, least squares."""
    n = len(samples)
    mean_t, mean_y = sum(t for t, _ in samples) / n, sum(y for _, y in samples) / n
    spread = sum((t - mean_t) ** 2 for t, _ in samples)
    return sum((t - mean_t) * (y - mean_y) for t, y in samples) / spread if spread else 0.0
