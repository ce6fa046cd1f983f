"""What the clients of a replay ask, and when: a trace's requests on the replay's clock, in its tokens.

Equal block names of the trace become equal blocks of tokens, in every world alike.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from baton.bench.load.traces import Traced
from baton.bench.route.setup import FOREVER_S, PREFILL_TOKENS_PER_S, Setup
from baton.core.request import Request, SamplingParams

NAME_TOKENS = 4
"""Of a block's tokens, those that spell its name, a byte each: token 0 would end an answer."""
FIRST_FRESH = 1 << 24
"""Blocks that the trace does not name have names from here on."""


@dataclass(frozen=True, slots=True)
class Question:
    at_s: float
    """By the replay's clock, from its begin."""
    request: Request


def questions(trace: Sequence[Traced], setup: Setup, load: float) -> list[Question]:
    """In order of time. Nothing is put into an answer's way: it has no deadline, and as many tokens as recorded."""
    fresh = itertools.count(FIRST_FRESH)
    return [
        Question(traced.at_s / setup.pace, _request(f"r{number}", traced, setup, fresh))
        for number, traced in enumerate(timed(trace, setup, load))
    ]


def timed(trace: Sequence[Traced], setup: Setup, load: float) -> list[Traced]:
    """The trace with its time stretched so that its prompts, computed whole, would keep the prefill workers busy for
    `load` of it."""
    offered_s = sum(r.prompt_tokens for r in trace) / (PREFILL_TOKENS_PER_S * setup.num_prefill)
    span_s = trace[-1].at_s - trace[0].at_s
    stretch = offered_s / load / span_s if span_s else 0.0
    return [dataclasses.replace(r, at_s=(r.at_s - trace[0].at_s) * stretch) for r in trace]


def _request(request_id: str, traced: Traced, setup: Setup, fresh: Iterator[int]) -> Request:
    length, tokens = max(1, traced.prompt_tokens // setup.grain), list[int]()
    names = itertools.chain(traced.blocks, fresh)
    while len(tokens) < length:
        tokens += (1 + byte for byte in next(names).to_bytes(NAME_TOKENS, "little"))
        tokens += [1] * (setup.block_tokens - NAME_TOKENS)
    output = 1 if setup.mode == "fcfs" else max(1, round(traced.output_tokens / setup.grain))
    sampling = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
    return Request(request_id, tuple(tokens[:length]), sampling, deadline_s=FOREVER_S)
