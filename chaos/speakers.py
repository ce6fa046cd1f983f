"""The two ways a client can ask: gRPC and the OpenAI-compatible HTTP front. What comes back is made alike.

Owns the connections of the clients: one channel and one HTTP client per router, for the whole run, as real clients
have them; they reconnect by themselves when a router has been replaced.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import httpx

from baton.chaos.stack import Endpoints
from baton.chaos.workload import Front, Job
from baton.core.errors import BatonError, PeerLost, from_code
from baton.core.request import FinishReason, Request, SampledToken, TokenLogprob
from baton.wire import inference_pb2 as pb
from baton.wire.client import GrpcInference

CONNECT_S = 2.0


@dataclass(frozen=True, slots=True)
class Piece:
    """What one message of a stream adds, whatever front it came through."""

    choice: int = 0
    tokens: tuple[SampledToken, ...] = ()
    """gRPC."""
    text: str = ""
    """HTTP."""
    finish: FinishReason | None = None
    usage: tuple[int, int] | None = None
    """(prompt tokens, output tokens), with the very last piece."""
    request_id: str = ""
    """As the router names it, where it chose the name."""


class Speakers:
    def __init__(self, endpoints: Mapping[str, Endpoints]) -> None:
        self._grpc = {name: GrpcInference(e.grpc) for name, e in endpoints.items()}
        timeout = httpx.Timeout(None, connect=CONNECT_S)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
        self._http = {
            name: httpx.AsyncClient(base_url=e.http, timeout=timeout, limits=limits) for name, e in endpoints.items()
        }

    def ask(self, router: str, job: Job, request_id: str) -> AsyncGenerator[Piece, None]:
        """The stream of an answer. Raises what the router says, and PeerLost when the connection fails. Closing it is
        going away."""
        if job.front is Front.HTTP:
            return self._over_http(router, job.request)
        return self._over_grpc(router, job.request, request_id)

    async def close(self) -> None:
        for channel in self._grpc.values():
            await channel.close()
        for client in self._http.values():
            await client.aclose()

    async def _over_grpc(self, router: str, request: Request, request_id: str) -> AsyncGenerator[Piece, None]:
        async with aclosing(self._grpc[router].generate(_message(request, request_id))) as messages:
            async for said in messages:
                scored: list[TokenLogprob | None] = [_scored(p) for p in said.logprobs]
                scored = scored or [None] * len(said.token_ids)
                tokens = tuple(map(SampledToken, said.token_ids, scored))
                usage = (said.usage.prompt_tokens, said.usage.output_tokens) if said.HasField("usage") else None
                yield Piece(said.choice, tokens, "", _finish(said), usage)

    async def _over_http(self, router: str, request: Request) -> AsyncGenerator[Piece, None]:
        body = {
            "model": "chaos", "prompt": list(request.prompt), "max_tokens": request.sampling.max_tokens,
            "seed": request.sampling.seed, "stream": True, "stream_options": {"include_usage": True},
            "temperature": request.sampling.temperature, "ignore_eos": request.sampling.ignore_eos,
        }
        try:
            async with self._http[router].stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    raise _refusal(await response.aread())
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        yield _event(json.loads(line[6:]))
        except httpx.HTTPError as e:
            raise PeerLost(f"lost {router}: {type(e).__name__}: {e}") from None


def _message(request: Request, request_id: str) -> pb.GenerateRequest:
    s = request.sampling
    sampling = pb.Sampling(
        max_tokens=s.max_tokens, temperature=s.temperature, seed=s.seed, ignore_eos=s.ignore_eos,
        stop_token_ids=s.stop_token_ids, n=len(request.choices), frequency_penalty=s.frequency_penalty,
        presence_penalty=s.presence_penalty, repetition_penalty=s.repetition_penalty,
        logit_bias=dict(s.logit_bias), logprobs=s.logprobs,
    )
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=request.prompt), sampling=sampling, request_id=request_id,
        timeout_s=request.deadline_s,
    )


def _scored(position: pb.ScoredPosition) -> TokenLogprob:
    return TokenLogprob(position.chosen.logprob, tuple((t.token_id, t.logprob) for t in position.top))


_FINISH = {pb.GenerateResponse.STOP: FinishReason.STOP, pb.GenerateResponse.LENGTH: FinishReason.LENGTH}


def _finish(said: pb.GenerateResponse) -> FinishReason | None:
    return _FINISH.get(said.finish_reason)


def _event(event: dict[str, Any]) -> Piece:
    if "error" in event:
        raise from_code(str(event["error"].get("code")), str(event["error"].get("message")))
    usage = event.get("usage")
    counted = (usage["prompt_tokens"], usage["completion_tokens"]) if usage else None
    for choice in event["choices"]:
        reason = choice["finish_reason"]
        return Piece(0, (), choice["text"], FinishReason(reason) if reason else None, counted, event["id"])
    return Piece(usage=counted)


def _refusal(body: bytes) -> BatonError:
    try:
        error = json.loads(body)["error"]
        return from_code(str(error["code"]), str(error["message"]))
    except (ValueError, KeyError, TypeError):
        return PeerLost(f"not an answer: {body[:200]!r}")
