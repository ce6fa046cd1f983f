"""`baton explain` and `baton trace --out` on a real stack of processes: from the id a client has to the reasons."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.cli.conftest import Baton
from tests.cli.test_perfetto import check_nesting
from tests.cli.test_serve import READY, TIMEOUT_S, serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(TIMEOUT_S)]
CLIENTS = 6


def test_a_client_finds_out_why_by_the_id_it_was_told(tmp_path: Path, baton: Baton) -> None:
    options = ("--pool", "local", "--prefill", "2", "--set", "model.name=hash", "--set", "engine.num_blocks=600",
               "--set", f"model.cache_dir={tmp_path / 'cache'}")  # fmt: skip
    with serving(tmp_path, *options) as stack:
        said = stack.read_until(READY)
        url, grpc = re.findall(r"HTTP +(http://\S+)/v1", said)[0], re.findall(r"gRPC +(\S+)", said)[0]

        nothing = baton("trace", "--last", "3", "--out", str(tmp_path / "none.json"), "--router", grpc)
        assert (nothing.returncode, (tmp_path / "none.json").exists()) == (1, False), nothing.stderr

        def ask(number: int) -> str:
            body = {"model": "hash", "prompt": f"Leg {number % 2} of the relay. " * 60, "max_tokens": 8,
                    "ignore_eos": True}  # fmt: skip
            reply = httpx.post(f"{url}/v1/completions", json=body, timeout=TIMEOUT_S)
            assert reply.json()["id"] == reply.headers["x-request-id"]
            return str(reply.headers["x-request-id"])

        with ThreadPoolExecutor(CLIENTS) as pool:
            ids = list(pool.map(ask, range(CLIENTS)))
        for request_id in ids:
            explained = baton("explain", request_id, "--router", grpc)
            assert explained.returncode == 0, explained.stderr
            assert explained.stdout.startswith(f"{request_id}: ended with length")
            assert "chosen" in explained.stdout
            record = tmp_path / f"{request_id}.json"
            record.write_text(baton("explain", request_id, "--router", grpc, "--json").stdout)
            assert json.loads(record.read_text())["request_id"] == request_id
            again = baton("explain", "--replay", str(record))
            assert (again.returncode, "the same pick" in again.stdout) == (0, True), again.stdout

        out = tmp_path / "requests.json"
        assert baton("trace", "--last", str(CLIENTS), "--out", str(out), "--router", grpc).returncode == 0
        events = json.loads(out.read_text())["traceEvents"]
        check_nesting(events)
        processes = {e["args"]["name"] for e in events if e["name"] == "process_name"}
        assert {"router", "decode-0"} <= processes
        assert processes & {"prefill-0", "prefill-1"}
        assert set(ids) == {e["name"] for e in events if e["ph"] == "X"} & set(ids)
        assert len([e for e in events if e["name"] == "step"]) == CLIENTS * 7
        unknown = baton("explain", "cmpl-nobody", "--router", grpc)
        assert unknown.returncode == 1
        assert "the newest finished ones are kept" in unknown.stderr
