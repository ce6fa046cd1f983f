"""Workers as the rest of the fleet sees them, and the router's choice between them."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field

from baton.core.layout import Capability
from baton.core.step_model import StepModel


class Role(enum.StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """One incarnation of a worker. A restart keeps `worker_id` and changes `boot_id`: everything that was said
    about the old boot (blocks, leases, index entries) is void."""

    worker_id: str
    boot_id: str
    role: Role
    address: str
    """host:port of its gRPC server (in the simulator: a name on the simulated network)."""
    capability: Capability


@dataclass(slots=True)
class WorkerLoad:
    """What a worker says of its own load with each step message."""

    queued_prefill_tokens: int = 0
    """Tokens of admitted sequences that are still to be computed, running chunks included, and without what a waiting
    one will find in the prefix map."""
    queued_prefill_pairs: int = 0
    """(query, key) pairs that these tokens attend to."""
    chunk_tokens: int = 512
    """Most prompt tokens in one step."""
    num_running: int = 0
    num_waiting: int = 0
    num_arriving: int = 0
    """Requests taken whose KV is not here yet: it is computed, pulled or taken over elsewhere."""
    context_tokens: int = 0
    """Sum of num_computed_tokens over running sequences: what a decode step has to read. And the prompts of those that
    arrive: it soon will."""
    available_blocks: int = 0
    """free + cached, less outstanding credit."""
    total_blocks: int = 0
    model: StepModel = field(default_factory=StepModel)
    """Of its steps, fitted to its own; before there were any, a guess."""
    steps: int = 0
    """Engine steps since boot. It must grow while num_running + num_waiting > 0."""
    oldest_waiting_s: float = 0.0
    """Age of the oldest request that has been in no step yet."""
    draining: bool = False
    """It takes nothing new; its requests should be taken over."""
    num_lent_out: int = 0
    """Leases that live: what somebody may still pull. A draining worker may go when this and its requests are 0."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """Where every block of a pool is: each counts once, under the first that applies, and the sum is the pool."""

    quarantined: int
    lent: int
    active: int
    cached: int
    free: int

    @property
    def total(self) -> int:
        return self.quarantined + self.lent + self.active + self.cached + self.free


FIRST_TOKEN_TERMS = frozenset(("queue", "prefill", "fetch", "handoff"))
"""Terms of a price that are over when the first token is there."""


def first_token_s(terms: Iterable[tuple[str, float]]) -> float:
    return sum(seconds for name, seconds in terms if name in FIRST_TOKEN_TERMS)


@dataclass(frozen=True, slots=True)
class Route:
    """The router's choice for one attempt, with its price and reason."""

    decode: str
    prefill: WorkerInfo | None
    """None: the decode worker prefills itself (short or mostly cached prompts, or nobody else fits)."""
    spares: tuple[WorkerInfo, ...] = ()
    """Tried in this order when `prefill` fails, with what was verified kept."""
    holder: WorkerInfo | None = None
    """Who has more of the prompt's KV than the worker that computes it: that one pulls it from here first."""
    cost_s: float = 0.0
    terms: tuple[tuple[str, float], ...] = ()
    """(name, seconds) of each term of the cost."""
    reason: str = ""
    alternatives: tuple[tuple[str, float, tuple[tuple[str, float], ...]], ...] = ()
    """(name, cost, terms) of the next best, cheapest first. Among them the best with a prefill worker and the best
    without, whichever of the two was not chosen, if there was one."""

    @property
    def ttft_s(self) -> float:
        """What the price says of the time to the first token."""
        return first_token_s(self.terms)


@dataclass(frozen=True, slots=True)
class Span:
    """One bar of a request's waterfall. Times are seconds since the decode worker got the request; the router's
    own spans may therefore be negative."""

    name: str
    start_s: float
    end_s: float
    detail: str = ""
    worker: str = ""
    """Whose time it was, by worker_id; empty: the router's."""
    marks: tuple[float, ...] = ()
    """Moments in it, in seconds since its start: of decode, each token; of a prompt's last chunk, each publish of
    layers."""


@dataclass(frozen=True, slots=True)
class Timeline:
    spans: tuple[Span, ...] = field(default_factory=tuple)
