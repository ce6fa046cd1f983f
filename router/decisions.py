"""Every decision of a router, written down as it is made: what the policy was asked, what it chose, and the dice that
broke ties. Enough to say why afterwards, and to make the same decision again (recorded.py).

A decision refers to the frozen objects that the policy saw, so writing it down costs no copy; it becomes text only when
somebody asks.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.core.config import RouterConfig
from baton.core.worker import Route, WorkerInfo
from baton.router.cost import price_move
from baton.router.dice import Dice
from baton.router.policy import Candidates, Facts, Policy

CANDIDATE_BYTES, PAIR_BYTES = 1_000, 200
"""What a decision keeps alive for each candidate, and for each pair bandwidth of one, at most: others may share it."""


@dataclass(frozen=True, slots=True)
class Decision:
    facts: Facts
    candidates: Candidates
    config: RouterConfig
    route: Route | None
    """None: nobody could take it."""
    dice: int | None = None
    """Of the policy, before it chose. None: it has others, and its ties cannot be repeated."""
    moved_from: WorkerInfo | None = None
    """Set: a planned move away from there, which no policy decides."""

    @property
    def num_bytes(self) -> int:
        """Of memory, at most."""
        told = self.candidates
        everybody = (*told.decode, *told.prefill, *told.holders)
        return CANDIDATE_BYTES * (1 + len(everybody)) + PAIR_BYTES * sum(len(c.bandwidth) for c in everybody)


class Decider:
    """Asks the policy. `dice` are those that the policy was made with."""

    def __init__(self, policy: Policy, config: RouterConfig, dice: Dice | None = None) -> None:
        self._policy = policy
        self._config = config
        self._dice = dice
        self.num_decisions = 0
        """Of the policy, so far: the `turn` of the next."""

    @property
    def compares_all(self) -> bool:
        return self._policy.compares_all

    def choose(self, facts: Facts, candidates: Candidates) -> Decision:
        self.num_decisions += 1
        state = self._dice.state if self._dice is not None else None
        route = self._policy.price(facts, candidates)
        return Decision(facts, candidates, self._config, route, state)

    def choose_move(self, facts: Facts, source: WorkerInfo, candidates: Candidates) -> Decision:
        route = price_move(facts, self._config, source, candidates)
        return Decision(facts, candidates, self._config, route, moved_from=source)
