"""Entries for the pool tests: workers that register themselves, and do nothing else."""

from __future__ import annotations

import asyncio
import os
import uuid

from baton.cluster.store import Registry
from baton.core.config import Config
from baton.core.errors import SetupError
from baton.core.layout import Capability, KVLayout
from baton.core.worker import Role, WorkerInfo


async def serve(config: Config, worker_id: str, registry: Registry) -> None:
    """Registers as `pid.threads`, keeps a child process, and deregisters when it is told to end."""
    boot_id = uuid.uuid4().hex
    capability = Capability(config.model.name, "f00d", KVLayout(1, 1, 4, 16, "fp32"), 64, 4)
    address = f"{os.getpid()}.{os.environ['OMP_NUM_THREADS']}"
    child = await asyncio.create_subprocess_exec("sleep", "600")
    try:
        while True:
            await registry.register(WorkerInfo(worker_id, boot_id, Role.PREFILL, address, capability))
            await asyncio.sleep(0.2)
    finally:
        child.kill()
        await child.wait()
        await registry.deregister(worker_id, boot_id)


async def refuse(config: Config, worker_id: str, registry: Registry) -> None:
    raise SetupError(f"{worker_id} has nothing to serve: find it a model.")


async def crash(config: Config, worker_id: str, registry: Registry) -> None:
    raise ZeroDivisionError("worker bug")


async def dawdle(config: Config, worker_id: str, registry: Registry) -> None:
    await asyncio.Event().wait()


async def come_back(config: Config, worker_id: str, registry: Registry) -> None:
    """Serves, but ignores being cancelled."""
    while True:
        try:
            await serve(config, worker_id, registry)
        except asyncio.CancelledError:
            continue


async def drain(config: Config, worker_id: str, registry: Registry) -> None:
    """Serves; told to end, it says `draining` in the registry and leaves when somebody registers as `enough`."""
    try:
        await serve(config, worker_id, registry)
    finally:
        capability = Capability(config.model.name, "f00d", KVLayout(1, 1, 4, 16, "fp32"), 64, 4)
        await registry.register(WorkerInfo(worker_id, "last words", Role.PREFILL, "draining", capability))
        while "enough" not in {info.worker_id for info in await registry.list()}:
            await asyncio.sleep(0.05)
        await registry.deregister(worker_id, "last words")
