"""The system under test: routers, workers and a registry as processes of their own, started by the same entries as in
production, each on a host of its own and kept alive by a supervisor (chaos/kept.py).

Owns the processes and the hosts. Does not know faults or clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import random
import socket
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from baton.chaos.kept import Kept, Program
from baton.chaos.lossy import LossyControl
from baton.chaos.netns import Host, Namespaces, open_namespaces, sweep, why_no_namespaces
from baton.chaos.plan import Plan
from baton.cluster.embedded import EmbeddedRedis, start_embedded_redis
from baton.cluster.pool import WorkerSpec
from baton.cluster.processes import family_of
from baton.core.errors import BatonError, PeerLost, SetupError
from baton.core.messages import WorkerStatus
from baton.core.worker import Role, WorkerInfo
from baton.models.catalog import open_model
from baton.wire import codec
from baton.wire.admin_pb2 import FleetStatus, RequestTrace
from baton.wire.admin_pb2 import WorkerState as WireState
from baton.wire.client import GrpcAdmin, GrpcDial

START_TIMEOUT_S = 120.0
ASK_TIMEOUT_S = 1.0
POLL_S = 0.05
PREFILL_ENTRY = "baton.prefill_node.server:serve"


@dataclass(frozen=True, slots=True)
class Endpoints:
    http: str
    """http://host:port"""
    grpc: str
    """host:port"""


@dataclass(slots=True)
class Stack:
    """Built by `open_stack`."""

    plan: Plan
    kept: dict[str, Kept]
    endpoints: dict[str, Endpoints]
    """Of each router; the same after a restart."""
    redis: EmbeddedRedis
    dial: GrpcDial
    admins: dict[str, GrpcAdmin]
    net: Namespaces | None = None
    lossy: LossyControl | None = None
    left_out: tuple[str, ...] = ()
    """What this machine does not allow, and why."""
    _infos: dict[str, WorkerInfo] = dataclasses.field(default_factory=dict)

    # ---- looking ---------------------------------------------------------------------------------------------------

    async def fleet(self, router: str) -> FleetStatus:
        """As this router sees it. Raises BatonError if it does not answer."""
        return await self.admins[router].status(ASK_TIMEOUT_S)

    async def trace(self, router: str, request_id: str) -> RequestTrace:
        return await self.admins[router].trace(request_id, ASK_TIMEOUT_S)

    async def worker(self, name: str) -> WorkerStatus:
        """What a worker says of itself, asked directly. Raises BatonError if it does not answer."""
        info = self._infos.get(name)
        if info is not None:
            with contextlib.suppress(BatonError):
                return await self.dial(info).status(ASK_TIMEOUT_S)
        for router in self.plan.routers:
            with contextlib.suppress(BatonError):
                for seen in (await self.fleet(router)).workers:
                    found = codec.INFO.decode(seen.info)
                    self._infos[found.worker_id] = found
                break
        fresh = self._infos.get(name)
        if fresh is None or fresh == info:
            raise PeerLost(f"{name} does not answer")
        return await self.dial(fresh).status(ASK_TIMEOUT_S)

    async def is_ready(self, name: str, calm: set[str]) -> bool:
        """A router: it answers, and each calm worker is ready for it. A worker: it is ready for each calm router, in
        the incarnation that runs."""
        if name in self.kept and not self.kept[name].serving.is_set():
            return False
        try:
            if name in self.plan.routers:
                ready = {w.info.worker_id for w in (await self.fleet(name)).workers if w.state == WireState.READY}
                return calm & {*self.plan.prefills, *self.plan.decodes} <= ready
            status = await self.worker(name)
            for router in calm & set(self.plan.routers):
                seen = {w.info.worker_id: w for w in (await self.fleet(router)).workers}.get(name)
                boot = status.info.boot_id
                if seen is None or seen.state != WireState.READY or seen.info.boot_id != boot:
                    return False
        except BatonError:
            return False
        return True

    async def until_ready(self, name: str, calm: Callable[[], set[str]], timeout_s: float) -> bool:
        """`calm`, the hosts that nothing disturbs, is asked anew at each look: a fault may come upon one meanwhile."""
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + timeout_s
        while loop.time() < give_up_s:
            if await self.is_ready(name, calm()):
                return True
            await asyncio.sleep(POLL_S)
        return False

    def redis_pid(self) -> int | None:
        """The server itself, not its watchdog."""
        for pid in family_of({os.getpid()}):
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if command[0].endswith((b"valkey-server", b"redis-server")) or b"-server " in command[0]:
                    return pid
        return None


@contextlib.asynccontextmanager
async def open_stack(plan: Plan, logs: Path) -> AsyncIterator[Stack]:
    """Everything serves and every worker is ready for every router when it is given out; gone afterwards."""
    async with contextlib.AsyncExitStack() as opened:
        names = (*plan.routers, *plan.prefills, *plan.decodes)
        missing = await why_no_namespaces() if plan.use_namespaces else "not asked for"
        net: Namespaces | None = None
        lossy: LossyControl | None = None
        left_out = [f"network namespaces and all faults of the network: {missing}"] if missing else []
        hosts = {name: Host(name) for name in names}
        if missing is None:
            await sweep()
            net = await open_namespaces(names)
            opened.push_async_callback(net.close)
            hosts = net.hosts
            if net.has_lossy_link():
                lossy = await LossyControl.start(plan.seed, {h.address: h.namespace or "" for h in hosts.values()})
                opened.push_async_callback(lossy.close)
            else:
                left_out.append("the lossy link: no /dev/net/tun")
        redis = await start_embedded_redis()
        opened.push_async_callback(redis.close)
        processes = [await prepared(plan, hosts[name], redis.url, logs) for name in names]
        stack = await stack_around(plan, processes, redis, opened)
        stack.net, stack.lossy, stack.left_out = net, lossy, tuple(left_out)
        yield stack
        await asyncio.gather(*(one.stop() for one in stack.kept.values()))


async def stack_around(
    plan: Plan, processes: list[tuple[Kept, Endpoints | None]], redis: EmbeddedRedis, opened: contextlib.AsyncExitStack
) -> Stack:
    """Start these processes; when this returns, every router and worker of the plan is ready. `opened` stops all."""
    kept = {one.name: one for one, _ in processes}
    for one in kept.values():
        opened.push_async_callback(one.stop)
    async with asyncio.TaskGroup() as starts:
        for one in kept.values():
            starts.create_task(one.start(START_TIMEOUT_S))
    dial = GrpcDial()
    opened.push_async_callback(dial.close)
    endpoints = {one.name: endpoint for one, endpoint in processes if endpoint is not None}
    admins = {name: GrpcAdmin(endpoint.grpc) for name, endpoint in endpoints.items()}
    for admin in admins.values():
        opened.push_async_callback(admin.close)
    stack = Stack(plan, kept, endpoints, redis, dial, admins)
    everybody = (*plan.routers, *plan.prefills, *plan.decodes)
    for name in everybody:
        if not await stack.until_ready(name, lambda: set(everybody), START_TIMEOUT_S):
            raise SetupError(f"{name} never was ready for every router")
    return stack


async def prepared(plan: Plan, host: Host, redis_url: str, logs: Path) -> tuple[Kept, Endpoints | None]:
    """A process of the plan, by its host's name, not started; of a router also where it will be."""
    log = logs / f"{host.name}.log"
    if host.name not in plan.routers:
        words = (sys.executable, "-m", "baton.cluster.local_child", str(os.getpid()), "{fd}")
        spec = json.dumps(dataclasses.asdict(worker_spec(plan, host, redis_url))).encode()
        return Kept(host.name, host, Program(words, spec), log), None
    ports = (8000, 8001) if host.namespace else _free_ports(random.Random(f"{os.getpid()} {host.name}"))
    config = plan.config(host.address, *ports)
    files = await asyncio.to_thread(open_model, config.model)
    router = (
        sys.executable, "-m", "baton.cli.router_child", str(os.getpid()), "--config-json", config.model_dump_json(),
        "--model-dir", str(files.directory), "--redis-url", redis_url,
    )
    endpoint = Endpoints(f"http://{host.address}:{ports[0]}", f"{host.address}:{ports[1]}")
    return Kept(host.name, host, Program(router), log), endpoint


def worker_spec(plan: Plan, host: Host, redis_url: str) -> WorkerSpec:
    role, entry = (Role.PREFILL, PREFILL_ENTRY) if host.name in plan.prefills else (Role.DECODE, plan.decode_entry)
    return WorkerSpec(host.name, role, entry, plan.config(host.address).model_dump_json(), redis_url, 1)


def _free_ports(rng: random.Random) -> tuple[int, int]:
    """Nobody listens on them now; a router takes the same ones at each of its starts. Below those that the kernel deals
    out to connections, which would take them while the router is down."""
    free: list[int] = []
    while len(free) < 2:
        port = rng.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            free.append(port)
    return free[0], free[1]
