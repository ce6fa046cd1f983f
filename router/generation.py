"""Text in, text out: the one path that HTTP and gRPC share, so that they cannot differ.

Owns: the checks every prompt passes, the per-request text state, usage, the end-of-request log line and latency
figures. Does not know: HTTP, protobuf, workers. Prompts are never logged.

Life of a request:
 1. `prepare`: templated, tokenised (long texts off the loop), checked against the model's context.
 2. `run`: tokens come from the dispatcher; each becomes text, or is held back while it may still change.
 3. It ends with the model's finish, or at a stop string: the dispatcher's iterator is closed (which cancels the work)
    and the tokens past the stop are neither shown nor billed. Closing `run` early is how a front cancels.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import secrets
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from baton.core.config import RouterConfig
from baton.core.errors import (
    BatonError,
    Cancelled,
    InternalError,
    InvalidRequest,
    NotFound,
    from_code,
)
from baton.core.messages import TokenChunk
from baton.core.metrics import Metrics
from baton.core.request import FinishReason, Request, SamplingParams
from baton.router.detokenize import StopMatcher
from baton.router.text import TextCodec

MAX_STOPS = 8
MAX_STOP_BYTES = 64
MAX_REQUEST_ID_CHARS = 128
INLINE_CHARS = 16_384
"""Longer texts are tokenised in a thread: about 0.5 us a character (tokenizers 0.23, SmolLM2's vocabulary)."""

log = logging.getLogger("baton.router.requests")


class PromptTooLong(InvalidRequest):
    code = "context_length_exceeded"


class ModelNotFound(NotFound):
    code = "model_not_found"


class TokenSource(Protocol):
    """Where tokens come from: the dispatcher."""

    def generate(self, request: Request) -> AsyncGenerator[TokenChunk, None]:
        """Closing the iterator cancels the request."""
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
    timeout_s: float | None = None
    max_tokens_field: str = "max_tokens"
    """What the client called it."""


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Delta:
    """News of one request; the last one has `finish` (STOP or LENGTH)."""

    text: str
    token_ids: tuple[int, ...]
    finish: FinishReason | None
    usage: Usage


@dataclass(frozen=True, slots=True)
class Job:
    """A request that may run: `prepare` made it."""

    request: Request
    stop: tuple[str, ...]
    arrived_s: float
    """Loop time."""


class Generation:
    def __init__(self, codec: TextCodec, tokens: TokenSource, config: RouterConfig, metrics: Metrics,
                 served_name: str) -> None:
        self.codec = codec
        self.served_name = served_name
        self.metrics = metrics
        self._tokens = tokens
        self._config = config

    def max_model_len(self) -> int:
        """Longest prompt + output, in tokens."""
        return min(self._tokens.max_model_len() or self.codec.card.max_model_len, self.codec.card.max_model_len)

    def check_model(self, name: str) -> None:
        if name != self.served_name:
            raise ModelNotFound(f"the model {shown(name)} is not served here. "
                                f"Use {self.served_name!r} (GET /v1/models).", "model")

    async def prepare(self, call: GenerateCall, request_id: str) -> Job:
        """Tokens and limits of a call. Raises InvalidRequest naming the field at fault; it is counted here."""
        with self.refusals_counted():
            return await self._prepare(call, request_id)

    async def _prepare(self, call: GenerateCall, request_id: str) -> Job:
        arrived_s = asyncio.get_running_loop().time()
        check_stop(call.stop)
        dataclasses.replace(call.sampling, max_tokens=1).check()
        self._check_token_ids(call.sampling.stop_token_ids, "stop_token_ids")
        if len(request_id) > MAX_REQUEST_ID_CHARS:
            raise InvalidRequest(f"request_id may have {MAX_REQUEST_ID_CHARS} characters at most.", "request_id")
        if call.timeout_s is not None and not 0 < call.timeout_s < float("inf"):
            raise InvalidRequest(f"timeout_s is {call.timeout_s!r}; it must be a positive number of seconds.",
                                 "timeout_s")
        prompt = await self._encode(call.prompt)
        request = Request(
            request_id, prompt, self._with_max_tokens(call, len(prompt)), tenant=call.tenant,
            deadline_s=min(call.timeout_s or self._config.request_timeout_s, self._config.request_timeout_s))
        return Job(request, call.stop, arrived_s)

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
        output = _Output(self.codec, job)
        last: Delta | None = None
        try:
            async with aclosing(self._tokens.generate(job.request)) as chunks:
                async for chunk in chunks:
                    delta = output.take(chunk)
                    record.saw(delta)
                    if delta.finish is None:
                        yield delta
                        continue
                    last = delta
                    if chunk.finish is None:
                        break  # at a stop string; else the source ends by itself now
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
            self._check_token_ids(ids, field_name)
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
        vocab_size = self.codec.card.vocab_size
        bad = next((i for i in ids if not 0 <= i < vocab_size), None)
        if bad is not None:
            raise InvalidRequest(f"{name} holds {shown(bad)}; this model's token ids are 0 to {vocab_size - 1}.", name)

    def _refuse_hopeless(self, num_chars: int, name: str) -> None:
        """Texts that cannot fit are refused before work is spent on them."""
        at_least = num_chars // self.codec.longest_token
        if at_least >= self.max_model_len():
            raise PromptTooLong(f"{name} has {num_chars} characters, at least {at_least} tokens; this model's context "
                                f"is {self.max_model_len()}. Shorten it.", name)

    @staticmethod
    async def _off_loop_if_long(num_chars: int, encode: Callable[[], list[int]]) -> list[int]:
        return encode() if num_chars <= INLINE_CHARS else await asyncio.to_thread(encode)


class _Output:
    """Text state of one running request."""

    def __init__(self, codec: TextCodec, job: Job) -> None:
        sampling = job.request.sampling
        self._detokenizer = codec.detokenizer()
        self._matcher = StopMatcher(job.stop)
        self._silent_at_end = frozenset(sampling.stop_token_ids) | frozenset(codec.card.eos_token_ids)
        self._num_prompt_tokens = len(job.request.prompt)
        self._num_output_tokens = 0
        self._cached_tokens = 0

    def take(self, chunk: TokenChunk) -> Delta:
        """Raises the error that a chunk carries."""
        if chunk.finish is FinishReason.ERROR:
            raise from_code(chunk.error_code, chunk.error_message)
        if chunk.finish is FinishReason.CANCELLED:
            raise Cancelled("the request was cancelled.")
        self._cached_tokens = max(self._cached_tokens, chunk.cached_tokens)
        texts, used = [], 0
        for token_id in chunk.token_ids:
            used += 1
            ends_here = chunk.finish is FinishReason.STOP and used == len(chunk.token_ids)
            if not (ends_here and token_id in self._silent_at_end):
                texts.append(self._matcher.feed(self._detokenizer.push(token_id)))
            if self._matcher.stopped:
                break
        finish = chunk.finish
        if finish is not None and not self._matcher.stopped:
            texts += [self._matcher.feed(self._detokenizer.flush()), self._matcher.flush()]
        if self._matcher.stopped:
            finish = FinishReason.STOP
        self._num_output_tokens += used
        usage = Usage(self._num_prompt_tokens, self._cached_tokens, self._num_output_tokens)
        return Delta("".join(texts), chunk.token_ids[:used], finish, usage)


class _Record:
    """What is counted and logged of one request. Numbers and ids only."""

    def __init__(self, job: Job, metrics: Metrics, now: Callable[[], float]) -> None:
        self._job = job
        self._metrics = metrics
        self._now = now
        self._usage = Usage(len(job.request.prompt), 0, 0)
        self._ttft_s: float | None = None
        self._latest_s = job.arrived_s
        self.outcome = Cancelled.code

    def saw(self, delta: Delta) -> None:
        now = self._now()
        if delta.token_ids and self._ttft_s is None:
            self._ttft_s = now - self._job.arrived_s
            self._metrics.observe("baton_ttft_seconds", self._ttft_s)
        elif delta.token_ids:
            self._metrics.observe("baton_itl_seconds", now - self._latest_s)
        self._latest_s = now
        self._usage = delta.usage
        if delta.finish is not None:
            self.outcome = delta.finish.value

    def close(self) -> None:
        total_s = self._now() - self._job.arrived_s
        usage, metrics = self._usage, self._metrics
        metrics.inc("baton_requests_total", outcome=self.outcome)
        metrics.inc("baton_prompt_tokens_total", usage.prompt_tokens)
        metrics.inc("baton_cached_prompt_tokens_total", usage.cached_tokens)
        metrics.inc("baton_output_tokens_total", usage.output_tokens)
        metrics.observe("baton_request_seconds", total_s)
        log.info("request %s outcome=%s prompt_tokens=%d cached_tokens=%d output_tokens=%d ttft_s=%s total_s=%.3f",
                 printable(self._job.request.request_id), self.outcome, usage.prompt_tokens, usage.cached_tokens,
                 usage.output_tokens, "-" if self._ttft_s is None else f"{self._ttft_s:.3f}", total_s)


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
    return "".join(c if c.isprintable() else "?" for c in text)
