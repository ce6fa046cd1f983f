"""What this worker has said of each request, to whoever listens: so that a stream, or its router, may be lost and the
answer is not.

Owns the tokens of each attempt, from the first index on, and which stream hears of it now. Does not know what is still
computed for it (intake.py), or when it may be given up (node.py).

Life of a log: opened with a submit -> every chunk passes through it -> its stream breaks, and it goes on without one ->
`resume` gives it another stream, from any index that it knows -> its request ends -> kept for `router.orphan_window_s`,
for a client may still lack its last words -> forgotten.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from baton.core.errors import Forgotten, ResumedElsewhere
from baton.core.messages import Resume, Submit, TokenChunk
from baton.core.request import FinishReason, TokenLogprob
from baton.worker.outbox import Outbox

FAILURES = (FinishReason.ERROR, FinishReason.CANCELLED)
"""They end all choices of an attempt, and are no choice's own finish."""
MAX_ENDED_TOKENS = 1 << 20
"""Of requests that have ended, prompts included: a bound on memory, at 8 bytes a token and more with log-probs."""


@dataclass(slots=True)
class _Line:
    """One choice."""

    tokens: list[int]
    """All of its output, what was delivered before it came here included."""
    first_scored: int
    """Index of the first log-prob, if they are asked for."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None


class TokenLog:
    def __init__(self, submit: Submit, outbox: Outbox) -> None:
        self.request = submit.request
        self.epoch = submit.epoch
        """Under which its router knows it now."""
        self.outbox = outbox
        """Of the stream that hears of it now; closed, once that has ended."""
        self._lines = {c.index: _Line(list(c.delivered), len(c.delivered)) for c in submit.request.choices}
        self._last: TokenChunk | None = None
        """The last one said: it has the spans, and the error if it failed."""

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt) + sum(len(line.tokens) for line in self._lines.values())

    def say(self, chunk: TokenChunk) -> None:
        """News of its request; sent at the next flush of the stream that hears of it."""
        line = self._lines[chunk.choice]
        line.tokens += chunk.token_ids
        line.logprobs += chunk.logprobs
        if chunk.finish not in FAILURES:
            line.finish = chunk.finish
        self._last = chunk
        self.outbox.put(chunk)

    def flush(self) -> None:
        self.outbox.flush()

    def resume(self, resume: Resume, outbox: Outbox) -> None:
        """From now on this stream hears of it, first what it lacks. Raises Forgotten when some of that is not here."""
        self._check(resume)
        if self.outbox is not outbox:
            self._leave()
        self.epoch, self.outbox = resume.epoch, outbox
        last = self._last
        if last is None:
            return
        for choice, index in resume.next_indexes:
            line = self._lines[choice]
            if line.tokens[index:] or line.finish is not None:
                outbox.put(TokenChunk(
                    self.request.request_id, self.epoch, index, tuple(line.tokens[index:]), line.finish, choice,
                    tuple(line.logprobs[index - line.first_scored :]), cached_tokens=last.cached_tokens,
                    spans=last.spans if choice == last.choice else ()))
        if last.finish in FAILURES:
            outbox.put(dataclasses.replace(last, epoch=self.epoch))
        outbox.flush()

    def _leave(self) -> None:
        """Who still listens on the old stream is told, or it would wait for ever."""
        choice, line = next(iter(self._lines.items()))
        self.outbox.put(TokenChunk(
            self.request.request_id, self.epoch, len(line.tokens), (), FinishReason.ERROR, choice,
            error_code=ResumedElsewhere.code, error_message="its client reads on at another router"))
        self.outbox.flush()

    def _check(self, resume: Resume) -> None:
        scored = self.request.sampling.logprobs is not None
        if resume.asked != self.request.asked:
            raise forgotten(resume)
        for choice, index in resume.next_indexes:
            line = self._lines.get(choice)
            if line is None or index > len(line.tokens) or (scored and index < line.first_scored):
                raise forgotten(resume)


def forgotten(resume: Resume) -> Forgotten:
    return Forgotten(f"request {resume.request_id} is not known here (any more), or not all of what is asked for. "
                     "Compute it again.")


class TokenLogs:
    """All logs of a worker: of what runs, and of what ended within the window."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._logs: dict[str, list[TokenLog]] = {}
        """By request id, oldest first: routers and attempts may bring the same one."""
        self._ended: deque[tuple[float, TokenLog]] = deque()
        self._num_ended_tokens = 0

    def __len__(self) -> int:
        return sum(len(logs) for logs in self._logs.values())

    def open(self, log: TokenLog) -> None:
        self._logs.setdefault(log.request.request_id, []).append(log)

    def ended(self, log: TokenLog, now: float) -> None:
        """Its request holds nothing any more. Kept for the window, unless that is too much."""
        self._ended.append((now, log))
        self._num_ended_tokens += log.num_tokens
        while self._num_ended_tokens > MAX_ENDED_TOKENS:
            self._forget_oldest()

    def expire(self, now: float) -> None:
        while self._ended and self._ended[0][0] <= now - self._window_s:
            self._forget_oldest()

    def of(self, request_id: str) -> Iterator[TokenLog]:
        """The newest first."""
        return reversed(self._logs.get(request_id, []))

    def find(self, request_id: str, router_id: str, epoch: int) -> TokenLog | None:
        """The attempt that this router calls so."""
        return next((log for log in self.of(request_id)
                     if log.epoch == epoch and log.outbox.router_id == router_id), None)

    def resume(self, resume: Resume, outbox: Outbox) -> None:
        """The newest log that knows all of it goes on with this stream. Raises Forgotten."""
        for log in self.of(resume.request_id):
            try:
                log.resume(resume, outbox)
            except Forgotten:
                continue
            return
        raise forgotten(resume)

    def _forget_oldest(self) -> None:
        _, log = self._ended.popleft()
        self._num_ended_tokens -= log.num_tokens
        request_id = log.request.request_id
        self._logs[request_id].remove(log)
        if not self._logs[request_id]:
            del self._logs[request_id]
