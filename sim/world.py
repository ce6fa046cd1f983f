"""The deterministic world: routers, prefill and decode workers, all production code, on virtual time.

Owns the hosts, the clients, and when a run is over. The workload, the faults and the oracle are handed in or drawn
from the seed: a seed is all there is to a run.

Life of a run: hosts start -> clients come, in waves, until every fault has landed in the middle of work -> faults
heal -> a request through each router is served at once -> the world falls quiet -> nothing may be held -> everything
stops in order -> no task may be left.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
from collections.abc import AsyncGenerator, Iterable
from typing import TextIO

from baton.core.config import Config
from baton.core.errors import BatonError, PeerLost
from baton.core.messages import TokenChunk
from baton.core.request import Request, SamplingParams
from baton.core.step import Step
from baton.core.worker import Role
from baton.models.hash_model import VOCABULARY
from baton.router.link import WorkerState
from baton.sim.loop import SimLoop, SimProcess
from baton.sim.machine import Machine, Site
from baton.sim.network import SimNetwork
from baton.sim.oracle import Oracle, OracleFailure, Record, asked_as, require
from baton.sim.plan import Plan
from baton.sim.registry import SimRegistry
from baton.sim.router_host import RouterHost
from baton.sim.trace import Trace
from baton.sim.transport import Fabric
from baton.sim.workload import Job, Workload

MORE_JOBS = 8
"""Further clients per wave while a fault has not found its moment."""
MAX_WAVES = 12
READY_S = 20.0
"""By then every router knows every worker."""
MEET_S = 2.0
"""By then workers have measured the ways to their peers, if nothing is lost."""
RESTART_S = 0.5
"""A worker that a request crashed is up again after this."""
HEAL_S = 5.0
"""After the last fault: routers dial again (back-off up to 2 s), keep-alive ends what a cut link held."""
PROBE_S = 6.0
"""Then a request takes no longer than this: the longest one on the slowest wire takes 2.5 s."""
QUIET_S = 14.0
"""Nothing holds a block for longer than this after the last client: leases, quarantine and back-off all end before."""


class World:
    """`run` is the whole life; everything else is for faults and tests to look at and act on."""

    def __init__(self, loop: SimLoop, plan: Plan, out: TextIO | None = None) -> None:
        self.loop = loop
        self.plan = plan
        self.trace = Trace(lambda: loop.now, out)
        self.network = SimNetwork(loop, self.trace, plan.terms.conditions)
        self.fabric = Fabric(loop, self.trace, plan.terms.speed)
        self.fabric.reaches = lambda a, b: self.network.reaches(a, b) and self.network.reaches(b, a)
        self.registry = SimRegistry(self.network)
        self.oracle = Oracle(plan.terms.config, plan.terms.max_model_len, lambda: self.network.longest_delay_s)
        self.site = Site(loop, self.trace, self.network, self.fabric, self.registry,
                         failed=self.fail, cut_off=self._cut_off, dies_of=self._dies_of)
        self.machines = {m.worker_id: m for m in (
            *(self._machine(f"prefill-{i}", Role.PREFILL) for i in range(plan.num_prefill)),
            *(self._machine(f"decode-{i}", Role.DECODE) for i in range(plan.num_decode)),
        )}
        self.routers = {f"router-{i}": RouterHost(self.site, self.config, f"router-{i}", self.oracle.accounted)
                        for i in range(plan.num_routers)}
        kept = range(len(plan.faults)) if plan.kept_faults is None else plan.kept_faults
        self.faults = {i: fault for i, fault in enumerate(plan.faults) if i in kept}
        self.poison: set[str] = set()
        """Requests that crash every worker that computes them."""
        self.over = False
        """The last client has ended: faults that still wait for a moment give up."""
        self._failures: list[str] = []
        self._reading: dict[str, asyncio.Task[None]] = {}
        """By request id: clients whose calls are open."""
        self._workload = Workload(loop.fork("workload"), plan.shape)
        self._num_jobs = 0

    @staticmethod
    def is_drawn(request_id: str) -> bool:
        """Asked by a client of the workload."""
        return request_id.startswith("q")

    @property
    def config(self) -> Config:
        return self.plan.terms.config

    def of(self, role: Role) -> list[Machine]:
        """Machines of a role that run: neither dead nor frozen."""
        return [m for m in self.machines.values() if m.role is role and m.alive and m.process and m.process.running]

    def running_routers(self) -> list[RouterHost]:
        return [r for r in self.routers.values() if r.process is not None and r.process.running and r.dispatcher]

    def kill(self, machine: Machine, silent: bool) -> None:
        """kill -9 of a worker, or (`silent`) the whole machine is off."""
        if machine.node is not None:
            # Off, it only falls silent: nobody counts that as a crash, until its next boot shows that it was one.
            aboard = {asked_as(s.request_id) for s in machine.node.parts.scheduler.sequences()} if not silent else ()
            self.oracle.crashed(machine.node.info.boot_id, sorted(aboard))
        machine.kill(silent)

    def _cut_off(self, boot_id: str) -> None:
        self.oracle.crashed(boot_id, ())

    def _dies_of(self, worker_id: str, step: Step) -> bool:
        if not any(asked_as(chunk.request_id) in self.poison for chunk in step.chunks):
            return False
        machine = self.machines[worker_id]
        self.kill(machine, silent=False)
        self.loop.at(self.loop.now + RESTART_S, machine.start)
        return True

    def fail(self, message: str) -> None:
        """A failure found where raising would not end the run."""
        self._failures.append(message)

    # ---- the run -------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Raises OracleFailure at the first thing that must not happen."""
        self.loop.on_turn = self._watch
        for machine in self.machines.values():
            machine.start()
        for router in self.routers.values():
            router.start()
        await self._until_ready()
        faults = [asyncio.ensure_future(self._inflict(i)) for i in self.faults]
        await self._serve()
        self.over = True
        await asyncio.wait_for(asyncio.gather(*faults), 120.0)
        await asyncio.sleep(HEAL_S)
        await self._probe()
        await asyncio.sleep(QUIET_S)
        self._check_quiet()
        await self._stop()

    async def _until_ready(self) -> None:
        deadline = self.loop.now + READY_S
        while not all(r.fleet and self._knows_all(r) for r in self.routers.values()):
            require(self.loop.now < deadline, f"after {READY_S} s some router does not know every worker")
            await asyncio.sleep(0.05)
        await asyncio.sleep(max(0.0, MEET_S - self.loop.now))

    def _knows_all(self, router: RouterHost) -> bool:
        assert router.fleet is not None
        ready = [w for w in router.fleet.workers() if w.state is WorkerState.READY]
        return len(ready) == len(self.machines)

    async def _serve(self) -> None:
        num_jobs = self.plan.num_jobs
        for _ in range(MAX_WAVES):
            if self.plan.kept_jobs is not None:
                num_jobs = min(num_jobs, self.plan.kept_jobs - self._num_jobs)
            await self._wave(self._workload.wave(num_jobs, self.loop.now))
            self._num_jobs += num_jobs
            if all(f.landed for f in self.faults.values()) or self._num_jobs == self.plan.kept_jobs:
                return
            num_jobs = MORE_JOBS
            await asyncio.sleep(1.0)  # a fault may be in the middle of its strike

    async def _wave(self, jobs: Iterable[Job]) -> None:
        clients = [asyncio.ensure_future(self.client(job)) for job in jobs]
        if not clients:
            return
        _, late = await asyncio.wait(clients, timeout=600.0)
        require(not late, f"{len(late)} clients still wait: {sorted(self._reading)}")
        for client in clients:
            client.result()

    async def _inflict(self, index: int) -> None:
        fault, rng = self.faults[index], self.loop.fork(f"fault {index}")
        await asyncio.sleep(rng.uniform(0.0, 1.5))
        while not (fault.landed or self.over):
            await fault.inflict(self, rng)
        self.trace.note("fault", fault.name, fault.evidence)

    # ---- clients -------------------------------------------------------------------------------------------------

    async def client(self, job: Job, router: RouterHost | None = None) -> Record:
        """One client's whole life; `router`: where it goes, if not to the one that it draws."""
        await asyncio.sleep(max(0.0, job.arrival_s - self.loop.now))
        while router is None:
            up = [r for r in self.routers.values() if r.alive]
            router = up[int(job.router * len(up))] if up else None
            if router is None:
                await asyncio.sleep(0.1)
        name = job.request.request_id
        record = self.oracle.begins(job, self.loop.now, router.trouble_between)
        self.trace.note(name, "asks", router.name, len(job.request.prompt), job.request.sampling.max_tokens)
        last_seen: str | None = None
        while await self._converse(record, router, last_seen):
            others = self.running_routers()
            while not others:
                await asyncio.sleep(0.1)
                others = self.running_routers()
            router, last_seen = others[int(job.router * len(others))], record.last_seen
            record.error, record.heard, record.over = None, {}, set()
            self.trace.note(name, "resumes", router.name, last_seen)
        tokens = (t.token_id for seen in record.choices.values() for t in seen.tokens)
        self.trace.note(name, "ends", record.outcome, *tokens)
        self.oracle.ends(record, self.loop.now)
        return record

    async def _converse(self, record: Record, router: RouterHost, last_seen: str | None) -> bool:
        """Over one connection. True: the router is lost, and the client wants to read on."""
        job, name, boots = record.job, record.request_id, router.boots
        left_s = job.request.deadline_s - (self.loop.now - record.started_s)
        request = dataclasses.replace(job.request, deadline_s=max(left_s, 0.001))
        chunks = self.network.ask(_host_of(name), router.name, "generate", request=request, last_seen=last_seen)
        try:
            async with asyncio.timeout(job.cancel_after_s):
                self._reading[name] = asyncio.ensure_future(self._read(record, chunks, router))
                await asyncio.wait([self._reading[name]])
                await self._reading[name]
        except (TimeoutError, asyncio.CancelledError):
            record.left = True
        except BatonError as e:
            record.error = e
        finally:
            reading = self._reading.pop(name)
            reading.cancel()
            await asyncio.wait([reading])
            await chunks.aclose()
        is_lost = router.boots != boots or not router.alive
        record.router_lost |= is_lost
        return is_lost and job.resumes and left_s > 0 and isinstance(record.error, PeerLost)

    async def _read(self, record: Record, chunks: AsyncGenerator[TokenChunk, None], router: RouterHost) -> None:
        job = record.job
        async for chunk in chunks:
            self.oracle.chunk(record, chunk)
            if router.dispatcher is not None:
                record.last_seen = router.dispatcher.whereabouts(record.request_id) or record.last_seen
            if job.cancel_after_tokens is not None and record.num_tokens >= job.cancel_after_tokens:
                record.left = not record.is_answered
                return
            await asyncio.sleep(job.read_delay_s)

    def reading_clients(self) -> list[str]:
        """Requests whose clients wait for tokens now."""
        return list(self._reading)

    def vanish(self, request_id: str) -> None:
        """Its client's machine is switched off."""
        self.network.crash(_host_of(request_id), silent=True)
        self._reading[request_id].cancel()

    # ---- the end -------------------------------------------------------------------------------------------------

    def _watch(self, ran: Iterable[SimProcess]) -> None:
        """After every turn of the loop: blocks move only in a worker's own process."""
        if self._failures:
            raise OracleFailure(self._failures[0])
        self.oracle.turn([self.machines[p.name] for p in ran if p.name in self.machines], self.loop.now)

    async def _probe(self) -> None:
        """Whatever happened before: now every router serves at once."""
        rng = self.loop.fork("probe")
        jobs = []
        for name in self.routers:
            prompt = tuple(rng.randrange(VOCABULARY) for _ in range(self.plan.terms.max_model_len // 3))
            sampling = SamplingParams(max_tokens=4, ignore_eos=True)
            request = Request(f"probe-{name}", prompt, sampling, deadline_s=PROBE_S)
            jobs.append(self.client(Job(self.loop.now, request), self.routers[name]))
        for record in await asyncio.gather(*jobs):
            require(record.is_answered, f"healed {HEAL_S} s ago, {record.request_id} failed: {record.error!r}")

    def _check_quiet(self) -> None:
        for machine in self.machines.values():
            require(machine.alive and machine.node is not None, f"{machine.worker_id} was not started again")
            assert machine.node is not None
            self.oracle.quiet(machine.node)
        for router in self.routers.values():
            require(router.alive, f"{router.name} was not started again")
            require(router.num_requests == 0, f"{router.name} still has {router.num_requests} requests")
        self.oracle.books_balance()

    async def _stop(self) -> None:
        for router in self.routers.values():
            await router.stop()
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


def _host_of(request_id: str) -> str:
    return f"client-{request_id}"
