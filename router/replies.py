"""OpenAI's reply bodies: whole answers, stream events, and errors. Plain data to bytes, nothing decided here."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from baton.core.errors import BatonError
from baton.core.request import FinishReason, TokenLogprob
from baton.router.bookmark import Bookmark
from baton.router.openai import Endpoint
from baton.router.output import Delta, ShownToken, Usage

DONE = b"data: [DONE]\n\n"
_GAP = "\0"
"""Where the text goes in an event that is kept for it."""
LOWEST_LOGPROB = -9999.0
"""OpenAI's word for a probability of 0: JSON has no infinity."""


_encode_text: Callable[[str], str] = json.JSONEncoder(ensure_ascii=False).encode


def encode(document: Any) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def event(document: Any, bookmark: Bookmark | None = None) -> bytes:
    """One server-sent event, and where its reader is after it. JSON has no bare line feed, so one `data:` line holds
    it."""
    return _id(bookmark) + b"data: " + encode(document) + b"\n\n"


def _id(bookmark: Bookmark | None) -> bytes:
    return f"id: {bookmark}\n".encode() if bookmark is not None else b""


def error_body(error: BatonError) -> dict[str, Any]:
    if error.http_status == 429:
        kind = "rate_limit_error"
    else:
        kind = "invalid_request_error" if error.http_status < 500 else "server_error"
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def usage_body(usage: Usage) -> dict[str, Any]:
    return {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.output_tokens,
            "total_tokens": usage.prompt_tokens + usage.output_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens}}


@dataclass(slots=True)
class Answer:
    """One choice of a reply that is sent whole, as it comes together."""

    texts: list[str] = field(default_factory=list)
    tokens: list[ShownToken] = field(default_factory=list)
    finish: FinishReason | None = None

    def add(self, delta: Delta) -> None:
        self.texts.append(delta.text)
        self.tokens += delta.shown
        self.finish = delta.finish


@dataclass(frozen=True, slots=True)
class Shape:
    """What all bodies of one reply share."""

    endpoint: Endpoint
    request_id: str
    created: int
    model: str
    fingerprint: str
    include_usage: bool
    logprobs: bool
    spelled: Callable[[int], bytes]
    """What a token stands for, alone."""
    _frames: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    """Of each choice: what stands before and behind the text of an event that says nothing else. There is an event for
    every token, and nothing but the text changes."""

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        kind = "chat.completion" if self._is_chat else "text_completion"
        choices = [self._answered(index, answer) for index, answer in enumerate(answers)]
        return {**self._head(kind), "choices": choices, "usage": usage_body(usage)}

    def news(self, delta: Delta, bookmark: Bookmark) -> bytes:
        """What a delta adds to its choice, then why the choice ended, then, after the last one, usage where asked for
        and [DONE]. Empty if it adds nothing to what the reader has, whose bookmark moves on with each event."""
        place = bookmark.places[delta.choice]
        said = b""
        if not place.opened:
            place.opened = True
            said = self._opening(delta.choice, bookmark)
        place.num_tokens += len(delta.token_ids)
        place.said = delta.finish is not None
        if self.logprobs and (delta.text or delta.shown):
            said += self._event(delta.choice, self._piece(delta.text), self._scored(delta.shown), None, bookmark)
        elif delta.text:
            said += _id(bookmark) + self._spoken(delta.choice, delta.text)
        if delta.finish is not None and not place.ended:
            place.ended = True
            nothing: dict[str, Any] = {"delta": {}} if self._is_chat else {"text": ""}
            said += self._event(delta.choice, nothing, None, delta.finish, bookmark)
        if delta.last and self.include_usage and not bookmark.has_usage:
            bookmark.has_usage = True
            usage = {**self._head(self._chunk_object), "choices": [], "usage": usage_body(delta.usage)}
            said += event(usage, bookmark)
        return said + DONE if delta.last else said

    def _opening(self, index: int, bookmark: Bookmark) -> bytes:
        """The first event of a chat's choice: who speaks. A completion has none."""
        if not self._is_chat:
            return b""
        opening = {"delta": {"role": "assistant", "content": "", "refusal": None}}
        return self._event(index, opening, None, None, bookmark)

    @property
    def _is_chat(self) -> bool:
        return self.endpoint is Endpoint.CHAT

    @property
    def _chunk_object(self) -> str:
        return "chat.completion.chunk" if self._is_chat else "text_completion"

    def _answered(self, index: int, answer: Answer) -> dict[str, Any]:
        text = "".join(answer.texts)
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self._is_chat else {"text": text}
        assert answer.finish is not None, f"choice {index} has not ended"
        tokens = self._scored(answer.tokens) if self.logprobs else None
        return {"index": index, **said, "logprobs": tokens, "finish_reason": answer.finish.value}

    def _piece(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}} if self._is_chat else {"text": text}

    def _event(self, index: int, said: dict[str, Any], tokens: dict[str, Any] | None, finish: FinishReason | None,
               bookmark: Bookmark | None = None) -> bytes:
        choice = {"index": index, **said, "logprobs": tokens, "finish_reason": finish.value if finish else None}
        usage = {"usage": None} if self.include_usage else {}
        return event({**self._head(self._chunk_object), "choices": [choice], **usage}, bookmark)

    def _spoken(self, index: int, text: str) -> bytes:
        """As `_event`, several times faster."""
        frame = self._frames.get(index)
        if frame is None:
            before, _, after = self._event(index, self._piece(_GAP), None, None).rpartition(encode(_GAP))
            frame = self._frames[index] = (before, after)
        return frame[0] + _encode_text(text).encode() + frame[1]

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.request_id, "object": kind, "created": self.created, "model": self.model,
                "system_fingerprint": self.fingerprint}

    # ---- log-probs ----

    def _scored(self, tokens: Sequence[ShownToken]) -> dict[str, Any]:
        return self._scored_chat(tokens) if self._is_chat else self._scored_text(tokens)

    def _scored_chat(self, tokens: Sequence[ShownToken]) -> dict[str, Any]:
        def entry(token_id: int, logprob: float) -> dict[str, Any]:
            spelled = self.spelled(token_id)
            return {"token": spelled.decode(errors="replace"), "logprob": finite(logprob), "bytes": [*spelled]}

        return {"content": [
            entry(t.token_id, t.logprob.logprob) | {"top_logprobs": [entry(*other) for other in t.logprob.top]}
            for t in tokens], "refusal": None}

    def _scored_text(self, tokens: Sequence[ShownToken]) -> dict[str, Any]:
        """`top_logprobs` holds the chosen token too, as OpenAI documents it."""
        return {
            "tokens": [self._named(t.token_id) for t in tokens],
            "token_logprobs": [finite(t.logprob.logprob) for t in tokens],
            "top_logprobs": [self._likeliest(t.token_id, t.logprob) for t in tokens],
            "text_offset": [t.offset for t in tokens],
        }

    def _likeliest(self, token_id: int, logprob: TokenLogprob) -> dict[str, float]:
        named: dict[str, float] = {}
        for other, value in (*logprob.top, (token_id, logprob.logprob)):
            named.setdefault(self._named(other), finite(value))
        return named

    def _named(self, token_id: int) -> str:
        """Its text; of one that is not whole characters its bytes, as OpenAI writes them."""
        spelled = self.spelled(token_id)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in spelled)


def finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
