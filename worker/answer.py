"""One choice of a request on the decode worker: what of it the router was told, and the sequence it runs as."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from baton.core.request import Choice, FinishReason, SampledToken, TokenLogprob
from baton.core.sequence import SequenceState
from baton.worker.spans import MAX_MARKS


@dataclass(slots=True, eq=False)
class Answer:
    choice: Choice
    seq: SequenceState | None = None
    """Set while it runs on its own: from the fork of several choices, or from the start of an only one."""
    first: tuple[int, ...] = ()
    """Its first token, if that was sampled with the others' at the end of the prompt."""
    sent: int = 0
    """Output tokens that the router was told, by us or before."""
    finish: FinishReason | None = None
    """Its last token is known; the word may not be out yet."""
    said_last: bool = False
    paused: bool = False
    """It is being given to a peer."""
    take_back: Callable[[], None] = lambda: None
    """While it is paused: end the lease under which it is lent."""
    given: bool = False
    """The peer has acknowledged it."""
    token_times: list[float] = field(default_factory=list)
    """When its first tokens were sampled, in the loop's time."""
    _logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of the tokens sampled since it came here, if asked for."""
    _first_logprob: int = 0

    def __post_init__(self) -> None:
        self.sent = self._first_logprob = len(self.choice.delivered)

    def sampled(self, token: SampledToken, now_s: float) -> None:
        """Keep its log-prob: whoever takes over tells it again where the client did not get it."""
        if len(self.token_times) < MAX_MARKS:
            self.token_times.append(now_s)
        if token.logprob is not None:
            self._logprobs.append(token.logprob)

    def came_with(self, output: tuple[int, ...], logprobs: tuple[TokenLogprob, ...]) -> None:
        """It comes from another worker, which sampled these tokens; `logprobs` are of the last ones."""
        self._logprobs = list(logprobs)
        self._first_logprob = len(output) - len(logprobs)

    def logprobs_from(self, index: int) -> tuple[TokenLogprob, ...]:
        """Of the output tokens from `index` on."""
        return tuple(self._logprobs[max(0, index - self._first_logprob) :])
