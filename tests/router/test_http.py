"""The HTTP front over real sockets: the official client, streams, clients that leave, workers that fail."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from baton.core.errors import InternalError, Overloaded, PeerLost, SetupError
from baton.core.worker import Role, WorkerInfo
from baton.router.listen import MAX_HEADER_BYTES, HttpServer
from tests.router.fake_fleet import capability
from tests.router.front_world import MODEL, EchoDispatcher, FrontWorld, make_codec, open_front

HI: Any = [{"role": "user", "content": "hi, 你好 🙂"}]
STREAMED = {"model": MODEL, "messages": HI, "stream": True}


def sdk(world: FrontWorld) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=world.url + "/v1", api_key="none", max_retries=0)


def saying(tmp_path: Path, text: str, **settings: Any) -> EchoDispatcher:
    return EchoDispatcher(script=tuple(make_codec(tmp_path).encode(text)), **settings)


# ---- the official client -----------------------------------------------------------------------------------------


def test_the_openai_client_chats(tmp_path: Path) -> None:
    async def scenario() -> None:
        text = "Nobody drops it. 你好 🙂"
        async with open_front(tmp_path, saying(tmp_path, text)) as world, sdk(world) as client:
            raw = await client.chat.completions.with_raw_response.create(model=MODEL, messages=HI, temperature=0)
            reply = raw.parse()
            assert reply.choices[0].message.content == text
            assert reply.choices[0].message.role == "assistant"
            assert reply.choices[0].finish_reason == "stop"
            assert reply.id.startswith("chatcmpl-")
            assert reply.object == "chat.completion"
            assert raw.headers["x-request-id"] == reply.id == world.source.requests[0].request_id
            assert reply.system_fingerprint == "fp_" + "0" * 12
            request, usage = world.source.requests[0], reply.usage
            assert usage is not None
            assert usage.prompt_tokens_details is not None
            assert usage.prompt_tokens == len(request.prompt)
            assert usage.completion_tokens == len(world.generation.codec.encode(text)) + 1, (
                "the end token is output too"
            )
            assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
            assert usage.prompt_tokens_details.cached_tokens == len(request.prompt) // 2
            assert request.sampling.max_tokens == world.generation.max_model_len() - len(request.prompt)
            assert not world.source.cancelled[request.request_id].is_set(), "it ended by itself"

    asyncio.run(scenario())


@pytest.mark.parametrize("chunk_tokens", [1, 3, 100])
def test_the_openai_client_streams_what_it_would_get_at_once(tmp_path: Path, chunk_tokens: int) -> None:
    async def scenario() -> None:
        text = "héllo wörld, 你好, 👩‍👩‍👧 done"
        async with (
            open_front(tmp_path, saying(tmp_path, text, chunk_tokens=chunk_tokens)) as world,
            sdk(world) as client,
        ):
            stream = await client.chat.completions.create(
                model=MODEL, messages=HI, stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
            assert chunks[0].choices[0].delta.role == "assistant"
            deltas = [c.choices[0].delta.content or "" for c in chunks if c.choices]
            assert "".join(deltas) == text
            assert not any("\ufffd" in delta for delta in deltas)
            reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
            assert reasons == [None] * (len(reasons) - 1) + ["stop"]
            assert [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1)
            assert chunks[-1].usage is not None
            assert chunks[-1].choices == []
            assert chunks[-1].usage.completion_tokens == len(world.generation.codec.encode(text)) + 1
            assert len({c.id for c in chunks}) == 1

    asyncio.run(scenario())


def test_the_openai_client_completes_text_and_token_ids(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_front(tmp_path) as world, sdk(world) as client:
            reply = await client.completions.create(model=MODEL, prompt="Tokens are", max_tokens=100)
            assert reply.choices[0].text == "Tokens are"
            assert reply.choices[0].finish_reason == "stop"
            assert reply.object == "text_completion"
            ids = world.generation.codec.encode("blocks")
            assert (await client.completions.create(model=MODEL, prompt=ids, max_tokens=100)).choices[
                0
            ].text == "blocks"
            stream = await client.completions.create(model=MODEL, prompt="blocks are dear", max_tokens=2, stream=True)
            chunks = [chunk async for chunk in stream]
            assert "".join(c.choices[0].text for c in chunks) == world.generation.codec.decode(
                world.generation.codec.encode("blocks are dear")[:2]
            )
            assert chunks[-1].choices[0].finish_reason == "length"
            await client.completions.create(model=MODEL, prompt="a" * 100)
            assert world.source.requests[-1].sampling.max_tokens == 16, "OpenAI's default of this endpoint"
            assert world.source.requests[-1].priority == 0
            for priority, classes in ((1, 1), (2**60, 2)):
                await client.completions.create(model=MODEL, prompt="a", extra_body={"priority": priority})
                assert world.source.requests[-1].priority == classes

    asyncio.run(scenario())


def test_the_openai_client_lists_models_and_sees_typed_errors(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_front(tmp_path) as world, sdk(world) as client:
            assert [m.id async for m in client.models.list()] == [MODEL]
            assert (await client.models.retrieve(MODEL)).id == MODEL
            with pytest.raises(openai.NotFoundError) as missing:
                await client.chat.completions.create(model="gpt-4", messages=HI)
            assert missing.value.code == "model_not_found"
            with pytest.raises(openai.BadRequestError, match="not supported yet"):
                await client.chat.completions.create(model=MODEL, messages=HI, reasoning_effort="low")
            with pytest.raises(openai.BadRequestError, match="nobody can ask for a higher one") as proud:
                await client.chat.completions.create(model=MODEL, messages=HI, extra_body={"priority": -1})
            assert proud.value.param == "priority"
            world.source.fail_after, world.source.error = 0, Overloaded("full")
            with pytest.raises(openai.RateLimitError):
                await client.chat.completions.create(model=MODEL, messages=HI)

    asyncio.run(scenario())


def test_the_synchronous_openai_client_works_too(tmp_path: Path) -> None:
    def talk(url: str) -> tuple[str | None, str]:
        with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
            whole = client.chat.completions.create(
                model=MODEL, messages=HI, extra_body={"top_k": 3, "ignore_eos": True}
            )
            with client.chat.completions.create(model=MODEL, messages=HI, stream=True) as stream:
                parts = [chunk.choices[0].delta.content or "" for chunk in stream]
            return whole.choices[0].message.content, "".join(parts)

    async def scenario() -> None:
        async with open_front(tmp_path, saying(tmp_path, "one baton")) as world:
            assert await asyncio.to_thread(talk, world.url) == ("one baton", "one baton")
            assert world.source.requests[0].sampling.top_k == 3

    asyncio.run(scenario())


# ---- stop strings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
def test_a_stop_string_ends_the_output_before_it_and_overshoot_is_not_billed(
    tmp_path: Path, stream: bool, chunk_tokens: int
) -> None:
    async def scenario() -> None:
        source = saying(tmp_path, "The baton is dear; text is for people.", chunk_tokens=chunk_tokens)
        async with open_front(tmp_path, source) as world, httpx.AsyncClient() as client:
            body = {"model": MODEL, "prompt": "x", "max_tokens": 200, "stop": ["; te", "people"], "stream": stream} | (
                {"stream_options": {"include_usage": True}} if stream else {}
            )
            reply = await client.post(world.url + "/v1/completions", json=body)
            events = sse(reply.text) if stream else [reply.json()]
            choices = [c for e in events for c in e["choices"]]
            assert "".join(c["text"] for c in choices) == "The baton is dear"
            assert choices[-1]["finish_reason"] == "stop"
            codec = world.generation.codec
            needed = next(n for n in range(100) if "; te" in codec.decode(source.script[:n] if source.script else ()))
            assert events[-1]["usage"]["completion_tokens"] == needed
            if chunk_tokens == 1:
                async with asyncio.timeout(10):
                    await next(iter(source.cancelled.values())).wait()

    asyncio.run(scenario())


def test_a_held_back_beginning_of_a_stop_string_comes_out_at_the_end(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_front(tmp_path, saying(tmp_path, "text is for")) as world, httpx.AsyncClient() as client:
            reply = await client.post(
                world.url + "/v1/completions",
                json={"model": MODEL, "prompt": "x", "max_tokens": 99, "stop": "for people"},
            )
            assert reply.json()["choices"][0]["text"] == "text is for"

    asyncio.run(scenario())


def test_a_stop_token_is_counted_and_not_shown(tmp_path: Path) -> None:
    async def scenario() -> None:
        script = (*make_codec(tmp_path).encode("ab"), 40)
        async with open_front(tmp_path, EchoDispatcher(script=script)) as world, httpx.AsyncClient() as client:
            asked = {"model": MODEL, "prompt": "x", "max_tokens": 99, "ignore_eos": True}
            shown = (await client.post(world.url + "/v1/completions", json=asked)).json()
            assert shown["choices"][0]["text"] == world.generation.codec.decode(script)
            reply = await client.post(world.url + "/v1/completions", json=asked | {"stop_token_ids": [40]})
            assert reply.json()["choices"][0]["text"] == "ab"
            assert reply.json()["usage"]["completion_tokens"] == len(script)

    asyncio.run(scenario())


# ---- streams that end badly --------------------------------------------------------------------------------------


def sse(text: str) -> list[Any]:
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""], text
    return [json.loads(event.partition("data: ")[2]) for event in events[:-2]]


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_before_the_first_token_has_its_own_status(tmp_path: Path, stream: bool) -> None:
    async def scenario() -> None:
        source = EchoDispatcher(fail_after=0, error=Overloaded("full"))
        async with open_front(tmp_path, source) as world, httpx.AsyncClient() as client:
            reply = await client.post(world.url + "/v1/chat/completions", json=STREAMED | {"stream": stream})
            assert (reply.status_code, reply.headers["retry-after"]) == (429, "1")
            assert reply.json()["error"]["code"] == "overloaded"
            world.source.error = PeerLost("gone")
            reply = await client.post(world.url + "/v1/chat/completions", json=STREAMED | {"stream": stream})
            assert (reply.status_code, reply.json()["error"]["type"]) == (503, "server_error")

    asyncio.run(scenario())


def test_a_failure_in_mid_stream_is_an_event_that_the_openai_client_raises(tmp_path: Path) -> None:
    async def scenario() -> None:
        source = EchoDispatcher(fail_after=2, error=InternalError("broken"))
        async with open_front(tmp_path, source) as world, sdk(world) as client:
            stream = await client.chat.completions.create(model=MODEL, messages=HI, stream=True)
            with pytest.raises(openai.APIError, match="broken"):
                async for _ in stream:
                    pass
            assert world.metrics.value("baton_requests_total", outcome="internal") == 1

    asyncio.run(scenario())


@pytest.mark.parametrize("hang_after", [0, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_request(tmp_path: Path, stream: bool, hang_after: int) -> None:
    async def scenario() -> None:
        async with open_front(tmp_path, EchoDispatcher(hang_after=hang_after)) as world:
            port = int(world.url.rpartition(":")[2])
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            body = json.dumps(STREAMED | {"stream": stream}).encode()
            writer.write(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n" % len(body) + body
            )
            if stream and hang_after:
                await reader.readuntil(b"data: ")
            async with asyncio.timeout(10):
                while not world.source.requests:
                    await asyncio.sleep(0)
                writer.close()
                await writer.wait_closed()
                await world.source.cancelled[world.source.requests[0].request_id].wait()
                while not world.metrics.value("baton_requests_total", outcome="cancelled"):
                    await asyncio.sleep(0)

    asyncio.run(scenario())


def test_a_router_that_stops_ends_its_streams_with_an_error(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_front(tmp_path, EchoDispatcher(hang_after=1)) as world, httpx.AsyncClient() as client:
            async with client.stream("POST", world.url + "/v1/chat/completions", json=STREAMED) as reply:
                lines = reply.aiter_lines()
                await anext(lines)
                world.stopping.set()
                rest = [line async for line in lines if line]
            assert "the router is stopping" in rest[-2]
            assert rest[-1] == "data: [DONE]"
            late = await client.post(world.url + "/v1/chat/completions", json=STREAMED)
            assert (late.status_code, late.json()["error"]["code"]) == (503, "peer_lost")

    asyncio.run(scenario())


# ---- health, metrics, logs, ports --------------------------------------------------------------------------------


def test_readiness_says_why_not(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_front(tmp_path) as world, httpx.AsyncClient() as client:
            assert (await client.get(world.url + "/livez")).status_code == 200
            assert (await client.get(world.url + "/readyz")).status_code == 200
            world.not_ready.append("no decode worker is ready")
            reply = await client.get(world.url + "/readyz")
            assert (reply.status_code, reply.json()["why"]) == (503, "no decode worker is ready")
            assert (await client.get(world.url + "/livez")).status_code == 200

    asyncio.run(scenario())


def test_metrics_are_prometheus_text_with_latencies(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_front(tmp_path) as world, httpx.AsyncClient() as client:
            for stream in (False, True):
                await client.post(world.url + "/v1/chat/completions", json=STREAMED | {"stream": stream})
            text = (await client.get(world.url + "/metrics")).text
            assert '\nbaton_requests_total{outcome="stop"} 2.0\n' in text
            assert "\nbaton_ttft_seconds_count 2.0\n" in text
            assert '\nbaton_request_seconds_bucket{le="+Inf"} 2.0\n' in text
            prompt = len(world.source.requests[0].prompt)
            assert f"\nbaton_prompt_tokens_total {2.0 * prompt}\n" in text
            assert f"\nbaton_output_tokens_total {2.0 * (prompt + 1)}\n" in text
            assert f"\nbaton_cached_prompt_tokens_total {2.0 * (prompt // 2)}\n" in text
            world.told.append((WorkerInfo("d-0", "b", Role.DECODE, "here:1", capability()), None))
            text = (await client.get(world.url + "/metrics")).text
            assert '\nbaton_worker_up{role="decode",worker="d-0"} 0.0\n' in text

    asyncio.run(scenario())


def test_one_log_line_per_request_and_never_its_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with open_front(tmp_path) as world, httpx.AsyncClient() as client:
            for content in ("canary-word", "canary-word " * 9999):
                await client.post(
                    world.url + "/v1/chat/completions",
                    json={"model": MODEL, "messages": [{"role": "user", "content": content}], "user": "canary-user"},
                )

    with caplog.at_level(logging.DEBUG):
        asyncio.run(scenario())
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("baton.")]
    assert len([line for line in lines if line.startswith("request chatcmpl-") and "outcome=stop" in line]) == 1
    ours = [r.getMessage() for r in caplog.records if not r.name.startswith(("httpx", "httpcore"))]
    assert not any("canary" in line for line in ours), ours


POST = b"POST /v1/completions HTTP/1.1\r\n"
CHUNKED = POST + b"host: a\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "begun", [POST + b"x-long: ", b"GET /", CHUNKED + b"2\r\n{}\r\n0\r\nx: ", CHUNKED + b"2;x="]
)
def test_a_request_whose_headers_never_end_is_refused_and_cut_off(tmp_path: Path, begun: bytes) -> None:
    async def scenario() -> None:
        async with open_front(tmp_path) as world:
            reader, writer = await connect(world)
            writer.write(begun)
            await asyncio.sleep(0.1)  # what comes together with a part of a body is not counted
            writer.write(b"a" * (MAX_HEADER_BYTES + 1))  # no byte more: unread ones would reset the line
            async with asyncio.timeout(30):
                told = await reader.read()
            assert told.startswith(b"HTTP/1.1 400 "), told
            writer.close()
            async with httpx.AsyncClient() as client:
                assert (await client.get(world.url + "/livez")).status_code == 200

    asyncio.run(scenario())


def test_a_request_in_a_pipeline_ends_the_connection_and_what_ran_on_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_front(tmp_path, EchoDispatcher(hang_after=1)) as world:
            body = json.dumps({"model": MODEL, "prompt": "hi there", "max_tokens": 9}).encode()
            one = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n" \
                  f"content-length: {len(body)}\r\n\r\n".encode() + body
            reader, writer = await connect(world)
            writer.write(one)
            async with asyncio.timeout(30):
                while not world.source.requests:
                    await asyncio.sleep(0.01)
                writer.write(one)
                assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
                await world.source.cancelled[world.source.requests[0].request_id].wait()
            writer.close()
            assert len(world.source.requests) == 1

    asyncio.run(scenario())


async def connect(world: FrontWorld) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", int(world.url.rpartition(":")[2]))


def test_a_taken_port_is_one_clear_sentence(tmp_path: Path) -> None:
    async def scenario() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            with pytest.raises(SetupError, match=f"port {port} on 127.0.0.1 is taken"):
                await HttpServer.start(_never, "127.0.0.1", port, 1)
        with pytest.raises(SetupError, match="router.host"):
            await HttpServer.start(_never, "192.0.2.1", 8000, 1)

    asyncio.run(scenario())


async def _never(scope: object, receive: object, send: object) -> None:
    pytest.fail("nothing was asked")
