"""What a record holds after each kind of answer, from a server that plays a script over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from itertools import pairwise
from typing import Any

import pytest

from baton.bench.load.client import Client
from baton.bench.load.openai import Asker, Dialect, first_model, sized
from baton.bench.load.prose import Prose
from baton.bench.load.record import Record
from baton.core.errors import SetupError
from tests.bench.scripted import Exchange, Play, Scripted, scripted

TEXT = Dialect("completions", "m")
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}


def played(play: Play, work: Callable[[Scripted, Client], Coroutine[Any, Any, Any]], path: str = "") -> Any:
    async def main() -> Any:
        async with scripted(play) as server, Client(server.url + path, {"Authorization": "Bearer k"}) as client:
            return await work(server, client)

    return asyncio.run(main())


async def ask(
    client: Client, dialect: Dialect = TEXT, timeout_s: float = 60.0, keep_text: bool = False
) -> tuple[Record, str]:
    record = Record("r", 0, asyncio.get_running_loop().time(), 1, 3)
    text = await Asker(client, dialect, timeout_s).ask(record, dialect.body(["hello"], 3), keep_text)
    return record, text


def asked_once(play: Play, dialect: Dialect = TEXT, timeout_s: float = 60.0) -> Record:
    async def work(server: Scripted, client: Client) -> Record:
        return (await ask(client, dialect, timeout_s))[0]

    record = played(play, work)
    assert isinstance(record, Record)
    assert record.end_s is not None
    return record


def test_an_answer_fills_its_record_in_the_order_in_which_things_came() -> None:
    async def play(x: Exchange) -> None:
        await x.answer(3, USAGE)

    record = asked_once(play)
    assert record.ok, record.message
    assert record.sent_s is not None
    assert record.end_s is not None
    times = [record.intended_s, record.sent_s, *record.event_s, record.end_s]
    assert len(record.event_s) == 3
    assert all(a <= b for a, b in pairwise(times))
    assert (record.prompt_tokens, record.cached_tokens, record.usage_output_tokens) == (7, 4, 3)
    assert record.finish == "length"


def test_a_chat_s_first_event_that_only_names_the_role_is_no_token() -> None:
    async def play(x: Exchange) -> None:
        assert x.path == "/v1/chat/completions"
        await x.begin()
        for delta in ({"role": "assistant", "content": ""}, {"reasoning_content": "hm"}, {"content": "hi"}, {}):
            await x.event({"choices": [{"delta": delta, "finish_reason": None}]})
        await x.event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        await x.event(b"[DONE]")
        await x.end()

    record = asked_once(play, Dialect("chat", "m"))
    assert record.ok
    assert len(record.event_s) == record.output_tokens == 2
    assert record.finish == "stop"


def test_the_body_says_what_was_asked_and_extra_fields_win() -> None:
    async def play(x: Exchange) -> None:
        await x.answer(1)

    async def work(server: Scripted, client: Client) -> Exchange:
        await ask(client, Dialect("completions", "m", extra={"temperature": 0.7, "ignore_eos": False}))
        return server.seen[0]

    seen = played(play, work, "/prefix/v1/")
    assert seen.path == "/prefix/v1/completions"
    assert seen.headers["authorization"] == "Bearer k"
    assert seen.body == {
        "model": "m", "prompt": "hello", "max_tokens": 3, "stream": True, "temperature": 0.7, "ignore_eos": False,
        "stream_options": {"include_usage": True},
    }  # fmt: skip


async def too_busy(x: Exchange) -> None:
    await x.whole(429, {"error": {"message": "come back later"}})


async def closes(x: Exchange) -> None:
    raise ConnectionError


async def breaks_off(x: Exchange) -> None:
    await x.begin()
    await x.event({"choices": [{"text": "a", "finish_reason": None}]})
    raise ConnectionError


async def ends_without_an_end(x: Exchange) -> None:
    await x.begin()
    await x.event({"choices": [{"text": "a", "finish_reason": None}]})
    await x.end()


async def reports_an_error(x: Exchange) -> None:
    await x.begin()
    await x.event({"error": {"message": "out of blocks"}})
    await x.event(b"[DONE]")
    await x.end()


async def says_no_json(x: Exchange) -> None:
    await x.begin()
    await x.event(b"{nonsense")


async def says_no_object(x: Exchange) -> None:
    await x.begin()
    await x.event(b"[1]")


async def says_another_shape(x: Exchange) -> None:
    await x.begin()
    await x.event({"choices": ["text"]})


async def speaks_something_else(x: Exchange) -> None:
    await x.send(b"220 smtp.example.com ESMTP\r\n\r\n")


@pytest.mark.parametrize(
    ("play", "kind", "message"),
    [
        (too_busy, "http 429", "come back later"),
        (closes, "broken", "in the middle"),
        (breaks_off, "broken", "in the middle"),
        (ends_without_an_end, "broken", "in the middle"),
        (reports_an_error, "in stream", "out of blocks"),
        (says_no_json, "malformed", ""),
        (says_no_object, "malformed", "no object"),
        (says_another_shape, "malformed", "another shape"),
        (speaks_something_else, "malformed", "220 smtp"),
    ],
)
def test_each_kind_of_failure_has_its_name_and_what_was_said(play: Play, kind: str, message: str) -> None:
    record = asked_once(play)
    assert not record.ok
    assert record.error == kind
    assert message in record.message


def test_a_server_that_is_silent_for_too_long_is_a_time_out() -> None:
    async def play(x: Exchange) -> None:
        await x.begin()
        await asyncio.Event().wait()

    assert asked_once(play, timeout_s=0.05).error == "timeout"


def test_nobody_there_is_a_failure_to_connect() -> None:
    async def main() -> Record:
        async with scripted(closes) as server:
            url = server.url
        async with Client(url) as client:
            return (await ask(client))[0]

    assert asyncio.run(main()).error == "connect"


def test_requests_in_flight_are_unbounded_and_connections_are_used_again() -> None:
    everybody = asyncio.Event()

    async def play(x: Exchange) -> None:
        if len(there.seen) == 50:
            everybody.set()
        await everybody.wait()  # nobody is answered before all have asked
        await x.answer(2)

    there = Scripted("")

    async def work(server: Scripted, client: Client) -> tuple[int, int]:
        there.seen = server.seen
        records = [r for r, _ in await asyncio.gather(*(ask(client) for _ in range(50)))]
        assert all(r.ok for r in records)
        first_round = server.num_connections
        await asyncio.gather(*(ask(client) for _ in range(50)))
        return first_round, server.num_connections

    assert played(play, work) == (50, 50)


def test_an_error_with_a_whole_answer_leaves_its_connection_usable() -> None:
    async def work(server: Scripted, client: Client) -> int:
        for _ in range(3):
            await ask(client)
        return server.num_connections

    assert played(too_busy, work) == 1


def test_a_connection_that_was_closed_while_idle_costs_no_request() -> None:
    """The server takes the second request and closes without a word, as one does whose keep-alive has just ended."""

    async def play(x: Exchange) -> None:
        if len(there.seen) == 2:
            raise ConnectionError
        await x.answer(1)

    there = Scripted("")

    async def work(server: Scripted, client: Client) -> tuple[bool, bool, int]:
        there.seen = server.seen
        first, _ = await ask(client)
        second, _ = await ask(client)
        return first.ok, second.ok, len(server.seen)

    assert played(play, work) == (True, True, 3)


def test_an_answer_that_breaks_off_is_not_asked_for_again() -> None:
    async def play(x: Exchange) -> None:
        if len(there.seen) == 2:
            await breaks_off(x)
        await x.answer(1)

    there = Scripted("")

    async def work(server: Scripted, client: Client) -> tuple[str | None, int]:
        there.seen = server.seen
        await ask(client)
        second, _ = await ask(client)
        return second.error, len(server.seen)

    assert played(play, work) == ("broken", 2)


def test_the_text_is_kept_for_the_next_turn_where_it_is_wanted() -> None:
    async def play(x: Exchange) -> None:
        await x.answer(2)

    async def work(server: Scripted, client: Client) -> tuple[str, str]:
        return (await ask(client, keep_text=True))[1], (await ask(client))[1]

    assert played(play, work) == (" word word", "")


# ---- finding out what an endpoint can do -----------------------------------------------------------------------------


def strict(takes_ignore_eos: bool, takes_usage: bool, per_word: float = 2.0, frame: int = 11) -> Play:
    """A server that knows its fields, and bills so much per word."""

    async def play(x: Exchange) -> None:
        if ("ignore_eos" in x.body and not takes_ignore_eos) or ("stream_options" in x.body and not takes_usage):
            await x.whole(400, {"error": {"message": "unknown field"}})
            return
        tokens = round(len(x.body["prompt"].split()) * per_word) + frame
        usage = {"prompt_tokens": tokens, "completion_tokens": 4}
        await x.answer(4, usage if "stream_options" in x.body else None)

    return play


def met(play: Play, prose: Prose | None = None) -> tuple[Dialect, Prose]:
    async def work(server: Scripted, client: Client) -> tuple[Dialect, Prose]:
        return await sized(client, TEXT, prose, "s")

    found: tuple[Dialect, Prose] = played(play, work)
    return found


@pytest.mark.parametrize(
    ("play", "ignore_eos", "usage"),
    [(strict(True, True), True, True), (strict(False, True), False, True), (strict(False, False), False, False)],
)
def test_fields_that_a_server_refuses_are_left_out(play: Play, ignore_eos: bool, usage: bool) -> None:
    dialect, _ = met(play)
    assert (dialect.ignore_eos, dialect.usage) == (ignore_eos, usage)


def test_tokens_per_word_and_what_is_around_a_prompt_are_measured_from_usage() -> None:
    _, prose = met(strict(True, True, per_word=2.0, frame=11))
    assert set(prose.costs.values()) == {2.0}
    assert prose.frame_tokens == 11


def test_a_tokenizer_says_what_words_cost_and_usage_only_what_is_around_them() -> None:
    _, prose = met(strict(True, True, per_word=2.0, frame=11), Prose.estimated(2.0))
    assert prose.frame_tokens == 11


def test_a_server_that_refuses_everything_cannot_be_measured() -> None:
    with pytest.raises(SetupError, match="refuses a request: http 429, .*come back later"):
        met(too_busy)


@pytest.mark.parametrize("play", [breaks_off, ends_without_an_end, reports_an_error, says_no_json])
def test_a_server_that_cannot_answer_cannot_be_measured(play: Play) -> None:
    with pytest.raises(SetupError, match="does not answer|broke a stream off"):
        met(play)


@pytest.mark.parametrize("body", [{"data": []}, {"object": "list"}, [1], {"data": [{"id": "m"}]}])
def test_the_model_is_the_first_that_is_listed(body: Any) -> None:
    async def play(x: Exchange) -> None:
        await x.whole(200, body)

    async def work(server: Scripted, client: Client) -> str:
        return await first_model(client)

    if body == {"data": [{"id": "m"}]}:
        assert played(play, work) == "m"
        return
    with pytest.raises(SetupError, match="lists no model"):
        played(play, work)


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://x", "http://", "http://x:port", "http://x:99999"])
def test_an_address_that_is_none_is_named_in_one_sentence(url: str) -> None:
    with pytest.raises(SetupError, match="no address of a server"):
        Client(url)
