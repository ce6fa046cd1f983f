"""A pool keeps worker processes alive. What runs in them it knows by name only; who they serve, not at all.

Life of a member: started (its process runs the entry, the worker registers, `start` returns) -> its process ends by
itself, however -> started again after a back-off, as often as it takes -> stopped: asked to end, which it does when
nothing is left on it, then made to.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol

from baton.core.worker import Role


class MemberState(enum.StrEnum):
    STARTING = "starting"
    """Its process runs, and has not registered yet."""
    RUNNING = "running"
    RESTARTING = "restarting"
    """Its process ended by itself and is being replaced, or does not answer its pool."""
    STOPPING = "stopping"
    """It was asked to end, and drains. Nobody starts it again."""


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """All a process needs to become a worker."""

    worker_id: str
    role: Role
    entry: str
    """'module:function', the function being `async def serve(config, worker_id, registry)` that runs until
    cancelled. Imported in the worker's process only."""
    config_json: str
    """The whole Config."""
    redis_url: str
    threads: int
    """Compute threads: the environment is set for them before the entry is imported."""


@dataclass(frozen=True, slots=True)
class PoolMember:
    worker_id: str
    role: Role
    pid: int | None
    """None between two processes, or before the first is known."""
    restarts: int
    state: MemberState


class WorkerPool(Protocol):
    """Implementations: local_pool.LocalPool, ray_pool.RayPool. `close` is for all ends, also after a failure."""

    async def start(self, spec: WorkerSpec) -> None:
        """Start a worker and wait until it has registered. Raises SetupError with the worker's own last words if its
        first process ends before that or takes longer than cluster.start_timeout_s; nothing is left running then."""
        ...

    async def stop(self, worker_id: str, grace_s: float) -> None:
        """Ask a worker to end, and after `grace_s` end it. Asked, it drains: what runs on it moves away for at most
        cluster.drain_timeout_s, so a grace that is longer loses nothing. When this returns its process is gone, and it
        is no member; until then it is one. Raises NotFound for an id that is none."""
        ...

    async def members(self) -> tuple[PoolMember, ...]:
        """All members, by id. Answers within a second or two, whatever state the pool is in."""
        ...

    async def close(self) -> None:
        """Stop every worker and leave nothing behind: no process, no file. Safe to call twice. If the routers
        went before, no worker has a request to wait for."""
        ...
