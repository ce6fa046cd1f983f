"""Inside a worker's process: from a WorkerSpec to its running entry. Both pools end up here."""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable

from baton.cluster.pool import WorkerSpec
from baton.cluster.store import RedisRegistry, Registry
from baton.core.config import Config, apply_child_env
from baton.core.errors import SetupError
from baton.core.worker import WorkerInfo

Entry = Callable[[Config, str, Registry], Awaitable[None]]


async def run_entry(spec: WorkerSpec, on_registered: Callable[[], None]) -> None:
    """Run the spec's entry until it ends or this is cancelled; `on_registered` is called at its first registration.

    Raises what the entry raises, SetupError when there is no such entry, and SetupError also if it just returns: a
    worker has no end of its own.
    """
    apply_child_env(spec.threads)
    config = Config.model_validate_json(spec.config_json)
    registry = RedisRegistry(spec.redis_url)
    try:
        await load_entry(spec.entry)(config, spec.worker_id, _Announced(registry, on_registered))
    finally:
        await registry.close()
    raise SetupError(f"{spec.entry} returned; a worker's entry runs until it is cancelled.")


def load_entry(name: str) -> Entry:
    """The function behind 'module:function'."""
    module, _, function = name.partition(":")
    try:
        entry: Entry = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as e:
        raise SetupError(f"the worker entry {name!r} cannot be imported: {e}") from e
    return entry


class _Announced:
    """A registry that says when the worker has entered it: from then on others can find it, so it is up."""

    def __init__(self, registry: Registry, on_registered: Callable[[], None]) -> None:
        self._registry = registry
        self._on_registered: Callable[[], None] | None = on_registered

    async def register(self, info: WorkerInfo) -> None:
        await self._registry.register(info)
        if self._on_registered is not None:
            self._on_registered()
            self._on_registered = None

    async def deregister(self, worker_id: str, boot_id: str) -> None:
        await self._registry.deregister(worker_id, boot_id)

    async def list(self) -> tuple[WorkerInfo, ...]:
        return await self._registry.list()

    async def close(self) -> None:
        """Its owner closes it."""
