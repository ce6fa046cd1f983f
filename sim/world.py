"""The deterministic world: 2 prefill workers, 3 decode workers and a router, all production code, on virtual time.

Owns the machines, the clients, and when a run is over. The workload, the faults and the oracle are handed in or drawn
from the seed: a seed is all there is to a run.

Life of a run: machines start -> clients come, in waves, until every fault has landed in the middle of work -> faults
heal -> the world falls quiet -> nothing may be held -> everything stops in order -> no task may be left.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass, field
from typing import TextIO

from baton.core.config import Config, load
from baton.core.errors import BatonError
from baton.core.metrics import Metrics
from baton.core.worker import Role
from baton.engine.hash_runner import StepCosts
from baton.router.dispatch import Dispatcher
from baton.router.fleet import Fleet
from baton.router.policy import CostPolicy
from baton.sim.faults import Fault, draw_faults
from baton.sim.loop import SimLoop, SimProcess
from baton.sim.machine import Builders, Machine, SimRegistry, Site, Terms
from baton.sim.network import Conditions, SimNetwork
from baton.sim.oracle import Oracle, OracleFailure, Record, require
from baton.sim.trace import Trace
from baton.sim.transport import Fabric, WireSpeed
from baton.sim.workload import Job, Shape, Workload

ROUTER = "router"
WAVE_JOBS = 20
MORE_JOBS = 8
"""Further clients per wave while a fault has not found its moment."""
MAX_WAVES = 12
QUIET_S = 14.0
"""Nothing holds a block for longer than this after the last client: leases, quarantine and back-off all end before."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a seed decides before the first turn; a test may decide parts of it."""

    terms: Terms
    shape: Shape
    faults: tuple[Fault, ...]
    num_prefill: int = 2
    num_decode: int = 3
    num_jobs: int = WAVE_JOBS
    builders: Builders = field(default_factory=Builders)


def draw_plan(seed: int) -> Plan:
    rng = random.Random(f"plan {seed}")
    block_size = rng.choice((2, 3, 4))
    max_model_len = 48
    longest = -(-max_model_len // block_size)
    num_blocks = {
        Role.PREFILL: longest + rng.randint(0, 2 * longest),
        Role.DECODE: longest + rng.randint(0, 2 * longest),
    }
    chunk = rng.choice((block_size, 2 * block_size, 16))
    config = load({}, [
        f"handoff.lease_ttl_s={rng.choice((0.2, 1, 3))}", "handoff.pull_timeout_s=1", "handoff.alive_interval_s=0.2",
        "handoff.peer_timeout_s=1", "handoff.release_timeout_s=0.5", "handoff.quarantine_max_s=4",
        "handoff.probe_bytes=256", f"handoff.quarantine_cap={rng.choice((0.1, 0.5, 1.0))}",
        f"router.local_prefill_max_tokens={rng.choice((0, 0, 2, 8))}", "router.max_attempts=8",
        f"prefill.max_chunk_tokens={chunk}", "prefill.max_step_tokens=24", "prefill.max_sequences=6",
        f"decode.max_chunk_tokens={chunk}", "decode.max_step_tokens=16", "decode.max_sequences=8",
    ])
    conditions = Conditions(delay_s=rng.choice((0.0002, 0.002, 0.01)), loss=rng.choice((0.0, 0.01, 0.04)))
    speed = WireSpeed(bytes_per_s=rng.choice((2e4, 1e5, 5e5)), late_s=rng.uniform(1.0, 8.0))
    costs = StepCosts(per_token_s=rng.choice((0.0008, 0.005)))
    terms = Terms(block_size, max_model_len, num_blocks, config, costs, conditions, speed)
    shape = Shape(max_model_len=max_model_len, mean_gap_s=rng.choice((0.005, 0.02, 0.08)))
    return Plan(terms, shape, draw_faults(rng))


class World:
    """`run` is the whole life; everything else is for faults and tests to look at and act on."""

    def __init__(self, loop: SimLoop, plan: Plan, out: TextIO | None = None) -> None:
        self.loop = loop
        self.plan = plan
        self.trace = Trace(loop.time, out)
        self.rng = loop.fork("faults")
        self.network = SimNetwork(loop, self.trace, plan.terms.conditions)
        self.fabric = Fabric(loop, self.trace, plan.terms.speed)
        self.fabric.reaches = self.network.reaches
        self.registry = SimRegistry()
        self.oracle = Oracle(plan.terms.max_model_len)
        self.site = Site(loop, self.trace, self.network, self.fabric, self.registry, self.fail)
        self.machines = {m.worker_id: m for m in (
            *(self._machine(f"prefill-{i}", Role.PREFILL) for i in range(plan.num_prefill)),
            *(self._machine(f"decode-{i}", Role.DECODE) for i in range(plan.num_decode)),
        )}
        self.router = SimProcess(loop, ROUTER)
        self.dispatcher: Dispatcher | None = None
        self.metrics = Metrics()
        self.over = False
        """The last client has ended: faults that still wait for a moment give up."""
        self._failures: list[str] = []
        self._clients: list[asyncio.Task[None]] = []
        self._workload = Workload(loop.fork("workload"), plan.shape)

    @property
    def config(self) -> Config:
        return self.plan.terms.config

    def of(self, role: Role) -> list[Machine]:
        """Machines of a role that run: neither dead nor frozen."""
        return [m for m in self.machines.values() if m.role is role and m.alive and m.process and m.process.running]

    def fail(self, message: str) -> None:
        """A failure found where raising would not end the run."""
        self._failures.append(message)

    # ---- the run -------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Raises OracleFailure at the first thing that must not happen."""
        self.loop.on_turn = self._watch
        for machine in self.machines.values():
            machine.start()
        routing = self.router.spawn(self._route(), "fleet")
        await asyncio.sleep(2.0)
        faults = [asyncio.ensure_future(self._inflict(f)) for f in self.plan.faults]
        await self._serve()
        self.over = True
        await asyncio.wait_for(asyncio.gather(*faults), 120.0)
        await asyncio.sleep(QUIET_S)
        self._check_quiet()
        await self._stop(routing)

    async def _serve(self) -> None:
        num_jobs = self.plan.num_jobs
        for _ in range(MAX_WAVES):
            for job in self._workload.wave(num_jobs, self.loop.time()):
                self._clients.append(self.router.spawn(self._client(job), job.request.request_id))
            done, late = await asyncio.wait(self._clients, timeout=600.0)
            require(not late, f"{len(late)} clients still wait: {[t.get_name() for t in late]}")
            for client in self._clients:
                client.result()
            self._clients.clear()
            if all(f.landed for f in self.plan.faults):
                return
            num_jobs = MORE_JOBS
            await asyncio.sleep(1.0)  # a fault may be in the middle of its strike

    async def _inflict(self, fault: Fault) -> None:
        await asyncio.sleep(self.rng.uniform(0.0, 1.0))
        while not (fault.landed or self.over):
            await fault.inflict(self)
        self.trace.note("fault", fault.name, fault.evidence)

    async def _route(self) -> None:
        fleet = Fleet(self.registry.list, self.network.dial(ROUTER), self.config, self.metrics, ROUTER)
        policy = CostPolicy(self.config.router, random.Random(f"policy {self.loop.seed}"))
        self.dispatcher = Dispatcher(fleet, policy, self.config, self.metrics)
        await fleet.run()

    async def _client(self, job: Job) -> None:
        await asyncio.sleep(max(0.0, job.arrival_s - self.loop.time()))
        assert self.dispatcher is not None
        record = self.oracle.begins(job, self.loop.time())
        name = job.request.request_id
        self.trace.note(name, "asks", len(job.request.prompt), job.request.sampling.max_tokens)
        chunks = self.dispatcher.generate(job.request)
        try:
            async with asyncio.timeout(job.cancel_after_s):
                await self._read(record, chunks)
        except TimeoutError:
            record.left = True
        except BatonError as e:
            record.error = e
        finally:
            await chunks.aclose()
        self.trace.note(name, "ends", record.outcome, *record.tokens)
        self.oracle.ends(record, self.loop.time())

    async def _read(self, record: Record, chunks: AsyncGenerator[object, None]) -> None:
        job = record.job
        async for chunk in chunks:
            self.oracle.chunk(record, chunk)  # type: ignore[arg-type]
            if job.cancel_after_tokens is not None and len(record.tokens) >= job.cancel_after_tokens:
                if record.finish is None:
                    record.left = True
                return
            await asyncio.sleep(job.read_delay_s)

    # ---- the end -------------------------------------------------------------------------------------------------

    def _watch(self, ran: Iterable[SimProcess]) -> None:
        """After every turn of the loop: blocks move only in a worker's own process."""
        if self._failures:
            raise OracleFailure(self._failures[0])
        machines = [self.machines[p.name] for p in ran if p is not self.router]
        self.oracle.turn([m.node for m in machines if m.node is not None])

    def _check_quiet(self) -> None:
        for machine in self.machines.values():
            require(machine.alive and machine.node is not None, f"{machine.worker_id} was not started again")
            assert machine.node is not None
            self.oracle.quiet(machine.node)
        assert self.dispatcher is not None
        require(self.dispatcher.num_inflight == 0, f"the router still has {self.dispatcher.num_inflight} requests")

    async def _stop(self, routing: asyncio.Task[None]) -> None:
        routing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await routing
        for machine in self.machines.values():
            await machine.stop()
        await asyncio.sleep(2.0)
        self.trace.note("world", "ends", self.loop.num_turns)
        self.loop.on_turn = None
        left = [t for t in self.loop.tasks() if t.process is not None]
        require(not left, "tasks are left after an orderly stop:\n" + self.loop.describe())
        gc.collect(0)  # the collector is off during a run: all of its objects are young
        require(not self.loop.problems, f"nobody took these: {self.loop.problems}")

    def _machine(self, worker_id: str, role: Role) -> Machine:
        return Machine(self.site, self.plan.terms, worker_id, role, self.plan.builders)

