"""What will be asked, when: sessions made from options before anything is sent, so that making prompts costs nothing
while latencies are measured.

1. `Lengths` and `Shape` say what requests look like, a `Process` (arrivals.py) or a trace when they come
2. `synthetic` or `from_trace` makes sessions: a first request at a fixed time, and for chats its further turns
3. drive.py sends them
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from baton.bench.load.arrivals import Process, arrivals
from baton.bench.load.prose import Prose
from baton.bench.load.traces import BLOCK_TOKENS, Traced
from baton.core.errors import SetupError


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a session: what the user adds. What was said before is sent along."""

    pieces: tuple[str, ...]
    """The text, in pieces that turns may share: a trace of long prompts would not fit in memory as whole ones."""
    prompt_tokens: int
    """Of the text, with what the endpoint puts around it, as far as that is known."""
    output_tokens: int

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@dataclass(frozen=True, slots=True)
class Session:
    at_s: float
    """When its first turn is meant to be sent, from the start of the run."""
    turns: tuple[Turn, ...]
    label: str = "requests"
    """Reports are made for each label apart, too."""
    think_s: float = 0.0
    """From the end of an answer to the next turn."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens, drawn evenly from `low` to `high`, both possible."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """From `512` or `256-1024`. Raises SetupError."""
        low, _, high = text.partition("-")
        try:
            lengths = cls(int(low), int(high or low))
        except ValueError:
            lengths = cls(0, 0)
        if not 1 <= lengths.low <= lengths.high:
            raise SetupError(f"the length {text!r} is no number of tokens; as in 512, or 256-1024 for a range.")
        return lengths

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)


@dataclass(frozen=True, slots=True)
class Shape:
    """What synthetic requests look like."""

    prompt: Lengths = Lengths(512, 512)
    output: Lengths = Lengths(64, 64)
    shared_prefix: float = 0.0
    """Share of a first prompt that it has in common with others of its group."""
    prefix_groups: int = 1
    turns: int = 1
    """Requests per session; each further one adds a new prompt of `prompt` tokens to all that was said."""
    think_s: float = 1.0


def synthetic(
    shape: Shape, process: Process, rate: float, duration_s: float, prose: Prose, seed: str, label: str = "requests"
) -> list[Session]:
    """`rate`: sessions per second. Another seed has other prompts: runs that shall not find each other's in a prefix
    cache have different ones."""
    times = arrivals(process, rate, duration_s, random.Random(f"{seed}/{label}/arrivals"))
    shared: dict[int, str] = {}
    sessions = []
    for number, at_s in enumerate(times):
        rng = random.Random(f"{seed}/{label}/{number}")
        group = rng.randrange(shape.prefix_groups)
        turns = tuple(_turn(shape, prose, rng) for _ in range(shape.turns))
        if shape.shared_prefix:
            # As long as the longest needs, once per group; each prompt takes words from its beginning.
            if group not in shared:
                longest = shape.shared_prefix * shape.prompt.high
                shared[group] = prose.text(longest, random.Random(f"{seed}/{label}/prefix/{group}"))
            turns = (_with_prefix(turns[0], shared[group], shape.shared_prefix, prose, rng), *turns[1:])
        sessions.append(Session(at_s, turns, label, shape.think_s))
    return sessions


def _turn(shape: Shape, prose: Prose, rng: random.Random) -> Turn:
    prompt_tokens, output_tokens = shape.prompt.draw(rng), shape.output.draw(rng)
    return Turn((prose.text(max(prompt_tokens - prose.frame_tokens, 1), rng),), prompt_tokens, output_tokens)


def _with_prefix(turn: Turn, prefix: str, share: float, prose: Prose, rng: random.Random) -> Turn:
    common = prose.beginning(prefix, share * turn.prompt_tokens)
    own = turn.prompt_tokens - prose.frame_tokens - prose.tokens(common)
    return Turn((common, prose.text(max(own, 1), rng)), turn.prompt_tokens, turn.output_tokens)


@dataclass(frozen=True, slots=True)
class Scale:
    """How a trace of long requests is made to fit a small model."""

    lengths: float = 1.0
    """Factor on all lengths."""
    max_prompt_tokens: int | None = None
    """Longer prompts are cut at the end, after scaling."""
    max_output_tokens: int | None = None


def from_trace(trace: Sequence[Traced], scale: Scale, prose: Prose, seed: str) -> list[Session]:
    """Equal blocks become equal text, so that prompts share what they shared."""
    blocks: dict[int, str] = {}
    block_tokens = max(BLOCK_TOKENS * scale.lengths, 1.0)
    sessions = []
    for number, request in enumerate(trace):
        wanted = _within(request.prompt_tokens * scale.lengths, scale.max_prompt_tokens)
        left, said = wanted - prose.frame_tokens, []
        for block in request.blocks:
            if left < block_tokens:
                break
            if block not in blocks:
                blocks[block] = prose.text(block_tokens, random.Random(f"{seed}/block/{block}"))
            said.append(blocks[block])
            left -= prose.tokens(blocks[block])
        if left >= 1 or not said:  # the last block of a prompt is not full, and nobody else's
            said.append(prose.text(left, random.Random(f"{seed}/tail/{number}")))
        output_tokens = _within(request.output_tokens * scale.lengths, scale.max_output_tokens)
        sessions.append(Session(request.at_s, (Turn(tuple(said), wanted, output_tokens),)))
    return sessions


def _within(tokens: float, limit: int | None) -> int:
    whole = max(round(tokens), 1)
    return whole if limit is None else min(whole, limit)
