"""`baton serve`: starts a whole stack on this machine, shows that it works, and takes all of it away again.

    1. what must be true is checked; a SetupError here costs a second
    2. the model is fetched and converted, in a child that can be stopped
    3. a registry: the Redis given, or an embedded one
    4. the workers, by their pool, and the router, in a process of its own
    5. ready: endpoints, pools, and the transport each pair has measured
    6. a question, if asked for: the answer as it comes, and its waterfall
    7. until Ctrl-C (SIGINT, SIGTERM, SIGHUP): everything that was started is stopped, last things first

It composes pieces of `cluster/`; it neither routes nor computes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
from collections.abc import Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import httpx
import typer

from baton.cli.answers import CHAT_PATH, error_message, piece
from baton.cli.checks import check_machine, check_redis
from baton.cli.config import ConfigFile, Overrides, read_config
from baton.cli.logs import kept_if_failed
from baton.cli.progress import say, step
from baton.cli.question import DEMO, Question
from baton.cli.trace import request_trace, trace_lines
from baton.core.config import Config
from baton.core.errors import BatonError, InternalError, NotFound
from baton.core.worker import Role

if TYPE_CHECKING:  # they bring gRPC and a Redis client, which `baton --help` does without
    from baton.cli.stack import RouterChild
    from baton.cluster.pool import PoolMember
    from baton.wire.admin_pb2 import FleetStatus, RequestTrace

ANSWER_TOKENS = 64
"""Enough for an answer that one reads while waiting."""
TRACE_TIMEOUT_S, POLL_S = 3.0, 0.1

Pool = Annotated[Literal["ray", "local"] | None, typer.Option(help="Who runs the workers; as cluster.pool.")]
Replicas = Annotated[int | None, typer.Option(metavar="N", min=0, help="Workers of this role.")]


def serve(
    prefill: Replicas = None,
    decode: Replicas = None,
    pool: Pool = None,
    ask: Annotated[
        str | None, typer.Option("--ask", "--prompt", metavar="TEXT", help="Ask this when ready, and show how it went.")
    ] = None,
    once: Annotated[bool, typer.Option(help="Exit after the answer: 0 if it was given.")] = False,
    config: ConfigFile = None,
    override: Overrides = None,
) -> None:
    """Start a stack on this machine and serve until Ctrl-C."""
    flags = {"prefill.replicas": prefill, "decode.replicas": decode, "cluster.pool": pool}
    overrides = [*(override or ()), *(f"{name}={value}" for name, value in flags.items() if value is not None)]
    settings = read_config(config, overrides)
    asked = ask or ("demo" if once else "")
    question = DEMO if asked == "demo" else Question(asked, asked) if asked else None
    raise typer.Exit(asyncio.run(unless_signalled(run(settings, question, once))))


async def unless_signalled(work: Coroutine[None, None, int]) -> int:
    """The result of `work`; or, once a signal asks us to end, 0 after its clean-up. Further signals change nothing:
    every part of the clean-up has a deadline of its own."""
    loop, task, asked = asyncio.get_running_loop(), asyncio.ensure_future(work), asyncio.Event()

    def end() -> None:
        if not asked.is_set():
            asked.set()
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, end)
    try:
        return await task
    except asyncio.CancelledError:
        return 0


def reclaim_signals() -> None:
    """Ray puts a handler below Python's that prints a stack trace, and aborts the process at a second SIGTERM."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.getsignal(number))
        signal.siginterrupt(number, False)


async def run(config: Config, question: Question | None, once: bool) -> int:
    """The exit code. Whatever was started is stopped when this ends or is cancelled."""
    from baton.cli import stack
    from baton.cluster.scratch import private_dir

    check_machine(config)
    if config.cluster.redis_url:
        await check_redis(config.cluster.redis_url)
    model_dir = await stack.prepare_model(config)
    async with contextlib.AsyncExitStack() as started:
        logs = private_dir("log")
        started.callback(shutil.rmtree, logs, ignore_errors=True)
        with kept_if_failed(logs):
            redis_url = config.cluster.redis_url or await stack.start_registry(started)
            pool = await stack.start_workers(config, redis_url, logs, started)
            reclaim_signals()
            router = await stack.start_router(config, model_dir, redis_url, logs, started)
            with step("Meeting: every worker ready, every pair measured"):
                fleet = await stack.until_met(config, router)
        print("\n".join(summary(config, router, fleet, await pool.members())), flush=True)
        answered = await answer(router, question) if question else True
        if once:
            return 0 if answered else 1
        print(how_to_go_on(config, router), flush=True)
        raise InternalError(f"the router ended with exit code {await router.process.wait()}; {router.last_words()}")


# ---- showing ---------------------------------------------------------------------------------------------------------


def summary(config: Config, router: RouterChild, fleet: FleetStatus, members: Sequence[PoolMember]) -> Iterator[str]:
    kind = "Ray actors" if config.cluster.pool == "ray" else "local processes"
    yield f"\nBaton serves {router.model}"
    yield f"  HTTP      {router.http}/v1 (OpenAI-compatible)"
    yield f"  gRPC      {router.grpc} (baton.wire.Inference, health, reflection)"
    for role in Role:
        named = [f"{m.worker_id} (pid {m.pid})" for m in members if m.role is role]
        yield f"  {role:<9} {len(named)} {kind}: {', '.join(named) or 'none; decode workers prefill for themselves'}"
    for pair in fleet.pairs:
        speed = f", {pair.bytes_per_s / 1e6:,.0f} MB/s measured" if pair.bytes_per_s else ""
        chosen = f"not paired, {pair.refused}" if pair.refused else pair.transport or "not measured yet"
        yield f"  transport {pair.prefill} -> {pair.decode}: {chosen}{speed}"
    yield f"  registry  {config.cluster.redis_url or 'embedded Valkey'}"
    joined = ", and with Ray, of the workers" if config.cluster.ray_address and config.cluster.pool == "ray" else ""
    yield f"  logs      {router.log.parent}{joined}\n"


def how_to_go_on(config: Config, router: RouterChild) -> str:
    port = "" if router.grpc.endswith(":8001") else f" --router {router.grpc}"
    url = "" if router.http.endswith(":8000") else f" --url {router.http}"
    body = json.dumps({"model": router.model, "messages": [{"role": "user", "content": "Hello!"}]})
    return (
        f"\nGo on with:\n  baton chat{url}\n  baton status{port}\n  baton trace{port}\n"
        f"  curl {router.http}{CHAT_PATH} -H 'Content-Type: application/json' -d '{body}'\n"
        "Ctrl-C ends it and leaves nothing behind."
    )


async def answer(router: RouterChild, question: Question) -> bool:
    """Ask, print the answer as it comes, then its waterfall. False, with the reason said, if it did not end well."""
    print(f"> {question.shown}", flush=True)
    try:
        request_id = await stream_answer(router, question)
    except (BatonError, httpx.HTTPError) as e:
        say(f"\nthe question was not answered: {e or type(e).__name__}")
        return False
    print("\n\n" + "\n".join(trace_lines(await finished_trace(router.grpc, request_id))), flush=True)
    return True


async def stream_answer(router: RouterChild, question: Question) -> str:
    """The request's id. Raises BatonError if the server refuses, or the stream ends without a reason to."""
    body = {
        "model": router.model,
        "stream": True,
        "temperature": 0,
        "max_tokens": ANSWER_TOKENS,
        "messages": [{"role": "user", "content": question.text}],
    }
    request_id, finish = "", None
    async with (
        httpx.AsyncClient(base_url=router.http, timeout=httpx.Timeout(300, connect=5)) as client,
        client.stream("POST", CHAT_PATH, json=body) as response,
    ):
        if response.status_code != 200:
            raise InternalError(error_message(response.status_code, await response.aread()))
        async for line in response.aiter_lines():
            if news := piece(line):
                print(news.text, end="", flush=True)
                request_id, finish = news.id, news.finish or finish
    if finish is None:
        raise InternalError("the stream ended in the middle of the answer.")
    return request_id


async def finished_trace(grpc: str, request_id: str) -> RequestTrace:
    """The router books a request when it is over for it, which may be just after it is over for the client."""
    async with asyncio.timeout(TRACE_TIMEOUT_S):
        while True:
            with contextlib.suppress(NotFound):
                trace = await request_trace(grpc, request_id)
                if trace.finished:
                    return trace
            await asyncio.sleep(POLL_S)
