"""`baton drain`: empties a worker before it goes. It takes nothing new from then on, and what runs on it moves to its
peers with its KV; this command says what is left until nothing is.

Exit codes: 0 it is empty (or, with --wait 0 or --undo, it has heard), 1 it is not empty yet or is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Annotated

import typer

from baton.cli.config import ConfigFile, Overrides, read_config
from baton.cli.status import Address, fleet_status, router_address
from baton.core.errors import DeadlineExceeded

if TYPE_CHECKING:
    from baton.wire.admin_pb2 import DrainProgress
    from baton.wire.client import GrpcAdmin

POLL_S = 0.2
CALL_TIMEOUT_S = 5.0
MAX_WAIT_S = 86_400.0


def drain(
    worker: Annotated[str, typer.Argument(metavar="WORKER", help="As `baton status` names it.")],
    undo: Annotated[bool, typer.Option("--undo", help="Let it take requests again.")] = False,
    wait: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Longest wait until it is empty; 0: do not wait. Default: cluster.drain_timeout_s.",
        ),
    ] = None,
    router: Address = None,
    config: ConfigFile = None,
    override: Overrides = None,
) -> None:
    """Move all requests away from a worker, so that it can be stopped."""
    settings = read_config(config, override)
    wait_s = settings.cluster.drain_timeout_s if wait is None else wait
    if not 0 <= wait_s <= MAX_WAIT_S:
        raise typer.BadParameter(f"--wait is {wait_s:g}; it must be between 0 and {MAX_WAIT_S:g} seconds.")
    done = asyncio.run(run(router or router_address(settings), worker, undo, wait_s))
    raise typer.Exit(0 if done else 1)


async def run(address: str, worker: str, undo: bool, wait_s: float) -> bool:
    """Whether it ended as asked. Raises SetupError where no router answers, NotFound for a worker it does not know."""
    from baton.wire.client import GrpcAdmin

    await fleet_status(address)  # a router that is not there is said to be so, and is not taken for a lost worker
    async with GrpcAdmin(address) as admin:
        progress = await admin.drain(worker, not undo, CALL_TIMEOUT_S)
        if undo:
            print(f"{worker} takes requests again.")
            return True
        if not progress.peers:
            print(f"No other worker can take over from {worker}: what runs there ends there, and new work finds nobody "
                  "in its place.")  # fmt: skip
        if wait_s <= 0:
            print(said(progress))
            return True
        return await _until_empty(admin, progress, wait_s)


async def _until_empty(admin: GrpcAdmin, progress: DrainProgress, wait_s: float) -> bool:
    """Says what is left whenever that changes."""
    loop = asyncio.get_running_loop()
    give_up, shown = loop.time() + wait_s, ""
    while True:
        if (line := said(progress)) != shown:
            print(line, flush=True)
            shown = line
        if progress.drained:
            return True
        if not progress.draining:
            print(f"Somebody took that back: {progress.worker_id} takes requests again.")
            return False
        if loop.time() >= give_up:
            print(f"Not empty after {wait_s:g} s. It goes on draining; wait on with the same command, or take it back "
                  f"with `baton drain {progress.worker_id} --undo`.")  # fmt: skip
            return False
        await asyncio.sleep(min(POLL_S, max(0.0, give_up - loop.time())))
        with contextlib.suppress(DeadlineExceeded):  # busy, or slow to answer: it is asked again
            progress = await admin.drain(progress.worker_id, None, CALL_TIMEOUT_S)


def said(progress: DrainProgress) -> str:
    if progress.drained:
        return f"{progress.worker_id} is empty: nothing runs on it and nobody pulls from it. It can be stopped."
    left = [f"{count} {name}{'s' * (count != 1)}"
            for count, name in ((progress.requests, "request"), (progress.leases, "lease")) if count]  # fmt: skip
    return f"{progress.worker_id} is draining: {' and '.join(left) or 'nothing'} left"

