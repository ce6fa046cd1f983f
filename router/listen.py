"""An HTTP server inside our event loop: uvicorn without its signal handlers, on a socket that we opened.

uvicorn ends the process when its port is taken and takes over SIGINT and SIGTERM; both are server.py's to decide.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from baton.core.errors import SetupError

KEEP_ALIVE_S = 30
MAX_HEADER_BYTES = 32 << 10
BACKLOG = 1024
STALL_MS = 30_000
"""A client that takes nothing of what was sent for this long is cut off by the kernel: asyncio would keep the buffered
rest, and the connection, for as long as the client stays. One that vanished without a word is cut off by then too:
after 5 s of silence the kernel asks for it every 5 s."""
PROBE_S = 5


class _Pipelined(Exception):
    """A request came before the one ahead of it was answered."""


class _Protocol(HttpToolsProtocol):
    """One request at a time, and a bound on what is no body: llhttp has none for heads, trailers and chunk extensions,
    and a client that never ends them would fill our memory. Requests in a pipeline are refused: no client of these
    APIs sends them, and while one waits its client's going would not be heard."""

    _in_message = False
    _num_bytes = 0
    """Received since the message under way last brought a part of its body, or its head."""

    def data_received(self, data: bytes) -> None:
        self._num_bytes += len(data)
        super().data_received(data)
        if not self._in_message:
            self._num_bytes = 0
        elif self._num_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            self.send_400_response(f"More than {MAX_HEADER_BYTES} bytes of headers.")

    def on_message_begin(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            raise _Pipelined
        self._in_message = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._num_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_message = False
        super().on_message_complete()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


class HttpServer:
    """Serves from construction by `start` to `stop`; whoever started it stops it."""

    def __init__(self, server: _Server, task: asyncio.Task[None], port: int) -> None:
        self.port = port
        self.task = task
        """Ends only with `stop`, unless something is badly wrong."""
        self._server = server

    @classmethod
    async def start(cls, app: ASGIApp, host: str, port: int, stop_timeout_s: int) -> HttpServer:
        """Port 0 takes a free one. Raises SetupError when the port cannot be had. Running requests have
        `stop_timeout_s` to end after `stop`."""
        listener = bind(host, port)
        server = _Server(uvicorn.Config(
            app, http=_Protocol, lifespan="off", ws="none", log_config=None, access_log=False, server_header=False,
            proxy_headers=False, timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=stop_timeout_s,
            backlog=BACKLOG))
        task = asyncio.create_task(server.serve([listener]), name="http server")
        listening = asyncio.create_task(server.listening.wait())
        await asyncio.wait((task, listening), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            listening.cancel()
            await task
            raise SetupError(f"the HTTP server on {host}:{port} ended as it began. The log says why.")
        return cls(server, task, listener.getsockname()[1])

    async def stop(self) -> None:
        """Refuse new connections, wait for running requests. Safe to call twice."""
        self._server.should_exit = True
        await asyncio.gather(self.task, return_exceptions=True)


def bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
    except OSError as e:
        raise SetupError(f"router.host {host!r} is no address of this machine: {e.strerror or e}.",
                         "router.host") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as e:
        listener.close()
        if port and e.errno == errno.EADDRINUSE:
            raise SetupError(f"port {port} on {host} is taken. Choose another with --set router.http_port=PORT (0 "
                             "takes a free one), or end what uses it.", "router.http_port") from None
        raise SetupError(f"cannot listen on {host}:{port}: {(e.strerror or str(e)).lower()}. Choose another with "
                         "--set router.host=ADDRESS and router.http_port=PORT.", "router.http_port") from None
    listener.setblocking(False)
    _watch_clients(listener)
    return listener


def _watch_clients(listener: socket.socket) -> None:
    """Accepted connections inherit these (Linux; elsewhere the options that exist)."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", PROBE_S), ("TCP_KEEPINTVL", PROBE_S), ("TCP_USER_TIMEOUT", STALL_MS)):
        option = getattr(socket, name, None)
        if option is not None:
            listener.setsockopt(socket.IPPROTO_TCP, option, value)
