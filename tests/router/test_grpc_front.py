"""The gRPC front as a stranger sees it: found by reflection, called without our generated code, and equal to HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from baton.core.config import load
from baton.core.errors import Overloaded
from baton.router.cost import CostPolicy
from baton.router.dispatch import Dispatcher
from baton.router.fleet import Fleet
from baton.router.grpc_front import AdminFront, Identity, InferenceFront
from baton.wire.client import GrpcDial
from baton.wire.server import start_router_server
from tests.router.front_world import EOS, MAX_MODEL_LEN, MODEL, EchoDispatcher, FrontWorld, open_front, scored


class Stranger:
    """Knows an address and nothing else."""

    def __init__(self, address: str) -> None:
        with grpc.insecure_channel(address) as channel:
            pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
            self._service = pool.FindServiceByName("baton.wire.Inference")
            self._admin = pool.FindServiceByName("baton.wire.Admin")
        self._address = address
        self._channel: Any = None

    def call(self, name: str, timeout: float = 30.0, **fields: Any) -> Any:
        service = self._admin if name in ("Status", "Trace", "Newest", "Explain") else self._service
        method = service.FindMethodByName(name)
        request = message_factory.GetMessageClass(method.input_type)
        reply = message_factory.GetMessageClass(method.output_type)
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self._address)
        make = self._channel.unary_stream if method.server_streaming else self._channel.unary_unary
        stub = make(f"/{service.full_name}/{name}", request.SerializeToString, reply.FromString)
        return stub(request(**fields), timeout=timeout)

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()


@contextlib.asynccontextmanager
async def open_both(
    directory: Path, source: EchoDispatcher | None = None
) -> AsyncIterator[tuple[FrontWorld, Stranger]]:
    async with open_front(directory, source) as world, contextlib.AsyncExitStack() as stack:
        config = load({})
        dial = GrpcDial()
        stack.push_async_callback(dial.close)

        async def nobody() -> tuple[()]:
            return ()

        fleet = Fleet(nobody, dial, config, world.metrics, "router-test")
        dispatcher = Dispatcher(fleet, CostPolicy(config.router, random.Random(1)), config, world.metrics)
        who = Identity("router-test", world.url, "here", MODEL)
        admin = AdminFront(fleet, dispatcher, world.metrics, dial, lambda: who)
        server = await start_router_server(InferenceFront(world.generation), admin, "127.0.0.1", 0)
        stack.push_async_callback(server.stop, 0.0)
        stranger = await asyncio.to_thread(Stranger, f"127.0.0.1:{server.port}")
        stack.push_async_callback(stranger.close)
        yield world, stranger


async def status_of(call: Any) -> tuple[str, str, str]:
    """(status, details, field at fault)."""
    try:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as e:
        metadata = dict(e.trailing_metadata() or ())
        param = metadata.get("baton-param-bin", b"")
        return e.code().name, e.details() or "", param.decode() if isinstance(param, bytes) else param
    return "OK", "", ""


def test_a_reflection_client_generates_what_http_does(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_both(tmp_path) as (world, stranger), httpx.AsyncClient() as client:
            text = "héllo, 你好 🙂 the baton; text"
            for stop in ([], ["; te"], ["nope"]):
                sampling = {"max_tokens": 120, "temperature": 0.5, "seed": 3, "stop": stop}
                replies = [r async for r in stranger.call("Generate", text=text, sampling=sampling)]
                http = (
                    await client.post(world.url + "/v1/completions", json={"model": MODEL, "prompt": text, **sampling})
                ).json()
                assert "".join(r.text for r in replies) == http["choices"][0]["text"]
                assert sum(len(r.token_ids) for r in replies) == http["usage"]["completion_tokens"]
                last = replies[-1]
                assert (last.finish_reason, last.usage.output_tokens) == (1, http["usage"]["completion_tokens"])
                assert last.usage.prompt_tokens == http["usage"]["prompt_tokens"]
                assert last.usage.cached_tokens == http["usage"]["prompt_tokens_details"]["cached_tokens"]
                by_grpc, by_http = world.source.requests[-2:]
                assert (by_grpc.prompt, by_grpc.sampling) == (by_http.prompt, by_http.sampling)

    asyncio.run(scenario())


def test_token_ids_ids_and_defaults(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_both(tmp_path) as (world, stranger):
            replies = [
                r
                async for r in stranger.call(
                    "Generate", token_ids={"ids": [5, 6, 7]}, request_id="mine", model=MODEL, tenant="t", timeout_s=7.0,
                    priority=1,
                )
            ]
            assert {r.request_id for r in replies} == {"mine"}
            assert [i for r in replies for i in r.token_ids] == [5, 6, 7, EOS]
            request = world.source.requests[0]
            assert (request.request_id, request.tenant, request.sampling.max_tokens) == ("mine", "t", 128)
            assert (request.deadline_s, request.priority) == (7.0, 1)
            [_ async for _ in stranger.call("Generate", token_ids={"ids": [5] * 200}, timeout=3.0)]
            assert world.source.requests[1].sampling.max_tokens == MAX_MODEL_LEN - 200
            assert 0 < world.source.requests[1].deadline_s < 5.0  # gRPC rounds up

    asyncio.run(scenario())


def test_several_answers_with_penalties_bias_and_log_probs(tmp_path: Path) -> None:
    async def scenario() -> None:
        source = EchoDispatcher(scripts={0: (5, 6, 7), 1: (9,)})
        sampling = {"n": 2, "frequency_penalty": 0.5, "presence_penalty": -0.5, "repetition_penalty": 1.5,
                    "logit_bias": {7: -100.0}, "logprobs": 2, "max_tokens": 9}  # fmt: skip
        async with open_both(tmp_path, source) as (world, stranger):
            replies = [r async for r in stranger.call("Generate", text="x", sampling=sampling)]
            for choice, script in source.scripts.items():
                own = [r for r in replies if r.choice == choice]
                assert [i for r in own for i in r.token_ids] == [*script, EOS]
                assert [r.finish_reason for r in own] == [0] * (len(own) - 1) + [1]
                assert "".join(r.text for r in own) == world.generation.codec.decode(script)
                for reply in own:
                    for token_id, position in zip(reply.token_ids, reply.logprobs, strict=True):
                        known = scored(token_id, 2)
                        assert (position.chosen.token_id, position.chosen.logprob) == (token_id, known.logprob)
                        assert tuple((t.token_id, t.logprob) for t in position.top) == known.top
                        assert position.chosen.bytes == world.generation.codec.spelled(token_id)
            assert [r.HasField("usage") for r in replies] == [False] * (len(replies) - 1) + [True]
            assert replies[-1].usage.output_tokens == 6
            got = world.source.requests[0].sampling
            assert (got.frequency_penalty, got.presence_penalty, got.repetition_penalty) == (0.5, -0.5, 1.5)
            assert (got.logit_bias, got.logprobs) == (((7, -100.0),), 2)
            plain = [r async for r in stranger.call("Generate", text="x")]
            assert not any(r.logprobs or r.choice for r in plain)
            assert world.source.requests[1].sampling.logprobs is None

    asyncio.run(scenario())


def test_tokenize_detokenize_and_models(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_both(tmp_path) as (world, stranger):
            ids = list((await stranger.call("Tokenize", text="<|im_start|>blocks 你好")).token_ids)
            assert ids == world.generation.codec.encode("<|im_start|>blocks 你好")
            assert (await stranger.call("Detokenize", token_ids=ids)).text == "<|im_start|>blocks 你好"
            assert (await stranger.call("Detokenize", token_ids=ids, skip_special_tokens=True)).text == "blocks 你好"
            model = (await stranger.call("ListModels")).models[0]
            assert (model.name, model.max_model_len, list(model.eos_token_ids)) == (MODEL, MAX_MODEL_LEN, [EOS])

    asyncio.run(scenario())


def test_bad_calls_are_statuses_that_name_the_field(tmp_path: Path) -> None:
    bad: list[tuple[dict[str, Any], str, str]] = [
        ({}, "INVALID_ARGUMENT", "prompt"),
        ({"text": ""}, "INVALID_ARGUMENT", "prompt"),
        ({"text": "x", "model": "gpt-4"}, "NOT_FOUND", "model"),
        ({"token_ids": {"ids": []}}, "INVALID_ARGUMENT", "prompt"),
        ({"token_ids": {"ids": [2**31]}}, "INVALID_ARGUMENT", "prompt"),
        ({"text": "x" * 500_000}, "INVALID_ARGUMENT", "prompt"),
        ({"text": "x", "sampling": {"max_tokens": 0}}, "INVALID_ARGUMENT", "max_tokens"),
        ({"text": "x", "sampling": {"max_tokens": 2**63}}, "INVALID_ARGUMENT", "max_tokens"),
        ({"text": "x", "sampling": {"temperature": float("nan")}}, "INVALID_ARGUMENT", "temperature"),
        ({"text": "x", "sampling": {"temperature": -1}}, "INVALID_ARGUMENT", "temperature"),
        ({"text": "x", "sampling": {"top_p": float("inf")}}, "INVALID_ARGUMENT", "top_p"),
        ({"text": "x", "sampling": {"top_k": 2**31}}, "INVALID_ARGUMENT", "top_k"),
        ({"text": "x", "sampling": {"min_p": 1.5}}, "INVALID_ARGUMENT", "min_p"),
        ({"text": "x", "sampling": {"stop": [""]}}, "INVALID_ARGUMENT", "stop"),
        ({"text": "x", "sampling": {"stop_token_ids": [2**31]}}, "INVALID_ARGUMENT", "stop_token_ids"),
        ({"text": "x", "sampling": {"n": 0}}, "INVALID_ARGUMENT", "n"),
        ({"text": "x", "sampling": {"n": 9}}, "INVALID_ARGUMENT", "n"),
        ({"text": "x", "sampling": {"logprobs": 21}}, "INVALID_ARGUMENT", "logprobs"),
        ({"text": "x", "sampling": {"frequency_penalty": 2.5}}, "INVALID_ARGUMENT", "frequency_penalty"),
        ({"text": "x", "sampling": {"presence_penalty": float("nan")}}, "INVALID_ARGUMENT", "presence_penalty"),
        ({"text": "x", "sampling": {"repetition_penalty": 0.0}}, "INVALID_ARGUMENT", "repetition_penalty"),
        ({"text": "x", "sampling": {"logit_bias": {5: 101.0}}}, "INVALID_ARGUMENT", "logit_bias"),
        ({"text": "x", "sampling": {"logit_bias": {5: float("nan")}}}, "INVALID_ARGUMENT", "logit_bias"),
        ({"text": "x", "sampling": {"logit_bias": {2**20: 1.0}}}, "INVALID_ARGUMENT", "logit_bias"),
        ({"text": "x", "timeout_s": -1.0}, "INVALID_ARGUMENT", "timeout_s"),
        ({"text": "x", "timeout_s": float("nan")}, "INVALID_ARGUMENT", "timeout_s"),
        ({"text": "x", "request_id": "r" * 129}, "INVALID_ARGUMENT", "request_id"),
    ]

    async def scenario() -> None:
        async with open_both(tmp_path) as (world, stranger):
            for fields, status, param in bad:
                got = await status_of(stranger.call("Generate", **fields))
                assert (got[0], got[2]) == (status, param), (fields, got)
            assert (await status_of(stranger.call("Detokenize", token_ids=[2**31])))[0] == "INVALID_ARGUMENT"
            assert (await status_of(stranger.call("Tokenize", text="x" * 500_000)))[0] == "INVALID_ARGUMENT"
            assert not world.source.requests
            world.source.fail_after, world.source.error = 1, Overloaded("full")
            assert (await status_of(stranger.call("Generate", text="hello")))[:2] == ("RESOURCE_EXHAUSTED", "full")

    asyncio.run(scenario())


def test_cancelling_a_call_cancels_the_request(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_both(tmp_path, EchoDispatcher(hang_after=1)) as (world, stranger):
            call = stranger.call("Generate", text="hello", request_id="r")
            await call.read()
            call.cancel()
            async with asyncio.timeout(10):
                await world.source.cancelled["r"].wait()
            with pytest.raises(asyncio.CancelledError):
                await call.read()

    asyncio.run(scenario())


def test_status_and_trace_of_an_empty_fleet(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_both(tmp_path) as (world, stranger):
            [_ async for _ in stranger.call("Generate", text="hello")]
            status = await stranger.call("Status")
            assert (status.router_id, status.http_endpoint, status.model) == ("router-test", world.url, MODEL)
            assert 'baton_requests_total{outcome="stop"}' in {c.name for c in status.counters}
            for name in ("Trace", "Explain"):
                assert (await status_of(stranger.call(name, request_id="nobody")))[0] == "NOT_FOUND"
                assert (await status_of(stranger.call(name)))[0] == "NOT_FOUND"
            assert not (await stranger.call("Newest", count=3)).traces

    asyncio.run(scenario())
