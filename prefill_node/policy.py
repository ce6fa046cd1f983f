"""What makes a worker a prefill worker."""

from __future__ import annotations

from baton.core.config import Config
from baton.core.worker import Role
from baton.engine.scheduler import SchedulerLimits
from baton.worker.policy import RolePolicy


def prefill_policy(config: Config, eos_token_ids: tuple[int, ...]) -> RolePolicy:
    """Large chunks, one after the other: a chunk is what decode pulls while the next one is computed."""
    pool = config.prefill
    limits = SchedulerLimits(
        pool.max_step_tokens, pool.max_chunk_tokens, pool.max_sequences, pool.max_waiting, eos_token_ids
    )
    return RolePolicy(Role.PREFILL, limits)
