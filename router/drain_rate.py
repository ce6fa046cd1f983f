"""How fast waiting requests go: the measured rate, what they turn out to cost, and what follows for the next one.

Tokens are the unit: those of the prompt, and those of the output that are expected. Time counts only while somebody
waits: an idle router says nothing about how fast a busy one is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from baton.core.request import Request

HORIZON_S = 10.0
"""What is older counts less than a third (an exponential window)."""
MIN_BUSY_S = 0.5
"""So much waiting must have been seen before a rate is believed."""
LONGEST_S = 1.0
"""Between two looks at the clock: workers speak at least every router.heartbeat_s."""
LEARNT = 1 / 32
"""Weight of the newest request in what is learnt of requests."""


@dataclass(slots=True)
class DrainRate:
    _tokens: float = 0.0
    _busy_s: float = 0.0
    _busy_since: float | None = None
    _went_at: float = 0.0
    """When somebody went last, or began to wait where nobody did."""
    _output_tokens: float = 0.0
    """Of a request; 0 until one has ended."""
    _token_s: float = 0.0
    """From dispatch to the end, by output token."""

    @property
    def tokens_per_s(self) -> float:
        """0 while it is not known."""
        return self._tokens / self._busy_s if self._busy_s >= MIN_BUSY_S else 0.0

    def tokens_of(self, request: Request) -> int:
        return len(request.prompt) + round(self._outputs(request) * len(request.choices))

    def wait_s(self, tokens: int, now: float) -> float:
        """Until so many tokens have gone; 0 while the rate is not known."""
        self.passes(now)
        return tokens / self.tokens_per_s if self.tokens_per_s else 0.0

    def stalled_s(self, now: float) -> float:
        """So long somebody waits and nobody has gone."""
        return 0.0 if self._busy_since is None else now - self._went_at

    def service_s(self, request: Request) -> float:
        """From dispatch to the last token; 0 until one has ended."""
        return self._token_s * self._outputs(request)

    def waiting(self, somebody: bool, now: float) -> None:
        """Somebody waits from now on, or nobody does."""
        self.passes(now)
        if self._busy_since is None:
            self._went_at = now
        self._busy_since = now if somebody else None

    def went(self, tokens: int, now: float) -> None:
        self.passes(now)
        self._tokens += tokens
        self._went_at = now

    def ended(self, num_output_tokens: int, service_s: float) -> None:
        """A request has its last token, so long after it was dispatched."""
        self._output_tokens = _learn(self._output_tokens, num_output_tokens)
        self._token_s = _learn(self._token_s, service_s / max(1, num_output_tokens))

    def _outputs(self, request: Request) -> float:
        most = request.sampling.max_tokens
        return min(most, self._output_tokens) if self._output_tokens else most

    def passes(self, now: float) -> None:
        """Time. Said whenever a worker speaks; a longer silence is this process not running, which is no measure of
        the workers."""
        if self._busy_since is None or now <= self._busy_since:
            return
        passed_s, self._busy_since = min(now - self._busy_since, LONGEST_S), now
        kept = math.exp(-passed_s / HORIZON_S)
        self._tokens *= kept
        self._busy_s = self._busy_s * kept + passed_s


def _learn(known: float, seen: float) -> float:
    return known + LEARNT * (seen - known) if known else seen
