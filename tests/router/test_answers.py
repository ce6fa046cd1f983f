"""Several answers to one prompt, and log-probs: OpenAI's shapes, whole and streamed, and the same over gRPC; each
answer's text is its own, whoever makes its tokens."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from baton.core.errors import InternalError, InvalidRequest
from baton.core.messages import TokenChunk
from baton.core.request import FinishReason, Request, SamplingParams
from baton.router.generation import GenerateCall, Unknown
from baton.router.output import Delta
from tests.router.front_world import EOS, MODEL, EchoDispatcher, make_codec, open_front, scored

HI: Any = [{"role": "user", "content": "hi"}]
TEXTS = ("The baton is dear; text is for people.", "Nobody drops it 🚀 ever.", "blocks", "héllo wörld, 你好")


def saying(tmp_path: Path, *texts: str, **settings: Any) -> EchoDispatcher:
    codec = make_codec(tmp_path)
    return EchoDispatcher(scripts={i: tuple(codec.encode(text)) for i, text in enumerate(texts)}, **settings)


def num_tokens(source: EchoDispatcher) -> int:
    return sum(len(script) + 1 for script in source.scripts.values())


# ---- several answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_tokens", [1, 3])
def test_each_answer_has_its_own_text_and_finish_and_the_prompt_is_billed_once(
    tmp_path: Path, chunk_tokens: int
) -> None:
    async def scenario() -> None:
        source = saying(tmp_path, *TEXTS, chunk_tokens=chunk_tokens)
        async with open_front(tmp_path, source) as world, openai.AsyncOpenAI(
            base_url=world.url + "/v1", api_key="none", max_retries=0
        ) as client:
            whole = await client.chat.completions.create(model=MODEL, messages=HI, n=4)
            assert [(c.index, c.message.content, c.finish_reason) for c in whole.choices] == [
                (i, text, "stop") for i, text in enumerate(TEXTS)
            ]
            request, usage = source.requests[0], whole.usage
            assert usage is not None
            assert (usage.prompt_tokens, usage.completion_tokens) == (len(request.prompt), num_tokens(source))
            assert [c.index for c in request.choices] == [0, 1, 2, 3]
            texts = await client.completions.create(model=MODEL, prompt="x", n=4, max_tokens=200)
            assert [(c.index, c.text) for c in texts.choices] == list(enumerate(TEXTS))

            stream = await client.chat.completions.create(
                model=MODEL, messages=HI, n=4, stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
            order = [c.choices[0].index for c in chunks if c.choices]
            assert len({*order[:8]}) == 4, "they come side by side"
            for index, text in enumerate(TEXTS):
                own = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
                assert [c.delta.role for c in own] == ["assistant"] + [None] * (len(own) - 1)
                assert "".join(c.delta.content or "" for c in own) == text
                assert [c.finish_reason for c in own] == [None] * (len(own) - 1) + ["stop"]
            assert chunks[-1].usage is not None
            assert chunks[-1].usage.completion_tokens == num_tokens(source)
            assert [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1)

    asyncio.run(scenario())


def test_a_stop_string_ends_its_own_answer_and_the_others_go_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        source = saying(tmp_path, "one; two three", "ab", "one two three; four")
        async with open_front(tmp_path, source) as world, httpx.AsyncClient() as client:
            body = {"model": MODEL, "prompt": "x", "max_tokens": 200, "n": 3, "stop": [";"]}
            reply = (await client.post(world.url + "/v1/completions", json=body)).json()
            assert [c["text"] for c in reply["choices"]] == ["one", "ab", "one two three"]
            codec = world.generation.codec
            billed = sum(
                next(n for n in range(1, 40) if n > len(script) or ";" in codec.decode(script[:n]))
                for script in source.scripts.values()
            )
            assert reply["usage"]["completion_tokens"] == billed, "what follows a stop string costs nothing"

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_when_every_answer_has_met_a_stop_string_the_rest_is_cancelled(tmp_path: Path, stream: bool) -> None:
    async def scenario() -> None:
        source = saying(tmp_path, "a; " + "b" * 50, "aaa; " + "b" * 50)
        async with open_front(tmp_path, source) as world, httpx.AsyncClient() as client:
            body = {"model": MODEL, "prompt": "x", "max_tokens": 200, "n": 2, "stop": ";", "stream": stream}
            assert (await client.post(world.url + "/v1/completions", json=body)).status_code == 200
            async with asyncio.timeout(10):
                await source.cancelled[source.requests[0].request_id].wait()
            assert world.metrics.value("baton_requests_total", outcome="stop") == 1

    asyncio.run(scenario())


def test_an_error_ends_all_answers(tmp_path: Path) -> None:
    async def scenario() -> None:
        source = saying(tmp_path, "a", "bbbbbb", fail_after=2, error=InternalError("broken"))
        async with open_front(tmp_path, source) as world, httpx.AsyncClient() as client:
            body = {"model": MODEL, "messages": HI, "n": 2, "stream": True}
            reply = await client.post(world.url + "/v1/chat/completions", json=body)
            events = [json.loads(e.partition("data: ")[2]) for e in reply.text.split("\n\n")[:-2]]
            assert "broken" in events[-1]["error"]["message"]
            assert reply.text.endswith("data: [DONE]\n\n")
            finished = [e["choices"][0]["index"] for e in events[:-1] if e["choices"][0]["finish_reason"]]
            assert finished == [0], "that one had ended before"

    asyncio.run(scenario())


# ---- log-probs -------------------------------------------------------------------------------------------------------


def check_chat_entry(entry: dict[str, Any], token_id: int, count: int) -> None:
    known = scored(token_id, count)
    assert entry["logprob"] == known.logprob
    assert bytes(entry["bytes"]).decode(errors="replace") == entry["token"]
    assert [o["logprob"] for o in entry["top_logprobs"]] == [max(lp, -9999.0) for _, lp in known.top]


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("chunk_tokens", [1, 4])
def test_a_chats_log_probs_come_with_its_text_whole_or_streamed(tmp_path: Path, count: int, chunk_tokens: int) -> None:
    async def scenario() -> None:
        source = saying(tmp_path, TEXTS[1], TEXTS[3], chunk_tokens=chunk_tokens)
        async with open_front(tmp_path, source) as world, httpx.AsyncClient() as client:
            body: dict[str, Any] = {"model": MODEL, "messages": HI, "n": 2, "logprobs": True, "top_logprobs": count}
            whole = (await client.post(world.url + "/v1/chat/completions", json=body)).json()["choices"]
            for choice, text in zip(whole, (TEXTS[1], TEXTS[3]), strict=True):
                content, script = choice["logprobs"]["content"], source.scripts[choice["index"]]
                assert bytes(b for e in content for b in e["bytes"]).decode() == text
                assert len(content) == len(script), "the end token is no content"
                for entry, token_id in zip(content, script, strict=True):
                    check_chat_entry(entry, token_id, count)
            reply = await client.post(world.url + "/v1/chat/completions", json=body | {"stream": True})
            events = [json.loads(e.partition("data: ")[2]) for e in reply.text.split("\n\n")[:-2]]
            for choice in whole:
                own = [e["choices"][0] for e in events if e["choices"][0]["index"] == choice["index"]]
                pieces = [c["logprobs"]["content"] for c in own if c["logprobs"]]
                assert [e for piece in pieces for e in piece] == choice["logprobs"]["content"]
                assert all(c["logprobs"] for c in own if c["delta"].get("content")), "text never comes without"
            bare = (await client.post(world.url + "/v1/chat/completions", json={"model": MODEL, "messages": HI})).json()
            assert bare["choices"][0]["logprobs"] is None

    asyncio.run(scenario())


@pytest.mark.parametrize("chunk_tokens", [1, 100])
def test_a_completions_log_probs_are_lists_beside_its_text(tmp_path: Path, chunk_tokens: int) -> None:
    async def scenario() -> None:
        source = saying(tmp_path, TEXTS[1], chunk_tokens=chunk_tokens)
        async with open_front(tmp_path, source) as world, httpx.AsyncClient() as client:
            body: dict[str, Any] = {"model": MODEL, "prompt": "x", "max_tokens": 99, "logprobs": 2}
            choice = (await client.post(world.url + "/v1/completions", json=body)).json()["choices"][0]
            known, script, spelled = choice["logprobs"], source.scripts[0], world.generation.codec.spelled
            assert known["token_logprobs"] == [scored(t, 2).logprob for t in script]
            for token, offset, top, token_id in zip(
                known["tokens"], known["text_offset"], known["top_logprobs"], script, strict=True
            ):
                if token.startswith("bytes:"):
                    assert token == "bytes:" + "".join(f"\\x{b:02x}" for b in spelled(token_id))
                else:
                    assert choice["text"][offset:].startswith(token)
                assert top[token] == scored(token_id, 2).logprob
                assert len(top) == 2
            assert any(token.startswith("bytes:") for token in known["tokens"]), "the rocket has more than one token"
            reply = await client.post(world.url + "/v1/completions", json=body | {"stream": True})
            parts = [json.loads(e.partition("data: ")[2])["choices"][0] for e in reply.text.split("\n\n")[:-2]]
            for name in known:
                assert [x for part in parts if part["logprobs"] for x in part["logprobs"][name]] == known[name]
            body["logprobs"] = 0
            choice = (await client.post(world.url + "/v1/completions", json=body)).json()["choices"][0]
            assert [len(top) for top in choice["logprobs"]["top_logprobs"]] == [1] * len(script), "the chosen one"

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
def test_tokens_of_a_stop_string_have_no_log_probs(tmp_path: Path, stream: bool, chunk_tokens: int) -> None:
    async def scenario() -> None:
        source = saying(tmp_path, "The baton is; te dear", chunk_tokens=chunk_tokens)
        async with open_front(tmp_path, source) as world, httpx.AsyncClient() as client:
            body = {"model": MODEL, "messages": HI, "logprobs": True, "stop": "; te", "stream": stream}
            reply = await client.post(world.url + "/v1/chat/completions", json=body)
            if stream:
                events = [json.loads(e.partition("data: ")[2]) for e in reply.text.split("\n\n")[:-2]]
                found = [e["choices"][0]["logprobs"] for e in events]
                content = [t for known in found if known for t in known["content"]]
            else:
                content = reply.json()["choices"][0]["logprobs"]["content"]
            assert "".join(t["token"] for t in content) == "The baton is"

    asyncio.run(scenario())


@pytest.mark.parametrize("wrong", [(), (scored(5, 1), scored(6, 1))])
def test_tokens_without_the_log_probs_they_should_have_are_a_workers_bug(tmp_path: Path, wrong: tuple[Any]) -> None:
    class Careless(EchoDispatcher):
        async def generate(self, request: Request, last_seen: str | None = None, unknown: Unknown | None = None
                           ) -> AsyncGenerator[TokenChunk, None]:
            yield TokenChunk(request.request_id, 1, 0, (5,), logprobs=wrong)

    async def scenario() -> None:
        async with open_front(tmp_path, Careless()) as world:
            job = await world.generation.prepare(GenerateCall((5,), SamplingParams(logprobs=1)), "r")
            with pytest.raises(InternalError, match="log-probs"):
                _ = [delta async for delta in world.generation.run(job)]

    asyncio.run(scenario())


# ---- text survives the change of hands -------------------------------------------------------------------------------


class Relay(EchoDispatcher):
    """Another worker goes on at `baton_at`: from that token of every choice on, chunks are of the next attempt."""

    baton_at = 0

    async def generate(self, request: Request, last_seen: str | None = None, unknown: Unknown | None = None
                       ) -> AsyncGenerator[TokenChunk, None]:
        async for chunk in super().generate(request):
            kept = max(0, min(self.baton_at - chunk.first_index, len(chunk.token_ids)))
            if kept:
                first = dataclasses.replace(chunk, token_ids=chunk.token_ids[:kept], logprobs=chunk.logprobs[:kept])
                yield first if kept == len(chunk.token_ids) else dataclasses.replace(first, finish=None)
            if kept < len(chunk.token_ids):
                yield dataclasses.replace(
                    chunk, epoch=2, first_index=chunk.first_index + kept, token_ids=chunk.token_ids[kept:],
                    logprobs=chunk.logprobs[kept:])  # fmt: skip


@pytest.mark.parametrize("stop", [("; te", "people"), ("🚀 ev",), ("; texts", "héllo x"), ()])
def test_a_request_that_changes_hands_at_any_token_says_the_same(tmp_path: Path, stop: tuple[str, ...]) -> None:
    """In the middle of a character, of half a stop string, of an answer that has ended beside one that has not."""
    codec = make_codec(tmp_path)
    source = Relay(scripts={i: tuple(codec.encode(text)) for i, text in enumerate(TEXTS)}, chunk_tokens=3)

    async def scenario() -> None:
        async with open_front(tmp_path, source) as world:

            async def said(baton_at: int) -> dict[int, tuple[str, list[Any], FinishReason]]:
                source.baton_at = baton_at
                sampling = SamplingParams(logprobs=2)
                call = GenerateCall((5, 6), sampling, max_tokens=60, stop=stop, n=len(TEXTS))
                job = await world.generation.prepare(call, f"r{baton_at}")
                deltas: list[Delta] = [delta async for delta in world.generation.run(job)]
                assert [d.last for d in deltas] == [False] * (len(deltas) - 1) + [True]
                assert all(len(d.logprobs) == len(d.token_ids) for d in deltas), "also where a stop string cuts"
                found = {}
                for choice in range(len(TEXTS)):
                    own = [d for d in deltas if d.choice == choice]
                    (finish,) = [d.finish for d in own if d.finish]
                    shown = [token for d in own for token in d.shown]
                    found[choice] = "".join(d.text for d in own), shown, finish
                return found

            undisturbed = await said(10**6)
            assert {0, 1, 2, 3} == set(undisturbed)
            for baton_at in range(max(len(s) for s in source.scripts.values()) + 2):
                assert await said(baton_at) == undisturbed, baton_at

    asyncio.run(scenario())


def test_the_end_token_and_the_bill_do_not_depend_on_who_sends_the_end(tmp_path: Path) -> None:
    async def scenario() -> None:
        source = Relay(script=(5, 6, 7), chunk_tokens=9)
        async with open_front(tmp_path, source) as world:
            for source.baton_at in range(6):
                job = await world.generation.prepare(GenerateCall((5,), max_tokens=9), f"r{source.baton_at}")
                deltas = [delta async for delta in world.generation.run(job)]
                assert [i for d in deltas for i in d.token_ids] == [5, 6, 7, EOS]
                assert deltas[-1].usage.output_tokens == 4

    asyncio.run(scenario())


def test_a_text_with_a_token_that_only_the_tokenizer_knows_is_refused_before_a_worker_sees_it(tmp_path: Path) -> None:
    """A fine-tune's tokenizer may have a token more than its model has rows."""

    async def scenario() -> None:
        async with open_front(tmp_path) as world:
            codec = world.generation.codec
            ids = codec.encode("The baton")
            codec.card = dataclasses.replace(codec.card, vocab_size=max(ids))
            with pytest.raises(InvalidRequest, match=f"prompt holds {max(ids)}; this model's token ids are 0 to"):
                await world.generation.prepare(GenerateCall("The baton", max_tokens=9), "r0")
            assert not world.source.requests

    asyncio.run(scenario())
