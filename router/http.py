"""The HTTP front: OpenAI's endpoints, health, metrics.

Owns: reading bodies within limits, server-sent events, the end of a request whose client has gone, errors as bodies.
Does not know: text, tokens, workers (generation.py), what fields mean (openai.py), what replies look like
(replies.py).

Life of a generation:
 1. The body is read: at most max_body_bytes, within BODY_TIMEOUT_S. Bad requests end here with a 4xx.
 2. Prepared, run and written by one task, until it is done, the client has hung up or takes nothing, or the router
    stops.
 3. Nothing is sent before the first news from a worker, so that an error then still has its own status. Later ones
    are an event in the stream.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from baton.core.config import RouterConfig
from baton.core.errors import BatonError, InternalError, InvalidRequest, NotFound, Overloaded, PeerLost
from baton.router import replies
from baton.router.bookmark import Bookmark, Place
from baton.router.exposition import CONTENT_TYPE, Told, exposition
from baton.router.generation import Generation, Job, new_request_id, shown
from baton.router.limits import account_of
from baton.router.openai import Call, Endpoint, parse
from baton.router.until import Stopping, Until

BODY_TIMEOUT_S = 30.0
SEND_TIMEOUT_S = 30.0
"""A client that reads nothing for this long is given up."""
INLINE_BODY_BYTES = 64 << 10
"""Larger bodies are parsed in a thread, so that other streams go on."""
DISCARD_FACTOR = 4
"""Of a body that is too large, this many times the limit is read and thrown away: most clients only look for the
answer when they have sent everything."""
TENANT_HEADER = "x-baton-tenant"

LAST_EVENT_ID = "last-event-id"
PREFIXES = {Endpoint.CHAT: "chatcmpl", Endpoint.COMPLETIONS: "cmpl"}
"""Of request ids."""

Headers = Mapping[str, str]

log = logging.getLogger(__name__)


class BodyTooLarge(InvalidRequest):
    code, http_status = "request_too_large", 413


class BodyTooSlow(InvalidRequest):
    code, http_status = "request_timeout", 408


class WrongMediaType(InvalidRequest):
    code, http_status = "unsupported_media_type", 415


class WrongMethod(InvalidRequest):
    code, http_status = "method_not_allowed", 405


@dataclass(frozen=True, slots=True)
class Front:
    """What the HTTP front stands on."""

    generation: Generation
    config: RouterConfig
    why_not_ready: Callable[[], str | None]
    """None: a request could be served now."""
    unix_time: Callable[[], float]
    """For `created`, which nothing here reads again."""
    stopping: Stopping
    """Set: the router ends now, and what still runs ends with an error."""
    statuses: Callable[[], Awaitable[Told]]
    """What the workers count, for /metrics."""


def create_app(front: Front) -> ASGIApp:
    """Generations are not sent through Starlette's middleware: they answer for their errors themselves, and there each
    of their events would pass two more functions."""
    generations = {endpoint.value: _Generations(front, endpoint) for endpoint in Endpoint}
    rest = _rest(front, generations)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        generation = generations.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        await (generation or rest)(scope, receive, send)

    return app


def _rest(front: Front, generations: Mapping[str, ASGIApp]) -> Starlette:
    app = Starlette(
        routes=[
            *(Route(path, generation, methods=["POST"]) for path, generation in generations.items()),
            Route("/v1/models", _models(front), methods=["GET"]),
            Route("/v1/models/{model_id:path}", _model(front), methods=["GET"]),
            Route("/livez", _livez, methods=["GET"]),
            Route("/readyz", _readyz(front), methods=["GET"]),
            Route("/metrics", _metrics(front), methods=["GET"]),
        ],
        exception_handlers={HTTPException: _http_error, Exception: _bug},
    )
    app.router.redirect_slashes = False  # a redirect would repeat the client's Host header
    return app


# ---- generations -------------------------------------------------------------------------------------------------


class _Generations:
    """ASGI application of one endpoint."""

    def __init__(self, front: Front, endpoint: Endpoint) -> None:
        self._front = front
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = _headers(scope)
        exchange = _Exchange(send, new_request_id(PREFIXES[self._endpoint]))
        try:
            if self._front.stopping.is_set:
                raise _stopping()
            call = await self._read(headers, receive)
            bookmark = self._bookmark(headers, call, exchange)
            with self._bounded(receive, exchange):
                await self._answer(call, exchange, bookmark)
        except ClientDisconnect:
            log.debug("request %s: its client left", exchange.request_id)
        except BatonError as e:
            await exchange.fail(e)
        except Exception:
            log.exception("request %s failed", exchange.request_id)
            why = f"internal error. The router's log says more under {exchange.request_id}."
            await exchange.fail(InternalError(why))

    @contextmanager
    def _bounded(self, receive: Receive, exchange: _Exchange) -> Iterator[None]:
        """Until the client goes, it takes nothing any more, or the router stops."""
        with Until() as until:
            going = asyncio.create_task(_gone(receive, until))
            stalling = _Stalling(exchange, until)
            self._front.stopping.ends(until, _stopping())
            try:
                yield
            finally:
                going.cancel()
                stalling.cancel()
                self._front.stopping.spares(until)

    async def _read(self, headers: Headers, receive: Receive) -> Call:
        tenant = headers.get(TENANT_HEADER, "")
        whose = tenant, account_of(tenant, headers.get("authorization", ""))
        with self._front.generation.refusals_counted():
            check_media_type(headers)
            body = await read_body(receive, self._front.config.max_body_bytes)
            if len(body) <= INLINE_BODY_BYTES:
                call = parse(body, self._endpoint, *whose)
            else:
                call = await asyncio.to_thread(parse, body, self._endpoint, *whose)
            self._front.generation.check_model(call.model)
        return call

    def _bookmark(self, headers: Headers, call: Call, exchange: _Exchange) -> Bookmark | None:
        """Where the client is in a stream that it has lost: the reply is the rest of it, under its id."""
        text = headers.get(LAST_EVENT_ID)
        if not text:
            return None
        with self._front.generation.refusals_counted():
            bookmark = Bookmark.parse(text, LAST_EVENT_ID)
            if not re.fullmatch(f"{PREFIXES[self._endpoint]}-[0-9a-f]{{32}}", bookmark.request_id):
                raise InvalidRequest(f"{LAST_EVENT_ID} is of another endpoint. Send it where the stream came from.",
                                     LAST_EVENT_ID)
            if not call.stream:
                raise InvalidRequest(f"{LAST_EVENT_ID} resumes a stream. Send the same body again, with stream true.",
                                     "stream")
        exchange.request_id = bookmark.request_id
        return bookmark

    async def _answer(self, call: Call, exchange: _Exchange, bookmark: Bookmark | None) -> None:
        generation = self._front.generation
        job = await generation.prepare(call.generate, exchange.request_id, bookmark)
        created = bookmark.created if bookmark is not None else int(self._front.unix_time())
        shape = replies.Shape(self._endpoint, exchange.request_id, created, call.model,
                              f"fp_{generation.codec.card.fingerprint[:12]}", call.include_usage,
                              job.request.sampling.logprobs is not None, generation.codec.spelled)
        await (self._stream if call.stream else self._collect)(job, shape, exchange)

    async def _collect(self, job: Job, shape: replies.Shape, exchange: _Exchange) -> None:
        answers = [replies.Answer() for _ in job.request.choices]
        async with aclosing(self._front.generation.run(job)) as deltas:
            async for delta in deltas:
                answers[delta.choice].add(delta)
                if delta.last:
                    await exchange.whole(200, replies.encode(shape.whole(answers, delta.usage)))

    async def _stream(self, job: Job, shape: replies.Shape, exchange: _Exchange) -> None:
        generation, request_id = self._front.generation, shape.request_id
        bookmark = job.bookmark or Bookmark(request_id, shape.created, [Place() for _ in job.request.choices])
        bookmark.where = lambda: generation.whereabouts(request_id)
        async with aclosing(generation.run(job)) as deltas:
            async for delta in deltas:
                news = shape.news(delta, bookmark)
                if news or not exchange.started:
                    await exchange.event(news, last=delta.last)


class _Exchange:
    """One reply on its way out. ClientDisconnect when nobody takes it."""

    def __init__(self, send: Send, request_id: str) -> None:
        self.request_id = request_id
        self.started = False
        self._ended = False
        self._send = send
        self.sending_since: float | None = None
        """When the send under way began (the loop's time)."""

    async def whole(self, status: int, body: bytes, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        await self._start(status, b"application/json", ((b"content-length", str(len(body)).encode()), *headers))
        await self._write(body, last=True)

    async def event(self, data: bytes, last: bool) -> None:
        if not self.started:
            await self._start(200, b"text/event-stream; charset=utf-8",
                              ((b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")))
        await self._write(data, last)

    async def fail(self, error: BatonError) -> None:
        """The error as the reply, or as the stream's last event. Never raises: there is nobody left to tell."""
        body = replies.error_body(error)
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                if not self.started:
                    await self.whole(error.http_status, json.dumps(body).encode(), retry_after(error))
                elif not self._ended:
                    await self.event(replies.event(body) + replies.DONE, last=True)
        except (ClientDisconnect, TimeoutError):
            log.debug("request %s: the client left before its error", self.request_id)

    async def _start(self, status: int, content_type: bytes, headers: tuple[tuple[bytes, bytes], ...]) -> None:
        self.started = True
        own = ((b"content-type", content_type), (b"x-request-id", self.request_id.encode()))
        await self._pass({"type": "http.response.start", "status": status, "headers": [*own, *headers]})

    async def _write(self, data: bytes, last: bool) -> None:
        self._ended = last
        await self._pass({"type": "http.response.body", "body": data, "more_body": not last})

    async def _pass(self, message: Message) -> None:
        self.sending_since = asyncio.get_running_loop().time()
        try:
            await self._send(message)
        except OSError:
            raise ClientDisconnect from None
        self.sending_since = None


class _Stalling:
    """Ends an exchange when one of its sends has taken SEND_TIMEOUT_S, and a little. One look now and then costs less
    than a timer for each of thousands of sends."""

    def __init__(self, exchange: _Exchange, until: Until) -> None:
        self._loop = asyncio.get_running_loop()
        self._exchange = exchange
        self._until = until
        self._look_again()

    def cancel(self) -> None:
        self._timer.cancel()

    def _look_again(self) -> None:
        self._timer = self._loop.call_later(SEND_TIMEOUT_S / 10, self._look)

    def _look(self) -> None:
        since = self._exchange.sending_since
        if since is not None and self._loop.time() - since > SEND_TIMEOUT_S:
            self._until.end(ClientDisconnect())
        else:
            self._look_again()


async def _gone(receive: Receive, until: Until) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    until.end(ClientDisconnect())


def _stopping() -> PeerLost:
    return PeerLost("the router is stopping. Send the request again, to another one.")


def _headers(scope: Scope) -> Headers:
    """By their names in lower case. Of one that came twice the first counts."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(scope["headers"])}


def check_media_type(headers: Headers) -> None:
    """Browsers send anything else to a foreign server without asking it first."""
    kind, _, parameters = headers.get("content-type", "").partition(";")
    if kind.strip().lower() != "application/json":
        raise WrongMediaType(f"the body's content type is {shown(kind.strip() or 'not given')}. "
                             "Send the header content-type: application/json.")
    charset = parameters.strip().lower().replace('"', "")
    if charset.startswith("charset=") and charset not in ("charset=utf-8", "charset=utf8"):
        raise WrongMediaType(f"the body's {shown(charset)} is not supported. Send UTF-8.")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise WrongMediaType("compressed bodies are not supported. Send the JSON as it is, without content-encoding.")


async def read_body(receive: Receive, max_bytes: int) -> bytes:
    parts, size, more = [], 0, True
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while more and size <= DISCARD_FACTOR * max_bytes:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                part, more = message.get("body", b""), message.get("more_body", False)
                size += len(part)
                if size <= max_bytes:
                    parts.append(part)
    except TimeoutError:
        raise BodyTooSlow(f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s. Send it faster.") from None
    if size > max_bytes:
        raise BodyTooLarge(f"the body has more than {max_bytes} bytes (router.max_body_bytes). Send a smaller one.")
    return b"".join(parts)


def retry_after(error: BatonError) -> tuple[tuple[bytes, bytes], ...]:
    """Whole seconds: HTTP knows no others."""
    if not isinstance(error, Overloaded):
        return ()
    return ((b"retry-after", str(math.ceil(error.retry_after_s)).encode()),)


# ---- everything else ---------------------------------------------------------------------------------------------

Answer = Callable[[Request], Awaitable[Response]]


def _failed(error: BatonError, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(replies.error_body(error)), error.http_status, headers, "application/json")


def _model_card(front: Front) -> dict[str, object]:
    generation = front.generation
    return {"id": generation.served_name, "object": "model", "created": 0, "owned_by": "baton",
            "max_model_len": generation.max_model_len()}


def _models(front: Front) -> Answer:
    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model_card(front)]})

    return models


def _model(front: Front) -> Answer:
    async def model(request: Request) -> Response:
        try:
            front.generation.check_model(request.path_params["model_id"])
        except NotFound as e:
            return _failed(e)
        return JSONResponse(_model_card(front))

    return model


async def _livez(request: Request) -> Response:
    return JSONResponse({"status": "ok"})


def _readyz(front: Front) -> Answer:
    async def readyz(request: Request) -> Response:
        why = front.why_not_ready()
        return JSONResponse({"status": "ok"} if why is None else {"status": "not ready", "why": why},
                            200 if why is None else 503)

    return readyz


def _metrics(front: Front) -> Answer:
    async def metrics(request: Request) -> Response:
        return Response(exposition(front.generation.metrics, await front.statuses()), media_type=CONTENT_TYPE)

    return metrics


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405, as OpenAI's error body."""
    assert isinstance(error, HTTPException), error
    path = shown(request.scope["path"])
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        return _failed(WrongMethod(f"{request.method} is not allowed on {path}. Use {allowed or 'another method'}."),
                       {"Allow": allowed})
    return _failed(NotFound(f"there is nothing at {path}. See GET /v1/models, POST /v1/chat/completions."))


async def _bug(request: Request, error: Exception) -> Response:
    log.error("%s failed", shown(request.scope["path"]), exc_info=error)
    return _failed(InternalError("internal error. The router's log says more."))
