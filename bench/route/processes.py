"""A trace replayed on real time through real processes: routers and workers as `baton serve` starts them, and clients
that speak gRPC to them.

Owns the processes and their clients. Workers serve the hash model (models/hash_model.py): it takes the time that the
setup's costs say, and really writes, lends and pulls the KV of every token, which is small. So, beside the same setup
on virtual time with a wire that costs nothing (`twin`), what differs is what the simulation leaves out: the CPU that
routers and workers need, the operating system, and what a call really takes.

Life of a replay: registry, workers and routers start -> all have met -> each question is asked at its time -> all are
answered -> one `Cell`, and everything is stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import shutil
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from baton.bench.load.traces import Traced
from baton.bench.route.cell import Cell, Seen
from baton.bench.route.questions import Question, questions
from baton.bench.route.setup import Setup
from baton.cli.stack import ENTRIES, RouterChild, start_all, start_registry, start_router, until_met
from baton.cluster.local_pool import LocalPool
from baton.cluster.pool import WorkerSpec
from baton.cluster.scratch import private_dir, sweep
from baton.core.config import Config
from baton.core.errors import SetupError
from baton.core.metrics import rendered
from baton.core.request import Request
from baton.core.worker import Role
from baton.models.catalog import open_model
from baton.wire.client import GrpcAdmin, GrpcInference
from baton.wire.inference_pb2 import GenerateRequest, Sampling, TokenIds

MAX_MODEL_LEN = 1 << 20
FREE_BYTES_PER_S = 1e15
STATUS_TIMEOUT_S = 10.0
GRAINS = (8, 16, 32)
"""Whose blocks are of a size that workers have."""


def twin(setup: Setup) -> Setup:
    """What the simulator is to replay beside it. Raises SetupError for a setup that processes cannot have."""
    if setup.mode == "fcfs" or setup.grain not in GRAINS:
        raise SetupError(f"real processes replay in --mode production with a --grain of {', '.join(map(str, GRAINS))}, "
                         f"not in {setup.mode} with {setup.grain}.")
    return dataclasses.replace(setup, wire_bytes_per_s=FREE_BYTES_PER_S)


def replay_for_real(trace: Sequence[Traced], setup: Setup, load: float) -> Cell:
    """Of a setup that has a twin. Raises SetupError when a process does not come up."""
    return asyncio.run(_replay(questions(trace, setup, load), setup))


async def _replay(asked: Sequence[Question], setup: Setup) -> Cell:
    async with AsyncExitStack() as started:
        logs = private_dir("log")
        started.callback(shutil.rmtree, logs, ignore_errors=True)
        routers = await _start(setup, logs, started)
        seen = Seen(setup.grain, setup.pace)
        took_s = await _ask(asked, routers, seen, random.Random(setup.seed), started)
        return await _cell(asked, routers, seen, setup, took_s)


# ---- processes -------------------------------------------------------------------------------------------------------


async def _start(setup: Setup, logs: Path, started: AsyncExitStack) -> list[RouterChild]:
    await sweep()
    redis_url = await start_registry(started)
    pool = LocalPool(logs)
    started.push_async_callback(pool.close)
    configs = {role: config_of(setup, role).model_dump_json() for role in Role}
    await start_all(pool, [
        WorkerSpec(name, role, ENTRIES[role], configs[role], redis_url, 1) for name, role in workers_of(setup)
    ])
    config = config_of(setup, Role.DECODE)
    files = open_model(config.model)
    routers = []
    for i in range(setup.num_routers):
        own_logs = logs / f"router-{i}"
        own_logs.mkdir()
        routers.append(await start_router(config, files.directory, redis_url, own_logs, started))
        await until_met(config, routers[-1])
    return routers


def workers_of(setup: Setup) -> list[tuple[str, Role]]:
    numbers = ((Role.PREFILL, setup.num_prefill), (Role.DECODE, setup.num_decode))
    return [(f"{role}-{i}", role) for role, number in numbers for i in range(number)]


def config_of(setup: Setup, role: Role) -> Config:
    """Roles differ in how long their model's steps take, and in nothing that would make them no peers."""
    costs = setup.costs(role)
    model = (f"hash:max_model_len={MAX_MODEL_LEN},step_s={costs.step_s!r},token_s={costs.token_s!r},"
             f"context_s={costs.context_token_s!r}")
    own = (
        f"model.name={model}", "model.served_name=replay", f"engine.block_size={setup.block_tokens}",
        f"engine.num_blocks={setup.num_blocks_of(role)}", f"prefill.replicas={setup.num_prefill}",
        f"decode.replicas={setup.num_decode}", "router.http_port=0", "router.grpc_port=0", "cluster.pool=local",
        'handoff.transports=["shm"]',
    )
    return dataclasses.replace(setup, settings=(*own, *setup.settings)).config()


# ---- clients ---------------------------------------------------------------------------------------------------------


async def _ask(
    asked: Sequence[Question], routers: Sequence[RouterChild], seen: Seen, rng: random.Random, started: AsyncExitStack
) -> float:
    """An open loop. Seconds until the last answer."""
    doors = [GrpcInference(router.grpc) for router in routers]
    for door in doors:
        started.push_async_callback(door.close)
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with asyncio.TaskGroup() as clients:
        for question in asked:
            due_s = began + question.at_s
            await asyncio.sleep(max(0.0, due_s - loop.time()))
            clients.create_task(seen.read(due_s, _answer(rng.choice(doors), question.request)))
    return loop.time() - began


async def _answer(door: GrpcInference, request: Request) -> AsyncGenerator[int, None]:
    """Its numbers of tokens."""
    sampling = Sampling(max_tokens=request.sampling.max_tokens, temperature=0.0, ignore_eos=True)
    call = GenerateRequest(
        token_ids=TokenIds(ids=request.prompt), sampling=sampling, request_id=request.request_id
    )
    async with contextlib.aclosing(door.generate(call)) as messages:
        async for message in messages:
            yield len(message.token_ids)


# ---- the result ------------------------------------------------------------------------------------------------------


async def _cell(
    asked: Sequence[Question], routers: Sequence[RouterChild], seen: Seen, setup: Setup, took_s: float
) -> Cell:
    """Busy seconds are what the costs make of the steps and prompt tokens that workers counted."""
    told = []
    for router in routers:
        async with GrpcAdmin(router.grpc) as admin:
            told.append(Counter({c.name: c.value for c in (await admin.status(STATUS_TIMEOUT_S)).counters}))
    counted, workers, costs = told[0], workers_of(setup), setup.costs(Role.PREFILL)  # each router tells of all workers
    if silent := [name for name, role in workers if not counted[_of("baton_worker_up", name, role)]]:
        raise SetupError(f"{', '.join(silent)} did not tell what it counted in time.")
    computed = {name: counted[_of("baton_step_tokens_total", name, role, kind="prefill")] for name, role in workers}
    busy_s = [
        counted[_of("baton_steps_total", name, role)] * costs.step_s + computed[name] * costs.token_s
        for name, role in workers if role is Role.PREFILL
    ]
    num_prompt_tokens = sum(len(question.request.prompt) for question in asked)
    hit = 1 - sum(computed.values()) / num_prompt_tokens
    return seen.cell(hit, busy_s, took_s, sum(told, Counter()))


def _of(metric: str, worker: str, role: Role, **labels: str) -> str:
    return rendered(metric, {**labels, "worker": worker, "role": role})
