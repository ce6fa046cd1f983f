"""A worker of the replay: production code around a runner that only takes time, and a memory of a few bytes.

Owns what `sim/machine.py` owns for the worlds with faults, less everything that watches for wrong KV: here nothing is
computed, so no KV can be wrong.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from baton.bench.route.setup import SEEN_BYTES, Costs, Setup
from baton.core.block_hash import HashScope
from baton.core.layout import Capability
from baton.core.metrics import Metrics
from baton.core.request import SampledToken
from baton.core.step import Step, StepResult
from baton.core.worker import Role, WorkerInfo
from baton.decode_node.policy import decode_policy
from baton.engine.block_pool import BlockPool
from baton.engine.scheduler import Scheduler
from baton.kv_transfer.lease import LeaseTable
from baton.kv_transfer.memory import KVMemory
from baton.kv_transfer.puller import Puller
from baton.prefill_node.policy import prefill_policy
from baton.sim.loop import SimProcess
from baton.sim.machine import Site
from baton.sim.transport import Lender, SimTransport
from baton.worker.node import NodeParts, WorkerNode
from baton.worker.registration import serve_registered

MAX_MODEL_LEN = 1 << 20
TOKEN = SampledToken(1)
"""What every step says. No trace tells what was answered."""


class CostRunner:
    """core.step.Runner without a model: a step takes as long as `costs` say, one after the other."""

    def __init__(self, costs: Costs, role: Role) -> None:
        self.busy_s = 0.0
        self.num_prompt_tokens = 0
        """Computed, in tokens of the simulated world."""
        self._costs = costs
        self._decodes = role is Role.DECODE
        self._free_at = 0.0

    def execute(self, step: Step, on_layers: Callable[[int], None] | None = None) -> asyncio.Future[StepResult]:
        loop = asyncio.get_running_loop()
        duration_s = self._costs.of(step)
        self._free_at = max(loop.time(), self._free_at) + duration_s
        self.busy_s += duration_s
        rows = (len(c.token_ids) for c in step.chunks)
        self.num_prompt_tokens += sum(n for n in rows if n > 1 or not self._decodes)
        result = StepResult(tuple((TOKEN,) * len(c.choices) for c in step.chunks))
        done: asyncio.Future[StepResult] = loop.create_future()
        loop.call_at(self._free_at, _finish, done, result)
        return done

    async def close(self) -> None:
        """It holds nothing."""


def _finish(done: asyncio.Future[StepResult], result: StepResult) -> None:
    if not done.done():  # the worker was stopped in the middle of it
        done.set_result(result)


class _OneBlock(KVMemory):
    """All blocks are the same few bytes, whatever their size is said to be: digests agree, and nothing is copied."""

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        super().__init__(1, SEEN_BYTES, shared=False)
        self.num_blocks = self.probe_block = num_blocks
        self.block_bytes = block_bytes
        self.landing_blocks = tuple(range(num_blocks + 1, num_blocks + 1 + len(self.landing_blocks)))

    def block(self, index: int) -> memoryview:
        return self.all_blocks[SEEN_BYTES : 2 * SEEN_BYTES]  # where the probe pattern is


class Machine:
    def __init__(self, site: Site, setup: Setup, worker_id: str, role: Role) -> None:
        self.worker_id = worker_id
        self.role = role
        self.runner = CostRunner(setup.costs(role), role)
        self._site = site
        self._setup = setup
        self._process = SimProcess(site.loop, worker_id)
        self._main = self._process.spawn(self._run(), worker_id)
        self._main.add_done_callback(self._on_end)

    async def stop(self) -> None:
        self._main.cancel()
        await asyncio.wait([self._main])

    def _on_end(self, main: asyncio.Task[None]) -> None:
        if not main.cancelled() and (error := main.exception()) is not None:
            self._site.failed(f"{self.worker_id} died of a bug: {error!r}")

    async def _run(self) -> None:
        site, setup, config, metrics = self._site, self._setup, self._setup.config(), Metrics()
        num_blocks = setup.num_blocks_of(self.role)
        memory = _OneBlock(num_blocks, setup.layout.block_bytes)
        pool = BlockPool(num_blocks, setup.block_tokens)
        leases = LeaseTable(pool, metrics)
        transport = SimTransport(site.fabric, self.worker_id, memory)
        puller = Puller(memory, {transport.name: transport}, pool, config.handoff, metrics)
        capability = Capability(
            model="replay", model_fingerprint="replay", layout=setup.layout, max_model_len=MAX_MODEL_LEN,
            num_blocks=num_blocks, numerics="none", transports=((transport.name, transport.advert),),
        )
        policy = (prefill_policy if self.role is Role.PREFILL else decode_policy)(config, ())
        scheduler = Scheduler(pool, policy.limits, HashScope.of(capability))
        dial = site.network.dial(self.worker_id)
        parts = NodeParts(pool, scheduler, self.runner, memory, leases, puller, dial, metrics)
        info = WorkerInfo(self.worker_id, f"{self.worker_id}.1", self.role, self.worker_id, capability)
        node = WorkerNode(info, parts, policy, config)
        site.fabric.attach(Lender(info, memory, leases.may_read, self._process))
        site.network.listen(self.worker_id, node, self._process)
        try:
            await serve_registered(node, site.registry.at(self.worker_id), config)
        finally:
            await site.network.close(self.worker_id)
            await puller.close()
            await transport.close()
