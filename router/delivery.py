"""One request under way, as plain state: what the client has of each answer, and how the request may end.

Owns exactness: (request, epoch, choice, first_index) decides what of a chunk is new. Knows no workers, clocks or
streams: whoever dispatches it says what arrived.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

from baton.core.errors import Cancelled, PeerLost
from baton.core.layout import Capability
from baton.core.messages import TokenChunk
from baton.core.request import Choice, FinishReason, Request
from baton.core.worker import Span


@dataclass(slots=True)
class Answer:
    """One choice of a request."""

    index: int
    tokens: list[int]
    """What was accepted of it: the client has it, or reads it next."""
    finish: FinishReason | None = None


@dataclass(slots=True)
class Delivery:
    """How far a request has come. `accept` is the only way on."""

    request: Request
    answers: dict[int, Answer] = field(init=False)
    cached_tokens: int = 0
    """Prompt tokens that were not computed for this request, as the first attempt that brought tokens says: what a
    later one finds cached, we had computed."""
    spans: tuple[Span, ...] = ()
    unfinished: list[Answer] = field(init=False)
    _counted_epoch: int | None = None

    def __post_init__(self) -> None:
        self.answers = {c.index: Answer(c.index, list(c.delivered)) for c in self.request.choices}
        self.unfinished = list(self.answers.values())

    @property
    def is_open(self) -> bool:
        return bool(self.unfinished)

    @property
    def num_output_tokens(self) -> int:
        return sum(len(a.tokens) for a in self.answers.values())

    @property
    def longest(self) -> int:
        """Tokens, prompt included, of the longest answer that is not finished."""
        return len(self.request.prompt) + max([len(a.tokens) for a in self.unfinished], default=0)

    @property
    def num_shared_tokens(self) -> int:
        """Of `remaining(...).shared`: what all unfinished answers begin with."""
        return self.longest if len(self.unfinished) == 1 else len(self.request.prompt)

    def shared_from(self, start: int) -> tuple[int, ...]:
        """Of these tokens those from there on."""
        prompt = self.request.prompt
        if len(self.unfinished) != 1:
            return prompt[start:]
        return (*prompt[start:], *self.unfinished[0].tokens[max(0, start - len(prompt)) :])

    @property
    def num_apart_tokens(self) -> int:
        """What each of several unfinished answers has beyond that, in all."""
        return sum(len(a.tokens) for a in self.unfinished) if len(self.unfinished) > 1 else 0

    def remaining(self, deadline_s: float) -> Request:
        """What is still to be generated, for the next attempt: finished choices are left out, the others replay what
        was delivered."""
        choices = tuple(Choice(a.index, tuple(a.tokens)) for a in self.unfinished)
        return dataclasses.replace(self.request, choices=choices, deadline_s=deadline_s)

    def accept(self, chunk: TokenChunk) -> TokenChunk | None:
        """What of a chunk is new; None if nothing is. Raises PeerLost when tokens are missing before it, or it speaks
        of what cannot be."""
        answer = self.answers.get(chunk.choice)
        if answer is None:
            raise PeerLost(f"request {self.request.request_id} has no choice {chunk.choice}, its worker speaks of one. "
                           "It is sent to another worker.")
        if answer.finish is not None:
            return None
        have = len(answer.tokens)
        end = chunk.first_index + len(chunk.token_ids)
        if chunk.first_index > have or (chunk.finish is not None and end < have):
            raise PeerLost(
                f"choice {chunk.choice} of request {self.request.request_id} has {have} tokens, its worker went on "
                f"with [{chunk.first_index}, {end}). It is sent to another worker."
            )
        wants_logprobs = self.request.sampling.logprobs is not None
        if len(chunk.logprobs) != (len(chunk.token_ids) if wants_logprobs else 0):
            raise PeerLost(
                f"choice {chunk.choice} of request {self.request.request_id} came with {len(chunk.logprobs)} log-probs "
                f"for {len(chunk.token_ids)} tokens. It is sent to another worker."
            )
        known = have - chunk.first_index
        fresh = chunk.token_ids[known:]
        answer.tokens.extend(fresh)
        if chunk.finish is not None:
            self._end(answer, chunk.finish)
        if self._counted_epoch in (None, chunk.epoch):
            self.cached_tokens = max(self.cached_tokens, chunk.cached_tokens)
            self._counted_epoch = chunk.epoch if fresh else self._counted_epoch
        self.spans = chunk.spans or self.spans
        if not fresh and chunk.finish is None:
            return None
        if not known:
            return chunk
        return dataclasses.replace(chunk, first_index=have, token_ids=fresh, logprobs=chunk.logprobs[known:])

    def conclude(self, epoch: int, capability: Capability) -> Iterator[TokenChunk]:
        """The last chunks of choices whose tokens already end them: their worker, which `capability` describes, died
        before it could say so."""
        for answer in self.answers.values():
            if answer.finish is None and (finish := self._natural_end(answer.tokens, capability)) is not None:
                self._end(answer, finish)
                yield TokenChunk(self.request.request_id, epoch, len(answer.tokens), (), finish, answer.index,
                                 cached_tokens=self.cached_tokens, spans=self.spans)

    def _end(self, answer: Answer, finish: FinishReason) -> None:
        answer.finish = finish
        self.unfinished = [a for a in self.unfinished if a is not answer]

    def how_it_ended(self) -> str:
        """Without an error: as its worker said of the last choice, else by its reader, who had enough (a stop string)
        or went away."""
        if self.is_open:
            return Cancelled.code
        return str(max(self.answers.values(), key=lambda a: a.index).finish)

    def _natural_end(self, tokens: list[int], capability: Capability) -> FinishReason | None:
        if not tokens:
            return None
        sampling = self.request.sampling
        eos = () if sampling.ignore_eos else capability.eos_token_ids
        if tokens[-1] in (*sampling.stop_token_ids, *eos):
            return FinishReason.STOP
        room = capability.max_model_len - len(self.request.prompt)
        return FinishReason.LENGTH if len(tokens) >= min(sampling.max_tokens, room) else None
