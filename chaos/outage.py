"""What it costs when the control plane is away: Ray's control store (GCS) and Redis, for as long as asked.

    python -m baton.chaos.outage --seconds 60

Workers are Ray actors here, on this machine's loopback; who owns them is a process of its own (`RayOwner`), so that
Ray's driver shares its process with nothing that is measured. Phases, each so long, with the same clients all along:
calm; Redis frozen; Redis frozen and the GCS dead; Redis back, the GCS still dead, and in the middle of that a decode
worker is killed, which nobody can start again. The report has each phase's gaps between tokens and times to the first.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.chaos.clients import Clients, Outcome, Question
from baton.chaos.netns import Host
from baton.chaos.plan import Plan
from baton.chaos.report import quantile
from baton.chaos.speakers import Speakers
from baton.chaos.stack import START_TIMEOUT_S, Stack, prepared, stack_around, worker_spec
from baton.chaos.workload import HashWorkload
from baton.cluster.embedded import start_embedded_redis
from baton.cluster.pool import WorkerSpec
from baton.cluster.processes import family_of, gone
from baton.cluster.scratch import private_dir
from baton.core.config import child_env
from baton.core.errors import SetupError
from baton.core.worker import Role
from baton.models.hash_files import HashSpec

Say = Callable[[str], None]


@dataclass(slots=True)
class Phase:
    name: str
    start_s: float
    end_s: float = 0.0
    in_flight: int = 0
    """When its fault struck."""


class RayOwner:
    """The process that runs the pool. It says the pids of its workers and ends when its stdin does."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pids: dict[str, int] = {}

    @classmethod
    async def start(cls, specs: list[WorkerSpec]) -> RayOwner:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "baton.chaos.outage", "--own-workers",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env=child_env(1))
        self = cls(process)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([dataclasses.asdict(spec) for spec in specs]).encode() + b"\n")
        async with asyncio.timeout(START_TIMEOUT_S):
            line = await process.stdout.readline()
        if not line:
            raise SetupError("the workers could not be started under Ray; what it said is above.")
        self.pids = json.loads(line)
        return self

    async def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), START_TIMEOUT_S)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


async def own_workers() -> None:
    """Inside that process."""
    from baton.cluster.ray_pool import open_ray_pool  # Ray is an extra

    loop, reader = asyncio.get_running_loop(), asyncio.StreamReader(limit=1 << 20)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    specs = [WorkerSpec(**{**fields, "role": Role(fields["role"])}) for fields in json.loads(await reader.readline())]
    pool = await open_ray_pool(None)
    try:
        async with asyncio.TaskGroup() as starts:
            for spec in specs:
                starts.create_task(pool.start(spec))
        print(json.dumps({m.worker_id: m.pid for m in await pool.members()}), flush=True)
        await reader.read()
    finally:
        await pool.close()


@contextlib.asynccontextmanager
async def open_ray_stack(plan: Plan, logs: Path) -> AsyncIterator[tuple[Stack, RayOwner]]:
    async with contextlib.AsyncExitStack() as opened:
        redis = await start_embedded_redis()
        opened.push_async_callback(redis.close)
        specs = [worker_spec(plan, Host(name), redis.url) for name in (*plan.prefills, *plan.decodes)]
        owner = await RayOwner.start(specs)
        opened.push_async_callback(owner.close)
        routers = [await prepared(plan, Host(name), redis.url, logs) for name in plan.routers]
        yield await stack_around(plan, routers, redis, opened), owner


class _Outage:
    def __init__(self, plan: Plan, stack: Stack, owner: RayOwner, say: Say) -> None:
        self._plan = plan
        self._stack = stack
        self._owner = owner
        self._say = say
        self.phases: list[Phase] = []
        self.questions: list[Question] = []

    async def play(self) -> None:
        rng = random.Random(self._plan.seed)
        workload = HashWorkload(rng, self._plan.deadline_s, HashSpec.parse(self._plan.model).head_dim)
        speakers = Speakers(self._stack.endpoints)
        clients = Clients(workload, speakers, self._plan.routers, lambda *_: False, lambda _: None, self.questions)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(clients.run(self._plan.num_clients), name="clients")
                try:
                    await self._phases(clients)
                finally:
                    clients.stopping.set()
        finally:
            await speakers.close()

    async def _phases(self, clients: Clients) -> None:
        await self._phase("warm-up", clients, 0.5)
        await self._phase("calm", clients)
        redis = self._stack.redis_pid()
        assert redis is not None
        try:
            os.kill(redis, signal.SIGSTOP)
            await self._phase("redis frozen", clients)
            control_store = _child("gcs_server")
            os.kill(control_store, signal.SIGKILL)
            await self._phase("redis frozen, GCS dead", clients)
            assert gone(control_store), "the GCS is back"
        finally:
            os.kill(redis, signal.SIGCONT)
        await self._phase("GCS dead", clients, 0.5)
        victim = self._plan.decodes[-1]
        os.kill(self._owner.pids[victim], signal.SIGKILL)
        await self._phase(f"GCS dead, {victim} killed", clients, 0.5)

    async def _phase(self, name: str, clients: Clients, share: float = 1.0) -> None:
        loop = asyncio.get_running_loop()
        phase = Phase(name, loop.time(), in_flight=len(clients.in_flight))
        self._say(name)
        await asyncio.sleep(self._plan.duration_s * share)
        phase.end_s = loop.time()
        self.phases.append(phase)


def _child(name: str) -> int:
    """pid of a process of this name below this one."""
    for pid in family_of({os.getpid()}):
        with contextlib.suppress(OSError):
            if name in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode():
                return pid
    raise SetupError(f"no {name} runs below this process")


def figures(phases: list[Phase], questions: list[Question]) -> list[dict[str, Any]]:
    """Per phase: what ended in it and how, gaps between tokens and times to the first, in seconds."""
    rows = []
    for phase in phases:
        inside = range_of(phase)
        itl = [b - a for q in questions for a, b in zip(q.news_s, q.news_s[1:], strict=False) if inside(b) and b > a]
        ttft = [q.news_s[0] - q.asked_s for q in questions if q.news_s and inside(q.news_s[0])]
        ended = [q for q in questions if q.ended_s is not None and inside(q.ended_s)]
        bad = [f"{q.name} {q.outcome}: {q.detail}" for q in ended if q.outcome not in (Outcome.DONE, Outcome.LEFT)]
        rows.append({
            "phase": phase.name, "in_flight": phase.in_flight, "ended": len(ended), "bad": bad,
            **{f"{what}_{name}_s": quantile(values, q) for what, values in (("itl", itl), ("ttft", ttft))
               for name, q in (("p50", 0.5), ("p99", 0.99))},
        })
    return rows


def range_of(phase: Phase) -> Callable[[float], bool]:
    return lambda s: phase.start_s <= s < phase.end_s


async def run_outage(plan: Plan, say: Say) -> tuple[list[dict[str, Any]], list[str]]:
    """(a row per phase, every request that did not end as it should)."""
    logs = private_dir("log")
    async with open_ray_stack(plan, logs) as (stack, owner):
        say(f"Ray and {len(stack.kept)} routers run; logs in {logs}")
        outage = _Outage(plan, stack, owner, say)
        await outage.play()
    bad = [f"{q.name} {q.outcome}: {q.detail}" for q in outage.questions
           if q.outcome not in (Outcome.DONE, Outcome.LEFT)]
    return figures(outage.phases, outage.questions), bad


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m baton.chaos.outage", description="Without a control plane.")
    parser.add_argument("--seconds", type=float, default=60.0, help="Of each phase.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--own-workers", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.own_workers:
        asyncio.run(own_workers())
        return 0
    plan = Plan(asked.seed, asked.seconds, num_prefill=1, num_decode=3, use_namespaces=False)
    try:
        rows, bad = asyncio.run(run_outage(plan, lambda line: print(line, file=sys.stderr, flush=True)))
    except (SetupError, ImportError) as e:
        print(e, file=sys.stderr)
        return 2
    print(f"{'phase':32} {'requests':>8} {'itl p50':>8} {'p99':>7} {'ttft p50':>9} {'p99':>7}  (ms)")
    for row in rows:
        shown = [f"{row[f'{what}_{q}_s'] * 1e3:.1f}" for what in ("itl", "ttft") for q in ("p50", "p99")]
        print(f"{row['phase']:32} {row['ended']:8} {shown[0]:>8} {shown[1]:>7} {shown[2]:>9} {shown[3]:>7}")
    print("\n".join(bad) or "every request ended with the tokens of an undisturbed run")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
