"""What makes a worker a prefill or a decode worker: numbers, injected by the node rooms. A role switch swaps this
value in the running process; no code asks for the role."""

from __future__ import annotations

from dataclasses import dataclass

from baton.core.worker import Role
from baton.engine.scheduler import SchedulerLimits


@dataclass(frozen=True, slots=True)
class RolePolicy:
    role: Role
    limits: SchedulerLimits
