"""One simulated worker machine: production worker code in a process that can be killed, frozen and started again.

Owns what `worker/assembly.py` owns on a real machine: it builds a node, here on the simulated runner, transport and
network. Does not know faults or clients.

Life: started (a new boot id, empty memory) -> listens, registers -> killed, or stopped in order -> started again.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from baton.core.block_hash import HashScope
from baton.core.config import Config
from baton.core.layout import Capability
from baton.core.metrics import Metrics
from baton.core.step import Step, StepResult
from baton.core.worker import Role, WorkerInfo
from baton.decode_node.policy import decode_policy
from baton.engine.block_pool import BlockPool
from baton.engine.hash_runner import HashRunner, StepCosts
from baton.engine.scheduler import Scheduler
from baton.kv_transfer.lease import LeaseTable
from baton.kv_transfer.memory import KVMemory
from baton.kv_transfer.puller import Puller
from baton.models.hash_model import EOS, NUMERICS, layout
from baton.prefill_node.policy import prefill_policy
from baton.sim.loop import SimLoop, SimProcess
from baton.sim.network import Conditions, SimNetwork
from baton.sim.provenance import Provenance
from baton.sim.registry import SimRegistry
from baton.sim.trace import Trace
from baton.sim.transport import Fabric, Lender, SimTransport, WireSpeed
from baton.worker.node import NodeParts, WorkerNode
from baton.worker.registration import serve_registered

STOP_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Terms:
    """What all machines of a world have in common."""

    block_size: int
    max_model_len: int
    num_blocks: dict[Role, int]
    config: Config
    costs: StepCosts = field(default_factory=StepCosts)
    conditions: Conditions = field(default_factory=Conditions)
    speed: WireSpeed = field(default_factory=WireSpeed)


@dataclass(frozen=True, slots=True)
class Builders:
    """The parts of production that a test may replace by a broken one, to see the oracle catch it."""

    puller: Callable[..., Puller] = Puller
    leases: Callable[..., LeaseTable] = LeaseTable
    pool: Callable[[int, int], BlockPool] = BlockPool


@dataclass(frozen=True, slots=True)
class Site:
    """Where machines stand: the wires, the registry, the log."""

    loop: SimLoop
    trace: Trace
    network: SimNetwork
    fabric: Fabric
    registry: SimRegistry
    failed: Callable[[str], None]
    """Called when a worker's process ended by a bug."""
    cut_off: Callable[[str], None] = lambda boot_id: None
    """Called when a boot stopped in order and somebody could not be told: to him it crashed."""
    dies_of: Callable[[str, Step], bool] = lambda worker_id, step: False
    """Asked before a worker executes a step. True: it is dead now."""
    num_computed: Counter[str] = field(default_factory=Counter)
    """Tokens that went through an engine, by sequence."""


class _WatchedRunner(HashRunner):
    """Says in the trace what it executed, and to the oracle which blocks it read and wrote."""

    def __init__(
        self, memory: KVMemory, terms: Terms, scheduler: Scheduler, provenance: Provenance, site: Site
    ) -> None:
        super().__init__(memory.buffer, layout(terms.block_size), terms.costs)
        self._scheduler, self._block_size = scheduler, terms.block_size
        self._provenance, self._site = provenance, site
        self._taken: dict[asyncio.Task[StepResult], float] = {}

    def execute(self, step: Step, on_layers: Callable[[int], None] | None = None) -> asyncio.Task[StepResult]:
        task = super().execute(step, on_layers)
        self._taken[task] = self._site.loop.now
        task.add_done_callback(self._taken.__delitem__)
        return task

    @property
    def began_s(self) -> float:
        """World time since when the runner has had the oldest step that is not done; now, if it has none."""
        return min(self._taken.values(), default=self._site.loop.now)

    async def _compute(self, step: Step, on_layers: Callable[[int], None] | None) -> StepResult:
        site, size, marks, written = self._site, self._block_size, self._provenance, []
        if site.dies_of(marks.worker_id, step):
            await site.loop.create_future()
        tenants = {s.request_id: s.request.tenant for s in self._scheduler.sequences()}
        for chunk in step.chunks:
            tenant, first = tenants[chunk.request_id], chunk.start // size
            if "." in chunk.request_id and chunk.start % size:
                marks.forked(chunk.block_table[first], tenant)
            for block in chunk.block_table[: -(-chunk.start // size)]:
                marks.reads(block, tenant)
            blocks = chunk.block_table[first : -(-chunk.end // size)]
            written.append((tenant, [(b, marks.begins_writing(b)) for b in blocks]))
        result = await super()._compute(step, on_layers)
        for tenant, blocks_written in written:
            for block, generation in blocks_written:
                marks.wrote(block, generation, tenant)
        for chunk in step.chunks:
            site.num_computed[chunk.request_id] += len(chunk.token_ids)
        chunks = " ".join(f"{c.request_id}[{c.start}:{c.end}]" for c in step.chunks)
        site.trace.note(marks.worker_id, "step", step.step_id, chunks)
        return result


class Machine:
    def __init__(self, site: Site, terms: Terms, worker_id: str, role: Role, builders: Builders) -> None:
        self.worker_id = worker_id
        self.role = role
        self.boots = 0
        self.process: SimProcess | None = None
        self.node: WorkerNode | None = None
        self.runner: _WatchedRunner | None = None
        self.metrics: list[Metrics] = []
        """One per boot."""
        self.thawed_s = 0.0
        """World time when it last woke up; what is late then is not late by its own fault."""
        self._site = site
        self._terms = terms
        self._builders = builders
        self._main: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return self.worker_id

    @property
    def alive(self) -> bool:
        return self.process is not None and not self.process.dead and self.node is not None

    @property
    def num_requests(self) -> int:
        """Sequences that run or wait on this machine."""
        if not self.alive or self.node is None:
            return 0
        load = self.node.load()
        return load.num_running + load.num_waiting

    @property
    def steps(self) -> int:
        return self.node.load().steps if self.node is not None else 0

    def start(self) -> None:
        assert not self.alive, f"{self.worker_id} is running"
        self.boots += 1
        origin_s = clock_origin(self._site.loop, self.worker_id, self.boots)
        self.process = SimProcess(self._site.loop, self.worker_id, origin_s)
        self._site.trace.note(self.worker_id, "start", self.boots)
        self._main = self.process.spawn(self._run(self.process), f"{self.worker_id} boot {self.boots}")
        self._main.add_done_callback(self._on_end)

    def kill(self, silent: bool) -> None:
        """kill -9, or (`silent`) the whole machine is off."""
        assert self.process is not None
        self.process.kill()
        self.node = None
        self._site.network.crash(self.worker_id, silent)
        self._site.fabric.crash(self.worker_id, silent)

    def freeze(self) -> None:
        assert self.process is not None
        self.process.freeze()
        self._site.trace.note(self.worker_id, "freezes")

    def thaw(self) -> None:
        assert self.process is not None
        self.process.thaw()
        self.thawed_s = self._site.loop.now

    async def stop(self) -> bool:
        """SIGTERM: the node drains and ends in order, and no task of it may be left. False: it died on the way."""
        main, process = self._main, self.process
        assert main is not None, f"{self.worker_id} was never started"
        assert process is not None, f"{self.worker_id} was never started"
        main.cancel()
        while not main.done():
            if process.dead:
                return False
            await asyncio.wait([main], timeout=STOP_POLL_S)
        await asyncio.sleep(STOP_POLL_S)
        if left := [t.get_name() for t in process.tasks()]:
            self._site.failed(f"{self.worker_id} stopped in order and left {left}")
        process.kill()
        self.node = None
        return True

    def _on_end(self, main: asyncio.Task[None]) -> None:
        if not main.cancelled() and (error := main.exception()) is not None:
            self._site.failed(f"{self.worker_id} died of a bug: {leaf(error)!r}")

    async def _run(self, process: SimProcess) -> None:
        site, terms, config = self._site, self._terms, self._terms.config
        shape, num_blocks = layout(terms.block_size), terms.num_blocks[self.role]
        metrics = Metrics()
        self.metrics.append(metrics)
        memory = KVMemory(num_blocks, shape.block_bytes, shared=False)
        memory.buffer[:] = random.Random(self.worker_id).randbytes(len(memory.buffer))  # nobody may lean on zeroes
        pool = self._builders.pool(num_blocks, terms.block_size)
        leases = self._builders.leases(pool, metrics)
        provenance = Provenance(self.worker_id, pool, site.failed)
        transport = SimTransport(site.fabric, self.worker_id, memory, provenance)
        puller = self._builders.puller(memory, {transport.name: transport}, pool, config.handoff, metrics)
        capability = Capability(
            model="hash", model_fingerprint="hash-1", layout=shape, max_model_len=terms.max_model_len,
            num_blocks=num_blocks, eos_token_ids=(EOS,), numerics=NUMERICS,
            transports=((transport.name, transport.advert),),
        )
        policy = (prefill_policy if self.role is Role.PREFILL else decode_policy)(config, capability.eos_token_ids)
        scheduler = Scheduler(pool, policy.limits, HashScope.of(capability))
        self.runner = _WatchedRunner(memory, terms, scheduler, provenance, site)
        dial = site.network.dial(self.worker_id)
        parts = NodeParts(pool, scheduler, self.runner, memory, leases, puller, dial, metrics)
        info = WorkerInfo(self.worker_id, f"{self.worker_id}.{self.boots}", self.role, self.worker_id, capability)
        self.node = node = WorkerNode(info, parts, policy, config)
        site.fabric.attach(Lender(info, memory, leases.may_read, process, provenance))
        site.network.listen(self.worker_id, node, process)
        try:
            await serve_registered(node, site.registry.at(self.worker_id), config)
        finally:
            site.cut_off(info.boot_id)  # a router whose stream broke just before cannot tell this end from a crash
            await site.network.close(self.worker_id)
            await puller.close()
            await transport.close()


def clock_origin(loop: SimLoop, host: str, boot: int) -> int:
    """What a host's monotonic clock shows when the world begins: days since it was switched on."""
    return random.Random(f"clock {loop.seed} {host} {boot}").randrange(2**21)


def leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
