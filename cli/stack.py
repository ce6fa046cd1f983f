"""The pieces of a stack on this machine, each started onto an AsyncExitStack that stops it: the model, the registry,
the workers, the router. Which pieces and in what order is serve.py's business."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import typer

from baton.cli.logs import last_words, link_ray_logs
from baton.cli.progress import step
from baton.cli.status import fleet_status
from baton.cluster.cores import threads_per_worker, usable_cores
from baton.cluster.embedded import start_embedded_redis
from baton.cluster.local_pool import LocalPool
from baton.cluster.pool import WorkerPool, WorkerSpec
from baton.cluster.scratch import sweep
from baton.core.config import Config, child_env
from baton.core.errors import BatonError, SetupError
from baton.core.worker import Role
from baton.wire.admin_pb2 import FleetStatus, WorkerState

ENTRIES = {Role.PREFILL: "baton.prefill_node.server:serve", Role.DECODE: "baton.decode_node.server:serve"}
STOP_TIMEOUT_S = 10.0
MEET_S = 15.0
"""A handshake moves 4 MiB per transport; this is far more than it takes."""
POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class RouterChild:
    """A router that listens."""

    process: asyncio.subprocess.Process
    http: str
    """http://host:port"""
    grpc: str
    """host:port"""
    model: str
    """As clients name it."""
    log: Path

    def last_words(self) -> str:
        return last_words(self.log)


async def prepare_model(config: Config) -> Path:
    """The converted model's directory. In a child, because fetching, converting and compiling can be stopped there, and
    their memory goes with it. Raises typer.Exit if it cannot be had: the child has said why."""
    model = [
        f"{section}.{name}={json.dumps(value)}"
        for section in ("model", "engine") for name, value in getattr(config, section).model_dump(mode="json").items()
    ]
    with step(f"Model {config.model.name}"):
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "baton.cli.main",
            "model",
            "pull",
            *(w for item in model for w in ("--set", item)),
            stdout=asyncio.subprocess.PIPE,
            env=child_env(1),
            start_new_session=True,
        )
        try:
            out, _ = await child.communicate()
        except BaseException:
            await end_group(child, signal.SIGINT, STOP_TIMEOUT_S)  # the whole group: pip may be running in it
            raise
        if child.returncode:
            raise typer.Exit(child.returncode)
    return Path(out.decode().strip().splitlines()[-1])


async def start_registry(stack: contextlib.AsyncExitStack) -> str:
    with step("Registry: an embedded Valkey"):
        embedded = await start_embedded_redis()
        stack.push_async_callback(embedded.close)
        return embedded.url


async def start_workers(
    config: Config, redis_url: str, logs: Path, stack: contextlib.AsyncExitStack
) -> WorkerPool:
    """All at once: most of a worker's start is waiting for imports and the model."""
    await sweep()  # what stacks before us left, if they were killed
    if config.cluster.pool == "ray":
        with step("Ray"):
            from baton.cluster.ray_pool import open_ray_pool

            pool: WorkerPool = await open_ray_pool(config.cluster.ray_address)
            link_ray_logs(logs)
    else:
        pool = LocalPool(logs)
    stack.push_async_callback(pool.close)
    num_workers = config.prefill.replicas + config.decode.replicas
    threads = threads_per_worker(config.engine.threads, num_workers, usable_cores())
    given = config.model_copy(update={"engine": config.engine.model_copy(update={"threads": threads})})
    specs = [
        WorkerSpec(f"{role}-{i}", role, ENTRIES[role], given.model_dump_json(), redis_url, threads)
        for role, replicas in ((Role.PREFILL, config.prefill.replicas), (Role.DECODE, config.decode.replicas))
        for i in range(replicas)
    ]
    with step(f"Workers: {', '.join(spec.worker_id for spec in specs)}"):
        await start_all(pool, specs)
    return pool


async def start_all(pool: WorkerPool, specs: Iterable[WorkerSpec]) -> None:
    """Side by side. Raises what the first one that failed did."""
    failure: BatonError | None = None
    try:
        async with asyncio.TaskGroup() as starts:
            for spec in specs:
                starts.create_task(pool.start(spec))
    except* BatonError as group:
        failure = next(leaves(group))
    if failure is not None:  # raised up there, it would be in a group again
        raise failure


async def start_router(
    config: Config, model_dir: Path, redis_url: str, logs: Path, stack: contextlib.AsyncExitStack
) -> RouterChild:
    log_path = logs / "router.log"
    with step("Router"):
        with log_path.open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "baton.cli.router_child",
                str(os.getpid()),
                "--config-json",
                config.model_dump_json(),
                "--model-dir",
                str(model_dir),
                "--redis-url",
                redis_url,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=child_env(1),
                start_new_session=True,
            )
        stack.push_async_callback(end_group, process, signal.SIGTERM, STOP_TIMEOUT_S)
        assert process.stdout is not None
        line = b""
        with contextlib.suppress(TimeoutError):
            line = await asyncio.wait_for(process.stdout.readline(), config.cluster.start_timeout_s)
        if not line:
            raise SetupError(f"the router did not start: {last_words(log_path)}")
        said = json.loads(line)
        return RouterChild(process, said["http"], said["grpc"], said["model"], log_path)


async def until_met(config: Config, router: RouterChild) -> FleetStatus:
    """Every worker ready, and every pair's transport measured. A pair that is refused or slow to meet keeps nobody
    waiting longer than MEET_S: the summary shows it."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    expected = config.prefill.replicas + config.decode.replicas
    while True:
        fleet = await fleet_status(router.grpc)
        ready = sum(WorkerState.Name(w.state) == "READY" for w in fleet.workers)
        met = sum(bool(p.transport or p.refused) for p in fleet.pairs)
        waited = loop.time() - start
        if ready >= expected and (met >= config.prefill.replicas * config.decode.replicas or waited > MEET_S):
            return fleet
        if waited > config.cluster.start_timeout_s:
            raise SetupError(f"{ready} of {expected} workers are ready after {waited:.0f} s; {router.last_words()}")
        await asyncio.sleep(POLL_S)


async def end_group(process: asyncio.subprocess.Process, number: signal.Signals, timeout_s: float) -> None:
    """Ask a child and all its children to end; after `timeout_s` make them."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), timeout_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


def leaves(group: BaseExceptionGroup[BatonError]) -> Iterator[BatonError]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from leaves(error)
        else:
            yield error
