"""Streamed HTTP/1.1 answers are read the same however the network cuts them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.bench.load.http1 import Answer, Events, Malformed

BODY = b'data: {"text": "a"}\n\n: a comment\nevent: ping\ndata: {"text": "\xc3\xa4"}\r\n\r\ndata:[DONE]\n\n'
DATA = [b'{"text": "a"}', b'{"text": "\xc3\xa4"}', b"[DONE]"]


def chunked(body: bytes, sizes: list[int]) -> bytes:
    out, at = b"", 0
    for size in sizes:
        if piece := body[at : at + size]:
            out += b"%X;why=not\r\n%s\r\n" % (len(piece), piece)
            at += size
    if rest := body[at:]:
        out += b"%x\r\n%s\r\n" % (len(rest), rest)
    return out + b"0\r\nX-Trailer: 1\r\n\r\n"


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted({p % len(data) for p in places}), len(data)]
    return [data[a:b] for a, b in zip(edges, edges[1:], strict=False) if a < b]


HEADS = {
    "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\nServer: x\r\n\r\n",
    "length": b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(BODY),
    "close": b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n",
    "continue": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(BODY),
}
places = st.lists(st.integers(0, 1000), max_size=12)


@given(kind=st.sampled_from(sorted(HEADS)), sizes=st.lists(st.integers(1, 30)), network=places)
def test_an_answer_and_its_events_are_the_same_however_they_are_cut(
    kind: str, sizes: list[int], network: list[int]
) -> None:
    answer, events = Answer(), Events()
    body, seen = b"", []
    for piece in cut(HEADS[kind] + (chunked(BODY, sizes) if kind == "chunked" else BODY), network):
        assert not answer.complete
        taken = answer.feed(piece)
        body += taken
        seen += events.feed(taken)
    assert answer.complete is (kind != "close")
    answer.eof()
    assert answer.complete
    assert (answer.status, body, seen) == (200, BODY, DATA)
    assert answer.keeps_alive is (kind != "close")


@pytest.mark.parametrize(
    ("head", "keeps"),
    [
        (b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: Close\r\n\r\n", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", False),
    ],
)
def test_a_connection_is_used_again_only_where_both_sides_keep_it(head: bytes, keeps: bool) -> None:
    answer = Answer()
    answer.feed(head)
    assert answer.complete
    assert answer.keeps_alive is keeps


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 ok\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * (64 << 10),
    ],
)
def test_what_is_no_http_is_malformed(data: bytes) -> None:
    with pytest.raises(Malformed):
        Answer().feed(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
    ],
)
def test_a_connection_that_closes_in_the_middle_is_malformed(data: bytes) -> None:
    answer = Answer()
    answer.feed(data)
    with pytest.raises(Malformed, match="in the middle"):
        answer.eof()
