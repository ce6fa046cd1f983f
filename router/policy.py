"""Where a request could go: the nouns that every routing policy speaks.

A policy is handed facts and candidates and answers with a `Route`. It does not know streams, retries or how a prefix
is looked up. Baton's own is in cost.py; what it is compared with, in baselines.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from baton.core.step_model import StepModel
from baton.core.worker import Route, WorkerInfo, WorkerLoad

MAX_SPARES = 2
"""Further prefill workers that a route names."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a request asks of the fleet."""

    num_tokens: int
    """Tokens whose KV the decode worker must have: the prompt, and what was delivered of an only choice."""
    num_choices: int = 1
    turn: int = 0
    """Decisions that this router made before: policies remember none, who goes in turns goes by this."""
    output_tokens: float = 128.0
    """Expected of each choice."""
    handoff_s: float = 0.005
    """What a hand-off adds to the time of the first token: calls and leases."""
    priority: int = 0
    """A class above counts what it costs others half as much, one below twice."""
    deadline_s: float = 86_400.0
    """Left for all of it."""
    num_behind: int = 0
    """Requests that wait in the router."""
    home: str = ""
    """worker_id of where the session's last turn was decoded, if it has one."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that could take the request now."""

    info: WorkerInfo
    load: WorkerLoad
    """As reported."""
    held_blocks: int = 0
    """Leading blocks of this request in its prefix map."""
    queued_prefill_tokens: int = 0
    """Reported, plus what was dispatched to it since."""
    num_sequences: int = 0
    """Running, waiting, and dispatched since."""
    bandwidth: Mapping[str, float] = field(default_factory=dict)
    """Measured bytes/s from each peer it has pulled from."""
    queued_prefill_pairs: int = 0
    """(query, key) pairs of `queued_prefill_tokens`."""
    context_tokens: int = 0
    """What its sequences read in a decode step, those dispatched since included."""
    age_s: float = 0.0
    """Of the report: the worker has gone on since."""
    expected_blocks: int = 0
    """Leading blocks it will hold once it has computed what was sent to it before, if more than `held_blocks`: a prompt
    that comes behind finds them there, but nobody can pull them yet."""

    def queue_s(self, model: StepModel) -> float:
        """Until the prompts before a new one are computed, by `model`: what was reported, less what was done since, and
        what was dispatched since."""
        load = self.load
        reported_s = model.queue_s(load.queued_prefill_tokens, load.queued_prefill_pairs, load.chunk_tokens)
        now_s = model.queue_s(self.queued_prefill_tokens, self.queued_prefill_pairs, load.chunk_tokens)
        return now_s - min(self.age_s, reported_s)

    def uncached(self, num_tokens: int) -> int:
        """Tokens it would have to compute: never less than one, the last is always computed to sample from it."""
        blocks = max(self.held_blocks, self.expected_blocks)
        return max(1, num_tokens - blocks * self.info.capability.layout.block_size)

    def has_room(self, facts: Facts) -> bool:
        """Each further choice needs a block of its own at once."""
        missing = self.info.capability.layout.num_blocks_for(facts.num_tokens + 1) - self.held_blocks
        return self.load.total_blocks == 0 or missing + facts.num_choices - 1 <= self.load.available_blocks


@dataclass(frozen=True, slots=True)
class Candidates:
    decode: Sequence[Candidate]
    prefill: Sequence[Candidate]
    fits: Callable[[WorkerInfo, WorkerInfo], bool]
    """Do they store and speak alike?"""
    holders: Sequence[Candidate] = ()
    """Who can lend a prefix of the prompt, most first. May also be among the others."""


class Policy(Protocol):
    """Chooses among candidates; None when no decode worker is offered. Never an unfitting pair, never a wait."""

    compares_all: ClassVar[bool]
    """It must be offered every worker. Else, of many, those that can be the cheapest (shortlist.py)."""

    def price(self, facts: Facts, candidates: Candidates) -> Route | None: ...
