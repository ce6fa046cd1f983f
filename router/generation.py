"""Text in, text out: the one path that HTTP and gRPC share, so that they cannot differ.

Owns: the checks every prompt passes, a request's run from tokens to text, the end-of-request log line and latency
figures. Does not know: HTTP, protobuf, workers, how tokens become text (output.py). Prompts are never logged.

Life of a request:
 1. `prepare`: templated, tokenised (long texts off the loop), checked against the model's context.
 2. `run`: tokens come from the dispatcher; each becomes text, or is held back while it may still change.
 3. Each of its answers (choices) ends with the model's finish, or at a stop string: tokens past the stop are neither
    shown nor billed. When all have ended the dispatcher's iterator is closed, which cancels what still runs of them.
    Closing `run` early is how a front cancels.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from baton.core.config import PRIORITIES, RouterConfig
from baton.core.errors import (
    BatonError,
    Cancelled,
    InternalError,
    InvalidRequest,
    NotFound,
    ResumedElsewhere,
)
from baton.core.messages import TokenChunk
from baton.core.metrics import Metrics
from baton.core.request import MAX_CHOICES, Choice, FinishReason, Request, SamplingParams
from baton.router.bookmark import Bookmark, Unread
from baton.router.claims import Claims
from baton.router.limits import Charge, RateLimits
from baton.router.output import Delta, Output, Usage
from baton.router.text import TextCodec

MAX_STOPS = 8
MAX_STOP_BYTES = 64
MAX_REQUEST_ID_CHARS = MAX_TENANT_CHARS = 128
MAX_SESSION_CHARS = 128
INLINE_CHARS = 16_384
"""Longer texts are tokenised in a thread: about 0.5 us a character (tokenizers 0.23, SmolLM2's vocabulary)."""

log = logging.getLogger("baton.router.requests")


class PromptTooLong(InvalidRequest):
    code = "context_length_exceeded"


class ModelNotFound(NotFound):
    code = "model_not_found"


Unknown = Callable[[], Awaitable[None]]


class TokenSource(Protocol):
    """Where tokens come from: the dispatcher."""

    def generate(self, request: Request, last_seen: str | None = None, unknown: Unknown | None = None
                 ) -> AsyncGenerator[TokenChunk, None]:
        """Closing the iterator cancels the request. `last_seen`: it had begun, and then it ran there; `unknown` is
        awaited before it is computed (again) because no worker works on it, and may raise."""
        ...

    def whereabouts(self, request_id: str) -> str:
        """The worker that a running request is on; empty if none is."""
        ...

    def check_early(self, request_id: str, tenant: str, deadline_s: float) -> None:
        """Raises Overloaded for what would be refused whatever its prompt."""
        ...

    def max_model_len(self) -> int:
        """Most tokens, prompt and output, that a known worker holds for one request; 0 while none is known."""
        ...


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    content: str
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        """`developer` is OpenAI's newer name of `system`; templates know the older one."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content} | ({"name": self.name} if self.name else {})


Prompt = str | tuple[int, ...] | tuple[ChatMessage, ...]


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """What a client asked for, its types checked and its values not."""

    prompt: Prompt
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """Without its max_tokens: see below."""
    max_tokens: int | None = None
    default_max_tokens: int | None = None
    """Where max_tokens is None: this, cut to what the context leaves; None: all that it leaves."""
    stop: tuple[str, ...] = ()
    tenant: str = ""
    account: str = ""
    """Whose rate limits it counts on."""
    session: str = ""
    """A hint: the first MAX_SESSION_CHARS count."""
    timeout_s: float | None = None
    priority: int = 0
    """So many classes below the tenant's."""
    max_tokens_field: str = "max_tokens"
    """What the client called it."""
    n: int = 1
    """Answers side by side."""


@dataclass(frozen=True, slots=True)
class Job:
    """A request that may run: `prepare` made it."""

    request: Request
    stop: tuple[str, ...]
    arrived_s: float
    """Loop time."""
    account: str = ""
    bookmark: Bookmark | None = None
    """Where its reader is; None: at the beginning."""
    pays_first: bool = True
    """Or only once no worker is known to work on it."""

    @property
    def last_seen(self) -> str | None:
        """Where it ran, says its client. None: nowhere yet."""
        return self.bookmark.worker if self.bookmark is not None else None


class Generation:
    def __init__(self, codec: TextCodec, tokens: TokenSource, config: RouterConfig, metrics: Metrics,
                 served_name: str, limits: RateLimits) -> None:
        self.codec = codec
        self.served_name = served_name
        self.metrics = metrics
        self._tokens = tokens
        self._config = config
        self._limits = limits
        self._claims = Claims()

    def max_model_len(self) -> int:
        """Longest prompt + output, in tokens."""
        return min(self._tokens.max_model_len() or self.codec.card.max_model_len, self.codec.card.max_model_len)

    def check_model(self, name: str) -> None:
        if name != self.served_name:
            raise ModelNotFound(f"the model {shown(name)} is not served here. "
                                f"Use {self.served_name!r} (GET /v1/models).", "model")

    def whereabouts(self, request_id: str) -> str:
        return self._tokens.whereabouts(request_id)

    async def prepare(self, call: GenerateCall, request_id: str, bookmark: Bookmark | None = None) -> Job:
        """Tokens and limits of a call. Raises InvalidRequest naming the field at fault; it is counted here."""
        with self.refusals_counted():
            if bookmark is not None and len(bookmark.places) != call.n:
                raise InvalidRequest(f"the lost stream has {len(bookmark.places)} choices, and n is {call.n}. Send "
                                     "the same request again.", "n")
            return await self._prepare(call, request_id, bookmark)

    async def _prepare(self, call: GenerateCall, request_id: str, bookmark: Bookmark | None) -> Job:
        arrived_s = asyncio.get_running_loop().time()
        check_stop(call.stop)
        call.sampling.check()
        self._check_token_ids(call.sampling.stop_token_ids, "stop_token_ids")
        self._check_token_ids([token_id for token_id, _ in call.sampling.logit_bias], "logit_bias")
        if not 1 <= call.n <= MAX_CHOICES:
            raise InvalidRequest(f"n is {shown(call.n)}; it must be between 1 and {MAX_CHOICES}.", "n")
        if len(request_id) > MAX_REQUEST_ID_CHARS:
            raise InvalidRequest(f"request_id may have {MAX_REQUEST_ID_CHARS} characters at most.", "request_id")
        if len(call.tenant) > MAX_TENANT_CHARS:
            raise InvalidRequest(f"a tenant's name may have {MAX_TENANT_CHARS} characters at most.", "tenant")
        if call.priority < 0:
            raise InvalidRequest(f"priority is {shown(call.priority)}; 0 is your own class, 1 the next lower one, and "
                                 "nobody can ask for a higher one.", "priority")
        if call.timeout_s is not None and not 0 < call.timeout_s < float("inf"):
            raise InvalidRequest(f"timeout_s is {call.timeout_s!r}; it must be a positive number of seconds.",
                                 "timeout_s")
        deadline_s = min(call.timeout_s or self._config.request_timeout_s, self._config.request_timeout_s)
        is_new = bookmark is None or not self._claims.believes(call.account, arrived_s)
        if is_new:  # else it was let in at another router
            self._tokens.check_early(request_id, call.tenant, deadline_s)
        prompt = await self._encode(call.prompt)
        request = Request(
            request_id, prompt, self._with_max_tokens(call, len(prompt)), tuple(map(Choice, range(call.n))),
            tenant=call.tenant, deadline_s=deadline_s, session=call.session[:MAX_SESSION_CHARS],
            priority=min(call.priority, len(PRIORITIES) - 1))
        return Job(request, call.stop, arrived_s, call.account, bookmark, is_new)

    async def tokenize(self, text: str) -> list[int]:
        """As `run` would read the text; any length up to what could be a prompt."""
        self._refuse_hopeless(len(text), "text")
        return await self._off_loop_if_long(len(text), lambda: self.codec.encode(text))

    def detokenize(self, token_ids: Sequence[int], skip_special: bool) -> str:
        self._check_token_ids(token_ids, "token_ids")
        return self.codec.decode(token_ids, skip_special)

    async def run(self, job: Job) -> AsyncGenerator[Delta, None]:
        """The output as it comes. Raises what the request failed with; closing it cancels the request."""
        record = _Record(job, self.metrics, asyncio.get_running_loop().time)
        output = Output(self.codec, job.request, job.stop)
        unread = Unread(job.bookmark) if job.bookmark is not None else None
        last: Delta | None = None
        bill = _Bill(job, self._limits, self._claims)
        try:
            if job.pays_first:
                await bill.pay()
            async with aclosing(self._tokens.generate(job.request, job.last_seen, bill.pay_late)) as chunks:
                async for chunk in chunks:
                    for delta in (output.take(chunk),) if unread is None else _news(output, chunk, unread):
                        if delta is None:
                            continue
                        record.saw(delta)
                        if delta.last:
                            last = delta
                        else:
                            yield delta
                    if last is not None and output.runs_on:
                        break  # else the source ends by itself now
            if last is None:
                raise InternalError(f"request {job.request.request_id} ended without a finish reason.")
        except BatonError as e:
            record.outcome = e.code
            raise
        except Exception:
            record.outcome = InternalError.code
            raise
        finally:
            record.close()
            bill.settle(record)
        yield last  # everything is counted and released before the client hears the end

    @contextmanager
    def refusals_counted(self) -> Iterator[None]:
        """Around everything that can refuse a request before it runs."""
        try:
            yield
        except BatonError as e:
            self.metrics.inc("baton_requests_total", outcome=e.code)
            raise

    async def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, str):
            text = prompt
            self._refuse_hopeless(len(text), "prompt")
            ids = tuple(await self._off_loop_if_long(len(text), lambda: self.codec.encode(text)))
            field_name = "prompt"
        elif prompt and isinstance(prompt[0], ChatMessage):
            messages = [m.for_template() for m in prompt if isinstance(m, ChatMessage)]
            num_chars = sum(len(m["content"]) for m in messages)
            self._refuse_hopeless(num_chars, "messages")
            ids = tuple(await self._off_loop_if_long(num_chars, lambda: self.codec.encode_chat(messages)))
            field_name = "messages"
        else:
            ids, field_name = tuple(i for i in prompt if isinstance(i, int)), "prompt"
        self._check_token_ids(ids, field_name)  # of texts too: a tokenizer may know tokens that the model does not
        if not ids:
            raise InvalidRequest(f"{field_name} is empty. Send at least one token of text.", field_name)
        longest = self.max_model_len() - 1
        if len(ids) > longest:
            raise PromptTooLong(f"{field_name} has {len(ids)} tokens, and this model's context of {longest + 1} leaves "
                                f"room for {longest} and one output token. Shorten it.", field_name)
        return ids

    def _with_max_tokens(self, call: GenerateCall, num_prompt_tokens: int) -> SamplingParams:
        left = self.max_model_len() - num_prompt_tokens
        wanted = call.max_tokens
        if wanted is None:
            return dataclasses.replace(call.sampling, max_tokens=min(call.default_max_tokens or left, left))
        name = call.max_tokens_field
        if wanted < 1:
            raise InvalidRequest(f"{name} is {shown(wanted)}; it must be at least 1.", name)
        if wanted > left:
            raise PromptTooLong(
                f"{name} is {shown(wanted)}, but after a prompt of {num_prompt_tokens} tokens this model's context of "
                f"{left + num_prompt_tokens} leaves {left}. Ask for at most {left}, or leave {name} out.", name)
        return dataclasses.replace(call.sampling, max_tokens=wanted)

    def _check_token_ids(self, ids: Sequence[int], name: str) -> None:
        last = self.codec.card.vocab_size - 1
        bad = [i for i in (min(ids), max(ids)) if not 0 <= i <= last] if ids else []
        if bad:
            raise InvalidRequest(f"{name} holds {shown(bad[0])}; this model's token ids are 0 to {last}.", name)

    def _refuse_hopeless(self, num_chars: int, name: str) -> None:
        """Texts that cannot fit are refused before work is spent on them."""
        at_least = num_chars // self.codec.longest_token
        if at_least >= self.max_model_len():
            raise PromptTooLong(f"{name} has {num_chars} characters, at least {at_least} tokens; this model's context "
                                f"is {self.max_model_len()}. Shorten it.", name)

    @staticmethod
    async def _off_loop_if_long(num_chars: int, encode: Callable[[], list[int]]) -> list[int]:
        return encode() if num_chars <= INLINE_CHARS else await asyncio.to_thread(encode)


def _news(output: Output, chunk: TokenChunk, unread: Unread) -> Iterator[Delta | None]:
    """What a chunk adds to what its reader has."""
    for part in unread.parts(chunk):
        delta = output.take(part)
        yield None if delta is None else unread.news(delta)


class _Record:
    """What is counted and logged of one request. Numbers and ids only."""

    def __init__(self, job: Job, metrics: Metrics, now: Callable[[], float]) -> None:
        self._job = job
        self._metrics = metrics
        self._now = now
        self.usage = Usage(len(job.request.prompt), 0, 0)
        self._ttft_s: float | None = None
        self._latest_s: dict[int, float] = {}
        """By choice."""
        self.outcome = Cancelled.code

    @property
    def failed(self) -> bool:
        """It has neither ended nor been given up by its client."""
        return self.outcome not in (Cancelled.code, *FinishReason)

    def saw(self, delta: Delta) -> None:
        now = self._now()
        if delta.token_ids and self._ttft_s is None:
            self._ttft_s = now - self._job.arrived_s
            self._metrics.observe("baton_ttft_seconds", self._ttft_s)
        if delta.token_ids and delta.choice in self._latest_s:
            self._metrics.observe("baton_itl_seconds", now - self._latest_s[delta.choice])
        if delta.token_ids:
            self._latest_s[delta.choice] = now
        self.usage = delta.usage
        if delta.last:
            assert delta.finish is not None, delta
            self.outcome = delta.finish.value

    def close(self) -> None:
        total_s = self._now() - self._job.arrived_s
        usage, metrics = self.usage, self._metrics
        metrics.inc("baton_requests_total", outcome=self.outcome)
        metrics.inc("baton_prompt_tokens_total", usage.prompt_tokens)
        metrics.inc("baton_cached_prompt_tokens_total", usage.cached_tokens)
        metrics.inc("baton_output_tokens_total", usage.output_tokens)
        metrics.observe("baton_request_seconds", total_s)
        log.info("request %s outcome=%s prompt_tokens=%d cached_tokens=%d output_tokens=%d ttft_s=%s total_s=%.3f",
                 printable(self._job.request.request_id), self.outcome, usage.prompt_tokens, usage.cached_tokens,
                 usage.output_tokens, "-" if self._ttft_s is None else f"{self._ttft_s:.3f}", total_s)


class _Bill:
    """What one request is charged, once."""

    def __init__(self, job: Job, limits: RateLimits, claims: Claims) -> None:
        self._job = job
        self._limits = limits
        self._claims = claims
        self._charge: Charge | None = None
        self._runs_elsewhere = job.bookmark is not None
        """So it says, and nobody has found otherwise: then it was paid for there."""

    async def pay(self) -> None:
        """Raises RateLimited."""
        if self._charge is None:
            self._charge = await self._limits.charge(self._job.account, self._job.request)

    async def pay_late(self) -> None:
        """It said that it ran, and no worker works on it. Raises RateLimited."""
        self._runs_elsewhere = False
        self._claims.was_false(self._job.account, asyncio.get_running_loop().time())
        await self.pay()

    def settle(self, record: _Record) -> None:
        """It has ended here. Who reads on elsewhere has paid for the rest as well."""
        if self._charge is None or record.outcome == ResumedElsewhere.code:
            return
        if self._runs_elsewhere:
            self._limits.settle(self._charge, self._job.request, 0, failed=True)
        else:
            self._limits.settle(self._charge, self._job.request, record.usage.output_tokens, record.failed)


def check_stop(stop: Sequence[str]) -> None:
    if len(stop) > MAX_STOPS:
        raise InvalidRequest(f"stop holds {len(stop)} strings; {MAX_STOPS} are allowed.", "stop")
    for text in stop:
        if not text:
            raise InvalidRequest("stop holds an empty string, which would match everywhere. Remove it.", "stop")
        if len(text.encode()) > MAX_STOP_BYTES:
            raise InvalidRequest(f"a stop string has {len(text.encode())} bytes; {MAX_STOP_BYTES} are allowed.", "stop")


def new_request_id(prefix: str) -> str:
    """128 random bits: nobody can name another's request."""
    return f"{prefix}-{secrets.token_hex(16)}"


def shown(value: object) -> str:
    """A client's value in a message: its beginning, in ASCII."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def printable(text: str) -> str:
    """Clients may choose request ids; a log line stays one line."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)
