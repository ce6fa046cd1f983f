"""Every malformed request is the client's to mend: a 4xx with OpenAI's error body, and nothing lost for others."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from pathlib import Path
from typing import Any

import httpx
import pytest

from baton.core.errors import InvalidRequest, NotSupported
from baton.router.openai import BOTH, TABLE, Endpoint, parse
from tests.router.front_world import MAX_MODEL_LEN, MODEL, FrontWorld, open_front

HI = [{"role": "user", "content": "hi"}]
CHAT: dict[str, Any] = {"model": MODEL, "messages": HI}
TEXT: dict[str, Any] = {"model": MODEL, "prompt": "hi"}
JSON = {"content-type": "application/json"}
LONG = "token " * 100_000


def chat(**fields: Any) -> tuple[str, bytes]:
    return Endpoint.CHAT, json.dumps(CHAT | fields).encode()


def said(*messages: Any) -> tuple[str, bytes]:
    return chat(messages=list(messages))


def text(**fields: Any) -> tuple[str, bytes]:
    return Endpoint.COMPLETIONS, json.dumps(TEXT | fields).encode()


def raw(body: bytes) -> tuple[str, bytes]:
    return Endpoint.CHAT, body


BAD: list[tuple[tuple[str, bytes], str]] = [  # request, what the message must say
    # the body
    (raw(b""), "empty"),
    (raw(b"   "), "empty"),
    (raw(b"{"), "not JSON"),
    (raw(b"[]"), "object"),
    (raw(b"null"), "object"),
    (raw(b'"hi"'), "object"),
    (raw(b"{'model': 1}"), "not JSON"),
    (raw(b'{"a": 1} x'), "not JSON"),
    (raw(b"\xff\xfe{"), "not UTF-8"),
    (raw(b'{"model": "\x80"}'), "not UTF-8"),
    (raw(b"[" * 200_000), "nested too deeply"),
    (raw(b'{"a":' * 100_000 + b"1"), "nested too deeply"),
    (raw(b'{"model": "a", "model": "b"}'), "twice"),
    (raw(b'{"temperature": NaN}'), "NaN"),
    (raw(b'{"temperature": Infinity}'), "Infinity"),
    (raw(b'{"temperature": -Infinity}'), "Infinity"),
    (raw(b'{"temperature": 1e999}'), "too large"),
    (raw(b'{"seed": ' + b"9" * 5000 + b"}"), "digits"),
    (raw(b'{"model": "\\ud800", "messages": []}'), "surrogate"),
    (raw(b'{"\\ud800": 1}'), "no field"),
    (raw(b"\x00"), "not JSON"),
    (raw(b'{"model": "a\nb"}'), "not JSON"),
    # fields nobody knows
    (chat(temprature=1), "'temperature'"),
    (chat(max_token=1), "'max_tokens'"),
    (chat(foo=None), "no field"),
    (chat(prompt="x"), "no field"),
    (text(messages=HI), "no field"),
    (chat(kv_transfer_params={}), "no field"),
    (chat(bootstrap_room=1), "no field"),
    (chat(**{"x" * 10_000: 1}), "no field"),
    # what must be there
    (raw(b"{}"), "model is missing"),
    (raw(b'{"model": "echo"}'), "messages is missing"),
    (chat(model=None), "missing"),
    (text(prompt=None), "missing"),
    (chat(model=1), "string"),
    (chat(model=""), "not served"),
    (chat(model="gpt-4"), "not served"),
    (chat(model="../../etc/passwd"), "not served"),
    # messages
    (chat(messages=[]), "empty"),
    (chat(messages="hi"), "array"),
    (chat(messages={}), "array"),
    (said("hi"), "object"),
    (said({}), "role"),
    (said({"role": "user"}), "content"),
    (said({"role": "user", "content": None}), "content"),
    (said({"role": "root", "content": "x"}), "role"),
    (said({"role": ["user"], "content": "x"}), "role"),
    (said({"role": "tool", "content": "x"}), "not supported yet"),
    (said({"role": "user", "content": 1}), "string"),
    (said({"role": "user", "content": []}), "content"),
    (said({"role": "user", "content": ["x"]}), "object"),
    (said({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}), "not supported yet"),
    (said({"role": "user", "content": [{"type": "text"}]}), "text"),
    (said({"role": "user", "content": [{}]}), "type"),
    (said({"role": "user", "content": [{"type": "text", "text": "a", "txt": 1}]}), "no field"),
    (said({"role": "user", "contents": "x"}), "'content'"),
    (said({"role": "user", "content": "x", "name": 3}), "string"),
    (said({"role": "assistant", "content": "x", "tool_calls": [{}]}), "not supported yet"),
    (raw(b'{"model":"echo","messages":[{"role":"user","content":"\\udc00"}]}'), "surrogate"),
    (said({"role": "user", "content": LONG}), "characters"),
    (said(*HI * 400), "context"),
    # prompts
    (text(prompt=""), "empty"),
    (text(prompt=[]), "empty"),
    (text(prompt=[[]]), "empty"),
    (text(prompt=[""]), "empty"),
    (text(prompt=["a", "b"]), "not supported yet"),
    (text(prompt=[[1], [2]]), "not supported yet"),
    (text(prompt=5), "string"),
    (text(prompt={"a": 1}), "string"),
    (text(prompt=[-1]), "token ids"),
    (text(prompt=[2**31]), "token ids"),
    (text(prompt=[1.5]), "integer"),
    (text(prompt=[True]), "integer"),
    (text(prompt=[1, "a"]), "not supported yet"),
    (text(prompt=[None]), "integer"),
    (text(prompt=LONG), "characters"),
    (text(prompt=[5] * MAX_MODEL_LEN), "context"),
    # sampling
    (chat(max_tokens=0), "at least 1"),
    (chat(max_tokens=-1), "at least 1"),
    (chat(max_tokens="5"), "integer"),
    (chat(max_tokens=1.5), "integer"),
    (chat(max_tokens=True), "integer"),
    (chat(max_tokens=10**30), "integer"),
    (chat(max_tokens=10_000), "leaves"),
    (chat(max_completion_tokens=0), "max_completion_tokens"),
    (chat(max_tokens=1, max_completion_tokens=2), "differ"),
    (chat(temperature=-0.1), "temperature"),
    (chat(temperature=1e9), "temperature"),
    (chat(temperature="hot"), "number"),
    (chat(temperature=True), "number"),
    (chat(temperature=10**400), "number"),
    (chat(top_p=0), "top_p"),
    (chat(top_p=1.1), "top_p"),
    (chat(top_p=[]), "number"),
    (chat(top_k=-1), "top_k"),
    (chat(top_k=2**31), "top_k"),
    (chat(min_p=-1), "min_p"),
    (chat(min_p=2), "min_p"),
    (chat(seed=-1), "seed"),
    (chat(seed=2**64), "seed"),
    (chat(seed=1.5), "seed"),
    (chat(ignore_eos=1), "ignore_eos"),
    (chat(stop_token_ids=5), "array"),
    (chat(stop_token_ids=[2**20]), "token ids"),
    (chat(stop_token_ids=[1] * 65), "64"),
    (chat(stop_token_ids=[1] * 100_000), "64"),
    (chat(stop=""), "empty string"),
    (chat(stop=[""]), "empty string"),
    (chat(stop=["a"] * 9), "8"),
    (chat(stop=[1]), "string"),
    (chat(stop="x" * 65), "64"),
    (chat(stop={"a": 1}), "string"),
    (chat(n=0), "between 1 and 8"),
    (chat(n=9), "between 1 and 8"),
    (chat(n=-1), "between 1 and 8"),
    (chat(n=True), "integer"),
    (chat(n="2"), "integer"),
    (text(n=2**62), "between 1 and 8"),
    (chat(presence_penalty=2.1), "presence_penalty"),
    (chat(presence_penalty=-2.1), "presence_penalty"),
    (chat(frequency_penalty=3), "frequency_penalty"),
    (chat(frequency_penalty="x"), "number"),
    (chat(frequency_penalty=True), "number"),
    (chat(repetition_penalty=0), "repetition_penalty"),
    (chat(repetition_penalty=10.5), "repetition_penalty"),
    (chat(logit_bias=[5]), "object"),
    (chat(logit_bias={"five": 1}), "token id"),
    (chat(logit_bias={"-5": 1}), "token id"),
    (chat(logit_bias={"05": 1}), "token id"),
    (chat(logit_bias={"٥": 1}), "token id"),
    (chat(logit_bias={"": 1}), "token id"),
    (chat(logit_bias={"9" * 5000: 1}), "token id"),
    (chat(logit_bias={"5": "1"}), "number"),
    (chat(logit_bias={"5": None}), "number"),
    (chat(logit_bias={"5": 101}), "between -100 and 100"),
    (chat(logit_bias={"5": -101}), "between -100 and 100"),
    (chat(logit_bias={"100000": 1}), "token ids"),
    (chat(logit_bias={str(i): 1 for i in range(301)}), "300"),
    (chat(logprobs=1), "true or false"),
    (chat(logprobs="yes"), "true or false"),
    (chat(top_logprobs=5), "logprobs true"),
    (chat(top_logprobs=5, logprobs=False), "logprobs true"),
    (chat(top_logprobs=21, logprobs=True), "top_logprobs is 21"),
    (chat(top_logprobs=-1, logprobs=True), "top_logprobs is -1"),
    (chat(top_logprobs=True, logprobs=True), "integer"),
    (text(logprobs=21), "between 0 and 20"),
    (text(logprobs=-1), "between 0 and 20"),
    (text(logprobs=True), "integer"),
    (text(top_logprobs=1), "no field"),
    (chat(stream="yes"), "true or false"),
    (chat(stream=1), "true or false"),
    (chat(stream_options={"include_usage": True}), "stream true"),
    (chat(stream=True, stream_options={"usage": True}), "no field"),
    (chat(stream=True, stream_options=[]), "object"),
    (chat(stream=True, stream_options={"include_usage": "y"}), "true or false"),
    # harmless ones still have types
    (chat(user=5), "string"),
    (chat(metadata="x"), "object"),
    (chat(metadata={"a": 1}), "string"),
    (chat(store="x"), "true"),
    (chat(metadata={str(i): "" for i in range(17)}), "16"),
]
NOT_YET: list[tuple[str, bytes]] = [
    chat(tools=[{"type": "function"}]),
    chat(functions=[{}]),
    chat(tool_choice="auto"),
    chat(tool_choice={}),
    chat(response_format={"type": "json_object"}),
    chat(audio={}),
    chat(modalities=["audio"]),
    chat(reasoning_effort="low"),
    chat(parallel_tool_calls=True),
    chat(service_tier="flex"),
    text(best_of=2),
    text(echo=True),
    text(suffix="x"),
    chat(min_tokens=3),
]
NEUTRAL: list[tuple[str, bytes]] = [
    chat(
        n=1,
        logprobs=False,
        presence_penalty=0,
        frequency_penalty=0.0,
        response_format={"type": "text"},
        tools=[],
        tool_choice="none",
        logit_bias={},
        top_logprobs=0,
        modalities=["text"],
        service_tier="auto",
    ),
    chat(**{name: None for name in TABLE[Endpoint.CHAT] if name not in CHAT}),
    text(**{name: None for name in TABLE[Endpoint.COMPLETIONS] if name not in TEXT}),
    chat(user="u", metadata={"a": "b"}, store=True, safety_identifier="s", prompt_cache_key="k"),
    text(echo=False, best_of=1, suffix="", n=1, max_tokens=1.0),
    text(n=3, best_of=3, max_tokens=1),
    chat(n=8, temperature=1),
    chat(presence_penalty=-2, frequency_penalty=2, repetition_penalty=1.3),
    chat(presence_penalty=2, frequency_penalty=-2.0, repetition_penalty=10),
    chat(logit_bias={str(i): 100 - i for i in range(200)}),
    chat(logit_bias={"0": -100, "5": 0.5}),
    chat(logprobs=True),
    chat(logprobs=True, top_logprobs=20),
    text(logprobs=0),
    text(logprobs=20),
    text(prompt=["hi"]),
    text(prompt=[[5, 6]]),
    text(prompt=[5, 6]),
    chat(stop=["a"] * 8),
    chat(stop="x" * 64),
    chat(stop=[]),
    chat(top_p=1, temperature=0, top_k=0, min_p=0, seed=2**64 - 1),
    chat(stop_token_ids=[1] * 64),
    chat(stream_options=None),
    text(prompt="hi", max_tokens=MAX_MODEL_LEN - 2),
    said({"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, *HI),
    said(
        {"role": "user", "content": "x", "name": "n"},
        {"role": "assistant", "content": "y", "refusal": None, "tool_calls": []},
    ),
    text(prompt=[5] * (MAX_MODEL_LEN - 1)),
]


async def post(world: FrontWorld, client: httpx.AsyncClient, request: tuple[str, bytes]) -> httpx.Response:
    return await client.post(world.url + request[0], content=request[1], headers=JSON)


def check_error(reply: httpx.Response, says: str) -> dict[str, Any]:
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert 400 <= reply.status_code < 500, error
    assert error["type"] == "invalid_request_error"
    assert says in error["message"], error
    assert len(error["message"]) < 2000
    return dict(error)


def test_every_malformed_request_gets_a_4xx_that_says_what_is_wrong_and_a_good_one_still_works(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_front(tmp_path) as world, httpx.AsyncClient() as client:
            for request, says in BAD:
                check_error(await post(world, client, request), says)
                assert (await post(world, client, chat())).status_code == 200, request
            refused = sum(
                world.metrics.value("baton_requests_total", outcome=o)
                for o in ("invalid_request", "not_supported", "context_length_exceeded", "model_not_found")
            )
            assert refused == len(BAD)
            assert len(world.source.requests) == len(BAD), "only the good ones reached the workers"

    asyncio.run(scenario())


def test_known_features_that_are_not_built_say_so(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_front(tmp_path) as world, httpx.AsyncClient() as client:
            for request in NOT_YET:
                error = check_error(await post(world, client, request), "not supported yet")
                assert error["code"] == "not_supported", error
                assert error["param"], error

    asyncio.run(scenario())


def test_neutral_values_and_harmless_fields_are_accepted(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_front(tmp_path) as world, httpx.AsyncClient() as client:
            for request in NEUTRAL:
                reply = await post(world, client, request)
                assert reply.status_code == 200, (request, reply.text)

    asyncio.run(scenario())


def test_wrong_paths_methods_and_media_types_are_json_errors_too(tmp_path: Path) -> None:
    body = json.dumps(CHAT).encode()
    cases: list[tuple[str, str, dict[str, str], int]] = [
        ("GET", Endpoint.CHAT, {}, 405),
        ("DELETE", "/v1/models", {}, 405),
        ("PUT", "/livez", {}, 405),
        ("GET", "/v2", {}, 404),
        ("POST", "/v1/chat/completions/", JSON, 404),
        ("GET", "/v1/models/nobody", {}, 404),
        ("GET", "/", {}, 404),
        ("POST", "/v1/embeddings", JSON, 404),
        ("POST", Endpoint.CHAT, {"content-type": "text/plain"}, 415),
        ("POST", Endpoint.CHAT, {}, 415),
        ("POST", Endpoint.CHAT, {"content-type": "application/json; charset=latin-1"}, 415),
        ("POST", Endpoint.CHAT, JSON | {"content-encoding": "gzip"}, 415),
        ("POST", Endpoint.CHAT, {"content-type": "multipart/form-data"}, 415),
    ]

    async def scenario() -> None:
        async with open_front(tmp_path) as world, httpx.AsyncClient() as client:
            for method, path, headers, status in cases:
                content = body if method == "POST" else None
                reply = await client.request(method, world.url + path, content=content, headers=headers)
                assert reply.status_code == status, (method, path)
                check_error(reply, "")
            assert (await client.get(world.url + Endpoint.CHAT)).headers["allow"] == "POST"

    asyncio.run(scenario())


def test_a_body_at_the_limit_is_read_and_one_byte_more_is_413(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_front(tmp_path, None, "router.max_body_bytes=2000") as world, httpx.AsyncClient() as client:
            path, body = chat()
            assert (await post(world, client, (path, body.ljust(2000)))).status_code == 200
            for size in (2001, 7999, 1_000_000):
                try:
                    reply = await post(world, client, (path, body.ljust(size)))
                except httpx.WriteError:
                    assert size == 1_000_000, "far above the limit the connection may just close"
                    continue
                assert reply.status_code == 413
                assert check_error(reply, "max_body_bytes")["code"] == "request_too_large"
            assert (await post(world, client, (path, body))).status_code == 200

    asyncio.run(scenario())


def test_every_field_of_the_table_refuses_a_value_of_the_wrong_kind() -> None:
    for endpoint, base in ((Endpoint.CHAT, CHAT), (Endpoint.COMPLETIONS, TEXT)):
        for name in TABLE[endpoint]:
            for value in ({"no": {"such": "kind"}}, [[[]]], "\ud800"):
                if name == "prompt" and value == [[[]]]:
                    continue
                with pytest.raises(InvalidRequest) as caught:
                    parse(json.dumps(base | {name: value}).encode(), endpoint)
                assert name in caught.value.message
                assert caught.value.param is not None


def test_the_mutations_of_a_good_body_never_raise_anything_but_a_request_error() -> None:
    rng = random.Random(3)
    good = json.dumps(
        CHAT | {"temperature": 0.5, "stop": ["a"], "stream": True, "stream_options": {"include_usage": True}}
    ).encode()
    for _ in range(5000):
        body = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(body))
            match rng.randrange(3):
                case 0:
                    body[at] = rng.randrange(256)
                case 1:
                    del body[at : at + rng.randrange(1, 9)]
                case _:
                    body[at:at] = rng.choice((b"{", b"[", b'"', b"\\u", b"1e9", b"null,", b"\x00", good[:at]))
        with contextlib.suppress(InvalidRequest):
            parse(bytes(body), Endpoint.CHAT)


def test_extensions_and_sampling_reach_the_request() -> None:
    call = parse(
        chat(
            top_k=5,
            min_p=0.1,
            ignore_eos=True,
            stop_token_ids=[7],
            seed=9,
            temperature=0,
            top_p=0.5,
            max_completion_tokens=3,
            stop="x",
            n=4,
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            repetition_penalty=1.1,
            logit_bias={"7": -100, "8": 2},
            logprobs=True,
            top_logprobs=3,
        )[1],
        Endpoint.CHAT,
    )
    sampling = call.generate.sampling
    assert (sampling.top_k, sampling.min_p, sampling.ignore_eos, sampling.stop_token_ids) == (5, 0.1, True, (7,))
    assert (sampling.seed, sampling.temperature, sampling.top_p, call.generate.max_tokens) == (9, 0.0, 0.5, 3)
    assert (call.generate.stop, call.generate.n) == (("x",), 4)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.5, -0.5, 1.1)
    assert (sampling.logit_bias, sampling.logprobs) == (((7, -100.0), (8, 2.0)), 3)
    assert parse(chat(logprobs=True)[1], Endpoint.CHAT).generate.sampling.logprobs == 0
    assert parse(text(logprobs=0)[1], Endpoint.COMPLETIONS).generate.sampling.logprobs == 0
    assert parse(chat(logprobs=False)[1], Endpoint.CHAT).generate.sampling.logprobs is None


def test_the_tables_agree_that_what_is_not_built_is_named() -> None:
    assert set(BOTH) <= set(TABLE[Endpoint.CHAT])
    with pytest.raises(NotSupported, match="Leave it out, or send 0"):
        parse(chat(min_tokens=5)[1], Endpoint.CHAT)
    with pytest.raises(NotSupported, match="or send 3, as n is"):
        parse(text(n=3, best_of=5)[1], Endpoint.COMPLETIONS)


def test_the_cache_key_of_a_chat_is_its_session() -> None:
    assert parse(chat(prompt_cache_key="talk")[1], Endpoint.CHAT).generate.session == "talk"
    assert parse(chat()[1], Endpoint.CHAT).generate.session == ""
