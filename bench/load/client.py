"""An HTTP/1.1 client for many streams at once: as little CPU per token as Python allows, and a time stamp taken when
the bytes are read, before anything is done with them.

1. a request takes an idle connection, or opens one; there is no limit on how many are open
2. its answer's bytes go to the caller with the time they were read
3. an answer that ended well leaves its connection idle for the next; a failed one closes it

A connection that the server closed while it was idle may be taken in the same instant: if not one byte of an answer
came on a connection that had been used before, the request is sent once more on a new one.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

from baton.bench.load.http1 import Answer, Malformed
from baton.core.errors import SetupError

Take = Callable[[bytes, float], None]
"""Called with body bytes and the loop's time at which they were read. May raise ValueError: the answer is malformed."""
CONNECT_TIMEOUT_S = 10.0
ERROR_BODY_BYTES = 4096
"""So much of an answer that is no stream is kept for the message."""


class Failed(Exception):
    """A request that got no whole answer. `kind` is what records count."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Refused(Failed):
    """An answer with another status than 200; `body` is its beginning."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"http {status}", body.decode(errors="replace"))
        self.status = status


class _Connection(asyncio.Protocol):
    def __init__(self, idle: list[_Connection]) -> None:
        self.open = False
        self.used = False
        """Has carried an answer to its end."""
        self._heard = False
        self._idle = idle
        self._time = asyncio.get_running_loop().time
        self._answer: Answer | None = None
        self._take: Take | None = None
        self._refusal = b""
        self._done: asyncio.Future[None] | None = None

    async def exchange(self, request: bytes, take: Take) -> None:
        """Ends with the answer. Raises Failed; the connection is then closed, unless the answer was whole."""
        answer = self._answer = Answer()
        self._take, self._refusal, self._heard = take, b"", False
        self._done = asyncio.get_running_loop().create_future()
        try:
            self._transport.write(request)
            await self._done
        except BaseException:
            self.open = False
            raise
        finally:
            self._answer = self._take = self._done = None
            if self.open and answer.keeps_alive:
                self.used = True
                self._idle.append(self)
            else:
                self._transport.abort()
        if answer.status != 200:
            raise Refused(answer.status, self._refusal)

    def close(self) -> None:
        self._transport.abort()

    @property
    def untouched(self) -> bool:
        """Lost, perhaps before the request reached anybody."""
        return self.used and not self._heard

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport, self.open = transport, True

    def data_received(self, data: bytes) -> None:
        now = self._time()
        self._heard = True
        if self._answer is None or self._take is None:
            self._transport.abort()  # bytes that nobody asked for
            return
        try:
            body = self._answer.feed(data)
            if self._answer.status == 200:
                self._take(body, now)
            elif len(self._refusal) < ERROR_BODY_BYTES:
                self._refusal += body
        except (Malformed, ValueError) as e:
            self._end(Failed("malformed", str(e)))
            return
        if self._answer.complete:
            self._end(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        if self in self._idle:
            self._idle.remove(self)
        if self._answer is None:
            return
        try:
            self._answer.eof()
            self._end(None)
        except Malformed as e:
            self._end(Failed("broken", str(exc or e)))

    def _end(self, failure: Failed | None) -> None:
        if self._done is None or self._done.done():
            return
        if failure is None:
            self._done.set_result(None)
        else:
            self._done.set_exception(failure)


class Client:
    """Of one server. `async with` closes what is idle at the end."""

    def __init__(self, base_url: str, headers: Mapping[str, str] | None = None) -> None:
        """Raises SetupError if the address is none."""
        parts = urlsplit(base_url)
        try:
            self.host = parts.hostname or ""
            self.port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            self.host = ""
        if parts.scheme not in {"http", "https"} or not self.host:
            raise SetupError(f"{base_url!r} is no address of a server; as in http://127.0.0.1:8000.")
        self.where = f"{self.host}:{self.port}"
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        said = {
            "Host": parts.netloc.rpartition("@")[2],
            "Content-Type": "application/json",
            "User-Agent": "baton-bench",
            **(headers or {}),
        }
        if any(c in text for pair in said.items() for text in pair for c in "\r\n"):
            raise SetupError("a header holds a line break.")
        self._head = "".join(f"{name}: {value}\r\n" for name, value in said.items())
        self._idle: list[_Connection] = []

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        for connection in list(self._idle):
            connection.close()
        await asyncio.sleep(0)  # the loop tells each that it is closed

    async def post(self, path: str, body: bytes, take: Take) -> None:
        """Ends with the answer. Raises Failed."""
        length = f"Content-Length: {len(body)}\r\n"
        await self._ask(f"POST {self._path}{path} HTTP/1.1\r\n{self._head}{length}\r\n", body, take)

    async def get(self, path: str) -> bytes:
        """The whole body. Raises Failed."""
        parts: list[bytes] = []
        await self._ask(f"GET {self._path}{path} HTTP/1.1\r\n{self._head}\r\n", b"", lambda data, _: parts.append(data))
        return b"".join(parts)

    async def _ask(self, head: str, body: bytes, take: Take) -> None:
        request = head.encode("latin-1") + body
        connection = self._idle.pop() if self._idle else await self._connect()
        try:
            await connection.exchange(request, take)
        except Failed as e:
            if e.kind != "broken" or not connection.untouched:
                raise
            await (await self._connect()).exchange(request, take)

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(
                    lambda: _Connection(self._idle), self.host, self.port, ssl=self._tls
                )
        except TimeoutError:
            raise Failed("connect", f"no connection to {self.where} in {CONNECT_TIMEOUT_S:g} s") from None
        except OSError as e:
            raise Failed("connect", f"no connection to {self.where}: {e}") from e
        return connection
