"""What the clients of a simulated world ask for: shared prefixes, follow-up turns, cancels, slow and hurried readers.

Owns the draw. A workload is a pure function of its generator, so that a seed names it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from baton.core.request import Choice, Request, SamplingParams
from baton.models.hash_model import VOCABULARY, expected


@dataclass(frozen=True, slots=True)
class Job:
    """One client with one request."""

    arrival_s: float
    request: Request
    cancel_after_s: float | None = None
    """Goes away so long after it asked, wherever the request is then."""
    cancel_after_tokens: int | None = None
    read_delay_s: float = 0.0
    """Pause after each chunk it reads."""
    router: float = 0.0
    """In [0, 1): which of the routers that are up."""
    may_miss_deadline: bool = False
    """Its deadline is so short that missing it is no fault of ours."""
    resumes: bool = False
    """If its router dies, it reads on at another one."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a workload. Lengths are tokens; ends are inclusive here, because random.randint's are."""

    max_model_len: int = 48
    num_prefixes: int = 3
    prefix_tokens: tuple[int, int] = (4, 16)
    suffix_tokens: tuple[int, int] = (1, 14)
    output_tokens: tuple[int, int] = (1, 14)
    mean_gap_s: float = 0.02
    p_cancel: float = 0.15
    p_slow: float = 0.1
    p_hurried: float = 0.05
    p_follow_up: float = 0.25
    """A follow-up's prompt is an earlier prompt, its answer, and something new: the multi-turn chat."""
    deadline_s: float = 60.0
    p_resume: float = 0.8
    p_choices: float = 0.2
    """Several parallel answers."""
    max_choices: int = 3
    fancy: float = 1.0
    """Scales how often penalties, biases, seeds and log-probs are asked for."""
    tenants: tuple[str, ...] = ("", "acme", "umbra")
    """All of them use the same prefixes, and must not share a block."""


@dataclass(slots=True)
class Workload:
    """Draws jobs, wave after wave, ids counting on."""

    rng: random.Random
    shape: Shape = field(default_factory=Shape)
    _prefixes: list[tuple[int, ...]] = field(default_factory=list)
    _past: list[tuple[int, ...]] = field(default_factory=list)
    _num_jobs: int = 0

    def __post_init__(self) -> None:
        for _ in range(self.shape.num_prefixes):
            self._prefixes.append(self._tokens(self.shape.prefix_tokens))

    def wave(self, num_jobs: int, start_s: float) -> tuple[Job, ...]:
        jobs = []
        for _ in range(num_jobs):
            start_s += self.rng.expovariate(1 / self.shape.mean_gap_s)
            jobs.append(self._job(start_s))
        return tuple(jobs)

    def _job(self, arrival_s: float) -> Job:
        rng, shape = self.rng, self.shape
        self._num_jobs += 1
        hurried = rng.random() < shape.p_hurried
        deadline_s = rng.uniform(0.05, 0.5) if hurried else shape.deadline_s
        tenant = rng.choice(shape.tenants)
        num_choices = rng.randint(2, shape.max_choices) if rng.random() < shape.p_choices else 1
        request = Request(f"q{self._num_jobs}", self._prompt(), self._sampling(),
                          tuple(Choice(i) for i in range(num_choices)), tenant, deadline_s)
        self._past.append(request.prompt + rng.choice(expected(request, shape.max_model_len)).token_ids)
        kind = rng.random()
        after_s = rng.uniform(0.0, 0.6) if kind < shape.p_cancel / 2 else None
        after_tokens = rng.randint(0, 4) if shape.p_cancel / 2 <= kind < shape.p_cancel else None
        slow = shape.p_cancel <= kind < shape.p_cancel + shape.p_slow
        pause_s = rng.uniform(0.01, 0.2) if slow else 0.0
        resumes = rng.random() < shape.p_resume
        return Job(arrival_s, request, after_s, after_tokens, pause_s, rng.random(), hurried, resumes)

    def _sampling(self) -> SamplingParams:
        rng, shape = self.rng, self.shape

        def sometimes(p: float) -> bool:
            return rng.random() < p * shape.fancy

        return SamplingParams(
            max_tokens=rng.randint(*shape.output_tokens), ignore_eos=rng.random() < 0.3,
            stop_token_ids=(rng.randrange(VOCABULARY),) if rng.random() < 0.2 else (),
            seed=rng.randrange(2**64) if sometimes(0.2) else None,
            frequency_penalty=rng.choice((-0.5, 0.5)) if sometimes(0.15) else 0.0,
            presence_penalty=0.3 if sometimes(0.1) else 0.0,
            repetition_penalty=1.3 if sometimes(0.15) else 1.0,
            logit_bias=((rng.randrange(VOCABULARY), 2.0),) if sometimes(0.1) else (),
            logprobs=rng.randint(0, 3) if sometimes(0.1) else None,
        )

    def _prompt(self) -> tuple[int, ...]:
        rng, shape = self.rng, self.shape
        past = self._past and rng.random() < shape.p_follow_up
        head = rng.choice(self._past) if past else rng.choice(self._prefixes)
        tail = self._tokens(shape.suffix_tokens)
        longest = shape.max_model_len - 1
        return head + tail if len(head + tail) <= longest else (head[: longest // 2] + tail)[:longest]

    def _tokens(self, length: tuple[int, int]) -> tuple[int, ...]:
        return tuple(self.rng.randrange(VOCABULARY) for _ in range(self.rng.randint(*length)))
