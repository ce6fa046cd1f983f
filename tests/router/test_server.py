"""The router as a process: it says where it listens, ends when told, and refuses to start in one sentence."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from baton.wire.client import GrpcAdmin
from tests.router.front_world import MAX_MODEL_LEN, make_model

NOWHERE = "unix:///nowhere/baton.sock"


async def start(model_dir: Path, redis_url: str = NOWHERE, **router: Any) -> asyncio.subprocess.Process:
    config = {"router": {"http_port": 0, "grpc_port": 0} | router}
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "baton.router.server", "--config-json", json.dumps(config)),
        *("--model-dir", str(model_dir), "--redis-url", redis_url),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def endpoints(process: asyncio.subprocess.Process) -> dict[str, str]:
    assert process.stdout is not None
    return dict(json.loads(await process.stdout.readline()))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_it_says_where_it_listens_and_ends_cleanly_when_told(tmp_path: Path, number: signal.Signals) -> None:
    async def scenario() -> None:
        process = await start(make_model(tmp_path))
        async with asyncio.timeout(60):
            where = await endpoints(process)
            async with httpx.AsyncClient() as client, GrpcAdmin(where["grpc"]) as admin:
                assert (await client.get(where["http"] + "/livez")).status_code == 200
                ready = await client.get(where["http"] + "/readyz")
                assert (ready.status_code, ready.json()["why"][:27]) == (503, "no decode worker is ready: ")
                model = (await client.get(where["http"] + "/v1/models")).json()["data"][0]
                assert (model["id"], model["max_model_len"]) == (where["model"], MAX_MODEL_LEN)
                status = await admin.status(10)
                assert (status.http_endpoint, status.router_id) == (where["http"], where["router_id"])
            process.send_signal(number)
            _, log = await process.communicate()
        assert process.returncode == 0, log.decode()
        assert b"Traceback" not in log

    asyncio.run(scenario())


def test_a_request_that_waits_for_a_worker_is_told_that_the_router_stops(tmp_path: Path) -> None:
    async def scenario() -> None:
        process = await start(make_model(tmp_path))
        async with asyncio.timeout(60):
            where = await endpoints(process)
            async with httpx.AsyncClient(timeout=60) as client, GrpcAdmin(where["grpc"]) as admin:
                body = {"model": where["model"], "prompt": "hi"}
                asked = asyncio.create_task(client.post(where["http"] + "/v1/completions", json=body))
                while not (await admin.status(10)).in_flight:
                    await asyncio.sleep(0)
                process.terminate()
                reply = await asked
                assert (reply.status_code, reply.json()["error"]["code"]) == (503, "peer_lost")
            _, log = await process.communicate()
        assert process.returncode == 0, log.decode()
        assert b"Traceback" not in log

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"http_port": "taken"}, "port {taken} on 127.0.0.1 is taken"),
        pytest.param({"grpc_port": "taken"}, "{taken}", marks=pytest.mark.slow),
        pytest.param({"model_dir": "/nowhere"}, "config.json", marks=pytest.mark.slow),
        pytest.param({"redis_url": "gopher://x"}, "redis_url", marks=pytest.mark.slow),
        pytest.param({"max_inflight": 0}, "max_inflight", marks=pytest.mark.slow),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_what_keeps_it_from_starting_is_one_sentence_and_exit_code_2(
    wrong: dict[str, Any], says: str, tmp_path: Path
) -> None:
    async def scenario() -> None:
        with socket.socket() as holder:
            holder.bind(("127.0.0.1", 0))
            holder.listen()
            taken = holder.getsockname()[1]
            settings = {name: taken if value == "taken" else value for name, value in wrong.items()}
            process = await start(**{"model_dir": make_model(tmp_path), **settings})
            async with asyncio.timeout(60):
                out, log = await process.communicate()
            assert (process.returncode, out) == (2, b""), log.decode()
            assert says.format(taken=taken) in log.decode()
            assert "Traceback" not in log.decode()

    asyncio.run(scenario())
