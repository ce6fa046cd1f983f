"""A `baton serve` of a benchmark's own: a process on free ports, up when it is entered and gone afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence

import httpx

from baton.core.errors import SetupError

START_TIMEOUT_S, STOP_TIMEOUT_S, POLL_S = 300.0, 60.0, 0.2


@contextlib.asynccontextmanager
async def serving(arguments: Sequence[str]) -> AsyncIterator[tuple[str, int]]:
    """Its base URL and process id; `arguments` are those of `baton serve`. Stopped as a person would, with Ctrl-C,
    also if this is cancelled while it starts. Raises SetupError if it does not come up."""
    http_port, grpc_port = free_port(), free_port()
    ports = ("--set", f"router.http_port={http_port}", "--set", f"router.grpc_port={grpc_port}")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "baton.cli.main", "serve", "--pool", "local", *ports, *arguments,
        stdout=asyncio.subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    url = f"http://127.0.0.1:{http_port}"
    try:
        await _until_up(process, url)
        yield url, process.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        try:
            await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            process.kill()  # its children notice that it is gone, and go
            await process.wait()


async def _until_up(process: asyncio.subprocess.Process, url: str) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(START_TIMEOUT_S), httpx.AsyncClient(timeout=5) as client:
            while process.returncode is None:
                with contextlib.suppress(httpx.TransportError):
                    if (await client.get(f"{url}/readyz")).status_code == 200:
                        return
                await asyncio.sleep(POLL_S)
    raise SetupError("baton serve did not come up; its own message is above.")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port
