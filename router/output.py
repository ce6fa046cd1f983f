"""The text of a request's answers while their tokens come: characters that are not complete, stop strings, what is held
back, log-probs, usage. One state per answer (choice), here in the router and nowhere else.

Does not know: workers, attempts, HTTP. Tokens are told apart by choice alone, so nothing changes here when another
worker goes on with them.

Life of a choice: its tokens become text, or are held back while they may still turn out to be part of a character or a
stop string -> it ends with its source's finish, or at a stop string; what the source says of it afterwards is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from baton.core.errors import Cancelled, InternalError, from_code
from baton.core.messages import TokenChunk
from baton.core.request import FinishReason, Request, TokenLogprob
from baton.router.detokenize import Detokenizer, StopMatcher
from baton.router.text import TextCodec


@dataclass(slots=True)
class Usage:
    """As of one delta. Nobody changes one, or a Delta; they are not frozen because there is one of each for every
    token, and frozen ones take four times as long to make."""

    prompt_tokens: int
    """Once, however many answers it has."""
    cached_tokens: int
    output_tokens: int
    """Of all choices."""


@dataclass(frozen=True, slots=True)
class ShownToken:
    """A token whose text has begun to show. Tokens of a stop string never are."""

    token_id: int
    offset: int
    """Characters of its answer before it."""
    logprob: TokenLogprob


@dataclass(slots=True)
class Delta:
    """News of one choice."""

    choice: int
    text: str
    token_ids: tuple[int, ...]
    finish: FinishReason | None
    """Of this choice, with its last delta: STOP or LENGTH."""
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] = ()
    """Aligned with token_ids, if asked for."""
    shown: tuple[ShownToken, ...] = ()
    """Those that this delta's text makes visible, if log-probs are asked for: fewer or more than its token_ids."""
    last: bool = False
    """Every choice has ended."""


class Output:
    """All choices of one running request."""

    def __init__(self, codec: TextCodec, request: Request, stop: Sequence[str]) -> None:
        silent = frozenset(request.sampling.stop_token_ids) | frozenset(codec.card.eos_token_ids)
        self._texts = {c.index: _ChoiceText(codec.detokenizer(), StopMatcher(stop), silent) for c in request.choices}
        """Of those that have not ended for the client."""
        self._at_source = set(self._texts)
        self._num_choices = len(request.choices)
        self._wants_logprobs = request.sampling.logprobs is not None
        self._num_prompt_tokens = len(request.prompt)
        self._num_output_tokens = 0
        self._cached_tokens = 0

    @property
    def runs_on(self) -> bool:
        """The source still works for a choice that has ended here, at a stop string."""
        return bool(self._at_source)

    def take(self, chunk: TokenChunk) -> Delta | None:
        """None: nothing new for the client. Raises the error that a chunk carries."""
        self._check(chunk)
        self._cached_tokens = max(self._cached_tokens, chunk.cached_tokens)
        if chunk.finish is not None:
            self._at_source.discard(chunk.choice)
        text = self._texts.get(chunk.choice)
        if text is None:
            return None
        said, used, finish = text.take(chunk)
        if finish is not None:
            del self._texts[chunk.choice]
        self._num_output_tokens += used
        return Delta(
            chunk.choice, said, chunk.token_ids[:used], finish, self._usage(), chunk.logprobs[:used],
            text.shown(finish), not self._texts)

    def _check(self, chunk: TokenChunk) -> None:
        if chunk.finish is FinishReason.ERROR:
            raise from_code(chunk.error_code, chunk.error_message)
        if chunk.finish is FinishReason.CANCELLED:
            raise Cancelled("the request was cancelled.")
        if not 0 <= chunk.choice < self._num_choices:
            raise InternalError(f"request {chunk.request_id} has {self._num_choices} choices, and a worker sent tokens "
                                f"of choice {chunk.choice}.")
        if len(chunk.logprobs) != (len(chunk.token_ids) if self._wants_logprobs else 0):
            raise InternalError(f"request {chunk.request_id} got {len(chunk.logprobs)} log-probs with "
                                f"{len(chunk.token_ids)} tokens.")

    def _usage(self) -> Usage:
        return Usage(self._num_prompt_tokens, self._cached_tokens, self._num_output_tokens)


class _ChoiceText:
    def __init__(self, detokenizer: Detokenizer, matcher: StopMatcher, silent_at_end: frozenset[int]) -> None:
        self._detokenizer = detokenizer
        self._matcher = matcher
        self._silent_at_end = silent_at_end
        self._num_read = 0
        """Characters that the tokens so far have come to."""
        self._num_said = 0
        """Of these, not held back."""
        self._hidden: list[ShownToken] = []
        self._held: tuple[int, TokenLogprob | None] | None = None
        """A token that is silent if the text ends with it: known when another one follows, or the end. So what was said
        after so many tokens does not depend on how they were bundled."""

    def take(self, chunk: TokenChunk) -> tuple[str, int, FinishReason | None]:
        """Text to say, how many of the tokens count, and the finish, if this is its end."""
        texts, used = [], 0
        for index, token_id in enumerate(chunk.token_ids):
            texts.append(self._release())
            if self._matcher.stopped:
                break
            used += 1
            self._held = (token_id, chunk.logprobs[index] if chunk.logprobs else None)
            if token_id not in self._silent_at_end:
                texts.append(self._release())
            if self._matcher.stopped:
                break
        finish = chunk.finish
        if finish is not None and finish is not FinishReason.STOP:
            texts.append(self._release())
        if finish is not None and not self._matcher.stopped:
            texts += [self._read(self._detokenizer.flush()), self._matcher.flush()]
        said = "".join(texts)
        self._num_said += len(said)
        return said, used, FinishReason.STOP if self._matcher.stopped else finish

    def _release(self) -> str:
        """The held token's text, as far as it can be said."""
        if self._held is None:
            return ""
        (token_id, logprob), self._held = self._held, None
        if logprob is not None:
            self._hidden.append(ShownToken(token_id, self._num_read, logprob))
        return self._read(self._detokenizer.push(token_id))

    def _read(self, piece: str) -> str:
        self._num_read += len(piece)
        return self._matcher.feed(piece)

    def shown(self, finish: FinishReason | None) -> tuple[ShownToken, ...]:
        """Tokens that have come to light since the last call: those that begin in what was said; and at the end of a
        text that no stop string cut, all."""
        if finish is not None and not self._matcher.stopped:
            count = len(self._hidden)
        else:
            count = sum(token.offset < self._num_said for token in self._hidden)
        shown, self._hidden = self._hidden[:count], self._hidden[count:]
        return tuple(shown)
