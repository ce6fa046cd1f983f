"""The routers that are measured, each in front of workers that cost nothing: Baton's, SGLang's, vLLM's, and Dynamo's
frontend.

Peers are installed once, in an environment of their own
in the model cache. SGLang's and vLLM's are proxies: they neither tokenise nor template. Baton and Dynamo do.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import httpx

from baton.bench.peers.builds import LOG, environment, place, run
from baton.bench.peers.systems import child
from baton.bench.peers.weights import documents
from baton.bench.router_cost import mock
from baton.bench.stack import free_port
from baton.cli.stack import end_group, start_router
from baton.cluster.embedded import start_embedded_redis
from baton.core import config
from baton.core.errors import SetupError
from baton.core.once import made_once
from baton.models.spec import ModelSpec

PACKAGES = ("sglang-router==0.3.2", "vllm-router==0.1.17")
DYNAMO = ("ai-dynamo==1.6.1", "ai-dynamo-runtime==1.6.1")
"""Installed without what they depend on: one of those comes only from their vendor's own index, and a frontend and its
mock workers run without it."""
DYNAMO_NEEDS = ("pyyaml", "packaging", "transformers", "msgspec", "pyzmq", "uvloop", "zstandard", "pydantic")
NUM_WORKERS = 4
GAP_S = 0.01
UP_S, POLL_S, STOP_S = 120.0, 0.2, 10.0
DYNAMO_PLANES = ("--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq")
NAME = "smollm2"


@dataclass(frozen=True, slots=True)
class Up:
    port: int
    pid: int
    """Of the router's own process. What that starts counts with it; SGLang's and vLLM's start nothing."""
    model: str


@dataclass(frozen=True, slots=True)
class System:
    name: str
    start: Callable[[bool], contextlib.AbstractAsyncContextManager[Up]]
    """Given: workers take GAP_S for a token, or as little as they can."""


def baton(model: Path) -> System:
    """Its router over real gRPC streams to made-up workers, and a registry. `model`: a converted one's directory."""

    @contextlib.asynccontextmanager
    async def start(paced: bool) -> AsyncIterator[Up]:
        async with _made_up(model, paced) as (redis_url, started):
            logs = Path(started.enter_context(tempfile.TemporaryDirectory()))
            settings = config.load({}, ("router.http_port=0", "router.grpc_port=0"))
            router = await start_router(settings, model, redis_url, logs, started)
            await _until_it_answers(router.http, router.model, "Baton's router found no worker.")
            yield Up(int(router.http.rpartition(":")[2]), router.process.pid, router.model)

    return System("baton", start)


def floor(model: Path) -> System:
    """What the libraries under Baton's router cost without it (floor.py)."""

    @contextlib.asynccontextmanager
    async def start(paced: bool) -> AsyncIterator[Up]:
        async with _made_up(model, paced) as (redis_url, started):
            words = ("-m", "baton.bench.router_cost.floor", redis_url, str(model))
            process = await asyncio.create_subprocess_exec(
                sys.executable, *words, stdout=asyncio.subprocess.PIPE, env=environment(1), start_new_session=True
            )
            started.push_async_callback(end_group, process, signal.SIGKILL, STOP_S)
            assert process.stdout is not None
            port = int(await asyncio.wait_for(process.stdout.readline(), UP_S))
            yield Up(port, process.pid, NAME)

    return System("floor", start)


@contextlib.asynccontextmanager
async def _made_up(model: Path, paced: bool) -> AsyncIterator[tuple[str, contextlib.AsyncExitStack]]:
    """A registry's URL, with workers that cost nothing in it; and what is stopped before them."""
    async with contextlib.AsyncExitStack() as started:
        redis = await start_embedded_redis()
        started.push_async_callback(redis.close)
        words = ("-m", "baton.bench.router_cost.workers", redis.url, str(model / "config.json"))
        workers = await asyncio.create_subprocess_exec(
            sys.executable, *words, "--gap-s", str(GAP_S if paced else 0.0), env=environment(1), start_new_session=True
        )
        started.push_async_callback(end_group, workers, signal.SIGKILL, STOP_S)
        yield redis.url, started


@contextlib.asynccontextmanager
async def mocks(paced: bool) -> AsyncIterator[tuple[int, ...]]:
    """The ports of NUM_WORKERS workers, one process."""
    ports = tuple(free_port() for _ in range(NUM_WORKERS))
    gap_s = GAP_S if paced else 0.0
    words = (sys.executable, "-m", "baton.bench.router_cost.mock", "--gap-s", str(gap_s), *map(str, ports[1:]))
    async with child(lambda port: (*words, str(port)), "/health", environment(1)) as (url, _):
        yield (int(url.rpartition(":")[2]), *ports[1:])


def proxy(name: str, command: tuple[str, ...]) -> System:
    """One that forwards HTTP, with its cache-aware policy."""

    @contextlib.asynccontextmanager
    async def start(paced: bool) -> AsyncIterator[Up]:
        async with mocks(paced) as ports:
            workers = ("--worker-urls", *(f"http://127.0.0.1:{port}" for port in ports))
            words = (*command, "--policy", "cache_aware", "--host", "127.0.0.1", *workers)
            metrics = ("--prometheus-port", str(free_port()))
            async with child(lambda port: (*words, "--port", str(port), *metrics), "/health", environment(1)) as (
                url,
                pid,
            ):
                await _until_it_answers(url, mock.MODEL, f"{name} found no worker.")
                yield Up(int(url.rpartition(":")[2]), pid, mock.MODEL)

    return System(name, start)


def dynamo(python: Path, model: Path, scratch: Path) -> System:
    """Its frontend with KV routing, and two mock engines: 1,000 times as fast as what they imitate, or as fast."""

    @contextlib.asynccontextmanager
    async def start(paced: bool) -> AsyncIterator[Up]:
        variables = environment(1) | {"DYN_FILE_KV": str(scratch / f"kv-{free_port()}"), "DYN_LOG": "error"}
        engine = (str(python), "-m", "dynamo.mocker", "--model-path", str(model), "--model-name", NAME)
        speed = ("--num-workers", "2", "--speedup-ratio", "1" if paced else "1000", *DYNAMO_PLANES)
        front = (str(python), "-m", "dynamo.frontend", "--router-mode", "kv", *DYNAMO_PLANES)
        async with child(lambda port: (*front, "--http-port", str(port)), "/health", variables) as (url, pid):
            workers = await asyncio.create_subprocess_exec(
                *engine, *speed, env=variables, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
            try:
                await _until_it_answers(url, NAME, "Dynamo's frontend found no engine.")
                yield Up(int(url.rpartition(":")[2]), pid, NAME)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(workers.pid, 9)
                await workers.wait()

    return System("dynamo", start)


async def _until_it_answers(url: str, model: str, complaint: str) -> None:
    """A router is healthy before it knows its workers. Raises SetupError if it never does."""
    asked = {"model": model, "max_tokens": 1, "messages": [{"role": "user", "content": "hello"}]}
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(UP_S), httpx.AsyncClient(timeout=UP_S) as client:
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if (await client.post(f"{url}/v1/chat/completions", json=asked)).status_code == 200:
                        return
                await asyncio.sleep(POLL_S)
    raise SetupError(complaint)


def installed(cache: Path, say: Callable[[str], None]) -> Path:
    """The interpreter of the peers' environment. A minute the first time."""

    def build(building: Path) -> None:
        say("installing the other routers in an environment of their own (a minute, once)")
        python, log = str(building / "bin" / "python"), building / LOG
        run([sys.executable, "-m", "venv", str(building)], log)
        run([python, "-m", "pip", "install", *PACKAGES, *DYNAMO_NEEDS], log)
        run([python, "-m", "pip", "install", "--no-deps", *DYNAMO], log)

    def opened(directory: Path) -> Path | None:
        python = directory / "bin" / "python"
        return python if python.exists() and [*directory.glob("lib/python*/site-packages/dynamo")] else None

    depends_on = (*PACKAGES, *DYNAMO, *DYNAMO_NEEDS, platform.python_version())
    return made_once(place(cache, "routers", *depends_on), opened, build, "install other routers")


def text_files(directory: Path, converted: Path, spec: ModelSpec) -> Path:
    """What Dynamo reads of a model, out of ours: its tokenizer, template and sizes, no weights."""
    directory.mkdir(parents=True)
    (directory / "tokenizer.json").write_bytes((converted / "tokenizer.json").read_bytes())
    files = documents(spec, json.loads((converted / "config.json").read_text(encoding="utf-8"))["bos_token_id"])
    files["tokenizer_config.json"]["chat_template"] = (converted / "chat_template.jinja").read_text(encoding="utf-8")
    files["generation_config.json"] = {"eos_token_id": list(spec.eos_token_ids)}
    for name, document in files.items():
        (directory / name).write_text(json.dumps(document), encoding="utf-8")
    return directory
