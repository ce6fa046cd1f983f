"""What became of choices: how long outputs are, where sessions were decoded, how far first tokens were from their
predictions, and what the way that was not taken would have saved.

Owns these figures. Does not know how a price is made (prices.py).

Each route says what it predicted, and what it rejected: with a hand-off, or without. If the first token comes later
than predicted by more than the rejected way was dearer, that way had promised better: the difference is the *regret*.
It is counted against the kind that was chosen, so that a high one says which kind is priced too low.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from baton.core.metrics import Metrics
from baton.core.request import Request
from baton.core.worker import Route

ASSUMED_OUTPUT_TOKENS = 128.0
"""Of a request, until one has ended."""
ASSUMED_HANDOFF_S = 0.005
"""Until TRUST_AFTER of them were measured."""
CALM_S = 0.01
"""A shorter queue does not blur what a hand-off takes."""
MAX_LATE_S = 0.25
"""More is not a hand-off's doing."""
TRUST_AFTER = 16
SMOOTHING = 0.05
MAX_SESSIONS = 16_384
"""Remembered; those that were quiet for longest are forgotten."""


@dataclass(slots=True)
class _Mean:
    """Of what was added, the latest most."""

    value: float = 0.0
    count: int = 0

    def add(self, seen: float) -> None:
        self.count += 1
        self.value += (seen - self.value) * max(SMOOTHING, 1 / self.count)


class Outcomes:
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._num_tokens = _Mean()
        """Of a choice that has ended."""
        self._late = {"remote": _Mean(), "local": _Mean()}
        """Seconds by which first tokens came later than queue, prefill and fetch say, where no queue was."""
        self._homes: OrderedDict[tuple[str, str], str] = OrderedDict()
        """(tenant, session) -> worker_id, the last to speak at the end."""

    @property
    def handoff_s(self) -> float:
        """What a hand-off adds to the time of a first token: what remote ones are late, less what local ones are."""
        remote, local = self._late["remote"], self._late["local"]
        if remote.count < TRUST_AFTER:
            return ASSUMED_HANDOFF_S
        return max(0.0, remote.value - (local.value if local.count >= TRUST_AFTER else 0.0))

    def home(self, request: Request) -> str:
        """worker_id of where the last request of its session was decoded; "" if that is not known."""
        return self._homes.get((request.tenant, request.session), "")

    def decodes(self, request: Request, worker_id: str) -> None:
        """It has a first token there."""
        if not request.session:
            return
        session = request.tenant, request.session
        self._homes[session] = worker_id
        self._homes.move_to_end(session)
        if len(self._homes) > MAX_SESSIONS:
            self._homes.popitem(last=False)

    def expected_tokens(self, most: int) -> float:
        """Output of a choice that may have `most` tokens more."""
        return min(float(most), self._num_tokens.value if self._num_tokens.count else ASSUMED_OUTPUT_TOKENS)

    def first_token(self, route: Route, after_s: float) -> None:
        """It came so long after the request was dispatched by this route."""
        if "queue" not in dict(route.terms):
            return  # a planned move, or a policy that predicts nothing
        kind = "remote" if route.prefill is not None else "local"
        predicted_s = route.ttft_s
        self._metrics.inc("baton_ttft_predictions_total", prefill=kind)
        self._metrics.inc("baton_ttft_predicted_seconds_total", predicted_s, prefill=kind)
        self._metrics.inc("baton_ttft_error_seconds_total", abs(after_s - predicted_s), prefill=kind)
        told = dict(route.terms)
        if told["queue"] <= CALM_S:
            late_s = after_s - predicted_s + told.get("handoff", 0.0)
            self._late[kind].add(min(MAX_LATE_S, max(-MAX_LATE_S, late_s)))
        rejected = rejected_cost_s(route)
        if rejected is not None:
            regret_s = max(0.0, after_s - predicted_s - (rejected - route.cost_s))
            self._metrics.inc("baton_routing_regret_seconds_total", regret_s, prefill=kind)

    def ended(self, num_output_tokens: int, num_choices: int) -> None:
        self._num_tokens.add(num_output_tokens / num_choices)


def rejected_cost_s(route: Route) -> float | None:
    """Of the best alternative of the other kind: a hand-off, if none was chosen, or none. None: there was no such."""
    remote = route.prefill is not None
    return next((cost_s for _, cost_s, terms in route.alternatives if ("stall" in dict(terms)) == remote), None)
