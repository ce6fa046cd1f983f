"""kill -9 under Ray: of a prefill worker in the middle of a pull, of Redis and of Ray's control store.

The tokens are the same, nothing leaks, and the worker comes back.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

import psutil
import pytest

from baton.cluster.embedded import start_embedded_redis
from baton.cluster.pool import WorkerPool, WorkerSpec
from baton.cluster.ray_pool import open_ray_pool
from baton.cluster.store import RedisRegistry
from baton.core.config import Config
from baton.core.worker import Role, WorkerInfo
from baton.kv_transfer.puller import Puller
from baton.models.catalog import ModelFiles
from baton.wire.client import GrpcDial
from tests.e2e.pair import Answer, Client, background, forget_cache, pair_config, running_node, settle
from tests.e2e.test_tokens import prompts

pytestmark = [pytest.mark.model, pytest.mark.slow]

PREFILL = "prefill-0"


def test_a_prefill_worker_killed_mid_pull_costs_no_token_and_ray_brings_it_back(model_files: ModelFiles) -> None:
    (prompt,) = prompts(model_files, (900,))
    config = pair_config("prefill.max_chunk_tokens=256", "prefill.max_step_tokens=256")

    async def run() -> tuple[Answer, Answer, Answer]:
        async with contextlib.AsyncExitStack() as stack:
            redis = await start_embedded_redis()
            stack.push_async_callback(redis.close)
            registry = RedisRegistry(redis.url)
            stack.push_async_callback(registry.close)
            pool = await open_ray_pool(None)
            stack.push_async_callback(pool.close)
            entry = "baton.prefill_node.server:serve"
            await pool.start(WorkerSpec(PREFILL, Role.PREFILL, entry, config.model_dump_json(), redis.url, 1))
            (lender,) = await registry.list()
            dial = GrpcDial()
            stack.push_async_callback(dial.close)
            decode = await stack.enter_async_context(running_node(model_files, config, Role.DECODE, dial))
            await decode.meet(lender)
            client = Client(decode, decode.info, lender)
            await stack.enter_async_context(background(client.run_router()))
            undisturbed = await client.generate(prompt, 12, local=True, ignore_eos=True)
            forget_cache(decode)

            victim = asyncio.create_task(kill_mid_pull(pool, decode.parts.puller))
            disturbed = await client.generate(prompt, 12, ignore_eos=True)
            in_flight = await victim
            assert in_flight > 0, "the kill must land while bytes are under way"
            assert decode.parts.metrics.value("baton_fallbacks_total") > 0
            await settle(decode)
            forget_cache(decode)

            client.lender = await next_boot(registry, lender)
            again = await client.generate(prompt, 12, ignore_eos=True)
            assert again.chunks[-1].error_code == ""
            (member,) = await pool.members()
            assert member.restarts == 1
            await settle(decode)
            return undisturbed, disturbed, again

    undisturbed, disturbed, again = asyncio.run(run())
    assert disturbed.tokens == undisturbed.tokens
    assert again.tokens == undisturbed.tokens


async def kill_mid_pull(pool: WorkerPool, puller: Puller) -> int:
    """Freeze the lender as soon as a pull moves, see that the pull cannot end, kill. Returns blocks still under way."""
    (member,) = await pool.members()
    assert member.pid is not None
    async with asyncio.timeout(60):
        while True:
            while not puller.in_flight_blocks():
                await asyncio.sleep(0)
            os.kill(member.pid, signal.SIGSTOP)
            await asyncio.sleep(0.2)
            missing = sum(ordered - landed for _, _, landed, ordered in puller.progress())
            if missing:
                os.kill(member.pid, signal.SIGKILL)
                return missing
            os.kill(member.pid, signal.SIGCONT)  # all of it was in the socket's buffers already: the next chunk


async def next_boot(registry: RedisRegistry, old: WorkerInfo) -> WorkerInfo:
    async with asyncio.timeout(90):
        while True:
            for info in await registry.list():
                if info.boot_id != old.boot_id:
                    return info
            await asyncio.sleep(0.1)


def test_running_requests_outlive_redis_and_rays_control_store(model_files: ModelFiles) -> None:
    (prompt,) = prompts(model_files, (300,))
    config: Config = pair_config()

    async def run() -> tuple[Answer, Answer]:
        async with contextlib.AsyncExitStack() as stack:
            redis = await start_embedded_redis()
            stack.push_async_callback(redis.close)
            registry = RedisRegistry(redis.url)
            stack.push_async_callback(registry.close)
            pool = await open_ray_pool(None)
            stack.push_async_callback(pool.close)
            for role in (Role.PREFILL, Role.DECODE):
                entry = f"baton.{role}_node.server:serve"
                await pool.start(WorkerSpec(f"{role}-0", role, entry, config.model_dump_json(), redis.url, 1))
            workers = {w.role: w for w in await registry.list()}
            dial = GrpcDial()
            stack.push_async_callback(dial.close)
            client = Client(dial(workers[Role.DECODE]), workers[Role.DECODE], workers[Role.PREFILL])
            await stack.enter_async_context(background(client.run_router()))
            undisturbed = await client.generate(prompt, 40, ignore_eos=True)
            started = asyncio.Event()
            running = asyncio.create_task(client.generate(prompt[:-1], 40, started=started, ignore_eos=True))
            await started.wait()
            kill_child("valkey-server", "redis-server")
            kill_child("gcs_server")
            assert not running.done(), "the kill must land while the request runs"
            disturbed = await running
            # And a new one, while Ray's store is gone and Redis has come back empty, or is about to.
            after = await client.generate(prompt, 40, ignore_eos=True)
            assert after.tokens == undisturbed.tokens
            return undisturbed, disturbed

    undisturbed, disturbed = asyncio.run(run())
    assert len(undisturbed.tokens) == len(disturbed.tokens) == 40


def kill_child(*names: str) -> None:
    """SIGKILL the processes of these names below this one; there must be one to kill."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # Ray starts and ends small ones all the time
            if process.name() in names:
                process.kill()
                found.append(process)
    assert found, f"none of {names} is below this process"
