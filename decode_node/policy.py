"""What makes a worker a decode worker."""

from __future__ import annotations

from baton.core.config import Config
from baton.core.worker import Role
from baton.engine.scheduler import SchedulerLimits
from baton.worker.policy import RolePolicy


def decode_policy(config: Config, eos_token_ids: tuple[int, ...]) -> RolePolicy:
    """Small chunks, so that a local prefill stretches the steps of running requests only a little."""
    pool = config.decode
    limits = SchedulerLimits(
        pool.max_step_tokens, pool.max_chunk_tokens, pool.max_sequences, pool.max_waiting, eos_token_ids
    )
    return RolePolicy(Role.DECODE, limits)
