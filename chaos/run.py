"""A chaos run from its first process to its last figure.

    1. the stack starts; every worker is ready for every router
    2. warm-up: clients only; then rest, and what rest looks like is written down
    3. clients and faults, for as long as asked
    4. faults heal, open questions end; then rest again: nothing may be held
    5. the stack stops; nothing may be left
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Collection, Coroutine
from pathlib import Path
from typing import Any

from baton.chaos.clients import Clients, Outcome, Question
from baton.chaos.faults import Scene
from baton.chaos.nemesis import Nemesis
from baton.chaos.netns import namespaces_of
from baton.chaos.plan import Plan
from baton.chaos.report import Findings, violations
from baton.chaos.speakers import Speakers
from baton.chaos.stack import Stack, open_stack
from baton.chaos.watch import Watch
from baton.chaos.workload import HashWorkload, Job, Workload, learn
from baton.cluster.processes import family_of
from baton.cluster.scratch import private_dir
from baton.core.errors import BatonError, InternalError
from baton.core.request import Request, SampledToken
from baton.models.hash_files import HashSpec
from baton.models.hash_model import Answer

WARM_UP_S = 8.0
COOL_DOWN_S = 3.0
QUIET_S = 20.0
TRACE_S = 2.0

Say = Callable[[str], None]


async def run_chaos(plan: Plan, say: Say) -> Findings:
    """Raises only if the stack cannot be started or a fault cannot be played; what else goes wrong is in the findings,
    and then the logs stay."""
    logs, before = private_dir("log"), family_of({os.getpid()})
    findings: Findings | None = None
    try:
        async with open_stack(plan, logs) as stack:
            say(f"{len(stack.kept)} processes serve; logs in {logs}")
            for what in stack.left_out:
                say(f"left out: {what}")
            findings = await _Run(plan, stack, say).play()
        for name, kept in stack.kept.items():
            findings.crashes += [f"{name} {end}" for end in kept.crashes]
            findings.tracebacks += [f"{name}: {what}" for what in kept.tracebacks()]
        findings.leftovers = await _leftovers(before)
        if any(violations(findings)):
            say(f"logs in {_kept(logs, plan)}")
        else:
            shutil.rmtree(logs, ignore_errors=True)
    except BaseException:
        say(f"the run was cut short; logs in {_kept(logs, plan)}")
        raise
    return findings


def _kept(logs: Path, plan: Plan) -> Path:
    """Under a name that the next stack's start does not sweep away."""
    target = tempfile.mkdtemp(prefix=f"chaos-seed{plan.seed}-", dir=logs.parent)
    return logs.replace(target)  # an empty directory is replaced


class _Run:
    def __init__(self, plan: Plan, stack: Stack, say: Say) -> None:
        self._plan = plan
        self._stack = stack
        self._say = say
        self._rng = random.Random(plan.seed)
        self._speakers = Speakers(stack.endpoints)
        self._watch = Watch(stack)
        self._questions: list[Question] = []
        self._traces: set[asyncio.Task[None]] = set()
        self._nemesis: Nemesis | None = None

    async def play(self) -> Findings:
        watching = asyncio.create_task(self._watch.run(), name="watch")
        try:
            workload = await self._workload()
            self._say(f"warm-up: {WARM_UP_S:g} s without faults")
            await self._with_clients(workload, lambda clients: asyncio.sleep(WARM_UP_S))
            await self._watch.until_quiet(QUIET_S)
            self._watch.take_baseline()
            self._say(f"faults for {self._plan.duration_s:g} s")
            await self._with_clients(workload, self._disturb)
            self._say("at rest: what is still held?")
            leaks = await self._watch.leaks()
            await asyncio.gather(*self._traces)
            return await self._findings(leaks)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            await self._speakers.close()

    async def _with_clients(self, workload: Workload, scene: Callable[[Clients], Coroutine[Any, Any, None]]) -> None:
        """Clients ask while `scene` plays; afterwards their open questions end."""
        clients = Clients(workload, self._speakers, self._plan.routers, self._disturbed, self._ended, self._questions)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(clients.run(self._plan.num_clients), name="clients")
            try:
                await scene(clients)
            finally:
                clients.stopping.set()

    async def _disturb(self, clients: Clients) -> None:
        self._nemesis = Nemesis(Scene(self._stack, clients), self._rng)
        loop = asyncio.get_running_loop()
        await self._nemesis.run(loop.time() + self._plan.duration_s)
        await asyncio.sleep(COOL_DOWN_S)

    def _disturbed(self, router: str, since_s: float) -> bool:
        return self._nemesis is not None and self._nemesis.disturbed(router, since_s)

    async def _workload(self) -> Workload:
        rng = random.Random(self._rng.getrandbits(64))
        if self._plan.exact:
            return HashWorkload(rng, self._plan.deadline_s, HashSpec.parse(self._plan.model).head_dim)
        self._say("asking everything once, undisturbed")
        return await learn(rng, self._plan.deadline_s, self._ask_undisturbed)

    async def _ask_undisturbed(self, request: Request) -> Answer:
        tokens: list[SampledToken] = []
        finish = None
        async for piece in self._speakers.ask(self._plan.routers[0], Job(request, ()), request.request_id):
            tokens += piece.tokens
            finish = piece.finish or finish
        if finish is None:
            raise InternalError(f"{request.request_id} did not finish, and nothing disturbed it")
        return Answer(0, tuple(tokens), finish)

    # ---- afterwards ----------------------------------------------------------------------------------------------

    def _ended(self, question: Question) -> None:
        if question.outcome is not Outcome.DONE:
            self._say(f"{question.name} {question.outcome}: {question.detail}") if question.detail else None
        task = asyncio.create_task(self._trace(question), name=f"trace {question.name}")
        self._traces.add(task)
        task.add_done_callback(self._traces.discard)

    async def _trace(self, question: Question) -> None:
        """Whom it was aboard, as far as its routers still tell."""
        for attempt in question.attempts:
            with contextlib.suppress(BatonError, TimeoutError):
                async with asyncio.timeout(TRACE_S):
                    trace = await self._stack.trace(attempt.router, attempt.request_id)
                for dispatched in trace.attempts:
                    prefill = dispatched.route.prefill.worker_id
                    question.workers |= {dispatched.route.decode, *((prefill,) if prefill else ())}
                question.num_dispatches += len(trace.attempts)

    async def _findings(self, leaks: list[str]) -> Findings:
        assert self._nemesis is not None
        counters: dict[str, float] = {}
        for router in self._plan.routers:
            with contextlib.suppress(BatonError):
                counters |= {c.name: c.value for c in (await self._stack.fleet(router)).counters}
        fallbacks = {name: value for name, value in counters.items() if "fallback" in name or "integrity" in name}
        return Findings(
            self._plan, self._questions, self._nemesis.landed, self._nemesis.num_idle, leaks, self._watch.slopes(),
            self._stack.left_out, fallbacks,
        )


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]
    return "(gone)"


async def _leftovers(before: Collection[int]) -> list[str]:
    """The stack is closed. `before`: processes that were there when the run began."""
    left = family_of({os.getpid()}).difference(before)
    found = [f"process {pid} is left: {_command(pid)}" for pid in left]
    return found + [f"namespace {name} is left" for name in await namespaces_of(os.getpid())]
