"""A stream that was lost at any byte is read on, at another router, as if it had not been lost: no event is missing,
none comes twice. Over HTTP and over gRPC, whatever the text, the choices and the bundling of tokens."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from baton.core.errors import InvalidRequest
from baton.core.request import MAX_CHOICES
from baton.router.bookmark import Bookmark, Place
from baton.router.grpc_front import InferenceFront
from baton.wire import inference_pb2
from tests.router.front_world import MODEL, EchoDispatcher, FrontWorld, make_codec, open_front

PROMPT = "hé 你 👩‍👧 STOP rest"
BODY = {"model": MODEL, "prompt": PROMPT, "max_tokens": 99, "stream": True}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "usage": {"stream_options": {"include_usage": True}},
    "stop string": {"stop": ["STOP"], "stream_options": {"include_usage": True}},
    "stop at the end": {"stop": ["rest"]},
    "held back to the end": {"stop": ["rest!"]},
    "choices": {"n": 3, "stream_options": {"include_usage": True}},
    "log-probs": {"logprobs": 2, "stop": ["STOP"]},
    "cut": {"max_tokens": 7},
}


def events_of(text: str) -> list[tuple[str, str]]:
    """(id, data) of each event that is whole, as a reader of server-sent events sees them."""
    found, last_id = [], ""
    for event in text.split("\n\n")[:-1]:
        for line in event.split("\n"):
            name, _, value = line.partition(": ")
            if name == "id":
                last_id = value
            else:
                assert name == "data", line
                found.append((last_id, value))
    return found


async def posted(world: FrontWorld, path: str, body: dict[str, Any], last_id: str = "") -> httpx.Response:
    async with httpx.AsyncClient() as client:
        headers = {"last-event-id": last_id} if last_id else {}
        return await client.post(world.url + path, json=body, headers=headers)


def heard(events: list[tuple[str, str]]) -> dict[int, tuple[str, list[Any], list[Any]]]:
    """Of each choice: all of its text, who speaks and why it ended, its log-probs."""
    said: dict[int, tuple[str, list[Any], list[Any]]] = {}
    for _, data in events:
        for choice in json.loads(data)["choices"] if data != "[DONE]" else ():
            text, marks, tokens = said.get(choice["index"], ("", [], []))
            delta = choice.get("delta", {})
            marks += [x for x in (delta.get("role"), choice["finish_reason"]) if x]
            tokens += choice["logprobs"]["tokens"] if choice["logprobs"] else []
            said[choice["index"]] = (text + choice.get("text", "") + delta.get("content", ""), marks, tokens)
    return said


@pytest.mark.parametrize("chunk_tokens", [1, 3])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_lost_after_any_event_is_read_on(tmp_path: Path, path: str, case: str, chunk_tokens: int) -> None:
    body = BODY | CASES[case]
    if "chat" in path:
        body = {k: v for k, v in body.items() if k not in ("prompt", "logprobs")} | {
            "messages": [{"role": "user", "content": PROMPT}]}

    async def scenario() -> None:
        source = EchoDispatcher(chunk_tokens=chunk_tokens)
        async with open_front(tmp_path, source) as world, open_front(tmp_path, EchoDispatcher(chunk_tokens=2)) as other:
            whole = await posted(world, path, body)
            events = events_of(whole.text)
            assert events[-1][1] == "[DONE]"
            for cut in range(1, len(events)):
                last_id = events[cut - 1][0]
                reply = await posted(other, path, body, last_id)
                rest = events_of(reply.text)
                assert heard(events[:cut] + rest) == heard(events), f"lost after {events[cut - 1]}"
                assert ['"usage":{' in data for _, data in events[:cut] + rest].count(True) == \
                    ['"usage":{' in data for _, data in events].count(True)
                assert rest[-1][1] == "[DONE]"
                assert reply.headers["x-request-id"] == whole.headers["x-request-id"]
                said = [json.loads(data) for _, data in events + rest if data != "[DONE]"]
                heads = {(event["id"], event["created"]) for event in said}
                assert len(heads) == 1, "it is one answer"
                assert other.source.requests[-1].asked == source.requests[0].asked
                assert other.source.last_seen[-1] == "worker/0"

    asyncio.run(scenario())


def test_a_stop_token_that_comes_without_the_word_that_it_was_the_last_is_not_shown(tmp_path: Path) -> None:
    """As a first token does, which is said before its KV is here; the word follows."""
    texts = []
    for chunk_tokens in (1, 2):
        codec = make_codec(tmp_path)
        ids = codec.encode("ab")
        source = EchoDispatcher(script=tuple(ids), chunk_tokens=chunk_tokens)

        async def scenario(source: EchoDispatcher = source, stop: int = ids[-1]) -> str:
            async with open_front(tmp_path, source) as world:
                reply = await posted(world, "/v1/completions", BODY | {"stream": False, "stop_token_ids": [stop]})
                return str(reply.json()["choices"][0]["text"])

        texts.append(asyncio.run(scenario()))
    assert texts[0] == texts[1]


class Context:
    def time_remaining(self) -> float | None:
        return None

    def invocation_metadata(self) -> tuple[()]:
        return ()


@pytest.mark.parametrize("n", [1, 3])
def test_a_grpc_stream_lost_after_any_message_is_read_on(tmp_path: Path, n: int) -> None:
    request = inference_pb2.GenerateRequest(
        text=PROMPT, request_id="mine", tenant="acme",
        sampling=inference_pb2.Sampling(max_tokens=60, n=n, stop=["STOP"], logprobs=1))

    async def scenario() -> None:
        async with open_front(tmp_path, EchoDispatcher()) as world:
            front = InferenceFront(world.generation)

            async def answer(resume: str = "") -> list[inference_pb2.GenerateResponse]:
                asked = inference_pb2.GenerateRequest()
                asked.CopyFrom(request)
                asked.resume = resume
                return [message async for message in front.Generate(asked, Context())]

            whole = await answer()
            for cut in range(1, len(whole)):
                rest = await answer(whole[cut - 1].bookmark)
                assert rest == whole[cut:]
            assert await answer(whole[-1].bookmark) == []

    asyncio.run(scenario())


def test_the_usage_is_told_though_the_choice_that_ends_last_was_read_to_its_end(tmp_path: Path) -> None:
    """Said again, the choices take other turns: the one that ended first may now be the last."""

    async def scenario() -> None:
        scripts = {0: tuple(range(50, 60)), 1: tuple(range(60, 64))}
        request = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[40, 41]), request_id="mine",
                                                sampling=inference_pb2.Sampling(max_tokens=12, n=2))

        async def answer(chunk_tokens: int) -> list[inference_pb2.GenerateResponse]:
            async with open_front(tmp_path, EchoDispatcher(scripts=scripts, chunk_tokens=chunk_tokens)) as world:
                return [m async for m in InferenceFront(world.generation).Generate(request, Context())]

        whole = await answer(1)
        cut = next(i for i, m in enumerate(whole) if m.choice == 1 and m.finish_reason)
        request.resume = whole[cut].bookmark
        *rest, last = await answer(100)
        assert [m.usage for m in whole + rest if m.HasField("usage")] == [last.usage]
        assert (last.choice, last.text, list(last.token_ids), last.finish_reason) == (1, "", [], 0)
        read = [token for m in whole[: cut + 1] + rest for token in m.token_ids if m.choice == 0]
        assert read == [token for m in whole for token in m.token_ids if m.choice == 0]

    asyncio.run(scenario())


@pytest.mark.parametrize("last_id", [
    "x", "12", "12/7/w", "12x/7/w/cmpl-" + "0" * 32, "12/7/w/chatcmpl-" + "0" * 32, "1.2/7/w/cmpl-" + "0" * 32,
    "12/7/w/cmpl-short", ".".join("1" * (MAX_CHOICES + 1)) + "/7/w/cmpl-" + "0" * 32,
    "9" * 10 + "/7/w/cmpl-" + "0" * 32,
])
def test_what_is_no_bookmark_of_this_request_is_refused(tmp_path: Path, last_id: str) -> None:
    async def scenario() -> None:
        async with open_front(tmp_path) as world:
            reply = await posted(world, "/v1/completions", BODY, last_id)
            assert reply.status_code == 400
            assert reply.json()["error"]["type"] == "invalid_request_error"
            assert not world.source.requests

    asyncio.run(scenario())


def test_only_streams_are_resumed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_front(tmp_path) as world:
            reply = await posted(world, "/v1/completions", BODY | {"stream": False}, "1/7/w/cmpl-" + "0" * 32)
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "stream")

    asyncio.run(scenario())


def test_a_bookmark_reads_as_it_was_written() -> None:
    for places in ([Place()], [Place(0, True), Place(12, True, True), Place(3, True, True, True)]):
        mark = Bookmark("chatcmpl-ab/c", 17, places)
        mark.worker, mark.has_usage = "decode/0 é", len(places) > 1
        again = Bookmark.parse(str(mark), "id")
        assert (again.places, again.worker, again.has_usage) == (places, mark.worker, mark.has_usage)
        assert (again.request_id, again.created) == ("chatcmpl-ab/c", 17)
    with pytest.raises(InvalidRequest, match="id is no id"):
        Bookmark.parse("1/2/w/a\nb", "id")
