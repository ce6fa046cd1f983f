"""Reply bodies: an event made from a kept frame is what the whole would be."""

from __future__ import annotations

import json
from typing import Any

import pytest

from baton.core.request import FinishReason
from baton.router.bookmark import Bookmark, Place
from baton.router.openai import Endpoint
from baton.router.output import Delta, Usage
from baton.router.replies import Shape

TEXTS = ["a", "\0", '"\\', "\n\r\u2028", "é🚀", "</script>", "\x7f\x1b"]


def events(data: bytes) -> list[dict[str, Any]]:
    """Each stands on one line."""
    lines = data.decode().split("\n\n")
    assert lines.pop() == ""
    return [json.loads(line.partition("data: ")[2]) for line in lines]


def bookmark(num_choices: int) -> Bookmark:
    """Of a reader who knows who speaks."""
    return Bookmark("r", 7, [Place(opened=True) for _ in range(num_choices)])


@pytest.mark.parametrize("include_usage", [False, True])
@pytest.mark.parametrize("endpoint", Endpoint)
def test_each_token_s_event_says_its_text_and_its_choice(endpoint: Endpoint, include_usage: bool) -> None:
    shape = Shape(endpoint, "r", 7, 'm "\0" m', "f", include_usage, False, lambda _: b"")
    mark = bookmark(len(TEXTS))
    for index, text in [*enumerate(TEXTS), *enumerate(reversed(TEXTS))]:
        (event,) = events(shape.news(Delta(index, text, (1,), None, Usage(1, 0, 1), (), (), False), mark))
        (choice,) = event.pop("choices")
        said = {"delta": {"content": text}} if endpoint is Endpoint.CHAT else {"text": text}
        assert choice == {"index": index, **said, "logprobs": None, "finish_reason": None}
        kind = "chat.completion.chunk" if endpoint is Endpoint.CHAT else "text_completion"
        head = {"id": "r", "object": kind, "created": 7, "model": 'm "\0" m', "system_fingerprint": "f"}
        assert event == head | ({"usage": None} if include_usage else {})


def test_the_last_token_s_event_comes_before_the_finish() -> None:
    shape = Shape(Endpoint.COMPLETIONS, "r", 7, "m", "f", False, False, lambda _: b"")
    data = shape.news(Delta(0, "end", (1,), FinishReason.LENGTH, Usage(1, 0, 1), (), (), True), bookmark(1))
    said, finish = events(data.removesuffix(b"data: [DONE]\n\n"))
    assert [e["choices"][0]["text"] for e in (said, finish)] == ["end", ""]
    assert [e["choices"][0]["finish_reason"] for e in (said, finish)] == [None, "length"]
