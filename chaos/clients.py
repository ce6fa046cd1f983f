"""Clients that know what they must get. Each token is compared as it comes, and its time is kept.

A client whose router was taken from it by a fault (killed, frozen) asks the other router again, as any client would;
that is the one thing a router's death may cost. Every other error is a failed request.

Life of a question: drawn -> asked at a router -> tokens, each compared -> done, left (the client had enough), failed,
or wrong. Exactly one of these; `open` at the end of a run is a request without an end.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field

from baton.chaos.speakers import Piece, Speakers
from baton.chaos.workload import Front, Job, Workload
from baton.core.errors import BatonError, PeerLost
from baton.core.request import SampledToken
from baton.models.hash_files import text_of
from baton.models.hash_model import Answer

GRACE_S = 5.0
"""After a request's deadline, for its end to arrive."""
AGAIN_S = 0.05


class Outcome(enum.StrEnum):
    OPEN = "open"
    DONE = "done"
    LEFT = "left"
    """The client went away by itself."""
    FAILED = "failed"
    WRONG = "wrong"
    """A token, log-prob, reason or count that an undisturbed run does not give."""


@dataclass(slots=True)
class Attempt:
    """One call to a router."""

    router: str
    request_id: str
    """As the router names it."""
    started_s: float


@dataclass(slots=True)
class Question:
    """What one client asked, and all that it saw."""

    job: Job
    asked_s: float
    outcome: Outcome = Outcome.OPEN
    detail: str = ""
    ended_s: float | None = None
    attempts: list[Attempt] = field(default_factory=list)
    news_s: list[float] = field(default_factory=list)
    """When the client learnt something new: more tokens than it had ever seen."""
    workers: set[str] = field(default_factory=set)
    """Who it was aboard, as the router tells afterwards."""
    num_dispatches: int = 0
    """The same source."""

    @property
    def name(self) -> str:
        return self.job.request.request_id


class Mismatch(Exception):
    """What came is not what an undisturbed run gives."""


class Reading:
    """Compares one attempt's stream with the right answers."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._got: dict[int, list[SampledToken]] = {a.index: [] for a in job.answers}
        self._text = ""
        self._ended: set[int] = set()
        self._usage: tuple[int, int] | None = None

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self._got.values())) + len(self._text)

    def take(self, piece: Piece) -> None:
        """Raises Mismatch."""
        answer = next((a for a in self._job.answers if a.index == piece.choice), None)
        if answer is None or (piece.choice in self._ended and (piece.tokens or piece.text or piece.finish)):
            raise Mismatch(f"something about choice {piece.choice}, which has ended or was not asked for: {piece}")
        if self._job.front is Front.HTTP:
            self._take_text(answer, piece.text)
        else:
            self._take_tokens(answer, piece.tokens)
        if piece.finish is not None:
            self._ended.add(piece.choice)
            whole = text_of(answer.token_ids) == self._text if self._job.front is Front.HTTP else (
                len(self._got[piece.choice]) == len(answer.tokens))
            if not whole or piece.finish is not answer.finish:
                raise Mismatch(f"choice {piece.choice} ended as {piece.finish} after {self.num_tokens} tokens, it "
                               f"should as {answer.finish} after {len(answer.tokens)}")
        self._usage = piece.usage or self._usage

    def end(self) -> None:
        """The stream has ended without an error."""
        open_choices = self._got.keys() - self._ended
        if open_choices:
            raise Mismatch(f"the stream ended, and choices {sorted(open_choices)} have not")
        right = (len(self._job.request.prompt), sum(len(a.tokens) for a in self._job.answers))
        if self._usage != right:
            raise Mismatch(f"usage (prompt, output) is {self._usage}, it should be {right}")

    def _take_tokens(self, answer: Answer, tokens: tuple[SampledToken, ...]) -> None:
        got = self._got[answer.index]
        at = len(got)
        right = answer.tokens[at : at + len(tokens)]
        if tokens != right:
            raise Mismatch(f"choice {answer.index} from token {at} on: {_shown(tokens)}, it should be {_shown(right)}; "
                           f"{_kind(got, tokens, answer)}")
        got.extend(tokens)

    def _take_text(self, answer: Answer, text: str) -> None:
        right = text_of(answer.token_ids)
        if not right.startswith(self._text + text):
            raise Mismatch(f"text {self._text + text!r}, it should be {right!r}")
        self._text += text


def _shown(tokens: tuple[SampledToken, ...]) -> str:
    scored = any(t.logprob for t in tokens)
    return str(tokens if scored else [t.token_id for t in tokens])


def _kind(got: list[SampledToken], tokens: tuple[SampledToken, ...], answer: Answer) -> str:
    """Repeated, skipped, or simply wrong."""
    for shift in range(1, 200):
        for name, start in (("repeated", len(got) - shift), ("lost", len(got) + shift)):
            if tokens and start >= 0 and answer.tokens[start : start + len(tokens)] == tokens:
                return f"{shift} {name}"
    return "wrong"


@dataclass(slots=True)
class Clients:
    """`disturbed(router, since)`: a fault was on this router at some time since then."""

    workload: Workload
    speakers: Speakers
    routers: tuple[str, ...]
    disturbed: Callable[[str, float], bool]
    on_end: Callable[[Question], None]
    questions: list[Question]
    """All that was ever asked is added here."""
    in_flight: dict[str, Question] = field(default_factory=dict)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, num_clients: int) -> None:
        """Until `stopping`; then until the questions that are open have ended."""
        async with asyncio.TaskGroup() as tasks:
            for number in range(num_clients):
                tasks.create_task(self._client(number), name=f"client {number}")

    async def _client(self, number: int) -> None:
        turn = number
        while not self.stopping.is_set():
            job = self.workload.draw()
            question = Question(job, asyncio.get_running_loop().time())
            self.questions.append(question)
            self.in_flight[question.name] = question
            try:
                async with asyncio.timeout(job.request.deadline_s + GRACE_S):
                    await self.ask(question, turn)
            except TimeoutError:
                question.detail = "no end within its deadline and a grace"
            finally:
                question.ended_s = asyncio.get_running_loop().time()
                del self.in_flight[question.name]
                self.on_end(question)
            turn += 1

    async def ask(self, question: Question, turn: int) -> None:
        """Sets the outcome. `turn` says which router to begin with."""
        loop = asyncio.get_running_loop()
        while question.outcome is Outcome.OPEN:
            router = self.routers[(turn + len(question.attempts)) % len(self.routers)]
            attempt = Attempt(router, f"{question.name}.{len(question.attempts)}", loop.time())
            question.attempts.append(attempt)
            try:
                await self._attempt(question, attempt)
            except Mismatch as e:
                question.outcome, question.detail = Outcome.WRONG, str(e)
            except BatonError as e:
                if not (isinstance(e, PeerLost) and self.disturbed(router, attempt.started_s)):
                    question.outcome, question.detail = Outcome.FAILED, f"{e.code}: {e.message}"
                await asyncio.sleep(AGAIN_S)

    async def _attempt(self, question: Question, attempt: Attempt) -> None:
        loop, job, reading = asyncio.get_running_loop(), question.job, Reading(question.job)
        async with aclosing(self.speakers.ask(attempt.router, job, attempt.request_id)) as pieces:
            async for piece in pieces:
                attempt.request_id = piece.request_id or attempt.request_id
                reading.take(piece)
                question.news_s += [loop.time()] * (reading.num_tokens - len(question.news_s))
                if job.cancel_after_tokens is not None and reading.num_tokens >= job.cancel_after_tokens:
                    question.outcome = Outcome.LEFT
                    return
        reading.end()
        question.outcome = Outcome.DONE
