"""Workers as a policy is offered them, in a line each."""

from __future__ import annotations

import dataclasses
import random

from baton.core.config import RouterConfig
from baton.core.layout import CONVERT_KV, difference
from baton.core.step_model import StepModel
from baton.core.worker import Role, Route, WorkerInfo, WorkerLoad
from baton.router.cost import CostPolicy
from baton.router.policy import Candidate, Candidates, Facts, Policy
from tests.router.fake_fleet import capability


def fits(prefill: WorkerInfo, decode: WorkerInfo) -> bool:
    return difference(prefill.capability, decode.capability) is None


def worker(
    worker_id: str,
    fingerprint: str = "f00d",
    *,
    held: int = 0,
    queued: int = 0,
    sequences: int = 0,
    bandwidth: dict[str, float] | None = None,
    **load: float,
) -> Candidate:
    """`load`: of its WorkerLoad; and speeds, 0 where not measured: `prefill_tokens_per_s`, `decode_step_s` per row.
    Nothing else costs time in a step."""
    rate, row_s = load.pop("prefill_tokens_per_s", 0.0), load.pop("decode_step_s", 0.0)
    model = StepModel(0.0, 1 / rate if rate else 0.0, 0.0, row_s, 0.0, int(rate > 0), int(row_s > 0))
    role = Role.PREFILL if worker_id.startswith("p") else Role.DECODE
    info = WorkerInfo(worker_id, f"{worker_id}-boot", role, "x:1", capability(model_fingerprint=fingerprint))
    return Candidate(info, WorkerLoad(model=model, **load), held, queued, sequences, bandwidth or {})  # type: ignore[arg-type]


def fleet(*workers: Candidate, draining: tuple[Candidate, ...] = ()) -> Candidates:
    holders = sorted((w for w in (*workers, *draining) if w.held_blocks), key=lambda w: -w.held_blocks)
    return Candidates(
        [w for w in workers if w.info.role is Role.DECODE],
        [w for w in workers if w.info.role is Role.PREFILL],
        fits,
        holders,
    )


def cost_policy(limit: int = 4, seed: int = 5, **config: float) -> CostPolicy:
    return CostPolicy(RouterConfig(local_prefill_max_tokens=limit, **config), random.Random(seed))  # type: ignore[arg-type]


def choose(
    policy: Policy, asked: int | Facts, *workers: Candidate, draining: tuple[Candidate, ...] = ()
) -> Route:
    """`asked`: tokens, or all the facts."""
    facts = asked if isinstance(asked, Facts) else Facts(asked)
    route = policy.price(facts, fleet(*workers, draining=draining))
    assert route is not None
    return route


def storing(dtype: str, candidate: Candidate) -> Candidate:
    """It stores KV in this type, and converts."""
    known = candidate.info.capability
    layout = dataclasses.replace(known.layout, dtype=dtype)
    able = dataclasses.replace(known, layout=layout, features=(*known.features, CONVERT_KV))
    return dataclasses.replace(candidate, info=dataclasses.replace(candidate.info, capability=able))
