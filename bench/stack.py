"""A `baton serve` of a benchmark's own: a process on free ports, up when it is entered and gone afterwards."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import httpx

from baton.core.config import child_env
from baton.core.errors import SetupError

START_TIMEOUT_S, STOP_TIMEOUT_S, POLL_S = 300.0, 60.0, 0.2


@contextlib.contextmanager
def serving(arguments: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Its base URL and process id; `arguments` are those of `baton serve`. Stopped as a person would, with Ctrl-C.
    Raises SetupError if it does not come up."""
    http_port, grpc_port = free_port(), free_port()
    ports = ("--set", f"router.http_port={http_port}", "--set", f"router.grpc_port={grpc_port}")
    process = subprocess.Popen(
        [sys.executable, "-m", "baton.cli.main", "serve", "--pool", "local", *ports, *arguments],
        env=child_env(1),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{http_port}"
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SetupError("baton serve did not come up; its own message is above.")
            time.sleep(POLL_S)
        yield url, process.pid
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()  # its children notice that it is gone, and go
            process.wait()
            raise


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    return False


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port
