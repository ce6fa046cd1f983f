"""OpenAI's API as a load generator needs it: what a request says, what an event of its answer means, and what an
endpoint can do, found out by asking it before anything is measured."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from baton.bench.load.client import Client, Failed, Refused
from baton.bench.load.http1 import Events
from baton.bench.load.prose import GUESS, WORDS, Prose, every_word
from baton.bench.load.record import Record
from baton.core.errors import SetupError

Api = Literal["completions", "chat"]
PATHS: dict[Api, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
PROBE_TIMEOUT_S = 120.0
PROBE_ROUNDS = (1, 4)
"""How often each probe says every word: two lengths, from which slope and intercept follow."""
PROBE_OUTPUT_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Dialect:
    """How this endpoint wants to be asked."""

    api: Api
    model: str
    ignore_eos: bool = True
    """It takes `ignore_eos`, with which answers are as long as max_tokens says."""
    usage: bool = True
    """It takes `stream_options`, with which the last event bills the request."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Fields of every request; they win over ours."""

    def body(self, said: list[str], max_tokens: int) -> bytes:
        """`said`: the user's and the model's texts in turn, the user first and last."""
        asked: dict[str, Any] = {"model": self.model, "max_tokens": max_tokens, "stream": True, "temperature": 0}
        if self.api == "chat":
            asked["messages"] = [
                {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)
            ]
        else:
            asked["prompt"] = "".join(said)
        if self.ignore_eos:
            asked["ignore_eos"] = True
        if self.usage:
            asked["stream_options"] = {"include_usage": True}
        return json.dumps({**asked, **self.extra}).encode()


class Reading:
    """One streamed answer on its way into a record."""

    def __init__(self, record: Record, keep_text: bool = False) -> None:
        self.record = record
        self.text: list[str] = []
        """What was said, if it is wanted: the next turn of a session sends it back."""
        self.ended = False
        """[DONE] came, or a reason to stop."""
        self._events = Events()
        self._keep_text = keep_text

    def take(self, body: bytes, now_s: float) -> None:
        """Raises ValueError for an event that is none."""
        for data in self._events.feed(body):
            if data == b"[DONE]":
                self.ended = True
                continue
            event = json.loads(data)
            if not isinstance(event, dict):
                raise ValueError(f"an event that is no object: {data[:40]!r}")
            try:
                self._event(event, now_s)
            except (AttributeError, TypeError, LookupError):
                raise ValueError(f"an event of another shape: {data[:80]!r}") from None

    def _event(self, event: dict[str, Any], now_s: float) -> None:
        if event.get("error"):
            self.record.error, self.record.message = "in stream", json.dumps(event["error"])
        self._choice(event.get("choices") or [], now_s)
        if event.get("usage"):
            self._bill(event["usage"])

    def _choice(self, choices: list[dict[str, Any]], now_s: float) -> None:
        for choice in choices:
            said = choice.get("text") or spoken(choice.get("delta") or {})
            if said:
                self.record.event_s.append(now_s)
                if self._keep_text:
                    self.text.append(said)
            if choice.get("finish_reason"):
                self.record.finish, self.ended = choice["finish_reason"], True

    def _bill(self, usage: dict[str, Any]) -> None:
        self.record.prompt_tokens = usage.get("prompt_tokens")
        self.record.usage_output_tokens = usage.get("completion_tokens")
        self.record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")


def spoken(delta: dict[str, Any]) -> str:
    """What a chat's delta adds; the first, which only names the role, adds nothing."""
    return delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or ""


class Asker:
    """Sends the requests of one endpoint and fills in their records."""

    def __init__(self, client: Client, dialect: Dialect, timeout_s: float) -> None:
        self.dialect = dialect
        self._client = client
        self._timeout_s = timeout_s

    async def ask(self, record: Record, body: bytes, keep_text: bool) -> str:
        """The text, if it is kept. Whatever happens is in the record afterwards; only being cancelled is raised."""
        reading = Reading(record, keep_text)
        now = asyncio.get_running_loop().time
        record.sent_s = now()
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._client.post(PATHS[self.dialect.api], body, reading.take)
            if record.error is None and not reading.ended:
                record.error, record.message = "broken", "the stream ended in the middle of the answer"
        except TimeoutError:
            record.error, record.message = "timeout", f"no end in {self._timeout_s:g} s"
        except Failed as e:
            record.error, record.message = e.kind, str(e)
        record.end_s = now()
        return "".join(reading.text)


# ---- finding out -------------------------------------------------------------------------------------------------


async def first_model(client: Client) -> str:
    """The first that the server lists. Raises SetupError where nobody answers, or lists none."""
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            return str(json.loads(await client.get("/v1/models"))["data"][0]["id"])
    except (Failed, TimeoutError) as e:
        raise SetupError(f"{client.where} does not list its models ({e or 'no answer'}); is it "
                         "OpenAI-compatible, and up? Name the model with --model if it lists none.") from e
    except (ValueError, LookupError, TypeError) as e:
        raise SetupError(f"{client.where}/v1/models lists no model; name one with --model.") from e


async def probe(client: Client, dialect: Dialect, text: str) -> tuple[Dialect, Record]:
    """One small request, asked with less and less until it is taken. Raises SetupError if none is."""
    tries = (dialect, replace(dialect, ignore_eos=False), replace(dialect, ignore_eos=False, usage=False))
    for number, attempt in enumerate(tries, 1):
        record = Record("probe", 0, 0.0, 0, PROBE_OUTPUT_TOKENS)
        reading = Reading(record)
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                await client.post(PATHS[dialect.api], attempt.body([text], PROBE_OUTPUT_TOKENS), reading.take)
        except Refused as e:
            if e.status in {400, 422} and number < len(tries):
                continue
            raise SetupError(f"{client.where} refuses a request: {e.kind}, {e}") from e
        except (Failed, TimeoutError) as e:
            raise SetupError(f"{client.where} does not answer a request: {e or 'time-out'}.") from e
        if not reading.ended or record.error:
            raise SetupError(f"{client.where} broke a stream off: {record.error or 'no [DONE]'}.")
        return attempt, record
    raise AssertionError("the last try returns or raises")


async def sized(client: Client, dialect: Dialect, prose: Prose | None, seed: str) -> tuple[Dialect, Prose]:
    """Two probes: what the endpoint takes, and how texts become so long as they are meant to be. `prose`: of the
    model's tokenizer, where there is one; what the endpoint puts around a prompt is then measured, else all of it."""
    seen = []
    for rounds in PROBE_ROUNDS:
        text = every_word(rounds, random.Random(f"{seed}/probe/{rounds}"))
        dialect, record = await probe(client, dialect, text)
        seen.append((text, record.prompt_tokens))
    (_, few), (text, many) = seen
    if few is None or many is None:
        return dialect, prose or Prose.estimated(GUESS)
    if prose is not None:
        return dialect, replace(prose, frame_tokens=many - prose.tokens(text))
    once, often = (rounds * len(WORDS) for rounds in PROBE_ROUNDS)
    per_word = (many - few) / (often - once)
    if per_word <= 0:
        raise SetupError(f"{client.where} bills {few} tokens for {once} words and {many} for {often}; "
                         "name a --tokenizer.")
    return dialect, Prose.estimated(per_word, few - per_word * once)
