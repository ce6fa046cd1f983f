"""The OpenAI-compatible stream as a client sees it: server-sent events into pieces of text. Shared by `chat` and
`serve`; knows nothing of how the request got there."""

from __future__ import annotations

import json
from dataclasses import dataclass

from baton.core.errors import InternalError

CHAT_PATH = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Piece:
    """One event of an answer. `finish` is set on the last one that carries a choice; `id` names the request."""

    id: str
    text: str
    finish: str | None


def piece(line: str) -> Piece | None:
    """One line of the stream; None for blank lines, comments, usage-only events and [DONE].

    Raises InternalError if the server reports an error inside the stream: an answer that ends so did not end well.
    """
    kind, _, data = line.partition(":")
    if kind != "data" or data.strip() == "[DONE]":
        return None
    event = json.loads(data)
    if "error" in event:
        raise InternalError(message_of(event))
    if not event.get("choices"):
        return None
    choice = event["choices"][0]
    return Piece(str(event.get("id", "")), choice.get("delta", {}).get("content") or "", choice.get("finish_reason"))


def error_message(status: int, body: bytes) -> str:
    """What the server said, from OpenAI's error body, else the status alone."""
    try:
        return message_of(json.loads(body))
    except (ValueError, AttributeError):
        return f"the server answered {status}"


def message_of(event: dict[str, object]) -> str:
    error = event.get("error")
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)
