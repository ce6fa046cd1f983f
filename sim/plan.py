"""What a seed decides before a world's first turn."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass, field

from baton.core.config import load
from baton.core.worker import Role
from baton.engine.hash_runner import StepCosts
from baton.sim.faults import Fault
from baton.sim.machine import Builders, Terms
from baton.sim.more_faults import draw_faults
from baton.sim.network import Conditions
from baton.sim.transport import WireSpeed
from baton.sim.workload import Shape

WAVE_JOBS = 24
MAX_CHOICES = 3
"""The smallest decode pool holds the longest prompt, and a tail for each choice."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A test may decide parts of it."""

    terms: Terms
    shape: Shape
    faults: tuple[Fault, ...]
    num_routers: int = 1
    num_prefill: int = 2
    num_decode: int = 3
    num_jobs: int = WAVE_JOBS
    builders: Builders = field(default_factory=Builders)
    kept_faults: Collection[int] | None = None
    """Only these of `faults` happen, by position; None: all."""
    kept_jobs: int | None = None
    """Only so many clients come, the first of those drawn; None: as many as it takes."""


def draw_plan(seed: int) -> Plan:
    rng = random.Random(f"plan {seed}")
    block_size = rng.choice((2, 3, 4))
    max_model_len = 48
    longest = -(-max_model_len // block_size)
    num_blocks = {
        Role.PREFILL: longest + rng.randint(0, 2 * longest),
        Role.DECODE: longest + MAX_CHOICES - 1 + rng.randint(0, 2 * longest),
    }
    chunk = rng.choice((block_size, 2 * block_size, 16))
    config = load({}, [
        f"handoff.lease_ttl_s={rng.choice((0.5, 1, 3))}", "handoff.pull_timeout_s=1", "handoff.alive_interval_s=0.2",
        "handoff.peer_timeout_s=1", "handoff.release_timeout_s=0.5", "handoff.quarantine_max_s=4",
        "handoff.probe_bytes=256", "cluster.drain_timeout_s=10",
        f"handoff.quarantine_cap={rng.choice((0.1, 0.5, 1.0))}",
        f"router.local_prefill_max_tokens={rng.choice((0, 0, 2, 8))}", "router.max_attempts=8",
        f"prefill.max_chunk_tokens={chunk}", "prefill.max_step_tokens=24", "prefill.max_sequences=6",
        f"decode.max_chunk_tokens={chunk}", "decode.max_step_tokens=16", "decode.max_sequences=8",
    ])
    conditions = Conditions(delay_s=rng.choice((0.0002, 0.002, 0.01)), loss=rng.choice((0.0, 0.01, 0.04)))
    speed = WireSpeed(bytes_per_s=rng.choice((2e4, 1e5, 5e5)), late_s=rng.uniform(1.0, 8.0))
    costs = StepCosts(per_token_s=rng.choice((0.0008, 0.005)))
    terms = Terms(block_size, max_model_len, num_blocks, config, costs, conditions, speed)
    shape = Shape(max_model_len=max_model_len, max_choices=MAX_CHOICES, mean_gap_s=rng.choice((0.005, 0.02, 0.08)))
    return Plan(terms, shape, draw_faults(seed), num_routers=rng.choice((1, 2, 2, 3)))
