"""Whose CPU was used on this machine while something was measured: the client's, the server's, and everybody else's.

Results on cores that others use are results about those others; contention has cost up to 10x here. So every report
says how many cores' worth of time went to processes that are neither. Linux only; elsewhere reports say null.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
SAMPLE_S = 1.0
_BUSY = (0, 1, 2, 5, 6)
"""Columns of /proc/stat that are work: user, nice, system, irq, softirq. Steal is another machine's."""
_LISTENS = "0A"


@dataclass(frozen=True, slots=True)
class Ticks:
    """CPU seconds since boot, of everything and of two families of processes. The client's are also those of its
    children that ended: nobody else sent them."""

    at_s: float
    everything: float
    client: float
    server: float


@dataclass(frozen=True, slots=True)
class Used:
    """Mean cores in use over a span."""

    client: float
    server: float | None
    """None: nobody knows which processes the server is; they then count as others."""
    others: float


class Watch:
    """Looks every second, from `async with` to its end."""

    def __init__(self, server_pids: frozenset[int]) -> None:
        self._server_pids = server_pids
        self._server = frozenset[int]()
        self._seen: list[Ticks] = []
        self.loop_lag_s = 0.0
        """How late the client's own event loop was, at worst: what it read then has a late time stamp."""

    async def __aenter__(self) -> Watch:
        self._look(new_processes=True)
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})
        self._look(new_processes=True)

    def add_servers(self, pids: frozenset[int]) -> None:
        """Processes that began after the watch did: all that they used so far was used under it."""
        self._server_pids |= pids

    @property
    def mean(self) -> Used | None:
        return used(self._seen[0], self._seen[-1], bool(self._server_pids)) if len(self._seen) > 1 else None

    @property
    def worst_others(self) -> float | None:
        """Cores, in the second in which others used most."""
        spans = zip(self._seen, self._seen[1:], strict=False)
        return max((used(a, b, True).others for a, b in spans if b.at_s - a.at_s > SAMPLE_S / 2), default=None)

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + SAMPLE_S
            await asyncio.sleep(SAMPLE_S)
            self.loop_lag_s = max(self.loop_lag_s, loop.time() - due_s)
            self._look()

    def _look(self, new_processes: bool = False) -> None:
        if (PROC / "stat").exists():
            if new_processes:
                self._server |= family(self._server_pids)
            self._seen.append(look(asyncio.get_running_loop().time(), self._server))


def used(before: Ticks, after: Ticks, server_known: bool) -> Used:
    span_s = max(after.at_s - before.at_s, 1e-9)
    everything, client, server = (
        max(getattr(after, name) - getattr(before, name), 0.0) / span_s for name in ("everything", "client", "server")
    )
    return Used(client, server if server_known else None, max(everything - client - server, 0.0))


def look(at_s: float, server: frozenset[int]) -> Ticks:
    """Cheap enough for between tokens: only the processes named are read."""
    tick = os.sysconf("SC_CLK_TCK")
    columns = (PROC / "stat").read_text().partition("\n")[0].split()[1:]
    own, seen = os.times(), [process for pid in server if (process := _process(pid))]
    return Ticks(
        at_s,
        sum(int(columns[i]) for i in _BUSY) / tick,
        own.user + own.system + own.children_user + own.children_system,
        sum(ticks for _, ticks in seen) / tick,
    )


def family(pids: frozenset[int]) -> frozenset[int]:
    """With their descendants, but for this process and its own: the client is never its own server."""
    children: dict[int, list[int]] = {}
    for pid, parent in _parents().items():
        children.setdefault(parent, []).append(pid)
    found, to_see = set[int](), list(pids)
    while to_see:
        pid = to_see.pop()
        if pid != os.getpid() and pid not in found:
            found.add(pid)
            to_see += children.get(pid, [])
    return frozenset(found)


def _parents() -> dict[int, int]:
    pids = [int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit()]
    return {pid: process[0] for pid in pids if (process := _process(pid))}


def _process(pid: int) -> tuple[int, int] | None:
    """Its parent, and the ticks of it and of its children that ended. None if it is gone."""
    try:
        # The name may hold spaces and brackets; what follows its last bracket does not.
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[1]), sum(map(int, fields[11:15]))


def listener(host: str, port: int) -> frozenset[int]:
    """Who serves `port` here: the process that listens, and above it those that run the same program, as the parent
    of a server's workers does. Empty if it is another machine, or another user's."""
    if not _is_here(host) or not PROC.is_dir():
        return frozenset()
    inodes = {
        row[9]
        for name in ("tcp", "tcp6")
        if (PROC / "net" / name).exists()
        for row in (line.split() for line in (PROC / "net" / name).read_text().splitlines()[1:])
        if row[3] == _LISTENS and int(row[1].rpartition(":")[2], 16) == port
    }
    sockets = {f"socket:[{inode}]" for inode in inodes}
    owners = {int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit() and sockets & set(_open_files(entry))}
    return frozenset(_topmost(pid) for pid in owners)


def _is_here(host: str) -> bool:
    try:
        address = socket.getaddrinfo(host, None)[0]
        with socket.socket(address[0], socket.SOCK_DGRAM) as probe:
            probe.bind((address[4][0], 0))
    except OSError:
        return False
    return True


def _open_files(process: Path) -> Iterator[str]:
    try:
        for link in (process / "fd").iterdir():
            try:
                yield os.readlink(link)
            except OSError:
                continue
    except OSError:
        return


def _topmost(pid: int) -> int:
    parents, own = _parents(), _program(pid)
    while (parent := parents.get(pid, 0)) > 1 and parent != os.getpid() and _program(parent) == own:
        pid = parent
    return pid


def _program(pid: int) -> str | None:
    try:
        return os.readlink(PROC / str(pid) / "exe")
    except OSError:
        return None
