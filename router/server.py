"""The router process: the only place that builds its objects.

Life of a router:
 1. `serve_router` reads the model's text files, opens the fleet, the dispatcher and both fronts, and returns when both
    listen. As a process it then writes one JSON line with its endpoints to stdout.
 2. It serves until `stop` (SIGTERM, SIGINT), or until one of its own tasks ends, which is a bug.
 3. Stopping: new connections are refused, running requests have DRAIN_S, then their streams end with an error that
    says so. A second signal skips the wait.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import gc
import json
import logging
import secrets
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from datetime import datetime
from pathlib import Path
from typing import Any

import uvloop

from baton.cluster.rates import Buckets
from baton.cluster.store import RedisBuckets, RedisRegistry, Registry
from baton.core.config import Config, load
from baton.core.errors import ConfigError, InternalError, SetupError
from baton.core.metrics import Metrics
from baton.core.worker import Role, WorkerInfo
from baton.router.choose import make_policy
from baton.router.dice import Dice
from baton.router.dispatch import Dispatcher
from baton.router.fleet import Fleet
from baton.router.generation import Generation
from baton.router.grpc_front import AdminFront, Identity, InferenceFront
from baton.router.http import Front, create_app
from baton.router.limits import RateLimits
from baton.router.listen import HttpServer
from baton.router.text import TextCodec
from baton.router.until import Stopping
from baton.wire.client import GrpcDial
from baton.wire.server import GrpcServer, start_router_server

DRAIN_S = 2.0
CLOSE_S = 2
"""For streams to write their last event after DRAIN_S, whole seconds (uvicorn's unit)."""

log = logging.getLogger(__name__)


class Router:
    """A router that serves. Whoever started it stops it."""

    def __init__(self, identity: Identity, stopping: Stopping, tasks: tuple[asyncio.Task[None], ...],
                 stack: contextlib.AsyncExitStack) -> None:
        self.identity = identity
        self._stopping = stopping
        self._tasks = tasks
        self._stack = stack

    async def failed(self) -> None:
        """Wait until one of the router's own tasks has ended; raises what it ended with."""
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        raise InternalError("a task of the router ended without an error.")

    async def stop(self, drain_s: float = DRAIN_S) -> None:
        """Ends within drain_s and a few seconds. Safe to call twice."""
        drained = asyncio.get_running_loop().call_later(drain_s, self._stopping.set)
        try:
            await self._stack.aclose()
        finally:
            drained.cancel()


async def serve_router(config: Config, model_dir: Path, registry: Registry, buckets: Buckets) -> Router:
    """Start to serve and return once both ports listen. Workers may come later: /readyz says when. Raises SetupError
    for a model directory that cannot be read or a port that cannot be had; then nothing is left behind."""
    codec = TextCodec(model_dir, datetime.now)
    served_name = name_for_clients(config, codec.card.name)
    metrics, dial, stopping = Metrics(), GrpcDial(), Stopping()
    router_id = f"router-{secrets.token_hex(4)}"
    fleet = Fleet(_of_model(registry, codec.card.fingerprint), dial, config, metrics, router_id)
    dice = Dice(secrets.randbits(64))
    dispatcher = Dispatcher(fleet, make_policy(config.router, dice), config, metrics, dice=dice)
    limits = RateLimits(config.router.tenants, buckets, metrics)
    generation = Generation(codec, dispatcher, config.router, metrics, served_name, limits)
    front = Front(generation, config.router, functools.partial(why_not_ready, fleet), unix_time, stopping,
                  fleet.statuses)
    host = config.router.host
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(dial.close)
        stack.push_async_callback(limits.close)
        following = asyncio.create_task(fleet.run(), name="fleet")
        stack.push_async_callback(_ended, following)
        http = await HttpServer.start(create_app(front), host, config.router.http_port, int(DRAIN_S) + CLOSE_S)
        stack.push_async_callback(http.stop)
        identity: list[Identity] = []
        grpc = await start_router_server(
            InferenceFront(generation), AdminFront(fleet, dispatcher, metrics, dial, lambda: identity[0]), host,
            config.router.grpc_port, functools.partial(why_not_ready, fleet))
        stack.push_async_callback(_both, http, grpc)
        where = f"[{host}]" if ":" in host else host
        identity.append(Identity(router_id, f"http://{where}:{http.port}", f"{where}:{grpc.port}", served_name))
        return Router(identity[0], stopping, (following, http.task), stack.pop_all())


def _of_model(registry: Registry, fingerprint: str) -> Callable[[], Awaitable[list[WorkerInfo]]]:
    """The registered workers that serve this router's model: another model's answers would be wrong ones."""
    told: set[str] = set()

    async def found() -> list[WorkerInfo]:
        ours = []
        for info in await registry.list():
            theirs = info.capability.model_fingerprint
            if theirs == fingerprint:
                ours.append(info)
            elif info.boot_id not in told:
                told.add(info.boot_id)
                log.warning("%s at %s is left alone: it serves another model (%s, ours is %s)",
                            info.worker_id, info.address, theirs, fingerprint)
        return ours

    return found


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _both(http: HttpServer, grpc: GrpcServer) -> None:
    """Side by side: each waits for its own running requests."""
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(http.stop())
        tasks.create_task(grpc.stop(DRAIN_S))


def unix_time() -> float:
    return datetime.now().timestamp()


def name_for_clients(config: Config, converted_name: str) -> str:
    """model.served_name; else model.name, or the name of the file or directory that it points to."""
    is_path = "/" in config.model.name or config.model.name.endswith(".gguf")
    return config.model.served_name or (converted_name if is_path else config.model.name)


def why_not_ready(fleet: Fleet) -> str | None:
    """None: a request could be served now."""
    if fleet.ready:
        return None
    states = [f"{w.info.worker_id} is {w.state}" for w in fleet.workers() if w.info.role is Role.DECODE]
    return f"no decode worker is ready: {', '.join(states) or 'none has registered'}. `baton status` shows the workers."


# ---- as a process ------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m baton.router.server", description="Run one router.")
    parser.add_argument("--config-json", required=True, help="The whole configuration, as JSON.")
    parser.add_argument("--model-dir", required=True, type=Path, help="A converted model.")
    parser.add_argument("--redis-url", required=True, help="Where workers register.")
    arguments = parser.parse_args()
    told = logging.StreamHandler(sys.stderr)
    told.setFormatter(_LogLine("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[told])
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    # Our format has none of these, and there is a line for every request.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None  # so logging's own notes on speed
    try:
        config = load(_document(arguments.config_json))
        uvloop.run(_process(config, arguments.model_dir, arguments.redis_url))
    except SetupError as e:
        print(e.message, file=sys.stderr)
        sys.exit(2)


class _LogLine(logging.Formatter):
    """Works out the date once a second."""

    _second, _date = -1, ""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        second = int(record.created)
        if second != self._second:
            self._second, self._date = second, super().formatTime(record, "%Y-%m-%d %H:%M:%S")
        return f"{self._date},{int(record.msecs):03d}"


def _document(text: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except ValueError as e:
        raise ConfigError(f"--config-json is not JSON: {e}") from None
    if not isinstance(document, dict):
        raise ConfigError("--config-json must be an object of sections.")
    return document


async def _process(config: Config, model_dir: Path, redis_url: str) -> None:
    signals: asyncio.Queue[int] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, signals.put_nowait, number)
    registry, buckets = RedisRegistry(redis_url), RedisBuckets(redis_url)
    try:
        router = await serve_router(config, model_dir, registry, buckets)
        try:
            who = router.identity
            print(json.dumps({"router_id": who.router_id, "http": who.http_endpoint, "grpc": who.grpc_endpoint,
                              "model": who.model}), flush=True)
            _collect_garbage_seldom()
            failure = await _first(router.failed(), signals.get())
        except BaseException:  # nobody reads our line: without a stop its servers would keep the process for ever
            await router.stop()
            raise
        stopped = await _first(router.stop(), signals.get())
        if isinstance(stopped, int):
            log.warning("told to stop twice: not waiting for running requests")
        for error in (failure, stopped):
            if isinstance(error, BaseException):
                raise error
    finally:
        await buckets.close()
        await registry.close()


def _collect_garbage_seldom() -> None:
    """What is here now stays, and a request leaves few cycles: at Python's own pace the collector took 4 % of a busy
    router's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


async def _first(one: Coroutine[Any, Any, None], signalled: Coroutine[Any, Any, int]) -> BaseException | int | None:
    """What `one` raised, or the signal that came first; None: `one` is done. The other is cancelled."""
    tasks = (asyncio.create_task(one), asyncio.create_task(signalled))
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    ended, number = await asyncio.gather(*tasks, return_exceptions=True)
    if isinstance(ended, asyncio.CancelledError):
        assert isinstance(number, int), number
        return number
    return ended


if __name__ == "__main__":
    main()
