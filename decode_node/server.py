"""Builds a decode worker. The entry that pools start."""

from __future__ import annotations

from baton.cluster.store import Registry
from baton.core.config import Config
from baton.decode_node.policy import decode_policy
from baton.worker.assembly import serve_worker


async def serve(config: Config, worker_id: str, registry: Registry) -> None:
    """Run until cancelled."""
    await serve_worker(config, worker_id, registry, decode_policy)
