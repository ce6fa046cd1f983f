"""What can be done to a running stack. Each fault knows whether its victim is at work now, strikes, proves that it
landed in the middle of that work, and heals.

    kill      kill -9; the supervisor starts the next incarnation
    stop      SIGTERM: it drains and ends; the supervisor starts the next one
    freeze    SIGSTOP, later SIGCONT: the machine swaps, a hypervisor moves it, a disk hangs
    slow      stopped most of the time: a noisy neighbour
    mid pull  kill or freeze of a lender while bytes of a pull are on its cable, which is limited for that
    registry  kill or freeze of Redis
    cut       one direction between two hosts is dropped; or a host's cable is down
    limit     a host may send only so much
    lossy     a pair of hosts talks over a bad line

A proof is a sentence with numbers, or nothing if the fault missed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from baton.chaos.clients import Clients
from baton.chaos.kept import Kept
from baton.chaos.lossy import Conditions
from baton.chaos.netns import Namespaces
from baton.chaos.stack import Stack
from baton.core.errors import BatonError

POLL_S = 0.01
PROOF_TIMEOUT_S = 5.0
STOP_TIMEOUT_S = 45.0
"""cluster.drain_timeout_s and some."""
REGISTRY = "registry"


class Fault(Protocol):
    async def work(self) -> int:
        """How much the victim is in the middle of (requests, or bytes); 0: nothing that a fault could hit."""
        ...

    async def strike(self) -> None: ...

    async def proof(self) -> str:
        """Asked before `heal`, again after an empty answer: it has not met anything yet."""
        ...

    async def heal(self) -> None:
        """Also after a strike that failed half-way, and after none."""
        ...


@dataclass(slots=True)
class Scene:
    stack: Stack
    clients: Clients

    async def work_of(self, name: str) -> int:
        """Requests that a worker or router has now."""
        if name in self.stack.plan.routers:
            return sum(q.attempts[-1].router == name for q in self.clients.in_flight.values() if q.attempts)
        try:
            load = (await self.stack.worker(name)).load
        except BatonError:
            return 0
        return load.num_running + load.num_waiting

    async def requests_between(self, router: str, worker: str) -> int:
        """That this router has on this worker."""
        try:
            return sum(w.in_flight for w in (await self.stack.fleet(router)).workers if w.info.worker_id == worker)
        except BatonError:
            return 0


async def _until(holds: Callable[[], bool], timeout_s: float = PROOF_TIMEOUT_S) -> bool:
    for _ in range(int(timeout_s / POLL_S)):
        if holds():
            return True
        await asyncio.sleep(POLL_S)
    return False


# ---- processes -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Kill:
    scene: Scene
    victim: str
    aboard: int = 0
    _pid: int = 0
    _restarts: int = 0

    @property
    def kept(self) -> Kept:
        return self.scene.stack.kept[self.victim]

    async def work(self) -> int:
        self.aboard = await self.scene.work_of(self.victim)
        return self.aboard

    async def strike(self) -> None:
        self._restarts = self.kept.restarts
        self._pid = self.kept.signal(signal.SIGKILL)

    async def proof(self) -> str:
        again = await _until(lambda: self.kept.restarts > self._restarts and self.kept.pid is not None)
        return f"pid {self._pid} had {self.aboard} requests, now pid {self.kept.pid}" if again else ""

    async def heal(self) -> None:
        """The supervisor does."""


@dataclass(slots=True)
class Stop:
    """SIGTERM, as an upgrade or a scale-down sends it: what runs there moves away, then it ends by itself."""

    scene: Scene
    victim: str
    aboard: int = 0
    _pid: int = 0

    async def work(self) -> int:
        self.aboard = await self.scene.work_of(self.victim)
        return self.aboard

    async def strike(self) -> None:
        self._pid = self.scene.stack.kept[self.victim].signal(signal.SIGTERM)

    async def proof(self) -> str:
        kept, loop = self.scene.stack.kept[self.victim], asyncio.get_running_loop()
        began_s = loop.time()
        await _until(lambda: kept.exit_code(self._pid) is not None, STOP_TIMEOUT_S)
        took_s = loop.time() - began_s
        in_order = kept.exit_code(self._pid) == 0
        return f"pid {self._pid} had {self.aboard} requests, ended in order after {took_s:.1f} s" if in_order else ""

    async def heal(self) -> None:
        """The supervisor starts the next one."""


@dataclass(slots=True)
class Freeze:
    scene: Scene
    victim: str
    aboard: int = 0
    _pid: int | None = None

    async def work(self) -> int:
        self.aboard = await self.scene.work_of(self.victim)
        return self.aboard

    async def strike(self) -> None:
        self._pid = self.scene.stack.kept[self.victim].signal(signal.SIGSTOP)

    async def proof(self) -> str:
        stopped = self.scene.stack.kept[self.victim].state == "T"
        return f"pid {self._pid} in state T with {self.aboard} requests" if stopped else ""

    async def heal(self) -> None:
        if self._pid is not None and self.scene.stack.kept[self.victim].pid == self._pid:
            os.kill(self._pid, signal.SIGCONT)


@dataclass(slots=True)
class Slow:
    """Runs for 20 ms of every 100."""

    scene: Scene
    victim: str
    aboard: int = 0
    _times: int = 0
    _task: asyncio.Task[None] | None = None

    async def work(self) -> int:
        self.aboard = await self.scene.work_of(self.victim)
        return self.aboard

    async def strike(self) -> None:
        self._task = asyncio.create_task(self._stutter(), name=f"slow {self.victim}")

    async def _stutter(self) -> None:
        kept = self.scene.stack.kept[self.victim]
        while True:
            kept.signal(signal.SIGSTOP)
            try:
                await asyncio.sleep(0.08)
                self._times += kept.state == "T"
            finally:
                kept.signal(signal.SIGCONT)
            await asyncio.sleep(0.02)

    async def proof(self) -> str:
        return f"seen in state T {self._times} times, with {self.aboard} requests" if self._times > 5 else ""

    async def heal(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


@dataclass(slots=True)
class MidPull:
    """`inner` strikes a lender while what it sends waits in its cable's queue."""

    net: Namespaces
    inner: Kill | Freeze
    bits_per_s: int = 6_000_000
    _waiting_bytes: int = 0
    _limited: bool = False

    async def work(self) -> int:
        if not self._limited:
            await self.net.limit(self.inner.victim, self.bits_per_s)
            self._limited = True
        _, self._waiting_bytes = await self.net.limited(self.inner.victim)
        # Small messages wait for less than this: it is blocks that wait.
        return self._waiting_bytes if self._waiting_bytes > 16_000 and await self.inner.work() else 0

    async def strike(self) -> None:
        await self.inner.strike()

    async def proof(self) -> str:
        said = await self.inner.proof()
        return f"{self._waiting_bytes} bytes were in its cable; {said}" if said else ""

    async def heal(self) -> None:
        if self._limited:
            await self.net.unlimit(self.inner.victim)
            self._limited = False
        await self.inner.heal()


@dataclass(slots=True)
class Registry:
    """Redis, killed or frozen. No request waits for it, so any request is in its way."""

    scene: Scene
    kill: bool
    aboard: int = 0
    _pid: int | None = None

    async def work(self) -> int:
        self.aboard = len(self.scene.clients.in_flight)
        return self.aboard

    async def strike(self) -> None:
        self._pid = self.scene.stack.redis_pid()
        assert self._pid is not None, "there is no Redis"
        os.kill(self._pid, signal.SIGKILL if self.kill else signal.SIGSTOP)

    async def proof(self) -> str:
        pid, stack = self._pid, self.scene.stack
        if self.kill:
            back = await _until(lambda: stack.redis_pid() not in (None, pid))
            return f"pid {pid} during {self.aboard} requests, now pid {stack.redis_pid()}" if back else ""
        return f"pid {pid} in state T during {self.aboard} requests" if _state(pid) == "T" else ""

    async def heal(self) -> None:
        if self._pid is not None and not self.kill:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGCONT)


def _state(pid: int | None) -> str:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0]
    return "X"


# ---- the network -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class CutOneWay:
    scene: Scene
    net: Namespaces
    sender: str
    receiver: str
    aboard: int = 0
    _cut: str | None = None

    async def work(self) -> int:
        self.aboard = await _work_of_pair(self.scene, self.sender, self.receiver)
        return self.aboard

    async def strike(self) -> None:
        self._cut = await self.net.cut(self.sender, self.receiver)

    async def proof(self) -> str:
        assert self._cut is not None
        packets = await self.net.dropped(self.receiver, self._cut)
        return f"{packets} packets dropped, with {self.aboard} requests" if packets else ""

    async def heal(self) -> None:
        if self._cut is not None:
            await self.net.mend(self.receiver, self._cut)


@dataclass(slots=True)
class CableDown:
    scene: Scene
    net: Namespaces
    victim: str
    aboard: int = 0

    async def work(self) -> int:
        self.aboard = await self.scene.work_of(self.victim)
        return self.aboard

    async def strike(self) -> None:
        await self.net.set_cable(self.victim, False)

    async def proof(self) -> str:
        return "" if await self.net.cable_is_up(self.victim) else f"no carrier, with {self.aboard} requests"

    async def heal(self) -> None:
        await self.net.set_cable(self.victim, True)


@dataclass(slots=True)
class Limit:
    scene: Scene
    net: Namespaces
    victim: str
    bits_per_s: int
    aboard: int = 0
    _limited: bool = False

    async def work(self) -> int:
        self.aboard = await self.scene.work_of(self.victim)
        return self.aboard

    async def strike(self) -> None:
        await self.net.limit(self.victim, self.bits_per_s)
        self._limited = True

    async def proof(self) -> str:
        waited, _ = await self.net.limited(self.victim)
        return f"{waited} packets had to wait, with {self.aboard} requests" if waited else ""

    async def heal(self) -> None:
        if self._limited:
            await self.net.unlimit(self.victim)


@dataclass(slots=True)
class Lossy:
    """Both directions between two hosts run over the lossy link; `there` and `back` are its conditions."""

    scene: Scene
    net: Namespaces
    a: str
    b: str
    there: Conditions
    back: Conditions
    aboard: int = 0
    _before: dict[str, int] = field(default_factory=dict)
    _on: bool = False

    async def work(self) -> int:
        self.aboard = await _work_of_pair(self.scene, self.a, self.b)
        return self.aboard

    async def strike(self) -> None:
        lossy, (a, b) = self.scene.stack.lossy, self._addresses()
        assert lossy is not None
        await lossy.set(a, b, self.there)
        await lossy.set(b, a, self.back)
        self._before = await self._counters()
        await self.net.use_lossy(self.a, self.b, True)
        self._on = True

    async def proof(self) -> str:
        met = {name: n - self._before[name] for name, n in (await self._counters()).items()}
        told = ", ".join(f"{n} {name}" for name, n in met.items() if n)
        return f"{told}; with {self.aboard} requests" if met["packets"] else ""  # each was late at least

    async def heal(self) -> None:
        if self._on:
            await self.net.use_lossy(self.a, self.b, False)

    async def _counters(self) -> dict[str, int]:
        lossy, (a, b) = self.scene.stack.lossy, self._addresses()
        assert lossy is not None
        there, back = await lossy.counters(a, b), await lossy.counters(b, a)
        return {name: there[name] + back[name] for name in there}

    def _addresses(self) -> tuple[str, str]:
        return self.net.hosts[self.a].address, self.net.hosts[self.b].address


def bad_line(rng: random.Random) -> Conditions:
    return Conditions(
        delay_s=rng.choice((0.001, 0.01, 0.03)), jitter_s=rng.choice((0.0, 0.005, 0.02)),
        loss=rng.choice((0.01, 0.03, 0.08)), duplicate=rng.choice((0.0, 0.02)), corrupt=rng.choice((0.0, 0.01)),
    )


async def _work_of_pair(scene: Scene, a: str, b: str) -> int:
    """Requests that run over the connection between two hosts now."""
    routers = scene.stack.plan.routers
    for router, worker in ((a, b), (b, a)):
        if router in routers:
            return await scene.requests_between(router, worker)
    return min(await scene.work_of(a), await scene.work_of(b))
