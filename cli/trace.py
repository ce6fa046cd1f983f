"""`baton trace`: how the time of a request was spent, as bars in the terminal, or with --out as a file for a trace
viewer. The bars as JSON with --json."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from google.protobuf.json_format import MessageToJson

from baton.cli.config import ConfigFile, Overrides, read_config
from baton.cli.perfetto import trace_file
from baton.cli.status import Address, AsJson, reached, router_address
from baton.cli.waterfall import waterfall
from baton.core.errors import NotFound, SetupError
from baton.core.worker import Span

if TYPE_CHECKING:
    from baton.wire.admin_pb2 import RequestTrace

TIMEOUT_S = 10.0


def trace(
    request_id: Annotated[str, typer.Argument(metavar="[REQUEST]", help="Default: the newest that has ended.")] = "",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write trace events for ui.perfetto.dev instead.")
    ] = None,
    last: Annotated[
        int | None, typer.Option("--last", metavar="N", min=1, help="With --out: the newest N requests in one file.")
    ] = None,
    router: Address = None,
    as_json: AsJson = False,
    config: ConfigFile = None,
    override: Overrides = None,
) -> None:
    """The waterfall of one request, and why it went where it went."""
    if last is not None and (out is None or request_id):
        raise typer.BadParameter("--last goes with --out, and without a request.")
    address = router or router_address(read_config(config, override))
    if last is not None:
        traces = asyncio.run(newest_traces(address, last))
    else:
        traces = [asyncio.run(request_trace(address, request_id))]
    if out is not None:
        write(traces, out)
    elif as_json:
        print(MessageToJson(traces[0], always_print_fields_with_no_presence=True))
    else:
        print("\n".join(trace_lines(traces[0])))


async def request_trace(address: str, request_id: str = "") -> RequestTrace:
    from baton.wire.client import GrpcAdmin

    async with GrpcAdmin(address) as admin:
        return await reached(admin.trace(request_id, TIMEOUT_S), address)


async def newest_traces(address: str, count: int) -> list[RequestTrace]:
    from baton.wire.client import GrpcAdmin

    async with GrpcAdmin(address) as admin:
        traces = list((await reached(admin.newest(count, TIMEOUT_S), address)).traces)
    if not traces:
        raise NotFound(f"the router at {address} keeps no finished request yet. Send one.")
    return traces


def write(traces: list[RequestTrace], out: Path) -> None:
    """Raises SetupError where it cannot."""
    found = trace_file(traces)
    try:
        out.write_text(json.dumps(found))
    except OSError as e:
        raise SetupError(f"{out} cannot be written: {e.strerror}. Name another file with --out.") from None
    number = f"{len(traces)} requests" if len(traces) != 1 else "1 request"
    print(f"{out}: {number}, {len(found['traceEvents'])} events. Open it at https://ui.perfetto.dev.")


def trace_lines(answer: RequestTrace) -> Iterator[str]:
    state = "finished" if answer.finished else "running"
    yield (
        f"{answer.request_id} ({state}): {answer.prompt_tokens} prompt tokens, {answer.cached_tokens} of them cached, "
        f"{answer.output_tokens} output tokens"
    )
    for number, attempt in enumerate(answer.attempts, 1):
        yield f"attempt {number}: {attempt.route.reason}"
        if attempt.outcome not in ("stop", "length", "running"):
            yield f"  ended: {attempt.outcome}"
    # The router's own bar carries the reason again, which has been said.
    reasons = {attempt.route.reason for attempt in answer.attempts}
    spans = [Span(s.name, s.start_s, s.end_s, "" if s.detail in reasons else s.detail) for s in answer.spans]
    yield from waterfall(
        spans,
        min(shutil.get_terminal_size((100, 24)).columns, 140),
        ascii_only=not (sys.stdout.encoding or "").lower().startswith("utf"),
    )
