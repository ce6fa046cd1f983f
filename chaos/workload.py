"""What the clients of a chaos run ask for, and what they must get.

Owns the draw: a workload is a pure function of its seed. Of the hash model the right answer is computed; of any other
model it is what an undisturbed stack answered (`learn`), so that there the same few requests come again and again.
"""

from __future__ import annotations

import dataclasses
import enum
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from baton.core.request import Choice, Request, SamplingParams
from baton.models.hash_model import VOCABULARY, Answer, expected

MAX_TOKENS = 800
"""Of a prompt with its answer."""
NUM_LEARNT = 12


class Front(enum.StrEnum):
    GRPC = "grpc"
    HTTP = "http"


@dataclass(frozen=True, slots=True)
class Job:
    """One client's question."""

    request: Request
    answers: tuple[Answer, ...]
    """In the order of the request's choices."""
    front: Front = Front.GRPC
    cancel_after_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Shape:
    """Of the draw. Lengths are tokens, both ends inclusive; probabilities per request."""

    num_prefixes: int = 4
    prefix_tokens: tuple[int, int] = (64, 256)
    suffix_tokens: tuple[int, int] = (8, 280)
    output_tokens: tuple[int, int] = (24, 96)
    p_follow_up: float = 0.25
    p_http: float = 0.2
    p_cancel: float = 0.08
    p_choices: float = 0.15
    p_penalties: float = 0.2
    p_logprobs: float = 0.2
    p_eos: float = 0.3


PLAIN = Shape(p_choices=0.0, p_penalties=0.0, p_logprobs=0.0)


@dataclass(slots=True)
class HashWorkload:
    rng: random.Random
    deadline_s: float
    head_dim: int
    shape: Shape = field(default_factory=Shape)
    _prefixes: list[tuple[int, ...]] = field(default_factory=list)
    _past: list[tuple[int, ...]] = field(default_factory=list)
    _num_jobs: int = 0

    def __post_init__(self) -> None:
        self._prefixes = [self._tokens(self.shape.prefix_tokens) for _ in range(self.shape.num_prefixes)]

    def draw(self) -> Job:
        rng, shape = self.rng, self.shape
        self._num_jobs += 1
        front = Front.HTTP if rng.random() < shape.p_http else Front.GRPC
        sampling = self._sampling(front)
        several = front is Front.GRPC and rng.random() < shape.p_choices
        choices = tuple(Choice(i) for i in range(rng.randint(2, 3) if several else 1))
        request = Request(f"q{self._num_jobs}", self._prompt(), sampling, choices, deadline_s=self.deadline_s)
        answers = expected(request, MAX_TOKENS, self.head_dim)
        self._past = [*self._past[-20:], request.prompt + answers[0].token_ids]
        leaves = rng.randint(0, 20) if rng.random() < shape.p_cancel else None
        return Job(request, answers, front, leaves)

    def _sampling(self, front: Front) -> SamplingParams:
        rng, shape = self.rng, self.shape
        plain = SamplingParams(max_tokens=rng.randint(*shape.output_tokens), seed=rng.getrandbits(63),
                               ignore_eos=front is Front.GRPC and rng.random() >= shape.p_eos)
        if front is Front.GRPC and rng.random() < shape.p_penalties:
            plain = dataclasses.replace(
                plain, frequency_penalty=rng.choice((0.0, 0.5)), presence_penalty=rng.choice((0.25, 1.0)),
                repetition_penalty=rng.choice((1.0, 1.25)), logit_bias=((rng.randrange(4, VOCABULARY), 2.0), (3, -1.5)))
        if front is Front.GRPC and rng.random() < shape.p_logprobs:
            plain = dataclasses.replace(plain, logprobs=rng.randint(0, 3))
        return plain

    def _prompt(self) -> tuple[int, ...]:
        rng, shape = self.rng, self.shape
        follows = self._past and rng.random() < shape.p_follow_up
        head = rng.choice(self._past) if follows else rng.choice(self._prefixes)
        longest = MAX_TOKENS - shape.output_tokens[1]
        return (head + self._tokens(shape.suffix_tokens))[:longest]

    def _tokens(self, length: tuple[int, int]) -> tuple[int, ...]:
        return tuple(self.rng.randrange(1, VOCABULARY) for _ in range(self.rng.randint(*length)))


@dataclass(slots=True)
class LearntWorkload:
    """Greedy answers of a real model, each asked for once before anything is disturbed."""

    rng: random.Random
    jobs: list[Job]

    def draw(self) -> Job:
        job = self.rng.choice(self.jobs)
        leaves = self.rng.randint(0, 20) if self.rng.random() < PLAIN.p_cancel else None
        return dataclasses.replace(job, cancel_after_tokens=leaves)


async def learn(
    rng: random.Random, deadline_s: float, ask: Callable[[Request], Awaitable[Answer]]
) -> LearntWorkload:
    jobs = []
    for number in range(NUM_LEARNT):
        prompt = tuple(rng.randrange(100, 20_000) for _ in range(rng.randint(80, 400)))
        sampling = SamplingParams(max_tokens=rng.randint(24, 48), temperature=0.0, ignore_eos=True)
        request = Request(f"learn{number}", prompt, sampling, deadline_s=deadline_s)
        jobs.append(Job(request, (await ask(request),)))
    return LearntWorkload(rng, jobs)


Workload = HashWorkload | LearntWorkload
