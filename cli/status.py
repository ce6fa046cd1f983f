"""`baton status`: what a running router says of its fleet, over its admin service. The same message as JSON with
--json."""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import Awaitable, Iterator
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message

from baton.cli.config import ConfigFile, Overrides, read_config
from baton.core.config import Config
from baton.core.errors import PeerLost, SetupError

if TYPE_CHECKING:
    from baton.wire.admin_pb2 import FleetStatus, FleetWorker

Answer = TypeVar("Answer", bound=Message)
Address = Annotated[
    str | None,
    typer.Option("--router", metavar="HOST:PORT", help="The router's gRPC address; default: from the settings."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the whole answer as JSON.")]


def status(
    router: Address = None, as_json: AsJson = False, config: ConfigFile = None, override: Overrides = None
) -> None:
    """Workers, pairs and counters of a running stack."""
    answer = asyncio.run(fleet_status(router or router_address(read_config(config, override))))
    if as_json:
        print(MessageToJson(answer, always_print_fields_with_no_presence=True))
        return
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print("\n".join(summary(answer, columns)))


async def fleet_status(address: str, timeout_s: float = 5.0) -> FleetStatus:
    from baton.wire.client import GrpcAdmin

    async with GrpcAdmin(address) as admin:
        return await reached(admin.status(timeout_s), address)


async def reached(call: Awaitable[Answer], address: str) -> Answer:
    try:
        return await call
    except PeerLost as e:
        raise SetupError(
            f"no router answers at {address} ({e}); start a stack with `baton serve`, or name its gRPC "
            "address with --router."
        ) from e


def router_address(config: Config) -> str:
    return f"{config.router.host}:{config.router.grpc_port}"


def summary(answer: FleetStatus, columns: int | None) -> Iterator[str]:
    """`columns`: of the terminal; None where there is none, and everything is shown in full."""
    yield f"router {answer.router_id}: {answer.model} at {answer.http_endpoint} and {answer.grpc_endpoint} (gRPC)"
    yield f"{answer.in_flight} requests now"
    for title, rows, spare in (
        ("workers", worker_rows(answer), ("step", "prefill tok/s", "address", "requests", "role")),
        ("pairs", pair_rows(answer), ("measured",)),
        *([("never paired", apart, ())] if (apart := apart_rows(answer)) else []),
        ("counters", [{"name": c.name, "value": f"{c.value:g}"} for c in answer.counters], ()),
    ):
        yield f"\n{title}" if rows else f"\n{title}: none"
        yield from table(rows, columns, spare)


def worker_rows(answer: FleetStatus) -> list[dict[str, str]]:
    from baton.wire.codec import MODEL  # protobuf is loaded by the commands that speak it
    from baton.wire.worker_pb2 import Role

    rows = []
    for w in answer.workers:
        led = w.ledger
        model, num_rows = MODEL.decode(w.load.model), max(1, w.load.num_running)
        measured = model.num_prefill_steps + model.num_decode_steps
        blocks = f"{led.active}/{led.lent}/{led.cached}/{led.free}/{led.quarantined}" if w.HasField("ledger") else "-"
        rows.append({
            "worker": w.info.worker_id,
            "role": Role.Name(w.info.role).lower(),
            "state": state_of(w),
            "address": w.info.address,
            "requests": str(w.in_flight),
            "active/lent/cached/free/quarantined": blocks,
            "prefill tok/s": f"{model.tokens_per_s(w.load.chunk_tokens):.0f}" if model.num_prefill_steps else "-",
            "step": f"{model.decode_step_s(num_rows, w.load.context_tokens) * 1e3:.1f} ms" if measured else "-",
        })
    return rows


def state_of(worker: FleetWorker) -> str:
    """With what is left on a worker that drains, and for how long a silent one has been so."""
    from baton.wire.admin_pb2 import WorkerState

    state = WorkerState.Name(worker.state).lower()
    load = worker.load
    match state:
        case "draining":
            return f"{state}, {load.num_running + load.num_waiting} requests and {load.num_lent_out} leases left"
        case "suspect" | "dead":
            return f"{state}, silent for {worker.silent_s:.0f} s"
    return state


def apart_rows(answer: FleetStatus) -> list[dict[str, str]]:
    """Each worker with the peers that one field keeps it apart from."""
    rows: dict[tuple[str, str], list[str]] = {}
    for w in answer.workers:
        for apart in w.kept_apart:
            rows.setdefault((w.info.worker_id, apart.difference), []).append(apart.peer)
    return [{"worker": name, "with": ", ".join(peers), "because": why} for (name, why), peers in rows.items()]


def pair_rows(answer: FleetStatus) -> list[dict[str, str]]:
    """The transport last: why two workers are not paired may take a sentence."""
    rows = []
    for p in answer.pairs:
        speed = f"{p.bytes_per_s / 1e6:,.0f} MB/s" if p.bytes_per_s else "-"
        shown = f"not paired: {p.refused}" if p.refused else p.transport or "not used yet"
        rows.append({"prefill": p.prefill, "decode": p.decode, "measured": speed, "transport": shown})
    return rows


def table(rows: list[dict[str, str]], columns: int | None, spare: tuple[str, ...]) -> Iterator[str]:
    """A heading and a line per row, aligned; of `spare` the first columns are left out as far as the width asks."""
    if not rows:
        return
    shown = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    for name in spare:
        if columns is not None and sum(shown.values()) + 2 * len(shown) > columns:
            del shown[name]
    for row in ({name: name for name in shown}, *rows):
        yield "  " + "  ".join(row[name].ljust(width) for name, width in shown.items()).rstrip()
