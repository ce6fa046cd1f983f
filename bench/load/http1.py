"""Reading a streamed HTTP/1.1 answer, and the events in it. Pure: bytes in, pieces out, whatever way they are cut.

Its own, because the client shares its cores with what it measures: httpx takes several times the CPU for each
token (figures in docs/load.md).
"""

from __future__ import annotations

MAX_HEAD_BYTES = 64 << 10


class Malformed(Exception):
    """The peer does not speak HTTP/1.1, or not all of it arrived."""


class Answer:
    """One response. Feed it what arrives; `complete` says when its body is over, `status` is 0 before its head."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.complete = False
        self._buffer = b""
        self._left: int | None = None
        """Bytes of the body, or of the chunk, still to come; None: until the connection closes."""
        self._chunked = False
        self._in_trailers = False

    @property
    def keeps_alive(self) -> bool:
        """Another request may follow on the connection."""
        ends_itself = self._chunked or self._left is not None
        return self.complete and ends_itself and self.headers.get("connection", "").lower() != "close"

    def feed(self, data: bytes) -> bytes:
        """The body's next bytes. Raises Malformed."""
        self._buffer = self._buffer + data if self._buffer else data
        if not self.status and not self._head():
            return b""
        if self._chunked:
            return self._chunks()
        body, self._buffer = self._buffer, b""
        if self._left is not None:
            self._left -= len(body)
            if self._left < 0:
                raise Malformed("more bytes than Content-Length said")
            self.complete = self._left == 0
        return body

    def eof(self) -> None:
        """The connection was closed. Raises Malformed if that is not how the body ends."""
        if self.complete:
            return
        if not self.status or self._chunked or self._left is not None:
            raise Malformed("the connection closed in the middle of an answer")
        self.complete = True

    def _head(self) -> bool:
        """Whether it is here and read."""
        while True:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                if len(self._buffer) > MAX_HEAD_BYTES:
                    raise Malformed("headers without an end")
                return False
            first, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
            self._buffer = self._buffer[end + 4 :]
            version, _, rest = first.partition(" ")
            if not version.startswith("HTTP/1.") or not rest[:3].isdigit():
                raise Malformed(f"an answer that begins with {first[:40]!r}")
            if not rest.startswith("1"):  # 100 Continue and its like announce the real one
                break
        self.status = int(rest[:3])
        self.headers = {name.strip().lower(): value.strip() for name, _, value in (h.partition(":") for h in lines)}
        if version == "HTTP/1.0":
            self.headers.setdefault("connection", "close")
        self._chunked = "chunked" in self.headers.get("transfer-encoding", "").lower()
        length = self.headers.get("content-length")
        if self._chunked:
            self._left = 0
        elif length is not None:
            if not length.isdigit():
                raise Malformed(f"Content-Length {length!r}")
            self._left = int(length)
            self.complete = self._left == 0
        return True

    def _chunks(self) -> bytes:
        assert self._left is not None
        buffer, at, body = self._buffer, 0, []
        while not self.complete:
            if self._left:  # with the line end that follows a chunk, which is not body
                piece = buffer[at : at + self._left]
                at += len(piece)
                body.append(piece[: max(self._left - 2, 0)])
                self._left -= len(piece)
                if self._left:
                    break
            end = buffer.find(b"\r\n", at)
            if end < 0:
                break
            line, at = buffer[at:end], end + 2
            if self._in_trailers:
                self.complete = not line
                continue
            try:
                size = int(line.partition(b";")[0], 16)
            except ValueError:
                raise Malformed(f"a chunk that begins with {line[:20]!r}") from None
            self._in_trailers = size == 0
            self._left = size + 2 if size else 0
        self._buffer = buffer[at:]
        return body[0] if len(body) == 1 else b"".join(body)


class Events:
    """Server-sent events: the `data` of each line that has it. An event of these APIs is one line."""

    def __init__(self) -> None:
        self._partial = b""

    def feed(self, body: bytes) -> list[bytes]:
        *lines, self._partial = (self._partial + body if self._partial else body).split(b"\n")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]
