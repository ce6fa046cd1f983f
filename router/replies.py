"""OpenAI's reply bodies: whole answers, stream events, and errors. Plain data to bytes, nothing decided here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from baton.core.errors import BatonError
from baton.core.request import FinishReason
from baton.router.generation import Usage
from baton.router.openai import Endpoint

DONE = b"data: [DONE]\n\n"


def encode(document: Any) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def event(document: Any) -> bytes:
    """One server-sent event. JSON has no bare line feed, so one `data:` line holds it."""
    return b"data: " + encode(document) + b"\n\n"


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


@dataclass(frozen=True, slots=True)
class Shape:
    """What all bodies of one reply share."""

    endpoint: Endpoint
    request_id: str
    created: int
    model: str
    fingerprint: str
    include_usage: bool

    def whole(self, text: str, finish: FinishReason, usage: Usage) -> dict[str, Any]:
        chat = self.endpoint is Endpoint.CHAT
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish.value}
        return {**self._head("chat.completion" if chat else "text_completion"), "choices": [choice],
                "usage": usage_body(usage)}

    def opening(self) -> bytes:
        """The first event of a chat: who speaks. A completion has none."""
        return self._event([self._choice({"role": "assistant", "content": "", "refusal": None}, None)]) if (
            self.endpoint is Endpoint.CHAT) else b""

    def piece(self, text: str) -> bytes:
        return self._event([self._choice({"content": text}, None) if self.endpoint is Endpoint.CHAT
                            else {"index": 0, "text": text, "logprobs": None, "finish_reason": None}])

    def closing(self, finish: FinishReason, usage: Usage) -> bytes:
        """The last events: why it ended, usage where asked for, [DONE]."""
        last = self._event([self._choice({}, finish) if self.endpoint is Endpoint.CHAT
                            else {"index": 0, "text": "", "logprobs": None, "finish_reason": finish.value}])
        if self.include_usage:
            last += event({**self._head(self._chunk_object), "choices": [], "usage": usage_body(usage)})
        return last + DONE

    @property
    def _chunk_object(self) -> str:
        return "chat.completion.chunk" if self.endpoint is Endpoint.CHAT else "text_completion"

    @staticmethod
    def _choice(delta: dict[str, Any], finish: FinishReason | None) -> dict[str, Any]:
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish.value if finish else None}

    def _event(self, choices: list[dict[str, Any]]) -> bytes:
        usage = {"usage": None} if self.include_usage else {}
        return event({**self._head(self._chunk_object), "choices": choices, **usage})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.request_id, "object": kind, "created": self.created, "model": self.model,
                "system_fingerprint": self.fingerprint}
