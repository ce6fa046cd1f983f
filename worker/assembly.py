"""Builds a real worker process: model, memory, engine, transports, gRPC server, registration. The simulator builds its
own world instead.

 1. the model is opened (converted once per host) and says its layout
 2. KV memory is mapped and the engine built on it
 3. transports bind and advertise; the capability document is complete
 4. the gRPC server binds; the worker registers: from now on routers call
 5. until cancelled: steps, timers, and a look at the registry to meet prefill workers before a request does
 6. deregister, stop serving, close
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from baton.cluster.store import Registry
from baton.core.block_hash import HashScope
from baton.core.config import Config, EngineConfig, apply_network_env
from baton.core.errors import SetupError
from baton.core.layout import CONVERT_KV, CONVERTIBLE, FEATURES, Capability, KVLayout
from baton.core.metrics import Metrics
from baton.core.services import Dial
from baton.core.step import Runner
from baton.core.worker import Role, WorkerInfo
from baton.engine.backend import choose_backend
from baton.engine.block_pool import BlockPool
from baton.engine.hash_runner import HashRunner, StepCosts
from baton.engine.scheduler import Scheduler
from baton.kv_transfer.landing import Landings
from baton.kv_transfer.lease import LeaseTable
from baton.kv_transfer.memory import KVMemory
from baton.kv_transfer.offer import open_transports
from baton.kv_transfer.puller import Puller
from baton.kv_transfer.transport import Transport
from baton.models.catalog import open_model
from baton.models.convert import ModelFiles
from baton.models.hash_files import HashFiles
from baton.wire.client import GrpcDial
from baton.wire.server import start_worker_server
from baton.worker.node import NodeParts, WorkerNode
from baton.worker.policy import RolePolicy
from baton.worker.registration import serve_registered

log = logging.getLogger(__name__)

STOP_GRACE_S = 2.0
MAX_UNASKED_BLOCKS = 1 << 17
"""Of a model with tiny blocks, the bookkeeping would be larger than the memory it books."""
AnyFiles = ModelFiles | HashFiles
PolicyFor = Callable[[Config, tuple[int, ...]], RolePolicy]


async def serve_worker(config: Config, worker_id: str, registry: Registry, policy_for: PolicyFor) -> None:
    """Run one worker until cancelled. `policy_for(config, eos_token_ids)` is what makes it prefill or decode."""
    files = await asyncio.to_thread(open_model, config.model)
    async with contextlib.AsyncExitStack() as stack:
        dial = GrpcDial()
        stack.push_async_callback(dial.close)
        policy = policy_for(config, files.spec.eos_token_ids)
        node = await open_node(files, config, worker_id, policy, dial, stack)
        server = await start_worker_server(node, config.cluster.worker_host, 0, node.unhealthy)
        stack.push_async_callback(server.stop, STOP_GRACE_S)
        node.info = dataclasses.replace(node.info, address=f"{config.cluster.worker_host}:{server.port}")
        await serve_registered(node, registry, config)


async def open_node(
    files: AnyFiles, config: Config, worker_id: str, policy: RolePolicy, dial: Dial, stack: contextlib.AsyncExitStack
) -> WorkerNode:
    """A node with everything it needs, without an address yet; `stack` closes it. Raises SetupError when the pool
    could hold no request, or this machine not the pool."""
    engine = _engine(files, config.engine_of(config.prefill if policy.role is Role.PREFILL else config.decode))
    layout = engine.layout
    fitting = max(1, config.engine.kv_memory_bytes // layout.block_bytes)
    num_blocks = config.engine.num_blocks or min(fitting, MAX_UNASKED_BLOCKS)
    metrics, boot_id = Metrics(), uuid.uuid4().hex[:12]
    if engine.fallback:
        log.warning("plain torch computes, and slowly: %s", engine.fallback)
        metrics.inc("baton_fallbacks_total", kind="torch_runner")
    memory = _memory(config, layout, num_blocks)
    stack.callback(memory.close)
    pool = BlockPool(num_blocks, layout.block_size)
    leases = LeaseTable(pool, metrics)
    apply_network_env(config)
    transports = await open_transports(worker_id, boot_id, memory, leases, config.handoff)
    puller = Puller(memory, transports, pool, config.handoff, metrics)
    stack.push_async_callback(puller.close)
    landings = _landings(layout, memory, worker_id, boot_id, config, metrics)
    if landings is not None:
        stack.push_async_callback(landings.close)
    adverts = tuple((n, t.advert) for n, t in transports.items())
    capability = _capability(config, files, engine, num_blocks, adverts)
    runner = engine.open(memory)
    stack.push_async_callback(runner.close)
    scheduler = Scheduler(pool, policy.limits, HashScope.of(capability))
    info = WorkerInfo(worker_id, boot_id, policy.role, "", capability)
    parts = NodeParts(pool, scheduler, runner, memory, leases, puller, dial, metrics, landings)
    return WorkerNode(info, parts, policy, config)


def _landings(
    layout: KVLayout, memory: KVMemory, worker_id: str, boot_id: str, config: Config, metrics: Metrics
) -> Landings | None:
    """None where nothing may be converted, or could. The kernels are imported where they are needed."""
    if not config.handoff.convert_kv or layout.dtype not in CONVERTIBLE:
        return None

    async def open_for(landing: KVMemory, name: str) -> dict[str, Transport]:
        lends_nothing = LeaseTable(BlockPool(landing.num_blocks, layout.block_size), metrics)
        return await open_transports(worker_id, f"{boot_id}/{name}", landing, lends_nothing, config.handoff)

    from baton.kernels.host.convert import convert_kv

    return Landings(layout, memory, open_for, convert_kv, config.handoff, metrics)


@dataclass(frozen=True, slots=True)
class _Engine:
    """What computes, and what follows from it."""

    layout: KVLayout
    numerics: str
    open: Callable[[KVMemory], Runner]
    fallback: str = ""
    """Not empty: why it is not what would be preferred."""


def _engine(files: AnyFiles, config: EngineConfig) -> _Engine:
    block_size, threads = config.block_size, config.threads or 1
    if isinstance(files, HashFiles):
        spec = files.spec
        layout, costs = spec.layout(block_size), StepCosts(spec.step_s, spec.token_s, spec.context_s)
        return _Engine(layout, spec.numerics, lambda memory: HashRunner(memory.buffer, layout, costs))
    backend = choose_backend(config, files.spec.head_dim)
    layout = files.spec.layout(block_size, backend.kv_dtype)

    def open_runner(memory: KVMemory) -> Runner:
        return backend.open(files, memory.buffer, memory.num_blocks, layout, threads)

    return _Engine(layout, backend.numerics, open_runner, backend.fallback)


def _memory(config: Config, layout: KVLayout, num_blocks: int) -> KVMemory:
    setting = "engine.num_blocks" if config.engine.num_blocks else "engine.kv_memory_bytes"
    wanted, there = num_blocks * layout.block_bytes, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    why = "the machine does not have that much"
    if wanted <= there:  # pages come as they are written: the kernel may promise more than it can ever give
        try:
            return KVMemory(num_blocks, layout.block_bytes, shared=True)
        except (OSError, MemoryError) as e:
            why = getattr(e, "strerror", None) or "out of memory"
    raise SetupError(
        f"this worker cannot have {wanted:,} bytes of KV memory: {why}. "
        f"Lower {setting} (the machine's memory is {there:,} bytes)."
    )


def _capability(
    config: Config, files: AnyFiles, engine: _Engine, num_blocks: int, adverts: tuple[tuple[str, bytes], ...]
) -> Capability:
    holds = num_blocks * engine.layout.block_size
    limit = min(config.engine.max_model_len or files.spec.max_model_len, files.spec.max_model_len, holds)
    if limit < 2:  # a prompt token and an output token
        raise SetupError(
            f"no request fits: the model takes {files.spec.max_model_len} tokens, {num_blocks} blocks hold {holds}, "
            f"and engine.max_model_len is {config.engine.max_model_len}. Raise the smallest."
        )
    return Capability(
        model=config.model.served_name or files.name,
        model_fingerprint=files.fingerprint,
        layout=engine.layout,
        max_model_len=limit,
        num_blocks=num_blocks,
        eos_token_ids=files.spec.eos_token_ids,
        numerics=engine.numerics,
        features=(*FEATURES, CONVERT_KV) if config.handoff.convert_kv else FEATURES,
        transports=adverts,
    )
